"""A sweep over students: what they are set to, which of them are hopeless, which stand on the front, and which one is chosen.

A student stands on the front where no other is at least as accurate, fast and small, and better in one of these.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from flows._session import Session
from tasks.core import catalog, metrics
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.method import MethodConfig, configured
from tasks.core.metrics import Figure
from tasks.core.page_front import Point

Figures = Mapping[str, Mapping[str, Figure]]  # of students, by name and metric
Bounds = dict[str, dict[str, float]]  # by metric: {"max": ...} or {"min": ...}, as the gate has them

LATENCY, SIZE = "latency_ms_b1", "size_bytes"
COSTS = (LATENCY, "latency_ms_b64", SIZE, "parameters")  # known before a student has learnt anything
SHORT = {"latency_ms": LATENCY}
BUDGET = "retort.budget"  # tag of a version: bounds that the gate adds to its own
PICTURE = "front.json"  # artifact of the run that measured the students
EQUAL = 1.05  # latencies nearer than that are the same: the clock is not better
_BOUND = re.compile(r"\s*([a-z_0-9]+)\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*")


class Sweep(MethodConfig):
    """What section distill of params.yaml says besides the method and its settings."""

    students: tuple[dict[str, Any], ...] = Field((), description="settings of each student, where they differ from the section's own")
    early: float = Field(0.25, ge=0, lt=1, description="share of the steps after which hopeless students are stopped; 0: none is")
    budget: str = Field("", description="what the chosen student must keep to, such as latency_ms <= 2")


@dataclass(frozen=True)
class Candidate:
    """A student to be: its name, method and settings."""

    name: str
    method: str
    settings: dict[str, Any]

    def shortened(self, share: float) -> Candidate | None:
        """The same with a share of its steps; None for a method without steps."""
        if "steps" not in catalog.get(self.method).config.model_fields:
            return None
        config = catalog.configure(self.method, self.settings)
        fewer = {name: max(1, round(getattr(config, name) * share)) for name in ("steps", "pretrain_steps") if getattr(config, name, 0)}
        return Candidate(self.name, self.method, {**self.settings, **fewer})


def section(here: Session) -> tuple[str, dict[str, Any], Sweep]:
    """The method and settings of section distill, and its sweep. Raises UserError for what it does not know."""
    method, settings = here.method("distill")
    own = {key: settings.pop(key) for key in list(Sweep.model_fields) if key in settings}
    return method, settings, configured(Sweep, "distill", own)


def candidates(here: Session) -> tuple[Candidate, ...]:
    """The students of section distill; one where it lists none. Raises UserError where two are the same."""
    method, settings, sweep = section(here)
    found = []
    for own in sweep.students or ({},):
        name = catalog.card(f"distill.{own['method']}").name if "method" in own else method
        # another method's settings are its own: of the section's, those that it knows
        common = settings if name == method else {k: v for k, v in settings.items() if k in catalog.get(name).config.model_fields}
        found.append(Candidate(called(own), name, {**common, **{key: value for key, value in own.items() if key != "method"}}))
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{here.settings.params}: 'distill.students' lists the same student twice: {twice or 'no settings of its own'}")
    return tuple(found)


def called(own: Mapping[str, Any]) -> str:
    """A name for a student that differs in these settings: such as `widths 8-16 hidden 32`, with letters that MLflow takes."""

    def plain(value: Any) -> str:
        if isinstance(value, list | tuple):
            return "-".join(map(plain, value))
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{value:g}" if isinstance(value, float) else str(value))

    words = [plain(value) if key == "method" else f"{key} {plain(value)}" for key, value in own.items()]
    return " ".join(words)


def bounds(text: str) -> Bounds:
    """The bounds that a budget such as `latency_ms <= 2, accuracy >= 0.9` states. Raises UserError where it cannot be read."""
    found: Bounds = {}
    for part in re.split(r",|\band\b", text) if text.strip() else []:
        read = _BOUND.fullmatch(part)
        metric = SHORT.get(read[1], read[1]) if read else ""
        try:
            value = float(read[3]) if read else math.nan
        except ValueError:
            value = math.nan
        if read is None or not math.isfinite(value) or metric not in (*COSTS, "accuracy", "worst_class_accuracy", "ece", "nll"):
            known = ", ".join((*SHORT, *COSTS, "accuracy", "worst_class_accuracy", "ece", "nll"))
            raise UserError(f"the budget {part.strip()!r} cannot be read: write for example 'latency_ms <= 2'; figures: {known}")
        found.setdefault(metric, {})["max" if "<" in read[2] else "min"] = value
    return found


def missed(by: Mapping[str, Figure], limits: Bounds, only: Iterable[str] | None = None) -> str:
    """The bounds that a student's figures do not keep to, in words; empty where they keep to all. `only`: metrics that are looked at."""
    told = []
    for metric, bound in limits.items():
        value = by[metric].value
        if only is not None and metric not in only:
            continue
        if not value <= bound.get("max", math.inf):
            told.append(f"{metric} {value:.4g} is above {bound['max']:g}")
        if not value >= bound.get("min", -math.inf):
            told.append(f"{metric} {value:.4g} is below {bound['min']:g}")
    return ", ".join(told)


