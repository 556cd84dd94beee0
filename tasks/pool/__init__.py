"""Pool: a source in, a dataset out, with the bad rows set aside."""

from __future__ import annotations

from tasks.core.settings import Settings


def stage(settings: Settings, method: str) -> None:
    """Read the source that `params.yaml` names into `data/pool`."""
    from tasks.core import files
    from tasks.core import stage as stages
    from tasks.core.erased import FOLDER, Erased
    from tasks.pool import read

    own, seed = stages.section(settings, "pool")
    cfg = read.configure(own)
    before = read.fingerprint(cfg)  # what changes while it is read is read again by the next run
    figures = read.read_pool(cfg, settings.root / "data" / "pool", seed=seed, erased=Erased.read(settings.root / FOLDER))
    stages.write_figures(settings, "pool", figures)
    files.write_text(settings.home / "source.json", before)
