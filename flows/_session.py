"""What the flows of one process share: the project, its store, what has been done so far, and the way to run a step.

While `planning`, steps that are done give their results and the first that is not raises `NeedsRun`. So the very flows that do the work
also say, without a server and in seconds, that there is none to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from prefect import Flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from flows import _dvc, _promotion, _server
from flows._dvc import StageRun
from flows._runs import STEP_SECONDS, WAIT_SECONDS, can_pass, flow_run_page
from tasks.core import catalog, files, stage
from tasks.core.catalog import CONDENSED
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, configured
from tasks.core.saga import project_lock
from tasks.core.settings import Settings, project, read_params
from tasks.core.step import Done, Plan, find, run
from tasks.core.store import Store

R = TypeVar("R")
SECTIONS = ("pool", "filter", "condense", "generate", "recipe", "train", "distill", "unlearn", "references", "evaluate", "registry")
OPTIONAL = ("seed", "combine", "find", "generator", "keep", "devices", "erase")
GENERATOR = "generator"  # the role of a network that draws images
MODES = ("off", "dry-run", "enforce")  # what follows from a gate's word
FLOWS_OWN = {
    "train": ("pretrain",),
    "unlearn": ("demonstration_rows",),
    "evaluate": ("shifts",),
    "registry": ("mode",),
}  # keys of a section that are the flow's, not the method's


class Keep(MethodConfig):
    """Bounds of caches and logs."""

    cache_gb: float = Field(
        20, gt=0, description="gigabytes of decoded images, as many of older data versions, and of what teachers said of rows"
    )
    days: float = Field(90, gt=0, description="days that logs, and what a cache has not been asked for, are kept")


class Erase(MethodConfig):
    """Section `erase` of params.yaml."""

    methods: tuple[str, ...] = Field((), description="methods that `auto` may choose from; none: that of section unlearn")
    reference: bool = Field(True, description="retrain a reference beside each unlearned model, to measure forgetting against")
    rules: dict[str, dict[str, Any]] = Field({}, description="by metric, what differs from the gate's rule where a version must go")
    on_refusal: Literal["wait", "revoke"] = Field("wait", description="what becomes of a champion whose replacement the gate refuses")


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
    run_id: str = ""  # of MLflow


@dataclass
class Session:
    """The state of one run in one process.

    planning  find out what there is to do, and do nothing
    direct    do what takes no step, without Prefect
    served    a server that stays started it, or will hear of it
    """

    settings: Settings
    planning: bool = False
    direct: bool = False
    served: bool = False
    rows: list[Row] = field(default_factory=list)
    aside: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    opening: Future[Store] | None = None  # the store, while another thread makes it
    early: Future[list[StageRun]] | None = None  # the data stages, where they began before the server was there
    pushed: Future[bool] | None = None
    log: Path = Path()
    _store: Store | None = None

    @property
    def plain(self) -> bool:
        """Whether all is done without Prefect, and no step is run."""
        return self.planning or self.direct

    @property
    def channel(self) -> Path:
        """Where methods, here and in the processes of the data stages, say how far they are."""
        return self.settings.home / "progress.jsonl"

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = self.opening.result() if self.opening else Store(self.settings)
        return self._store

    @property
    def reads(self) -> bool:
        """Whether the project's rows are texts alone, which can be neither condensed nor generated."""
        return _dvc.reads(self.settings)

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

    def pretraining(self) -> tuple[str, dict[str, Any]] | None:
        """The method that makes the network which the teacher goes on from, and its settings, the teacher's sizes among them; None where
        section train has no `pretrain`. Raises UserError where that names none that learns from condensed rows.
        """
        train = self.params("train")
        found = train.get("pretrain")
        if found is None:
            return None
        if not isinstance(found, dict) or "method" not in found:
            raise UserError(f"{self.settings.params}: 'train.pretrain' must name its 'method:', such as from_condensed")
        name = catalog.card(f"train.{found['method']}").name
        if catalog.get(name).reads != CONDENSED:
            raise UserError(f"{self.settings.params}: 'train.pretrain' learns from condensed rows; {name} does not, from_condensed does")
        sizes = {key: train[key] for key in ("widths", "hidden") if key in train}
        return name, {**sizes, **{key: value for key, value in found.items() if key != "method"}}

    def generator(self) -> tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]:
        """The methods that train a generator and that unlearn it, each with its settings; the second's name is empty where none is named.

        Raises UserError where params.yaml has no such section, or names no method that makes a generator.
        """
        found = read_params(self.settings).get("generator")
        if not isinstance(found, dict) or "method" not in found:
            raise UserError(f"{self.settings.params} describes no generator: add 'generator: {{method: diffusion}}'")
        own = dict(found)
        unlearn = own.pop("unlearn", None) or {"method": ""}
        if not isinstance(unlearn, dict) or "method" not in unlearn:
            raise UserError(f"{self.settings.params}: 'generator.unlearn' must name its 'method:', such as sfd")
        name, other = f"train.{own.pop('method')}", unlearn["method"] and f"unlearn.{unlearn['method']}"
        if catalog.get(name).makes != GENERATOR:
            raise UserError(f"{self.settings.params}: {name} makes a classifier, no generator; train.diffusion makes one")
        return (name, own), (catalog.card(other).name if other else "", {key: value for key, value in unlearn.items() if key != "method"})

    def check(self) -> None:
        """Raise UserError where params.yaml has a section or a method that there is not, or lacks one: before anything is started."""
        stage.seed(self.settings)
        for section in SECTIONS:
            self.params(section)
        for section in read_params(self.settings):
            if section not in (*SECTIONS, *OPTIONAL):
                raise UserError(f"{self.settings.params}: there is no section {section!r}; valid: {', '.join((*OPTIONAL, *SECTIONS))}")
        for family in catalog.families():
            self.method(family)
        assert self.keep
        mode = self.params("registry").get("mode", "enforce")
        if mode not in MODES:
            raise UserError(f"{self.settings.params}: 'registry.mode' must be one of {', '.join(MODES)}, not {mode!r}")
        for name in read_params(self.settings).get("combine") or {}:
            catalog.card(f"registry.{name}")
        for name, found in self.params("references").items():
            if name != "finetune" or not isinstance(found, dict):
                raise UserError(f"{self.settings.params}: 'references:' knows 'finetune:' and its settings, not {name!r}: {found!r}")

    def check_settings(self) -> None:
        """Raise UserError where a method that a flow will run does not know a setting. Imports the methods."""
        from flows import _students  # which stands on this module

        for one in _students.candidates(self):
            catalog.configure(one.method, one.settings)
        _students.bounds(_students.section(self)[2].budget)
        for family in ("train", "unlearn", "evaluate", "registry"):
            name, settings = self.method(family)
            if family == "train":
                settings = {**self.params("recipe"), **settings}
            if catalog.get(name).makes == GENERATOR:
                raise UserError(f"{self.settings.params}: {name} makes a generator: its settings belong under 'generator:'")
            catalog.configure(name, {key: value for key, value in settings.items() if key not in FLOWS_OWN.get(family, ())})
        if "generator" in read_params(self.settings):
            for name, settings in self.generator():
                if name:
                    catalog.configure(name, settings)
        if (first := self.pretraining()) is not None:
            catalog.configure(*first)
        catalog.configure("unlearn.retrain", self.params("recipe"))
        catalog.configure("unlearn.finetune", self.params("references").get("finetune", {}))

    @property
    def keep(self) -> Keep:
        """How much of what can be made again is kept, and for how long."""
        return configured(Keep, "keep", read_params(self.settings).get("keep") or {})

    @property
    def seed(self) -> int:
        return stage.seed(self.settings)

    def record(self, stage: str, method: str, cached: bool, seconds: float, figure: str, run_id: str = "") -> None:
        """Add a line to the closing table."""
        self.rows.append(Row(stage, method, cached, seconds, figure, run_id))


