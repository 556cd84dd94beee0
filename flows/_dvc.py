"""The one place that talks to DVC: is there anything to do, and do it. Prefect drives DVC, never the other way round."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows._server import end, spawn
from tasks.core import files
from tasks.core.errors import UserError
from tasks.core.settings import Settings, read_params
from tasks.core.stage import section

GOOD_LOCK = "dvc.lock.good"
STAGES = ("pool", "filter", "condense", "generate")
OF_TEXTS = ("pool", "filter")  # the rest makes images


@dataclass(frozen=True)
class StageRun:
    """What became of one stage: whether it ran, for how long, and the figures it has now."""

    stage: str
    ran: bool
    seconds: float
    figures: dict[str, float]


def environment(settings: Settings) -> dict[str, str]:
    """The environment of DVC and its stages: this interpreter first, and hash caches inside the project."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(settings.root / ".dvc" / "site")}


def reads(settings: Settings) -> bool:
    """Whether the project's source is one of texts alone."""
    return str((read_params(settings).get("pool") or {}).get("source", "")).startswith("texts:")


def stages(settings: Settings) -> tuple[str, ...]:
    """The stages that the project's source can go through."""
    return OF_TEXTS if reads(settings) else STAGES


def clean(settings: Settings, targets: Sequence[str] = ()) -> bool:
    """Whether the stages, or those that the targets need, are up to date."""
    targets = targets or (OF_TEXTS if reads(settings) else ())
    os.environ["DVC_SITE_CACHE_DIR"] = str(settings.root / ".dvc" / "site")
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(settings.root)) as repo:
            return not repo.status(targets=list(targets) or None, with_deps=bool(targets))
    except DvcException as error:
        raise UserError(f"DVC cannot read this project: {error}") from None


def source_changed(settings: Settings) -> bool:
    """Whether the source's files are others than when the pool was last read here. DVC cannot know: the source lies outside."""
    noted = settings.home / "source.json"
    if not noted.exists():
        return False
    from tasks.pool import read

    return bool(noted.read_text(encoding="utf-8") != read.fingerprint(read.configure(section(settings, "pool")[0])))


def mend(settings: Settings) -> None:
    """Undo what a DVC that was killed while it wrote has left: half a file of locks, or half a `dvc.lock`.

    The last good `dvc.lock` is put back; without any, DVC makes it anew from its run cache.
    """
    locks = settings.root / ".dvc" / "tmp" / "rwlock"
    if locks.exists():  # whole, it may be another DVC's; that a holder is dead, DVC sees for itself
        try:
            json.loads(locks.read_text(encoding="utf-8"))
        except ValueError:
            locks.unlink()
    lock, good = settings.root / "dvc.lock", settings.home / GOOD_LOCK
    if not lock.exists():
        return
    try:
        if "schema" in yaml.safe_load(lock.read_text(encoding="utf-8")):
            return
    except (yaml.YAMLError, TypeError, UnicodeDecodeError):
        pass
    if good.exists():
        files.write_text(lock, good.read_text(encoding="utf-8"))
    else:
        lock.unlink()


def repro(settings: Settings, targets: Sequence[str] = (), *, log: Path, channel: Path) -> list[StageRun]:
    """Run `dvc repro`. Raises UserError with the sentence of the stage that failed."""
    before = channel.stat().st_size if channel.exists() else 0
    targets = targets or (OF_TEXTS if reads(settings) else ())
    status = 0
    if source_changed(settings):
        status = _dvc(settings, ["repro", "--force", "--single-item", "pool"], log, channel)
    trunk, leaves = ([], []) if targets else branches(settings)
    if status == 0:
        status = _dvc(settings, ["repro", *targets, *trunk], log, channel)
    if status == 0 and leaves:
        # DVC lets go of its lock while a stage's command runs, so that stages may run side by side if each is asked for alone
        with ThreadPoolExecutor(len(leaves)) as pool:
            words = [["--wait-for-lock", "repro", "--single-item", leaf] for leaf in leaves]
            ended = list(pool.map(lambda some: _dvc(settings, some, log, channel), words))
        status = next((code for code in ended if code != 0), 0)  # a child that was killed has a negative one
    events = _events(channel, before)
    if status != 0:
        said = [event["error"] for event in events if "error" in event]
        if said:
            raise UserError(said[-1])
        faults = [event["fault"] for event in events if "fault" in event]
        if faults:
            raise RuntimeError(faults[-1])
        errors = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("ERROR: ")]
        raise UserError(f"DVC says: {errors[-1].removeprefix('ERROR: ')}" if errors else f"'dvc repro' ended with {status}")
    files.write_text(settings.home / GOOD_LOCK, (settings.root / "dvc.lock").read_text(encoding="utf-8"))
    seconds = {event["stage"]: float(event["seconds"]) for event in events if event.get("state") == "end"}
    return [StageRun(stage, stage in seconds, seconds.get(stage, 0.0), figures(settings, stage)) for stage in STAGES]


def made(settings: Settings) -> tuple[str, ...]:
    """The stages that have run in this project, where these are not all; nothing where they are, or nobody knows."""
    lock = settings.root / "dvc.lock"
    found = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}
    return () if len(found) == len(STAGES) else tuple(stage for stage in STAGES if stage in found)


def branches(settings: Settings) -> tuple[list[str], list[str]]:
    """The stages that others need, and those that nothing follows, which may run side by side; nothing where there are not several."""
    stages = yaml.safe_load((settings.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    if any("cmd" not in stage for stage in stages.values()):  # templates: only DVC knows what they become
        return [], []
    needed = {dep for stage in stages.values() for dep in stage.get("deps", [])}
    outs = {name: {out if isinstance(out, str) else next(iter(out)) for out in stage.get("outs", [])} for name, stage in stages.items()}
    leaves = [name for name in stages if not outs[name] & needed]
    return ([name for name in stages if name not in leaves], leaves) if len(leaves) > 1 else ([], [])


def push(settings: Settings, log: Path, channel: Path) -> bool:
    """Send the data to the default remote; False where that failed."""
    return _dvc(settings, ["push", "-q"], log, channel) == 0


def figures(settings: Settings, stage: str) -> dict[str, float]:
    """The figures that a stage wrote last; none where it has not run."""
    path = settings.metrics / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # type: ignore[no-any-return]


def _dvc(settings: Settings, words: Sequence[str], log: Path, channel: Path) -> int:
    env = {**environment(settings), "RETORT_PROGRESS": str(channel)}
    child = spawn(settings, [sys.executable, "-m", "dvc", *words], env, log)
    try:
        return child.wait()
    finally:
        end(settings, child)


def _events(channel: Path, start: int) -> list[dict[str, Any]]:
    if not channel.exists():
        return []
    with channel.open("rb") as source:
        source.seek(start)
        return [json.loads(line) for line in source.read().splitlines() if line.strip()]
