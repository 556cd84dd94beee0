"""Measure how well models forgot, beside a network retrained without the forgotten rows.

Paper   Model Sparsity Can Simplify Machine Unlearning (2023), arXiv 2304.04934: UA, RA, TA, MIA and their average gap;
        Can Bad Teaching Induce Forgetting? (2022), arXiv 2205.08096: ZRF
Idea    forgetting is no score of its own: too little and too much both show as a distance to the retrained network. UA is the error on
        the forgotten rows, RA and TA the accuracy on retained and test rows, MIA the share of forgotten rows that an attack on the
        confidence calls unseen; avg_gap is the mean distance over the four. ZRF is 1 - JS to a random network on the forgotten rows.
Small   nothing is left out; the wall time of unlearning (RTE) is known to the caller only.
Limits  the attack is a global threshold in effect, and no privacy claim follows from it; far from its training range its RBF kernel can
        call a confidently wrong row a member, so that MIA may fall as forgetting goes on. Public code fits it on N = all test rows;
        here N is at most the number of retained rows, and `attack_rows`, since 5,000 on either side take 2 s and 10,000 take 8.
        On few forgotten rows the comparison is void: 10 random digits, and 65, in 3 of 3 seeds; a whole class in none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, metrics, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.method import MethodConfig, method
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.evaluate._shared import Rows, labelled

GAP_OF = ("ua", "ra", "ta", "mia")


class Config(MethodConfig):
    """Settings."""

    scenario: Literal["samples", "class"] = Field("samples", description="what is forgotten: some rows, or every row of a class")
    attack_rows: int = Field(5000, ge=2, description="at most so many members, and non-members, fit the attack")
    void_sd: float = Field(3.0, gt=0, description="standard errors by which retraining must change UA")  # protocol: 3


SMOKE = Config(attack_rows=50)


@method(
    paper="Model Sparsity Can Simplify Machine Unlearning (2023): its evaluation protocol",
    arxiv="2304.04934",
    claim="the average gap of doing nothing is larger than that between two retrained networks, unless the comparison is called void",
)
def forgetting(
    models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Config = Config(), *, seed: int = 0, device: str = "cpu"
) -> Evidence:
    """Figures of each model in percent: `ua`, `ra`, `ta`, `mia`; `zrf` in [0, 1]; and where a model named `retrain` is given, `avg_gap`
    to it; where `original` is given too, `void` (1: the forgotten rows cannot tell the two apart, the gap says nothing).

    data: roles `forget`, `retain` and `test`. Synthetic rows of `retain` are left out, and so are rows without a label.
    Raises UserError where a role or its labels are missing, forget and retain share rows, or a forgotten class is still retained.
    """
    forget, retain, test = labelled(models, data, "forget", "retain", "test")
    kept = set(retain.ids)
    shared = [at for at, name in enumerate(forget.ids) if name in kept]
    if shared:  # named by its place: the id of a row to be forgotten must not reach a log
        raise UserError(f"row {shared[0]} of 'forget' is in 'retain' too ({len(shared)} such): take it out of 'retain'")
    retain = retain.where(~retain.synthetic)
    if cfg.scenario == "class":
        retain, test = without_classes(forget, retain, test)
    if len(retain) == 0 or len(test) == 0:
        raise UserError("no real labelled row is left in 'retain' or 'test': nothing can be compared")
    figures: dict[str, dict[str, Figure]] = {}
    wrong: dict[str, npt.NDArray[np.bool_]] = {}
    for name, net in zip(models, track(list(models.values()), "forgetting"), strict=True):
        of = {role: probabilities(net, rows, device) for role, rows in (("forget", forget), ("retain", retain), ("test", test))}
        wrong[name] = of["forget"].argmax(1).numpy() != forget.labels
        unseen = attack(
            true_label(of["retain"], retain.labels), true_label(of["test"], test.labels), true_label(of["forget"], forget.labels),
            rows=cfg.attack_rows,
        )  # fmt: skip
        figures[name] = {
            "ua": percent(metrics.share(wrong[name])),
            "ra": percent(metrics.share(of["retain"].argmax(1).numpy() == retain.labels)),
            "ta": percent(metrics.share(of["test"].argmax(1).numpy() == test.labels)),
            "mia": percent(metrics.share(unseen)),
        }
        with loop.seeded(seed):
            stranger = networks.build(net.arch)
        figures[name]["zrf"] = metrics.mean(zrf(of["forget"], probabilities(stranger, forget, device)), seed=seed)
    details: dict[str, Any] = {
        "scenario": cfg.scenario,
        "rows": {"forget": len(forget), "retain": len(retain), "test": len(test)},
        "void": "not decided: it takes both an original and a retrained model",
    }
    if "retrain" in figures:
        for by in figures.values():
            by["avg_gap"] = Figure.exact(average_gap(by, figures["retrain"]))
    if "retrain" in figures and "original" in figures:
        void, details["void"] = decide_void(wrong["original"], wrong["retrain"], cfg.void_sd)
        for by in figures.values():
            by["void"] = Figure.exact(float(void))
    return Evidence(figures, {role: data[role].md5 for role in ("forget", "retain", "test")}, details)


def without_classes(forget: Rows, retain: Rows, test: Rows) -> tuple[Rows, Rows]:
    """`retain`, and `test` without the forgotten classes. Raises UserError where retain still has a row of them."""
    gone = np.unique(forget.labels)
    left = np.isin(retain.labels, gone)
    if left.any():
        name = retain.ids[int(np.flatnonzero(left)[0])]
        raise UserError(
            f"row {name!r} of 'retain' has a forgotten class ({int(left.sum())} such): to forget a class, forget all its rows; "
            "to forget some rows, set scenario to 'samples'"
        )
    return retain, test.where(~np.isin(test.labels, gone))


def probabilities(net: Net, rows: Rows, device: str = "cpu") -> Tensor:
    """Class probabilities (N, K), float64. Those of a network that diverged count as 0: it knows nothing, and the attack can be fitted."""
    return torch.nan_to_num(F.softmax(loop.predict(net, rows.images, device=device).double(), 1), nan=0.0)


def true_label(probabilities: Tensor, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Probability of the label (N,), out of (N, K)."""
    picked: npt.NDArray[np.float64] = probabilities.gather(1, torch.from_numpy(np.array(labels))[:, None])[:, 0].numpy()
    return picked


