"""Forget by training on with the retained rows alone, and hope that the rest fades.

Paper   none: a baseline
Idea    L = CE on the retained rows, from the model's own weights, at a learning rate high enough to leave its minimum.
Small   nothing is left out.
Limits  on digits, at its defaults, it forgets nearly nothing: average gap to a retrained network, in points (3 seeds, test): 10 random
        rows 4.2 (doing nothing: 4.2), 65 rows 3.3 (3.8), a class 49.8 (50.2). The retained rows alone do not move a network that fits
        them; a high learning rate does. Fashion-MNIST, 4,000 rows, each at the best of six settings (5 seeds, test): a class 0.9 (50.1) and
        10% of the rows 3.8 (8.6) at a tenth of retraining's cost, 1.7 at 0.4 of it, where one seed in five has 3.5. A class that it
        has forgotten is learned again in 7 steps (a retrained network: 29).
"""

from __future__ import annotations

import copy

from pydantic import Field

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.unlearn._shared import retained


class Config(loop.Recipe):
    """Settings: the shared recipe, at a tenth of its steps."""

    steps: int = Field(60, ge=1, description="batches seen")


SMOKE = Config(steps=10, batch=16)


@method(
    paper="none: a baseline",
    claim="the baseline that every unlearning method must beat at the same steps: at its own best learning rate, on average gap",
)
def finetune(model: Net, forget: Dataset, retain: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Net:
    """A copy of `model` trained on with the labelled rows of `retain`.

    Raises UserError where the sets are empty, share a row or do not fit the model, or where training diverged.
    """
    images, labels, synthetic = retained(model, forget, retain)
    with loop.seeded(seed) as generator:
        net = copy.deepcopy(model).requires_grad_(True)
        return loop.fit_supervised(net, images, labels, synthetic, generator=generator, device=device, what="fine-tune", **cfg.model_dump())