_current: Session | None = None


_held = ExitStack()  # until the process ends


def session() -> Session:
    """The session of this process. A flow that a server starts gets one of its own: it waits for the project, holds it to the end of the
    process, and first cleans up after a run that was cut off, as the commands do.
    """
    global _current
    if _current is None:
        here = project()
        here.logs.mkdir(parents=True, exist_ok=True)
        _held.enter_context(project_lock(here, wait=WAIT_SECONDS))
        _server.reap(here)
        _dvc.mend(here)
        _current = Session(here, served=True, log=here.logs / "flows.log")
        _current.check()
        open_store(_current)
    return _current


def open_store(here: Session) -> Store:
    """The session's store, once what a run that was cut off has left is cleared away."""
    here.store.sweep()
    _promotion.settle(here.settings, here.store)
    for cache in (here.settings.cache / name for name in ("decoded", "answers", "versions")):
        files.bound(cache, most_bytes=here.keep.cache_gb * 1e9, days=here.keep.days)
    files.bound(here.settings.logs, most_bytes=1e9, days=here.keep.days)
    return here.store


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
    """Run a flow within a flow; without Prefect, its plain function."""
    target: Callable[..., R] = flow.fn if session().plain else flow
    return target(*args, **kwargs)


def step(plan: Plan) -> Done:
    """Do one step, as a Prefect task, or give its stored result."""
    if not session().plain:
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


@task(
    name="step",
    task_run_name="{plan.role}: {plan.method}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[5, 60],
    retry_condition_fn=can_pass,
    timeout_seconds=STEP_SECONDS,
)
def _step(plan: Plan) -> Done:
    here = session()
    page = flow_run_page(here.served)
    return run(here.settings, here.store, replace(plan, extra={**plan.extra, **({"retort.flow_run": page} if page else {})}))


def erase_settings(here: Session) -> Erase:
    """How this project erases. Raises UserError for a key that there is not."""
    erase = configured(Erase, "erase", read_params(here.settings).get("erase") or {})
    for name in erase.methods:
        catalog.card(f"unlearn.{name}")
    return erase
