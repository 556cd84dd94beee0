"""Curate: bring the data stages up to date.

Consumes  params.yaml and the source that it names
Produces  data/pool, data/filtered, data/condensed, data/generated, pushed to the DVC remote
Started   by `retort run`, `retort curate`, or a schedule
"""

from __future__ import annotations

import json

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import _dvc
from flows._runs import DATA_CHANGED, STEP_SECONDS, alone, emit, shown
from flows._session import NeedsRun, session
from flows._types import Stages
from tasks.core import files
from tasks.core.settings import Settings

FOLLOWED = "followed.json"  # the data versions that the models follow
FOLDERS = ("data/pool", "data/filtered", "data/condensed", "data/generated")


@flow(name="curate")
def curate(targets: Stages = ()) -> bool:
    """Run the stages, or those that the targets need, whose inputs, code or settings have changed.

    targets  names of stages in dvc.yaml; none: all
    Gives whether any stage ran.
    """
    here = session()
    if here.planning and (_dvc.source_changed(here.settings) or not _dvc.clean(here.settings, targets)):
        raise NeedsRun("curate")
    before = versions(here.settings)
    runs = [_dvc.StageRun(stage, False, 0.0, _dvc.figures(here.settings, stage)) for stage in _dvc.stages(here.settings)]
    with shown(here, 1):
        if not here.planning:
            runs = repro(targets)
        for run in runs:
            if not run.ran and run.stage not in (targets or _dvc.stages(here.settings)):
                continue  # nobody asked for it
            method = here.params(run.stage).get("method") or here.params(run.stage).get("source", "")
            here.record(run.stage, str(method), not run.ran, run.seconds, headline(run.stage, run.figures))
    changed = {path: md5 for path, md5 in versions(here.settings).items() if before.get(path) != md5}
    if changed and alone():
        emit(here, DATA_CHANGED, "data", **changed)
    return bool(changed)


def followed(settings: Settings) -> bool:
    """Whether the models were last brought up to date on the data as it is now."""
    note = settings.home / FOLLOWED
    return note.exists() and json.loads(note.read_text(encoding="utf-8")) == versions(settings)


def follow(settings: Settings) -> None:
    """Note that the models are up to date on the data as it is now."""
    files.write_text(settings.home / FOLLOWED, json.dumps(versions(settings)))


def versions(settings: Settings) -> dict[str, str]:
    """The data folders that there are, with the md5 that DVC gives each."""
    return {path: files.folder_md5(settings.root / path) for path in FOLDERS if (settings.root / path / "dataset.json").exists()}


@task(name="dvc repro", cache_policy=NO_CACHE, persist_result=False, timeout_seconds=STEP_SECONDS)
def repro(targets: tuple[str, ...]) -> list[_dvc.StageRun]:
    """One `dvc repro` for all the stages: DVC knows what must run."""
    here = session()
    if here.early is not None and not targets:
        runs = here.early.result()
    else:
        runs = _dvc.repro(here.settings, targets, log=here.log, channel=here.channel)
    if any(run.ran for run in runs):
        here.pushed = here.aside.submit(_dvc.push, here.settings, here.log, here.channel)
    return runs


def headline(stage: str, figures: dict[str, float]) -> str:
    """The figure of a data stage that matters, in words."""
    if not figures:
        return ""
    if stage == "pool":
        return f"{figures.get('rows', 0):,.0f} rows, {figures.get('quarantined', 0):,.0f} set aside"
    if stage == "filter":
        share = figures.get("kept", 0) / max(figures.get("rows", 0), 1)
        known = f", {figures['kept_precision']:.1%} clean (pool {figures['pool_precision']:.1%})" if "kept_precision" in figures else ""
        return f"{share:.0%} kept{known}"
    if stage == "condense":
        beaten = f" (random {figures['heldout_loss_random']:.3f})" if "heldout_loss_random" in figures else ""
        return f"held-out loss {figures.get('heldout_loss', float('nan')):.3f}{beaten}"
    return f"{figures.get('rows', 0):,.0f} synthetic rows"


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(curate)
