"""What a claim is, and what decides whether it holds: differences paired by seed, their interval, and conditions stated beforehand.

A claim is the file `tests/claims/<family>/<name>.py`. It holds a `CLAIM`, a `measure(method, seed, data, small)` that runs all arms for
one seed under equal conditions and gives rows, and a `switched_off` that has the method's signature and the baseline's code. No status
is ever typed in: it follows from the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Status = Literal["holds", "holds in part", "does not hold here"]
Values = Mapping[str, Mapping[str, Sequence[float]]]  # metric -> arm -> one value for each seed
HOLDS: Status = "holds"
IN_PART: Status = "holds in part"
NOT_HERE: Status = "does not hold here"
CONFIDENCE = 0.95


class Row(NamedTuple):
    """One measured value of one arm, for one seed."""

    arm: str
    metric: str
    value: float


@dataclass(frozen=True)
class Beats:
    """`arm` must beat `against` on `metric` by `by`: in the metric's own unit or, if `relative`, as a share of what `against` reached.

    A `by` below 0 is a margin: no worse than by that much.
    """

    arm: str
    against: str
    metric: str
    by: float = 0.0
    better: Literal["higher", "lower"] = "higher"
    relative: bool = False

    @property
    def name(self) -> str:
        return f"{self.metric}: {self.arm} against {self.against}"


@dataclass(frozen=True)
class Claim:
    """What is claimed of a method.

    text      one plain sentence
    data      folders below `RETORT_DATA` that are read; the first can be replaced by another of the same schema
    headline  the paper's claim: if it does not hold, the claim does not
    also      what must hold besides for the claim to hold whole
    seeds     number of seeds, from 0 on; published results need five or more
    """

    text: str
    data: tuple[str, ...]
    headline: Beats
    also: tuple[Beats, ...] = ()
    seeds: int = 5

    @property
    def conditions(self) -> tuple[Beats, ...]:
        return (self.headline, *self.also)


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences with its interval, positive where the claim is right, and what follows for one condition.

    failed: positions of the seeds at which either arm gave no finite value. Any makes the condition fail: to leave a diverged run
    out would flatter. The figures are those of the other seeds.
    """

    mean: float
    low: float
    high: float
    differences: tuple[float, ...]
    failed: tuple[int, ...]
    status: Status


def table(measured: Mapping[int, Iterable[Row]]) -> dict[str, dict[str, list[float]]]:
    """Rows by seed as values by metric and arm, one for each seed in order; NaN where a seed has none, as after a diverged run.

    Raises ValueError where a seed gives the same value twice.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for seed, rows in measured.items():
        for arm, metric, value in rows:
            of_arm = found.setdefault(metric, {}).setdefault(arm, {})
            if seed in of_arm:
                raise ValueError(f"seed {seed} gives {metric} of {arm} twice")
            of_arm[seed] = float(value)
    return {
        metric: {arm: [by_seed.get(seed, math.nan) for seed in measured] for arm, by_seed in arms.items()} for metric, arms in found.items()
    }


def interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean and t interval. With one value there is no interval: it is infinite; with none all three are NaN.

    By t and not by bootstrap: on five seeds the bootstrap's interval is too short (it covers about 84% where it says 95%).
    """
    from scipy.special import stdtrit

    n = len(differences)
    if n == 0:
        return math.nan, math.nan, math.nan
    mean = math.fsum(differences) / n
    if n == 1:
        return mean, -math.inf, math.inf
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * spread / math.sqrt(n)
    return mean, mean - half, mean + half


def effect(condition: Beats, values: Values) -> Effect:
    """Judge one condition. It holds where the whole interval lies above 0 and reaches `by`; in part where it lies above 0 only.

    values: metric -> arm -> one value a seed, as `table` gives them. Raises KeyError where an arm was not measured at all.
    """
    arms = values.get(condition.metric, {})
    absent = [arm for arm in (condition.arm, condition.against) if arm not in arms]
    if absent:
        raise KeyError(f"no row has {condition.metric!r} of arm {absent[0]!r}")
    sign = 1 if condition.better == "higher" else -1
    pairs = list(zip(arms[condition.arm], arms[condition.against], strict=True))
    raw = [sign * (ours - theirs) for ours, theirs in pairs]
    if condition.relative:
        raw = [d / abs(theirs) if theirs else math.nan for d, (_, theirs) in zip(raw, pairs, strict=True)]
    failed = tuple(at for at, d in enumerate(raw) if not math.isfinite(d))
    mean, low, high = interval([d for d in raw if math.isfinite(d)])
    return Effect(mean, low, high, tuple(raw), failed, _status(low, condition.by, bool(failed)))


def _status(low: float, by: float, failed: bool) -> Status:
    if failed or not math.isfinite(low):
        return NOT_HERE
    if by < 0:
        return HOLDS if low >= by else NOT_HERE
    if low <= 0:
        return NOT_HERE
    return HOLDS if low >= by else IN_PART


def judge(claim: Claim, values: Values) -> tuple[Status, dict[str, Effect]]:
    """Status of the claim, and the effect of each condition by its name, the headline first.

    The claim holds if all its conditions do. (All must, so nothing is to be corrected for their number.) It holds in part if the headline
    does at least that. A headline that fails is the claim's failure, whatever else holds.
    """
    effects = {condition.name: effect(condition, values) for condition in claim.conditions}
    headline = effects[claim.headline.name].status
    if headline == NOT_HERE:
        return NOT_HERE, effects
    return (HOLDS if all(e.status == HOLDS for e in effects.values()) else IN_PART), effects
