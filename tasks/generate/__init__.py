"""Generate: a few real shots and a number in, synthetic labelled samples out."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.method import Made
from tasks.core.settings import Settings


class Generate(Protocol):
    """`n` rows of schema `image` for each class of `shots`; `parents` names every shot that a sample was made from.

    `base` is what a generator is first trained on where no pre-trained one is named; its rows are then parents too.
    """

    def __call__(self, shots: Dataset, base: Dataset, n: int, cfg: Any, *, seed: int = 0, device: str = "cpu") -> Made: ...


SIGNATURE = Generate
COPIES = 0.01  # how rare a distance between real rows must be for a synthetic row that near to be a copy


def stage(settings: Settings, method: str) -> None:
    """Generate rows for every class into `data/generated`, from a few trusted shots; the base is the kept rows of `data/filtered`.

    Near copies of real rows are dropped; `quarantine.parquet` beside the shards says which, and why.
    """
    from dataclasses import replace

    import numpy as np

    from tasks.core import catalog
    from tasks.core import stage as stages
    from tasks.core.errors import UserError
    from tasks.generate._copies import without_copies

    own, seed = stages.section(settings, "generate")
    own.pop("method", None)
    n, k, most = (stages.number(own, "generate", key) for key in ("n", "shots", "base_rows"))
    share = own.pop("copies", COPIES)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share < 1:
        raise UserError(f"params.yaml: 'generate.copies' must be a share from 0 (drop none) to below 1, not {share!r}")
    cfg = catalog.configure(f"generate.{method}", own)
    base = Dataset.open(settings.root / "data" / "filtered")
    trusted = Dataset.open(settings.root / "data" / "pool").split("reference")
    if len(base) > most:
        base = base.take(np.random.default_rng(seed).choice(len(base), most, replace=False))
    shots = pick_shots(trusted, base, k, seed)
    made = catalog.get(f"generate.{method}").entry(shots, base, n, cfg, seed=seed)
    made_by = {"method": f"generate.{method}", "settings": cfg.model_dump(mode="json"), "seed": seed, "n": n, "shots": k, "copies": share}
    made, aside = without_copies(made, base + shots, share, seed=seed) if share else (made, None)
    stages.write_made(settings, "generate", replace(base.info, schema="image", of=None, made_by=made_by), made, aside)


def pick_shots(trusted: Dataset, spare: Dataset, k: int, seed: int) -> Dataset:
    """At most `k` labelled rows of each class: trusted ones, and for a class that has none of these spare ones."""
    import numpy as np

    rng = np.random.default_rng(seed)
    chosen: dict[int, list[int]] = {0: [], 1: []}
    known = [source.labels() for source in (trusted, spare)]
    for label in range(len(trusted.info.classes)):
        for at, labels in enumerate(known):
            rows = np.flatnonzero(labels == label)
            if len(rows):
                chosen[at] += rng.permutation(rows)[:k].tolist()
                break
    return trusted.take(np.array(chosen[0])) + spare.take(np.array(chosen[1]))
