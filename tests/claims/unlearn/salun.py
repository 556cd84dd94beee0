"""Random labels that may change salient weights only come closer to retraining than random labels on all weights.

Claim   The average gap (UA, RA, TA, MIA) to retraining is smaller than that of random labels by 30% where 10% of the rows are forgotten
        (the paper's own: 7.15 to 1.15 on CIFAR-10, 84%), and at most 1.5 points where a class is, at a tenth of retraining's cost.
Arms    salun         the method
        random_label  the same without the mask
        limit         the points that its gap must stay below
        original      doing nothing
Equal   as in `tests/claims/unlearning.py`: steps, and six settings each: three learning rates, the same for both, by two shares of
        salient weights, or by two weights of the forget rows, of which salun has the larger
Tuned   on validation rows of one more seed (1000), with 150 steps: rates 0.005, 0.02, 0.05, where 10% of the rows are forgotten: salient
        0.2 6.6, 4.3, 5.4; 0.5 6.6, 3.4, 5.5; random labels 6.5, 3.6, 6.8. The rates of both arms then lie about the best. Fixed
        beforehand: the margins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.networks import Net
from tasks.unlearn import random_label, salun
from tests.claims import unlearning

CLAIM = Claim(
    text="Random labels that change salient weights only come closer to retraining than on all, where 10% of the rows are forgotten",
    data=("fashion_mnist",),
    headline=Beats("salun", "random_label", "random gap", better="lower", relative=True, by=0.3),
    also=(
        Beats("salun", "limit", "class gap", better="lower"),
        Beats("salun", "original", "random gap", better="lower", relative=True, by=0.5),
    ),
)
RATES = {"class": (0.005, 0.01, 0.02), "random": (0.01, 0.02, 0.04)}
WEIGHTS, SALIENT = (0.1, 0.25), (0.2, 0.5)
TENTH = 0.075  # of the steps: each takes more rows, and reading them costs, too
LIMIT = 1.5


def measure(method: Callable[..., Net], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed, forgetting the first class and then 10% of the rows."""
    found = [Row("limit", "class gap", LIMIT)]
    for scenario in unlearning.SCENARIOS[:2]:
        of = unlearning.case(scenario, seed, data[0], small)
        rates, steps = RATES[scenario], of.budget(TENTH)
        every = unlearning.grid(random_label.Config, rates, "forget_weight", WEIGHTS, steps=steps)
        salient = unlearning.grid(salun.Config, rates, "salient", SALIENT, steps=steps, forget_weight=WEIGHTS[1])
        found += unlearning.compare(of, {"salun": (method, salient), "random_label": (random_label.random_label, every)})
    return found


def switched_off(
    model: Net, forget: Dataset, retain: Dataset, cfg: salun.Config = salun.Config(), *, seed: int = 0, device: str = "cpu"
) -> Net:
    """Random labels on all weights, at the same settings."""
    same = cfg.model_dump(include=set(random_label.Config.model_fields))
    return random_label.random_label(model, forget, retain, random_label.Config(**same), seed=seed, device=device)
