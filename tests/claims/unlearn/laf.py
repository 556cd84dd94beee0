"""A class is forgotten without a single label, and wrong labels that were learned by heart are forgotten too.

Claim   The paper's, with margins fixed beforehand. A class: at most 10% accuracy on its test rows, and on those of the other classes
        within 5 points of retraining, without a label (LAF); within 2 with the short supervised repair (LAF+R). In the authors' own
        run (CIFAR-10) these are 2.0% and 4.6 points. Wrong labels: test accuracy rises above the original's.
Arms    laf         the method; every label of both sets is hidden from it
        laf+r       the method, then 20 batches with the labels of the retained rows, on the last layer only, as in the public code
        finetune    on the retained rows and their labels, 0.09 of the steps of retraining
        limit       no network: the 10% that are allowed
        original, retrain  doing nothing, and the reference
Equal   as in `tests/claims/unlearning.py`; three learning rates each (of LAF that of the alignment), chosen on validation rows. That
        choice knows these rows' labels and the retrained network, for all arms alike: without labels is the method, not the search.
Tuned   On validation rows of seeds 1000 and 1001, further settings: tau (LAF; gap of a class at 2, 5 and 10: 2.2, 1.3, 1.8; seed 1000:
        of random rows 2 leaves half the gap, 5 nearly all; of wrong labels 3 loses 5 points of test accuracy to 5), weight decay
        (fine-tuning, seed 1000, 5e-4 and 5e-3: class 2.0 and 0.9, random 4.0 and 3.3, wrong labels 2.9 and 2.6). 35 pairs of steps and
        60 batches for each VAE do as well as 100 and 300, at a third of the cost; a repair of all layers did no better. Fixed
        beforehand: the margins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.core import loop
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.networks import Net
from tasks.unlearn import finetune, laf
from tests.claims import unlearning

LIMIT = 10.0  # percent of the forgotten class's test rows
FORGOTTEN = "class accuracy on forgotten"

CLAIM = Claim(
    text="Without a label LAF forgets a class (at most 10% on its test rows) and, of wrong labels, regains test accuracy",
    data=("fashion_mnist",),
    headline=Beats("laf", "limit", FORGOTTEN, better="lower"),
    also=(
        Beats("laf", "retrain", "class ta", by=-5),
        Beats("laf+r", "limit", FORGOTTEN, better="lower"),
        Beats("laf+r", "retrain", "class ta", by=-2),
        Beats("laf", "original", "noisy ta"),
    ),
)
RATES, DECAY = (0.15, 0.2, 0.25), 5e-3  # fine-tuning
ALIGN, TAU = (2e-3, 4e-3, 8e-3), {"class": 5.0, "random": 2.0, "noisy": 5.0}  # learning rate of the alignment: the curve is over it
TENTH = 0.09  # of the steps: reading the rows costs, too


def measure(method: Callable[..., Net], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed: a class, a tenth of the rows, wrong labels."""

    def unlabelled(model: Net, forget: Dataset, retain: Dataset, cfg: laf.Config, *, seed: int) -> Net:
        return method(model, forget.without_labels(), retain.without_labels(), cfg, seed=seed)

    found, short = [Row("limit", FORGOTTEN, LIMIT)], {"steps": 5, "vae_steps": 5, "repair_steps": 2} if small else {}
    for scenario in unlearning.SCENARIOS:
        case = unlearning.case(scenario, seed, data[0], small)
        same: dict[str, Any] = {"tau": TAU[scenario], **short}
        arms: dict[str, unlearning.Arm] = {
            "finetune": (finetune.finetune, unlearning.grid(finetune.Config, RATES, weight_decay=DECAY, steps=case.budget(TENTH))),
            "laf": (unlabelled, {f"{lr:g}": laf.Config(lr_align=lr, **same) for lr in ALIGN}),
            "laf+r": (method, {f"{lr:g}": laf.Config(lr_align=lr, repair="head", **same) for lr in ALIGN}),
        }
        case.run(unlabelled, laf.Config(steps=1, vae_steps=1))  # a process's first call loads parts of torch: no method's cost
        rows = unlearning.compare(case, arms)
        found += rows
        if scenario == "class":
            chosen = {row.arm: int(row.value) for row in rows if row.metric == "class choice"}
            nets = {arm: case.run(entry, list(settings.values())[chosen[arm]])[0] for arm, (entry, settings) in arms.items()}
            gone = case.test.where(case.test.labels() == case.forget.labels()[0])
            images, labels = gone.images(), gone.labels()
            for arm, net in {"original": case.original, "retrain": case.retrain, **nets}.items():
                found.append(Row(arm, FORGOTTEN, 100 * float((loop.predict(net, images).argmax(1).numpy() == labels).mean())))
    return found


def switched_off(
    model: Net, forget: Dataset, retain: Dataset, cfg: laf.Config = laf.Config(), *, seed: int = 0, device: str = "cpu"
) -> Net:
    """Nothing is pushed, nothing is repaired: the original as it is."""
    return unlearning.nothing(model, forget, retain, cfg, seed=seed, device=device)