def hopeless(found: Evidence, limits: Bounds) -> dict[str, str]:
    """The students that need not go on, and why: beyond the budget in what training does not change, or less accurate than one that is no
    slower and no larger, by the whole 95% interval of the paired difference.
    """
    stopped = {name: reason for name, by in found.figures.items() if (reason := missed(by, limits, COSTS))}
    hits = _hits(found)
    for name, by in found.figures.items():
        for other, better in found.figures.items():
            cheaper = better[LATENCY].value <= by[LATENCY].value * EQUAL and better[SIZE].value <= by[SIZE].value
            if name in stopped or other == name or other in stopped or not cheaper:
                continue
            gain = metrics.difference(hits[other], hits[name])
            if gain.low > 0:
                stopped[name] = f"{other} is no slower, no larger, and {100 * gain.value:.1f} points more accurate"
    return stopped


def front(figures: Figures) -> list[str]:
    """The students that no other is better than in everything: the fastest first."""

    def costs(name: str) -> tuple[float, float, float]:
        by = figures[name]
        return (-by["accuracy"].value, by[LATENCY].value, by[SIZE].value)

    def beaten(name: str) -> bool:
        return any(_all_at_most(costs(other), costs(name)) and costs(other) != costs(name) for other in figures)

    return sorted((name for name in figures if not beaten(name)), key=lambda name: figures[name][LATENCY].value)


def choose(figures: Figures, limits: Bounds) -> str:
    """The most accurate student within the budget; of equal ones the fastest. Raises UserError where none keeps to it."""
    within = [name for name, by in figures.items() if not missed(by, limits)]
    if not within:
        told = "; ".join(f"{name}: {missed(by, limits)}" for name, by in figures.items())
        raise UserError(f"no student keeps to the budget ({told}); nothing was registered: allow more, or list smaller students")
    return min(within, key=lambda name: (-figures[name]["accuracy"].value, figures[name][LATENCY].value))


def picture(first: Figures, stopped: Mapping[str, str], last: Figures, chosen: str, limits: Bounds) -> list[Point]:
    """All students, the fastest first. `first`: figures of those that were stopped, as they were then; `last`: of those that were not."""
    best = front(last)

    def point(name: str, by: Mapping[str, Figure], state: str, reason: str = "") -> Point:
        return Point(name, by["accuracy"], by[LATENCY].value, by[SIZE].value, state, reason)

    points = [point(name, first[name], "stopped", reason) for name, reason in stopped.items()]
    for name, by in last.items():
        state = "chosen" if name == chosen else "front" if name in best else "behind"
        points.append(point(name, by, state, missed(by, limits)))
    return sorted(points, key=lambda one: one.latency)


def to_json(points: Iterable[Point], budget: str) -> dict[str, Any]:
    """What is kept of a sweep beside its evidence."""
    return {"points": [asdict(one) for one in points], "budget": budget}


def from_json(values: Mapping[str, Any]) -> tuple[list[Point], str]:
    """The points and the budget that `to_json` wrote."""
    return [Point(**{**one, "accuracy": Figure(**one["accuracy"])}) for one in values["points"]], values["budget"]


def budget_of(tags: Mapping[str, str]) -> Bounds:
    """The budget that stands on a version."""
    return json.loads(tags.get(BUDGET, "{}"))  # type: ignore[no-any-return]


def _hits(found: Evidence) -> dict[str, npt.NDArray[np.bool_]]:
    """By student, whether each row was answered right, in the order of the rows."""
    assert found.per_sample is not None
    table = found.per_sample.to_pandas().sort_values("sample_id", kind="stable")
    return {str(name): (rows["label"] == rows["predicted"]).to_numpy() for name, rows in table.groupby("model")}


def _all_at_most(some: Iterable[float], others: Iterable[float]) -> bool:
    return all(a <= b for a, b in zip(some, others, strict=True))
