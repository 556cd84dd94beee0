"""Two networks retrained from different seeds are closer to one another than the original network is to either.

Claim   The average gap (UA, RA, TA, MIA) between two retrained networks of different seeds is at most half of that between doing nothing
        and retraining, where 10% of the rows are forgotten and where a class is. Less, and a gap to one retrained network would measure
        its seed. Half, since methods at a tenth of the cost are asked for half of doing nothing's gap.
Arms    again     the method, from another seed: other first weights, other batches
        original  doing nothing
        retrain   the reference of all claims of unlearning, by the same method from the original's own seed
Equal   as in `tests/claims/unlearning.py`; there is nothing to choose, and both arms get the recipe of the original training
Tuned   nothing. The steps were set on one more seed (1000) so that the networks fit their rows: 1,250 leave 0.3% of 4,000, 1,000 1.4%.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tasks.core.claim import Beats, Claim, Row
from tasks.core.networks import Net
from tasks.unlearn import retrain
from tests.claims import unlearning

halved = partial(Beats, "again", "original", better="lower", relative=True, by=0.5)
CLAIM = Claim(
    text="Two networks retrained from different seeds are at most half as far apart as doing nothing is from retraining",
    data=("fashion_mnist",),
    headline=halved("random gap"),
    also=(halved("class gap"),),
)
OTHER = 500  # added to the seed


def measure(method: Callable[..., Net], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed, forgetting the first class and then 10% of the rows."""

    def again(*given: Any, seed: int) -> Net:
        return method(*given, seed=seed + OTHER)

    found: list[Row] = []
    for scenario in unlearning.SCENARIOS[:2]:
        of = unlearning.case(scenario, seed, data[0], small)
        found += unlearning.compare(of, {"again": (again, {"same": retrain.Config(steps=of.steps)})})
    return found


switched_off = unlearning.nothing
