"""The picture of a sweep over students: accuracy against latency, the size of a dot for that of the model, and the front in a line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tasks.core import page_charts as charts
from tasks.core.metrics import Figure

FAR = 4  # times the slowest or a part of the fastest student: a bound beyond that would press them together
STATES = {"chosen": "chosen", "front": "on the front", "behind": "behind another in everything", "stopped": "stopped early"}


@dataclass(frozen=True)
class Point:
    """A student in the picture: accuracy with its interval, milliseconds for one row, bytes. `state` is one of `STATES`; `reason` says
    why it was stopped, or what of the budget it misses.
    """

    name: str
    accuracy: Figure
    latency: float
    size: float
    state: str
    reason: str = ""

    @property
    def words(self) -> str:
        """What came of it, in a line."""
        known = f"{self.accuracy.value:.1%}, {self.latency:.2f} ms, {self.size / 1024:,.0f} KiB"
        return f"{self.name}: {known}, {STATES[self.state]}" + (f" ({self.reason})" if self.reason else "")


def front(points: Sequence[Point], bound: float | None = None) -> Markup:
    """Accuracy over latency, on a scale of logarithms; `bound`: the latency that a budget allows. Names are numbers: a table has them.

    Students that were stopped with less accuracy than all others stand at the foot; a bound far from all students is left out.
    """
    left, top, wide, tall, edge = 64, 30, 800, 300, 26
    times = [one.latency for one in points]
    if bound is not None and min(times) / FAR < bound < max(times) * FAR:
        times.append(bound)
    else:
        bound = None
    low, high = math.log(min(times)) - 0.15, math.log(max(times)) + 0.15
    whole = [one for one in points if one.state != "stopped"] or points
    ends = [end for one in whole for end in (one.accuracy.low, one.accuracy.high)]
    marks = charts.ticks(max(0.0, min(ends) - 0.005), min(1.0, max(ends) + 0.005), 5)
    largest = max(one.size for one in points)

    def x(latency: float) -> float:
        return left + edge + (wide - 2 * edge) * (math.log(latency) - low) / (high - low)

    def y(accuracy: float) -> float:
        return top + tall * (1 - max(0.0, accuracy - marks[0]) / (marks[-1] - marks[0]))

    parts: list[str] = []
    for mark in marks:
        parts.append(charts.line(left, y(mark), left + wide, y(mark), "grid"))
        parts.append(charts.words(left - 8, y(mark) + 4, f"{100 * mark:.4g}%", "t small", text_anchor="end"))
    for time in _times(math.exp(low), math.exp(high)):
        parts.append(charts.line(x(time), top, x(time), top + tall, "grid"))
        parts.append(charts.words(x(time), top + tall + 34, f"{time:.3g} ms", "t small", text_anchor="middle"))
    if bound:
        late = x(bound) > left + wide * 0.75
        parts.append(charts.line(x(bound), top, x(bound), top + tall, "cut"))
        at = x(bound) + (-7 if late else 7)
        parts.append(charts.words(at, top + tall - 8, f"at most {bound:g} ms", "t strong", text_anchor="end" if late else None))
    best = sorted((one for one in points if one.state in ("chosen", "front")), key=lambda one: one.latency)
    parts += [
        charts.line(x(a.latency), y(a.accuracy.value), x(b.latency), y(b.accuracy.value), "whisker") for a, b in itertools.pairwise(best)
    ]
    for number, one in enumerate(points, 1):
        across, up, radius = x(one.latency), y(one.accuracy.value), 5 + 11 * math.sqrt(one.size / largest)
        look = {"chosen": "dot", "front": "first", "behind": "behind", "stopped": "hollow"}[one.state]
        parts.append(charts.tag("circle", charts.tag("title", one.words), cx=across, cy=up, r=radius, class_=look))
        parts.append(charts.line(across, y(one.accuracy.low), across, y(one.accuracy.high), "whisker"))
        parts.append(charts.words(across + radius + 5, up + 4, str(number), "t strong"))
    label = "Students by accuracy and latency: " + "; ".join(one.words for one in points)
    return charts.svg(left + wide + 40, top + tall + 46, label, *parts)


def _times(low: float, high: float) -> list[float]:
    """Round numbers of milliseconds within the two, of which a scale of logarithms shows enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    return found or [math.sqrt(low * high)]
