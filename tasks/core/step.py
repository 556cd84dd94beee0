"""A step: one method on referenced inputs, run once. The same method source, settings, seed and inputs give the stored result."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.core import catalog, seen
from tasks.core.catalog import ANY, CLASSIFIER
from tasks.core.errors import UserError
from tasks.core.method import Taught
from tasks.core.refs import DataRef, EvidenceRef, ModelRef, Ref, open_data
from tasks.core.settings import Settings
from tasks.core.store import Store

Inputs = Mapping[str, Ref | tuple[Ref, ...] | Mapping[str, Ref]]


@dataclass(frozen=True)
class Plan:
    """What a step will do. `role` is the name that its result goes by, such as `teacher`.

    `facts` are plain values that a registry method looks at; `extra` are tags for the run, which change nothing.
    """

    role: str
    method: str
    settings: Mapping[str, Any]
    inputs: Inputs
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Changes with the method's source, its settings, its seed and its inputs; not with the versions of libraries."""
        card = catalog.card(self.method)
        what = {
            "method": self.method,
            "source": catalog.source_digest(card.module, "tasks.core.step"),
            "settings": json.loads(json.dumps(dict(self.settings), default=str)),  # what is not set stands in the source
            "inputs": _identity(_plain(self.inputs)),
            "seed": self.seed,
            **({"facts": self.facts} if self.facts else {}),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Done:
    """A step's result: the reference to what it made, how long the method ran, whether it was there already, and its figures."""

    role: str
    method: str
    ref: Ref
    seconds: float
    cached: bool
    figures: dict[str, float]


def preload() -> None:
    """Import what the first step that runs will need, while something else is waited for."""
    import mlflow.pyfunc  # noqa: F401
    import torch  # noqa: F401


def find(store: Store, plan: Plan) -> Done | None:
    """The stored result of a step, or None where it has not been done."""
    found = store.find(plan.key)
    if not found or ("model" in found and not store.has_net(ModelRef(**found["model"]))):
        return None
    return _done(plan, found, cached=True)


def run(settings: Settings, store: Store, plan: Plan) -> Done:
    """Do the step and store its result, or give the stored one. What a failure leaves is marked as failed and never found again."""
    if done := find(store, plan):
        return done
    key, method = plan.key, catalog.get(plan.method)
    cfg = catalog.configure(plan.method, dict(plan.settings))
    data = [ref for ref in _flat(plan.inputs) if isinstance(ref, DataRef)]
    run_id = store.start(
        key,
        f"{plan.role}: {plan.method}",
        params={"method": plan.method, "seed": plan.seed, **cfg.model_dump(mode="json")},
        tags={
            "retort.role": plan.role,
            "retort.method": plan.method,
            "retort.inputs": json.dumps(_plain(plan.inputs)),
            "retort.revision": revision(settings.root),
            **{name: str(value) for name, value in plan.extra.items()},
        },
        inputs=data,
    )
    try:
        result, metrics = _FAMILIES[plan.method.partition(".")[0]](settings, store, plan, method, cfg, run_id)
    except BaseException:
        store.fail(run_id)
        raise
    store.finish(run_id, key, result, metrics)
    return _done(plan, {**result, "run_id": run_id}, cached=False)


def revision(root: Path) -> str:
    """The git revision of the project, with `+` where files differ from it; empty outside a repository."""
    import subprocess

    def git(*words: str) -> str:
        ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)  # noqa: S603, S607
        return ran.stdout.strip() if ran.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")


Ran = tuple[dict[str, Any], dict[str, float]]


def _make_model(settings: Settings, store: Store, plan: Plan, run_id: str, rows: Any, call: Callable[[], Any], forgot: Any = None) -> Ran:
    """Run a method that gives a network; store the network and what it has seen."""
    from tasks.core.networks import parameters

    began = time.perf_counter()
    made = call()
    seconds = time.perf_counter() - began
    net, found = (made.net, made.figures) if isinstance(made, Taught) else (made, {})
    _note(store, run_id, "retort.seen", seen.FILE, seen.rows_and_parents(rows.column("sample_id"), rows.column("parents")))
    if forgot is not None:  # the rows alone: what they were made from may still be known
        _note(store, run_id, "retort.forgot", seen.FORGOT, forgot.ids())
    tags = {"retort.role": plan.role, "retort.method": plan.method}
    ref = store.log_net(run_id, net, name=plan.role, classes=rows.info.classes, tags=tags)
    figures = {"parameters": float(parameters(net)), "rows": float(len(rows)), **found}
    return {"model": ref.model_dump(), "seconds": seconds, "figures": figures}, {**figures, "seconds": seconds}


def _note(store: Store, run_id: str, tag: str, file: str, ids: Iterable[str]) -> None:
    """Store the keys of ids, and tag the run with what the list is known by."""
    keys = seen.keys_of(ids)
    with tempfile.TemporaryDirectory() as folder:
        seen.write(Path(folder, file), keys)
        store.log_file(run_id, Path(folder, file))
    store.client.set_tag(run_id, tag, seen.digest(keys))


def _net(store: Store, ref: Any, plan: Plan) -> Any:
    """A network out of the store. Raises UserError where it is not of the kind that the method takes."""
    from tasks.core import networks

    net, takes = store.load_net(ref), catalog.get(plan.method).takes
    if takes not in (ANY, net.arch["kind"] if networks.draws(net.arch) else CLASSIFIER):
        names = ", ".join(f"{name}/{version}" for name, version in store.versions_of(ref)) or ref.model_id
        what = "a diffusion model, which draws images" if networks.draws(net.arch) else "a classifier"
        raise UserError(f"{names} is {what} ({net.arch['kind']}); {plan.method} takes a model of kind {takes}")
    return net


