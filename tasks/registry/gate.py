"""A candidate takes the champion's place when every rule is met: bounds on its own figures, and paired comparisons on the same samples.

Paper   none: paired comparisons as any statistics book has them (McNemar's pairs, with a bootstrap interval)
Idea    for each metric `min` and `max` bound the candidate's own figure. `min_delta` bounds the low end of the 95% interval of the gain
        over the champion, sample by sample: above 0 asks for "better", below 0 says how much may be lost for "not worse".
        `max_ratio` bounds candidate / champion, for costs such as latency and size. `compatible_with: champion` asks that a gallery of
        the champion's embeddings serve the candidate's queries as it stands
Small   nothing is left out
Limits  "not worse" is read off an interval: with few test samples a margin smaller than the interval's half width is never met. With
        2,000 samples and a margin of .02 it promotes 2% of candidates that are .021 worse (two figures compared: 46%) and 81% of those
        that are as good (5 seeds of 150 drawn pairs). Gains can be paired for accuracy, also per class
        and under shifts, and for calibration error, whose answers are kept row by row; for others there is `max_ratio`, which compares
        two figures. Latency has no interval: leave room in its ratio. Compatibility is asked for only where there is a champion
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from pydantic import Field, model_validator

from tasks.core import metrics
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.method import MethodConfig, method
from tasks.core.metrics import Figure
from tasks.registry import Decision, Offer, Rule

LOWER_IS_BETTER = {"ece"}  # of those that can be paired
PAIRED = ("accuracy", "worst_class_accuracy", "ece", "shifted_accuracy")
DRAWS, BINS = 1000, 15


class Bounds(MethodConfig):
    """What one metric must meet; at least one of the four."""

    min: float | None = Field(None, description="least value")
    max: float | None = Field(None, description="largest value")
    min_delta: float | None = Field(None, description="least gain over the champion, by the low end of its interval; below 0: a margin")
    max_ratio: float | None = Field(None, gt=0, description="at most so many times the champion's")
    optional: bool = Field(False, description="passed over where the candidate has no such figure")

    @model_validator(mode="after")
    def _asks_for_something(self) -> Bounds:
        if all(bound is None for bound in (self.min, self.max, self.min_delta, self.max_ratio)):
            raise ValueError("a rule needs min, max, min_delta or max_ratio")
        return self


class Config(MethodConfig):
    """Rules by metric."""

    rules: dict[str, Bounds] = Field(
        {"accuracy": Bounds(min=0.5, min_delta=-0.02), "ece": Bounds(max=0.2)}, description="bounds by metric", min_length=1
    )
    compatible_with: Literal["", "champion"] = Field("", description="whose gallery the candidate's embeddings must serve as it is")
    compatible_margin: float = Field(0.02, ge=0, description="how much retrieval from that gallery may lose")

    @model_validator(mode="after")
    def _can_be_paired(self) -> Config:
        for metric, bounds in self.rules.items():
            if bounds.min_delta is not None and metric not in PAIRED:
                raise ValueError(
                    f"rules.{metric}.min_delta cannot be paired sample by sample: that takes {', '.join(PAIRED)}; use max_ratio"
                )
        return self


SMOKE = Config(rules={"accuracy": Bounds(min=0.1, min_delta=-0.5), "ece": Bounds(max=1.0, min_delta=-1.0, max_ratio=100.0)})


@method(paper="", claim="a candidate worse than the champion by more than the margin is never promoted; an equal one is")
def gate(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Decision:
    """Decide on the model `candidate` of the offer's evidence, against `champion` where the evidence has one.

    A figure that is missing or no number meets no rule. Raises UserError where there is no evidence, or where the two were not measured
    on the same samples.
    """
    evidence = offer.evidence
    if evidence is None or "candidate" not in evidence.figures:
        raise UserError("the gate needs evidence on the candidate; evaluate it first")
    rules: list[Rule] = []
    for metric, bounds in cfg.rules.items():
        figure = evidence.figures["candidate"].get(metric)
        if figure is None:
            if not bounds.optional:
                known = list(evidence.figures["candidate"])
                more = f" and {len(known) - 8} more" if len(known) > 8 else ""
                rules.append(_failed(metric, f"{metric} was not measured; measured: {', '.join(known[:8])}{more}"))
            continue
        if bounds.min is not None:
            rules.append(absolute(metric, figure, least=bounds.min))
        if bounds.max is not None:
            rules.append(absolute(metric, figure, most=bounds.max))
        if "champion" in evidence.figures:
            if bounds.min_delta is not None:
                rules.append(paired(evidence, metric, bounds.min_delta, seed))
            if bounds.max_ratio is not None:
                rules.append(ratio(metric, figure, evidence.figures["champion"].get(metric), bounds.max_ratio))
    if cfg.compatible_with and "champion" in evidence.figures:
        rules.append(compatible(evidence.figures["candidate"].get("compatibility"), cfg.compatible_margin))
    return Decision(all(rule.passed for rule in rules), tuple(rules))


def absolute(name: str, figure: Figure, *, least: float | None = None, most: float | None = None) -> Rule:
    """A bound on the candidate's own figure. NaN never passes."""
    bound, sign = (least, "at least") if least is not None else (most, "at most")
    assert bound is not None
    value = figure.value
    passed = not math.isnan(value) and (value >= bound if least is not None else value <= bound)
    reason = f"{name} {value:.4g} {'meets' if passed else 'misses'} {sign} {bound:g}"
    return Rule(f"{name} {sign} {bound:g}", passed, value, None, figure.low, figure.high, reason)


