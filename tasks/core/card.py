"""A version's model card: what it is for, what it was made from and under which licence, how well it does, and what to beware of.

Gathered from the store alone, so that it can be written at any time; the sections follow Model Cards for Model Reporting (2019),
arXiv 1810.03993.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tasks.core import catalog
from tasks.core.errors import UserError, without_secrets
from tasks.core.evidence import Evidence
from tasks.core.metrics import Figure
from tasks.core.refs import DataRef, EvidenceRef, ModelRef, info_of
from tasks.core.settings import Settings
from tasks.core.store import Store

PERCENT = ("accuracy", "class_accuracy", "worst_class_accuracy", "shifted_accuracy", "worst_shift_accuracy")
DRAWINGS = "drawings"  # the role of evidence on what models draw
WORDS = {
    "ece": "calibration error",
    "latency_ms_b1": "latency of 1 row, ms",
    "latency_ms_b64": "latency of 64 rows, ms",
    "nll": "loss, nats",
}
BEWARE = (
    "It always answers with one of its classes, also for images that show none of them.",
    "Figures are of the test rows named here; on images from elsewhere nothing is known unless a shift is listed.",
)
BEWARE_READING = (
    "It always answers with one of its classes, also for texts that belong to none of them.",
    "Figures are of the test rows named here; on texts from elsewhere nothing is known.",
)
BEWARE_DRAWING = (
    "What it draws may come near to rows that it was trained on.",
    "Figures are what a classifier says of its images, and their distance to the test rows named here.",
)


@dataclass(frozen=True)
class Source:
    """Where data came from, and under which licence it may be used."""

    name: str
    licence: str
    source: str


@dataclass(frozen=True)
class Card:
    """All that the card says. `data` are folders with their md5, `figures` those of the newest evidence on the version."""

    name: str
    version: int
    made_at: str
    role: str
    method: str
    paper: str
    arxiv: str
    summary: str
    limits: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    parameters: int
    seed: int
    revision: str
    aliases: tuple[str, ...]
    revoked: bool
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    sources: tuple[Source, ...]
    parents: tuple[str, ...]
    draws: bool = False  # it draws images, and tells none apart
    reads: bool = False  # it tells texts apart
    request: str = ""
    flow_run: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    measured_on: Mapping[str, str] = field(default_factory=dict)
    verdict: Mapping[str, Any] = field(default_factory=dict)

    @property
    def purpose(self) -> str:
        """What the model does, in a sentence."""
        some = ", ".join(self.classes[:12]) + (f" and {len(self.classes) - 12} more" if len(self.classes) > 12 else "")
        size = "x".join(map(str, self.shape[1:]))
        kind = "grey" if self.shape[0] == 1 else "colour"
        if self.reads:
            return f"Tells {len(self.classes)} classes of texts apart: {some}."
        if self.draws:
            return f"Draws {kind} images of {size} pixels, of {len(self.classes)} classes: {some}."
        return f"Tells {len(self.classes)} classes of {kind} images of {size} pixels apart: {some}."

    @property
    def beware(self) -> tuple[str, ...]:
        """What whoever uses it should know."""
        return BEWARE_DRAWING if self.draws else BEWARE_READING if self.reads else BEWARE

    @property
    def licence(self) -> str:
        """The licences of all the data that it was made from."""
        return "; ".join(dict.fromkeys(source.licence or "not known" for source in self.sources)) or "not known"

    @property
    def use(self) -> str:
        """How any client loads and asks it."""
        shape = ", ".join(map(str, self.shape))
        if self.draws:
            return (
                f'model = mlflow.pyfunc.load_model("models:/{self.name}/{self.version}")\n'
                f"model.predict(labels, params={{'seed': 0}})   # int64 (N,) in, uint8 (N, {shape}) out"
            )
        if self.reads:
            return (
                f'model = mlflow.pyfunc.load_model("models:/{self.name}/{self.version}")\n'
                f'model.predict(pandas.DataFrame({{"text": texts}}))   # class probabilities (N, {len(self.classes)}) out'
            )
        return (
            f'model = mlflow.pyfunc.load_model("models:/{self.name}/{self.version}")\n'
            f"model.predict(images)   # uint8 (N, {shape}) in, class probabilities (N, {len(self.classes)}) out"
        )


def gather(settings: Settings, store: Store, name: str, version: int) -> Card:
    """The card of a version. Raises UserError where there is no such version."""
    from tasks.core import networks

    ref = store.version_ref(name, version)
    found = store.version(name, version)
    run = store.client.get_run(ref.run_id)
    tags, method = run.data.tags, run.data.tags.get("retort.method", "")
    about = catalog.cards().get(method)
    arch = store.arch(ref)
    inputs = json.loads(tags.get("retort.inputs", "{}"))
    data, sources = _data(settings, inputs)
    evidence, where = _evidence(store, ref, DRAWINGS if networks.draws(arch) else "%evidence")
    aliases = store.aliases(name)
    return Card(
        name=name,
        version=version,
        made_at=f"{datetime.fromtimestamp(run.info.start_time / 1000, UTC):%Y-%m-%d %H:%M} UTC",
        role=tags.get("retort.role", ""),
        method=method,
        paper=about.paper if about else "",
        arxiv=about.arxiv if about else "",
        summary=about.summary if about else "",
        limits=_limits(method),
        shape=tuple(arch["shape"]),
        classes=tuple(arch["class_names"]),
        parameters=int(run.data.metrics.get("parameters", 0)),
        seed=int(run.data.params.get("seed", 0)),
        revision=tags.get("retort.revision", ""),
        aliases=tuple(sorted(alias for alias, number in aliases.items() if number == version)),
        revoked=found.tags.get("revoked", "false") != "false",
        settings={key: value for key, value in sorted(run.data.params.items()) if key not in ("method", "seed")},
        data=data,
        sources=sources,
        parents=tuple(_parents(store, inputs)),
        draws=networks.draws(arch),
        reads=networks.reads(arch),
        request=tags.get("retort.request", ""),
        flow_run=tags.get("retort.flow_run", ""),
        figures=evidence.figures[where] if evidence else {},
        measured_on=evidence.data if evidence else {},
        verdict=json.loads(found.tags.get("retort.verdict", "{}")),
    )


def provenance(settings: Settings, inputs: Mapping[str, Any]) -> tuple[Source, ...]:
    """The sources of all the data in a step's plain inputs, each once."""
    return _data(settings, inputs)[1]


