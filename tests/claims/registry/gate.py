"""A gate that reads an interval rarely lets a worse model pass; one that compares two figures does so every second time.

Claim   of candidates that are worse than the champion by just over the margin the gate promotes at most .05 (its interval promises .025),
        and at least .30 fewer than a gate that compares the two accuracies as they are; of candidates that are as good as the champion
        it promotes .80 or more
Arms    gate: `registry.gate`; points: the same rules, without the interval; allowed, asked: the figures above
Equal   the same answers on the same 2,000 samples, drawn so that champion and candidate share half of their errors; accuracy .90,
        margin .02
Tuned   nothing: these are sums that can be done beforehand. Answers are drawn, not a model's: only so is it known which one is worse
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.core.claim import Beats, Claim, Row
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.metrics import Figure
from tasks.registry import Decision, Offer, Rule
from tasks.registry.gate import Bounds, Config

CLAIM = Claim(
    text="of candidates just worse than the margin the gate promotes at most 5%, a comparison of two figures half; of equal ones over 80%",
    data=(),
    headline=Beats("gate", "allowed", "worse promoted", better="lower"),
    also=(
        Beats("gate", "points", "worse promoted", by=0.30, better="lower"),
        Beats("gate", "asked", "equal promoted"),
    ),
)
ACCURACY, MARGIN, WORSE = 0.90, 0.02, 0.021
RULES = Config(rules={"accuracy": Bounds(min_delta=-MARGIN)})


def measure(method: Callable[..., Decision], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """The share of candidates that each gate promotes. Raises UserError for data: there is none to read."""
    if data:
        raise UserError("this claim draws its answers and reads no data; leave out --data")
    trials, samples = (12, 200) if small else (150, 2000)
    rng = np.random.default_rng(seed)
    rows = [Row("allowed", "worse promoted", 0.05), Row("asked", "equal promoted", 0.80)]
    for metric, worse in (("worse promoted", WORSE), ("equal promoted", 0.0)):
        cases = [evidence(*answers(samples, ACCURACY, worse, rng)) for _ in range(trials)]
        for arm, gate in (("gate", method), ("points", switched_off)):
            promoted = [gate(Offer(evidence=case), RULES, seed=trial).promote for trial, case in enumerate(cases)]
            rows.append(Row(arm, metric, float(np.mean(promoted))))
    return rows


def switched_off(offer: Offer, cfg: Config = RULES, *, seed: int = 0, device: str = "cpu") -> Decision:
    """Two figures are compared as they are."""
    assert offer.evidence is not None
    mine, theirs = (offer.evidence.figures[name]["accuracy"].value for name in ("candidate", "champion"))
    passed = mine >= theirs - MARGIN
    return Decision(passed, (Rule("accuracy", passed, mine, theirs, mine, mine, ""),))


def answers(n: int, accuracy: float, worse: float, rng: np.random.Generator) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which of n samples the candidate and the champion answer right; half of the champion's errors are the candidate's too."""
    wrong, draw = 1 - accuracy, rng.random(n)
    champion = draw >= wrong
    shared = draw < wrong / 2
    own = (draw >= wrong) & (rng.random(n) < (wrong / 2 + worse) / accuracy)
    return ~(shared | own), champion


def evidence(candidate: npt.NDArray[np.bool_], champion: npt.NDArray[np.bool_]) -> Evidence:
    """Evidence as `evaluate.classification` gives it, as far as a gate reads it."""
    hits = {"candidate": candidate, "champion": champion}
    figures = {name: {"accuracy": Figure.exact(float(of.mean())), "ece": Figure.exact(0.05)} for name, of in hits.items()}
    ids = [f"s{at:05d}" for at in range(len(candidate))]
    tables = [
        pa.table(
            {
                "model": [name] * len(ids),
                "sample_id": ids,
                "label": np.ones(len(ids), np.int64),
                "predicted": of.astype(np.int64),
                "confidence": of * 0.9,
            }
        )
        for name, of in hits.items()
    ]
    return Evidence(figures, {"test": ""}, {}, pa.concat_tables(tables))