def _start(store: Store, plan: Plan) -> Any:
    return next((_net(store, ref, plan) for ref in (_models(plan, "start") if "start" in plan.inputs else [])), None)


def _train(settings: Settings, store: Store, plan: Plan, method: Any, cfg: Any, run_id: str) -> Ran:
    rows = open_data(settings, *_data(plan, "data"))
    start = _start(store, plan)
    return _make_model(settings, store, plan, run_id, rows, lambda: method.entry(rows, cfg, start=start, seed=plan.seed))


def _distill(settings: Settings, store: Store, plan: Plan, method: Any, cfg: Any, run_id: str) -> Ran:
    rows = open_data(settings, *_data(plan, "data"))
    teachers, start = [_net(store, ref, plan) for ref in _models(plan, "teachers")], _start(store, plan)
    return _make_model(settings, store, plan, run_id, rows, lambda: method.entry(teachers, rows, cfg, start=start, seed=plan.seed))


def _unlearn(settings: Settings, store: Store, plan: Plan, method: Any, cfg: Any, run_id: str) -> Ran:
    forget, retain = open_data(settings, *_data(plan, "forget")), open_data(settings, *_data(plan, "retain"))
    (model,) = (_net(store, ref, plan) for ref in _models(plan, "model"))
    return _make_model(settings, store, plan, run_id, retain, lambda: method.entry(model, forget, retain, cfg, seed=plan.seed), forget)


def _evaluate(settings: Settings, store: Store, plan: Plan, method: Any, cfg: Any, run_id: str) -> Ran:
    from tasks.core.dataset import write_parquet

    models = {name: _net(store, ref, plan) for name, ref in dict(plan.inputs["models"]).items()}  # type: ignore[call-overload,arg-type]
    data = {role: open_data(settings, *_data(plan, role)) for role in plan.inputs if role != "models"}
    began = time.perf_counter()
    evidence = method.entry(models, data, cfg, seed=plan.seed)
    seconds = time.perf_counter() - began
    store.log_json(run_id, "evidence.json", evidence.to_json())
    if evidence.per_sample is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "per_sample.parquet")
            write_parquet(path, evidence.per_sample)
            store.log_file(run_id, path)
    figures = {f"{name}/{metric}": figure.value for name, by in evidence.figures.items() for metric, figure in by.items()}
    return {"evidence": True, "seconds": seconds, "figures": {}}, figures


def _registry(settings: Settings, store: Store, plan: Plan, method: Any, cfg: Any, run_id: str) -> Ran:
    """Only the methods that make a model are steps; rankings and decisions are asked for directly."""
    from tasks.core.offer import Offer

    nets = {name: _net(store, ref, plan) for name, ref in dict(plan.inputs["models"]).items()}  # type: ignore[call-overload,arg-type]
    data = {role: open_data(settings, *_data(plan, role)) for role in plan.inputs if role != "models"}
    offer = Offer(nets, data, facts=plan.facts)
    return _make_model(settings, store, plan, run_id, data["train"], lambda: method.entry(offer, cfg, seed=plan.seed))


_FAMILIES = {"train": _train, "distill": _distill, "unlearn": _unlearn, "evaluate": _evaluate, "registry": _registry}


def read_evidence(store: Store, ref: EvidenceRef) -> Any:
    """The evidence that a step stored."""
    import pyarrow.parquet as pq

    from tasks.core.evidence import Evidence

    values = json.loads(store.artifact(ref.run_id, "evidence.json").read_text(encoding="utf-8"))
    names = {item.path for item in store.client.list_artifacts(ref.run_id)}
    samples = pq.read_table(store.artifact(ref.run_id, "per_sample.parquet")) if "per_sample.parquet" in names else None
    return Evidence.from_json(values, samples)


def _done(plan: Plan, found: Mapping[str, Any], *, cached: bool) -> Done:
    ref: Ref = ModelRef(**found["model"]) if "model" in found else EvidenceRef(run_id=found["run_id"])
    return Done(plan.role, plan.method, ref, found["seconds"], cached, found["figures"])


def _data(plan: Plan, role: str) -> list[DataRef]:
    found = plan.inputs[role]
    return [found] if isinstance(found, DataRef) else [ref for ref in found if isinstance(ref, DataRef)]  # type: ignore[union-attr]


def _models(plan: Plan, role: str) -> list[ModelRef]:
    found = plan.inputs[role]
    return [found] if isinstance(found, ModelRef) else [ref for ref in found if isinstance(ref, ModelRef)]  # type: ignore[union-attr]


def _flat(inputs: Inputs) -> list[Ref]:
    found: list[Ref] = []
    for value in inputs.values():
        if isinstance(value, Mapping):
            found.extend(value.values())
        elif isinstance(value, tuple):
            found.extend(value)
        else:
            found.append(value)
    return found


def _identity(plain: Any) -> Any:
    """The same values, with models known by their weights alone: a model that was made again is the same model."""
    if isinstance(plain, dict):
        if plain.get("kind") == "ModelRef":
            return plain["sha256"]
        return {name: _identity(value) for name, value in plain.items()}
    return [_identity(value) for value in plain] if isinstance(plain, list) else plain


def _plain(inputs: Inputs) -> dict[str, Any]:
    """Inputs as plain values, every reference with its kind."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return {"kind": type(value).__name__, **value.model_dump(mode="json")}

    return {name: plain(value) for name, value in inputs.items()}
