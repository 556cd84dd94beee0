"""What the flows of one process share: the project, its store, what has been done so far, and the way to run a step.

While `planning`, steps that are done give their results and the first that is not raises `NeedsRun`. So the very flows that do the work
also say, without a server and in seconds, that there is none to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prefect import Flow, task
from prefect.cache_policies import NO_CACHE

from flows._dvc import StageRun
from tasks.core import catalog, stage
from tasks.core.errors import UserError
from tasks.core.settings import Settings, project, read_params
from tasks.core.step import Done, Plan, find, run
from tasks.core.store import Store

R = TypeVar("R")
SECTIONS = ("pool", "filter", "condense", "generate", "recipe", "train", "distill", "unlearn", "references", "evaluate", "registry")
MODES = ("off", "dry-run", "enforce")  # what follows from a gate's word
FLOWS_OWN = {
    "unlearn": ("demonstration_rows",),
    "evaluate": ("shifts",),
    "registry": ("mode",),
}  # keys of a section that are the flow's, not the method's


class NeedsRun(Exception):  # noqa: N818 (a signal, not an error)
    """Planning met a step that has not been done."""


@dataclass(frozen=True)
class Row:
    """One line of the closing table."""

    stage: str
    method: str
    cached: bool
    seconds: float
    figure: str


@dataclass
class Session:
    """The state of one run in one process."""

    settings: Settings
    planning: bool = False
    rows: list[Row] = field(default_factory=list)
    aside: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    opening: Future[Store] | None = None  # the store, while another thread makes it
    early: Future[list[StageRun]] | None = None  # the data stages, where they began before the server was there
    pushed: Future[bool] | None = None
    log: Path = Path()
    _store: Store | None = None

    @property
    def channel(self) -> Path:
        """Where methods, here and in the processes of the data stages, say how far they are."""
        return self.settings.home / "progress.jsonl"

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = self.opening.result() if self.opening else Store(self.settings)
        return self._store

    def params(self, section: str) -> dict[str, Any]:
        """A section of `params.yaml`. Raises UserError where it is missing."""
        found = read_params(self.settings).get(section)
        if not isinstance(found, dict):
            raise UserError(f"{self.settings.params} needs a section '{section}:'")
        return dict(found)

    def method(self, family: str) -> tuple[str, dict[str, Any]]:
        """The method that `params.yaml` names for a family, and its settings."""
        settings = self.params(family)
        if "method" not in settings:
            raise UserError(f"{self.settings.params}: section '{family}:' must name its 'method:'")
        return catalog.card(f"{family}.{settings.pop('method')}").name, settings

    def check(self) -> None:
        """Raise UserError where params.yaml has a section or a method that there is not, or lacks one: before anything is started."""
        stage.seed(self.settings)
        for section in SECTIONS:
            self.params(section)
        for section in read_params(self.settings):
            if section not in (*SECTIONS, "seed"):
                raise UserError(f"{self.settings.params}: there is no section {section!r}; valid: seed, {', '.join(SECTIONS)}")
        for family in catalog.families():
            self.method(family)
        mode = self.params("registry").get("mode", "enforce")
        if mode not in MODES:
            raise UserError(f"{self.settings.params}: 'registry.mode' must be one of {', '.join(MODES)}, not {mode!r}")
        for name, found in self.params("references").items():
            if name != "finetune" or not isinstance(found, dict):
                raise UserError(f"{self.settings.params}: 'references:' knows 'finetune:' and its settings, not {name!r}: {found!r}")

    def check_settings(self) -> None:
        """Raise UserError where a method that a flow will run does not know a setting. Imports the methods."""
        for family in ("train", "distill", "unlearn", "evaluate", "registry"):
            name, settings = self.method(family)
            if family == "train":
                settings = {**self.params("recipe"), **settings}
            catalog.configure(name, {key: value for key, value in settings.items() if key not in FLOWS_OWN.get(family, ())})
        catalog.configure("unlearn.retrain", self.params("recipe"))
        catalog.configure("unlearn.finetune", self.params("references").get("finetune", {}))

    @property
    def seed(self) -> int:
        return stage.seed(self.settings)

    def record(self, stage: str, method: str, cached: bool, seconds: float, figure: str) -> None:
        """Add a line to the closing table."""
        self.rows.append(Row(stage, method, cached, seconds, figure))


_current: Session | None = None


def session() -> Session:
    """The session of this process; a flow that a server or a shell starts alone gets one of its own."""
    global _current
    if _current is None:
        here = project()
        here.logs.mkdir(parents=True, exist_ok=True)
        _current = Session(here, log=here.logs / "flows.log")
    return _current


@contextmanager
def use(new: Session) -> Iterator[Session]:
    """Make a session the current one for a block."""
    global _current
    before, _current = _current, new
    try:
        yield new
    finally:
        _current = before


def call(flow: Flow[Any, R], *args: Any, **kwargs: Any) -> R:
    """Run a flow within a flow; while planning, its plain function."""
    target: Callable[..., R] = flow.fn if session().planning else flow
    return target(*args, **kwargs)


def step(plan: Plan) -> Done:
    """Do one step, as a Prefect task, or give its stored result."""
    if not session().planning:
        tell(stage=plan.role, state="start", method=plan.method)
        done = _step(plan)
        tell(stage=plan.role, state="end", method=plan.method, seconds=done.seconds)
        return done
    stored = find(session().store, plan)
    if stored is None:
        raise NeedsRun(plan.role)
    return stored


def tell(**event: Any) -> None:
    """Say something to whoever watches the channel."""
    channel = session().channel
    channel.parent.mkdir(parents=True, exist_ok=True)
    with channel.open("a", encoding="utf-8") as out:
        out.write(json.dumps(event) + "\n")


@task(name="step", task_run_name="{plan.role}: {plan.method}", cache_policy=NO_CACHE, persist_result=False)
def _step(plan: Plan) -> Done:
    here = session()
    return run(here.settings, here.store, plan)
