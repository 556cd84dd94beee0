"""A candidate is promoted when it is good enough by itself and not worse than the champion on the same samples.

Paper   none: a paired test as any statistics book has it (McNemar's pairs, with a bootstrap interval)
Idea    accuracy >= min_accuracy, ece <= max_ece, and the low end of the 95% interval of accuracy(candidate) - accuracy(champion),
        sample by sample, above -margin
Small   accuracy and calibration only
Limits  "not worse" is read off an interval: with few test samples a margin smaller than the interval's half width is never met
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.method import MethodConfig, method
from tasks.core.metrics import difference
from tasks.registry import Decision, Rule


class Config(MethodConfig):
    min_accuracy: float = Field(0.5, ge=0, le=1, description="least accuracy on the test rows")
    max_ece: float = Field(0.2, ge=0, le=1, description="most calibration error on the test rows")
    margin: float = Field(0.02, ge=0, le=1, description="accuracy that a candidate may lose against the champion")


SMOKE = Config()


def absolute(name: str, value: float, *, least: float | None = None, most: float | None = None) -> Rule:
    """A rule on one figure of the candidate. NaN never passes."""
    bound, sign = (least, "at least") if least is not None else (most, "at most")
    assert bound is not None
    passed = not math.isnan(value) and (value >= bound if least is not None else value <= bound)
    reason = f"{name} {value:.4f} {'meets' if passed else 'misses'} {sign} {bound:g}"
    return Rule(f"{name} {sign} {bound:g}", passed, value, None, value, value, reason)


def hits(evidence: Evidence, model: str) -> dict[str, bool]:
    """Whether each sample was predicted right, by id."""
    assert evidence.per_sample is not None
    rows = [row for row in evidence.per_sample.to_pylist() if row["model"] == model]
    return {row["sample_id"]: row["label"] == row["predicted"] for row in rows}


@method(paper="", claim="a candidate worse than the champion by more than the margin is never promoted; an equal one is")
def gate(evidence: Evidence, cfg: Config = Config(), *, seed: int = 0) -> Decision:
    """Decide by the rules of `Config`. Raises UserError where the two were not measured on the same samples."""
    mine = evidence.figures["candidate"]
    rules = [
        absolute("accuracy", mine["accuracy"].value, least=cfg.min_accuracy),
        absolute("ece", mine["ece"].value, most=cfg.max_ece),
    ]
    if "champion" in evidence.figures:
        ours, theirs = hits(evidence, "candidate"), hits(evidence, "champion")
        if ours.keys() != theirs.keys():
            raise UserError("candidate and champion were not measured on the same samples; evaluate them again, together")
        order = sorted(ours)
        gap = difference(np.array([ours[i] for i in order]), np.array([theirs[i] for i in order]), seed=seed)
        passed = gap.low >= -cfg.margin
        words = "not worse than" if passed else "may be worse than"
        reason = f"{words} the champion by {cfg.margin:g}: difference {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        champion = evidence.figures["champion"]["accuracy"].value
        rules.append(
            Rule(f"accuracy within {cfg.margin:g} of champion", passed, mine["accuracy"].value, champion, gap.low, gap.high, reason)
        )
    return Decision(all(rule.passed for rule in rules), tuple(rules))