def markdown(card: Card) -> str:
    """The card as Markdown: what MLflow's page shows as the version's description."""
    lines = [f"# {card.name} version {card.version}", card.summary, "## What it is for", card.purpose]
    lines += ["```python", card.use, "```", "## Data"]
    lines += [f"- {path} `{md5}`" for path, md5 in card.data.items()]
    lines += [f"- {s.name or 'source'}: {s.source or 'origin not known'}. Licence: {s.licence or 'not known'}" for s in card.sources]
    lines += [f"- made from model {parent}" for parent in card.parents]
    lines += [f"- unlearned for request {card.request}"] if card.request else []
    lines += ["## Figures"]
    lines += [f"- {WORDS.get(k, k.replace('_', ' '))}: {write(k, v)}" for k, v in card.figures.items()] or ["Not measured yet."]
    if card.verdict:
        lines += ["", f"Gate: {'passed' if card.verdict['promote'] else 'refused'}: {card.verdict['reason']}"]
    lines += [
        "## Limits",
        *(f"- {line}" for line in (*card.beware, *([card.limits] if card.limits else []))),
    ]
    lines += ["## How it was made", f"{card.method}, seed {card.seed}, revision {card.revision or 'not known'}, {card.made_at}."]
    lines += [f"Flow run: {card.flow_run}"] if card.flow_run else []
    return "\n".join(lines) + "\n"


def write(metric: str, figure: Figure) -> str:
    """A figure with its interval, in the metric's own unit."""

    def text(value: float) -> str:
        if not math.isfinite(value):
            return "not measured"
        if metric in PERCENT or metric.startswith("accuracy_"):
            return f"{value:.1%}"
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"

    if figure.low == figure.high or figure.low != figure.low:
        return text(figure.value)
    return f"{text(figure.value)} [{text(figure.low)}, {text(figure.high)}]"


def _data(settings: Settings, inputs: Mapping[str, Any]) -> tuple[dict[str, str], tuple[Source, ...]]:
    data: dict[str, str] = {}
    sources: dict[Source, None] = {}
    for plain in _of_kind(inputs, "DataRef"):
        ref = DataRef(**plain)
        data[ref.path] = ref.md5
        try:
            info = info_of(settings, ref)
        except (UserError, OSError):  # an older version that is no longer to be had: its md5 is all there is
            continue
        if info.licence or info.source:
            sources[Source(info.name, info.licence, without_secrets(info.source))] = None
    return data, tuple(sources)


def _parents(store: Store, inputs: Mapping[str, Any]) -> Iterator[str]:
    for plain in _of_kind(inputs, "ModelRef"):
        ref = ModelRef(**plain)
        tags = store.client.get_run(ref.run_id).data.tags
        yield f"{tags.get('retort.role', 'model')} ({tags.get('retort.method', 'method not known')}, {ref.model_id})"


def _evidence(store: Store, ref: ModelRef, role: str) -> tuple[Evidence | None, str]:
    """The newest evidence on a model from runs of this role, and the name that it goes by there."""
    from tasks.core.step import read_evidence

    run = store.newest_run({"retort.role": role, "retort.inputs": f"%{ref.model_id}%"}, like=True)
    if run is None:
        return None, ""
    models = json.loads(store.client.get_run(run).data.tags["retort.inputs"])["models"]
    where = next(name for name, plain in models.items() if plain["model_id"] == ref.model_id)
    return read_evidence(store, EvidenceRef(run_id=run)), where


def _of_kind(value: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Every reference of a kind in plain values."""
    if isinstance(value, dict) and "kind" in value:
        if value["kind"] == kind:
            yield {key: item for key, item in value.items() if key != "kind"}
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _of_kind(item, kind)


def _limits(method: str) -> str:
    """What a method's docstring says under `Limits`, on one line."""
    about = catalog.cards().get(method)
    if about is None:
        return ""
    path = catalog.ROOT / about.path
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found = re.search(r"^Limits\s+(.*?)(?=^\S|\Z)", doc, re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""