def paired(evidence: Evidence, metric: str, least: float, seed: int) -> Rule:
    """The gain over the champion on the same samples: the low end of its interval must reach `least`."""
    mine, theirs = Answers(evidence, "candidate"), Answers(evidence, "champion")
    if mine.ids != theirs.ids:
        raise UserError("candidate and champion were not measured on the same samples; evaluate them again, together")
    gap = gain(metric, mine, theirs, seed)
    passed = not math.isnan(gap.low) and gap.low >= least
    if least > 0:
        rule, words = f"{metric} better than champion's by {least:g}", "better than" if passed else "not shown to be better than"
    else:
        rule, words = f"{metric} within {-least:g} of champion", "not worse than" if passed else "may be worse than"
    reason = f"{metric} {words} the champion's by {abs(least):g}: gain {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
    figures = [evidence.figures[name].get(metric, _nothing()).value for name in ("candidate", "champion")]
    return Rule(rule, passed, figures[0], figures[1], gap.low, gap.high, reason)


def ratio(metric: str, mine: Figure, theirs: Figure | None, most: float) -> Rule:
    """Candidate over champion; what the champion lacks cannot be compared and is not met."""
    name = f"{metric} at most {most:g} times champion's"
    if theirs is None:
        return _failed(name, f"{metric} of the champion was not measured")
    value = mine.value / theirs.value if theirs.value else math.nan
    passed = not math.isnan(value) and value <= most
    reason = f"{metric} is {value:.3g} times the champion's, {'within' if passed else 'above'} {most:g}"
    return Rule(name, passed, mine.value, theirs.value, value, value, reason)


def compatible(gap: Figure | None, margin: float) -> Rule:
    """Retrieval with the candidate's queries from the champion's gallery, less the champion's own: the low end may reach -margin.

    Stationary Representations (2024), section 3: the gallery of the old model is not indexed again.
    """
    name = f"embeddings within {margin:g} of champion's own retrieval"
    if gap is None:
        return _failed(name, "embedding compatibility with the champion was not measured")
    passed = not math.isnan(gap.low) and gap.low >= -margin
    words = "serve" if passed else "may not serve"
    reason = f"its embeddings {words} the champion's gallery: retrieval {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
    return Rule(name, passed, gap.value, 0.0, gap.low, gap.high, reason)


class Answers:
    """One model's answers in the order of their sample ids: labels, hits and confidence (N,).

    Raises UserError where the evidence holds none.
    """

    def __init__(self, evidence: Evidence, model: str) -> None:
        table = evidence.per_sample
        rows = table.filter(pc.equal(table["model"], model)).sort_by("sample_id") if table is not None else None
        if rows is None or rows.num_rows == 0:
            raise UserError(f"the evidence has no answers of the {model}, sample by sample; evaluate it again")
        self.ids = rows["sample_id"].to_pylist()
        self.labels = rows["label"].to_numpy()
        self.hits = self.labels == rows["predicted"].to_numpy()
        self.confidence = rows["confidence"].to_numpy()
        # the share of shifts that each sample is answered right under, where `evaluate.shifts` has measured it
        self.shifted = rows["shifted"].to_numpy() if "shifted" in rows.column_names else None


def gain(metric: str, mine: Answers, theirs: Answers, seed: int = 0) -> Figure:
    """How much better `mine` is, with a paired bootstrap interval: both are measured on the same drawn samples."""
    if metric == "accuracy":
        return metrics.difference(mine.hits, theirs.hits, seed=seed)
    if metric == "shifted_accuracy":
        if mine.shifted is None or theirs.shifted is None:
            return _nothing()
        return metrics.mean(mine.shifted - theirs.shifted, seed=seed, draws=DRAWS)
    sign = -1 if metric in LOWER_IS_BETTER else 1
    parts = [(_worst_class if metric == "worst_class_accuracy" else _ece)(answers) for answers in (mine, theirs)]
    once = np.ones((1, len(mine.ids)))
    value = sign * float(parts[0](once)[0] - parts[1](once)[0])
    drawn = np.concatenate([parts[0](counts) - parts[1](counts) for counts in metrics.resampled(len(mine.ids), seed, DRAWS)])
    low, high = np.nanpercentile(sign * drawn, [2.5, 97.5])
    return Figure(value, float(low), float(high))


Measure = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]


def _worst_class(answers: Answers) -> Measure:
    """Lowest accuracy of a class, for rows of counts (draws, N) of how often each sample was drawn."""
    of_class = (answers.labels[:, None] == np.unique(answers.labels)).astype(np.float64)
    right = of_class * answers.hits[:, None]

    def measure(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        seen = counts @ of_class
        worst: npt.NDArray[np.float64] = np.where(seen > 0, counts @ right / np.maximum(seen, 1), np.inf).min(1)
        return worst

    return measure


def _ece(answers: Answers) -> Measure:
    """Expected calibration error in `BINS` bins of confidence, likewise."""
    gaps = (metrics.bin_of(answers.confidence, BINS)[:, None] == np.arange(BINS)) * (answers.hits - answers.confidence)[:, None]

    def measure(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        error: npt.NDArray[np.float64] = np.abs(counts @ gaps).sum(1) / counts.sum(1)
        return error

    return measure


def _nothing() -> Figure:
    return Figure.exact(math.nan)


def _failed(name: str, reason: str) -> Rule:
    return Rule(name, False, math.nan, None, math.nan, math.nan, reason)