def attack(
    members: npt.NDArray[np.float64], strangers: npt.NDArray[np.float64], asked: npt.NDArray[np.float64], *, rows: int = 5000
) -> npt.NDArray[np.bool_]:
    """Which of `asked` (N,) a support vector classifier calls non-members, by the probability of the true label.

    It is fitted on as many members as strangers, the first ones of each; on at most `rows` of either.
    RBF kernel, C = 3, gamma = 1 ("auto" with one feature), as in the public code of Unlearn-Sparse.
    """
    from sklearn.svm import SVC

    n = min(len(members), len(strangers), rows)
    seen = np.concatenate([members[:n], strangers[:n]])[:, None]
    # it draws nothing here, but without a random_state it would still move numpy's global one
    judge = SVC(C=3, kernel="rbf", gamma="auto", random_state=0).fit(seen, np.repeat([1, 0], n))
    unseen: npt.NDArray[np.bool_] = judge.predict(asked[:, None]) == 0
    return unseen


def zrf(ours: Tensor, stranger: Tensor) -> npt.NDArray[np.float64]:
    """1 - JS(ours, stranger) for each row (N,), of probabilities (N, K); logarithms to base 2, so that it lies in [0, 1]."""
    middle = (ours + stranger) / 2
    # xlogy gives 0 where the probability is 0; there the middle may be 0 too, and its logarithm is not asked for
    halves = [(torch.xlogy(p, p) - torch.xlogy(p, middle)).sum(1) for p in (ours, stranger)]
    divergence: npt.NDArray[np.float64] = ((halves[0] + halves[1]) / 2 / np.log(2)).clamp(0, 1).numpy()
    return 1 - divergence


def average_gap(ours: Mapping[str, Figure], reference: Mapping[str, Figure]) -> float:
    """Mean absolute difference over UA, RA, TA and MIA, in percentage points."""
    return float(np.mean([abs(ours[key].value - reference[key].value) for key in GAP_OF]))


def decide_void(original: npt.NDArray[np.bool_], retrained: npt.NDArray[np.bool_], sd: float) -> tuple[bool, str]:
    """Is the difference in UA too small to tell a retrained network from the original one? With the sentence that says so.

    original, retrained: which forgotten rows (N,) each gets wrong. With one retrained network there is no spread over seeds, so that
    the standard error is the binomial one of two shares that are taken to be equal: sqrt(2 p (1 - p) / N), p their mean.
    """
    n, p = len(original), (original.mean() + retrained.mean()) / 2
    change = 100 * abs(retrained.mean() - original.mean())
    needed = 100 * sd * np.sqrt(2 * p * (1 - p) / n)
    void = bool(change == 0 or change < needed)
    verdict = "void: forgetting cannot be told from not forgetting on these rows" if void else "meaningful"
    return void, f"retraining moves UA by {change:.1f} points on {n} rows, {needed:.1f} are needed: the comparison is {verdict}"


def percent(figure: Figure) -> Figure:
    """A share as percent."""
    return replace(figure, value=100 * figure.value, low=100 * figure.low, high=100 * figure.high)
