"""Measure how well models forgot, beside networks retrained without the forgotten rows; an attack that recovers them always runs.

Paper   Model Sparsity Can Simplify Machine Unlearning (2023), arXiv 2304.04934: UA, RA, TA, MIA and their average gap;
        Can Bad Teaching Induce Forgetting? (2022), arXiv 2205.08096: ZRF; Zero-Shot Machine Unlearning (2022), arXiv 2201.05629: AIN;
        Membership Inference Attacks From First Principles (2021), arXiv 2112.03570: LiRA
Idea    forgetting is no score of its own: too little and too much both show as a distance to the retrained network. UA is the error on
        the forgotten rows, RA and TA the accuracy on retained and test rows, MIA the share of forgotten rows that an attack on the
        confidence calls unseen; avg_gap is the mean distance over the four. ZRF is 1 - JS to a random network on the forgotten rows.
        What answers may hide, traces show. relearn: steps of plain SGD on forgotten rows until they are right as in the original, less 5%;
        relearn_ratio (AIN): over the retrained network's. head: accuracy on each forgotten row of a new linear head that was fitted on
        frozen features of all rows but that one; head_test: on test rows of the class. activation_distance: L2 between class
        probabilities and the retrained network's; ks: two-sample Kolmogorov-Smirnov test of true-label probabilities against it. lira_auc:
        forgotten against test rows by how much surer the model is of them than shadow networks that were trained without them.
Small   nothing is left out; the wall time of unlearning (RTE) is known to the caller only. LiRA is the offline attack, with few shadows
        and one variance for all rows; it is off unless asked for, since each shadow costs a training (14 s of CPU for 1,500 steps).
        Four models of digits take 0.8 s of CPU in all, one of Fashion-MNIST (8,000 rows) 0.9 to 1.5: relearning 0.1 (1 at its limit), the
        head 0.3.
Limits  Fashion-MNIST, 4,000 rows, 5 seeds, test: the average gap of doing nothing and of a second retrained network are 8.6 and 0.5 for
        10% of the rows, 50.1 and 0.0 for a class. An edit of the last layer alone has a gap of 0.1 to retraining, but is relearned in 15
        steps (retrained: 29), and its new head is right on 96% (76%). On test rows of the class it is not: 78% and 75%. For 10% of the
        rows relearning tells little: the retrained network takes 10 steps, standard deviation 6. LiRA, 4 shadows: AUC of the original
        0.62 (10%) and 0.65 (class), retrained 0.50; of the edit only 0.52. KS tells two retrained networks apart for a class (p < 0.001
        in 2 of 5 seeds), so that its p-value says little without a second reference.
        MIA is a global threshold in effect, and no privacy claim follows from it; far from its training range its RBF kernel can
        call a confidently wrong row a member, so that MIA may fall as forgetting goes on. Public code fits it on N = all test rows;
        here N is at most the number of retained rows, and `attack_rows`, since 5,000 on either side take 2 s and 10,000 take 8.
        On few forgotten rows the comparison is void: 10 random rows, in 5 of 5 seeds (digits: 10 and 65, in 3 of 3); a class in none.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from tasks.evaluate._references import GAP_OF as GAP_OF  # what the average gap is of; claims ask for it here
from tasks.evaluate._references import beside, decide_void, over_seeds, references
from tasks.evaluate._shadows import single_rows
from tasks.evaluate._shared import Rows, labelled
from tasks.evaluate._traces import Found, new_heads, percent, recovery


class Config(MethodConfig):
    """Settings."""

    scenario: Literal["samples", "class"] = Field("samples", description="what is forgotten: some rows, or every row of a class")
    attack_rows: int = Field(5000, ge=2, description="at most so many members, and non-members, fit the attack")
    void_sd: float = Field(3.0, gt=0, description="standard errors by which retraining must change UA")  # protocol: 3
    relearn_rows: int = Field(64, ge=1, description="at most so many forgotten rows are learned again")
    relearn_steps: int = Field(100, ge=1, description="at most so many steps of that")
    relearn_lr: float = Field(0.01, gt=0, description="learning rate of that")  # slow enough to tell networks apart by steps
    relearn_margin: float = Field(
        0.05, ge=0, lt=1, description="share of the original's accuracy that may still be missing"
    )  # protocol: 5%
    probe_rows: int = Field(2000, ge=0, description="at most so many retained rows fit a new head; 0: none is fitted")
    shadows: int = Field(0, ge=0, multiple_of=2, description="networks behind the attack on single rows; 0: no such attack")  # LiRA: 256
    shadow_steps: int = Field(600, ge=1, description="batches that train each of them, by the shared recipe")


SMOKE = Config(attack_rows=50, relearn_steps=3, probe_rows=50, shadows=2, shadow_steps=3)


@method(
    paper="Model Sparsity Can Simplify Machine Unlearning (2023): its evaluation protocol",
    arxiv="2304.04934",
    claim="the average gap of doing nothing is larger than that between two retrained networks, unless the comparison is called void",
)
def forgetting(
    models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Config = Config(), *, seed: int = 0, device: str = "cpu"
) -> Evidence:
    """Figures of each model: `ua`, `ra`, `ta`, `mia`, `head` (percent), `zrf` (0 to 1), `relearn` (steps); of a class `head_test`; with
    shadows `lira_auc` (0 to 1) and `lira_members` (percent), where there are rows to compare with.

    Where `retrain` is among the models, and maybe `retrain-1` and so on, of other seeds: `avg_gap`, `activation_distance` and
    `activation_distance_retained` to it or to their mean, `ks` and `ks_p` against it, `relearn_ratio` (not where it needs no step);
    of several `avg_gap_spread`, the mean gap of two of them, and each is measured against the rest. Where `original` is there too,
    `void` (1: the forgotten rows cannot tell the two apart, the gap says nothing).

    data: roles `forget`, `retain` and `test`. Synthetic rows of `retain` are left out, and so are rows without a label.
    Raises UserError where a role or its labels are missing, forget and retain share rows, or a forgotten class is still retained; with
    shadows also where their training diverged.
    """
    forget, retain, test = labelled(models, data, "forget", "retain", "test")
    kept = set(retain.ids)
    shared = [at for at, name in enumerate(forget.ids) if name in kept]
    if shared:  # named by its place: the id of a row to be forgotten must not reach a log
        raise UserError(f"row {shared[0]} of 'forget' is in 'retain' too ({len(shared)} such): take it out of 'retain'")
    retain, alike = retain.where(~retain.synthetic), test
    if cfg.scenario == "class":
        test, alike = without_classes(forget, retain, test)
    if len(retain) == 0 or len(test) == 0:
        raise UserError("no real labelled row is left in 'retain' or 'test': nothing can be compared")

    figures: Found = {}
    on: dict[str, dict[str, Tensor]] = {}
    for name, net in zip(models, track(list(models.values()), "forgetting"), strict=True):
        of = on[name] = {role: probabilities(net, rows, device) for role, rows in (("forget", forget), ("retain", retain), ("test", test))}
        figures[name] = answers(of, forget, retain, test, cfg.attack_rows)
        with loop.seeded(seed):
            stranger = networks.build(net.arch)
        figures[name]["zrf"] = metrics.mean(zrf(of["forget"], probabilities(stranger, forget, device)), seed=seed)

    details: dict[str, Any] = {
        "scenario": cfg.scenario,
        "rows": {"forget": len(forget), "retain": len(retain), "test": len(test)},
        "void": "not decided: it takes both an original and a retrained model",
    }
    attacked, details["relearn"] = recovery(
        models, forget, rows=cfg.relearn_rows, steps=cfg.relearn_steps, lr=cfg.relearn_lr, margin=cfg.relearn_margin, device=device
    )
    add(figures, attacked)
    if cfg.probe_rows:
        held = alike if cfg.scenario == "class" else test.where(np.zeros(len(test), dtype=bool))
        add(figures, new_heads(models, retain, forget, held, rows=cfg.probe_rows, device=device))
    if cfg.shadows:
        size = {"count": cfg.shadows, "steps": cfg.shadow_steps}
        attacked, details["lira"] = single_rows(models, retain, forget, alike, **size, seed=seed, device=device)
        add(figures, attacked)
    add(figures, beside(figures, on, forget.labels, seed))
    if retrained := references(models):
        details["references"] = {"networks": retrained, "figures": over_seeds([figures[name] for name in retrained])}
    if retrained and "original" in figures:
        wrong = {name: on[name]["forget"].argmax(1).numpy() != forget.labels for name in ("original", *retrained)}
        void, details["void"] = decide_void(wrong["original"], np.stack([wrong[name] for name in retrained]), cfg.void_sd)
        add(figures, {name: {"void": Figure.exact(float(void))} for name in figures})
    return Evidence(figures, {role: data[role].md5 for role in ("forget", "retain", "test")}, details)


def add(figures: Found, more: Found) -> None:
    """Put more figures of the same models beside those that are there."""
    for name, by in more.items():
        figures[name].update(by)


def answers(of: Mapping[str, Tensor], forget: Rows, retain: Rows, test: Rows, attack_rows: int) -> dict[str, Figure]:
    """UA, RA, TA and MIA of one model, in percent, by its class probabilities (N, K) on the rows of each role."""
    right = {role: of[role].argmax(1).numpy() == rows.labels for role, rows in (("forget", forget), ("retain", retain), ("test", test))}
    unseen = attack(
        true_label(of["retain"], retain.labels), true_label(of["test"], test.labels), true_label(of["forget"], forget.labels),
        rows=attack_rows,
    )  # fmt: skip
    shares = {"ua": ~right["forget"], "ra": right["retain"], "ta": right["test"], "mia": unseen}
    return {name: percent(metrics.share(hits)) for name, hits in shares.items()}


def without_classes(forget: Rows, retain: Rows, test: Rows) -> tuple[Rows, Rows]:
    """`test` without the forgotten classes, and what is left out. Raises UserError where retain still has a row of them."""
    gone = np.unique(forget.labels)
    left = np.isin(retain.labels, gone)
    if left.any():
        name = retain.ids[int(np.flatnonzero(left)[0])]
        raise UserError(
            f"row {name!r} of 'retain' has a forgotten class ({int(left.sum())} such): to forget a class, forget all its rows; "
            "to forget some rows, set scenario to 'samples'"
        )
    of_them = np.isin(test.labels, gone)
    return test.where(~of_them), test.where(of_them)


def probabilities(net: Net, rows: Rows, device: str = "cpu") -> Tensor:
    """Class probabilities (N, K), float64. Those of a network that diverged count as 0: it knows nothing, and the attack can be fitted."""
    return torch.nan_to_num(F.softmax(loop.predict(net, rows.inputs, device=device).double(), 1), nan=0.0)


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
