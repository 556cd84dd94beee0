"""Models beside the networks that were retrained without the forgotten rows: one of them, or several seeds with their spread."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core import metrics
from tasks.core.metrics import Figure

GAP_OF = ("ua", "ra", "ta", "mia")
ROWS = 5000  # behind the interval of a distance on retained rows
NAME = re.compile(r"retrain(-\d+)?")

Figures = Mapping[str, Figure]
Found = dict[str, dict[str, Figure]]
Floats = npt.NDArray[np.float64]


def beside(figures: Mapping[str, Figures], on: Mapping[str, Mapping[str, Tensor]], labels: npt.NDArray[np.int64], seed: int = 0) -> Found:
    """Figures of each model against the references among them; nothing without any.

    on: class probabilities (N, K) by model and by role, `forget` and `retain`; labels: of the forgotten rows (N,).
    """
    known, found = references(figures), {}
    sure = {name: of["forget"].gather(1, torch.from_numpy(np.array(labels))[:, None])[:, 0].numpy() for name, of in on.items()}
    for name in figures if known else ():
        against = others(name, known)
        by = found[name] = {"avg_gap": Figure.exact(average_gap(figures[name], *[figures[one] for one in against]))}
        for role, metric in (("forget", "activation_distance"), ("retain", "activation_distance_retained")):
            by[metric] = distance(on[name][role], *[on[one][role] for one in against], seed=seed)
        by["ks"], by["ks_p"] = (Figure.exact(value) for value in ks(sure[name], *[sure[one] for one in against]))
        steps = float(np.mean([figures[one]["relearn"].value for one in against]))
        if steps:
            by["relearn_ratio"] = Figure.exact(figures[name]["relearn"].value / steps)
        if len(known) > 1:
            by["avg_gap_spread"] = Figure.exact(gap_spread([figures[one] for one in known]))
    return found


def references(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The names of retrained networks: `retrain`, and `retrain-` with a number."""
    return [name for name in names if NAME.fullmatch(name)]


def others(name: str, known: Sequence[str]) -> list[str]:
    """What a model is measured against: all references, but one of several is measured against the rest of them."""
    return [reference for reference in known if reference != name] or list(known)


def average_gap(ours: Figures, *theirs: Figures) -> float:
    """Mean absolute difference over UA, RA, TA and MIA to the mean of one or more references, in percentage points."""
    return float(np.mean([abs(ours[key].value - np.mean([one[key].value for one in theirs])) for key in GAP_OF]))


def gap_spread(known: Sequence[Figures]) -> float:
    """Mean of the average gaps between each two of several references: a model with such a gap is as good as retrained."""
    return float(np.mean([average_gap(one, other) for one, other in combinations(known, 2)]))


def over_seeds(known: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the references of each figure that all of them have; the deviation needs two."""
    shared = [key for key in known[0] if all(key in one for one in known)]
    values = {key: [one[key].value for one in known] for key in shared}
    deviation = {key: {"sd": float(np.std(of, ddof=1))} if len(of) > 1 else {} for key, of in values.items()}
    return {key: {"mean": float(np.mean(of)), **deviation[key]} for key, of in values.items()}


def distance(ours: Tensor, *theirs: Tensor, seed: int = 0, rows: int = ROWS) -> Figure:
    """Mean L2 distance of class probabilities (N, K), over at most `rows` rows and over the references. Protocol: "activation distance"."""
    step = -(-len(ours) // rows)
    most = max(one.shape[1] for one in (ours, *theirs))  # a class that a network does not know has probability 0
    mine, *yours = (F.pad(one[::step], (0, most - one.shape[1])) for one in (ours, *theirs))
    apart = [(mine - one).norm(dim=1).numpy() for one in yours]
    return metrics.mean(np.mean(apart, axis=0), seed=seed, draws=200)


def ks(ours: Floats, *theirs: Floats) -> tuple[float, float]:
    """Statistic and p-value of the two-sample Kolmogorov-Smirnov test of values (N,), each the mean over the references."""
    from scipy.stats import ks_2samp

    found = [ks_2samp(ours, one) for one in theirs]
    return float(np.mean([one.statistic for one in found])), float(np.mean([one.pvalue for one in found]))


def decide_void(original: npt.NDArray[np.bool_], retrained: npt.NDArray[np.bool_], sd: float) -> tuple[bool, str]:
    """Is the difference in UA too small to tell a retrained network from the original one? With the sentence that says so.

    original: which forgotten rows (N,) it gets wrong; retrained: the same of one network (N,) or of several (R, N). The difference must
    be `sd` times the binomial standard error of two shares that are taken to be equal, sqrt(2 p (1 - p) / N), p their mean; of several
    networks as many times the standard deviation of their UA, if that is more.
    """
    retrained = np.atleast_2d(retrained)
    each = retrained.mean(1)
    n, p = len(original), (original.mean() + each.mean()) / 2
    change = 100 * abs(each.mean() - original.mean())
    several = len(each) > 1
    between = float(each.std(ddof=1)) if several else 0.0
    needed = 100 * sd * max(np.sqrt(2 * p * (1 - p) / n), between)
    void = bool(change == 0 or change < needed)
    verdict = "void: forgetting cannot be told from not forgetting on these rows" if void else "meaningful"
    seeds = f" (standard deviation of {len(each)} networks: {100 * between:.1f})" if several else ""
    return void, f"retraining moves UA by {change:.1f} points on {n} rows{seeds}, {needed:.1f} are needed: the comparison is {verdict}"
