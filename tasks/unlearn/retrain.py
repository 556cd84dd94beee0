"""Forget exactly, by training a fresh network of the same architecture on the retained rows alone.

Paper   none: a baseline
Idea    what was never seen cannot be known. It is the reference that every approximate method is measured against.
Small   nothing is left out; where the recipe is not the one of the original training, differences mix with those of forgetting.
Limits  ten times the cost of the approximate methods (digits, 3.7 s of one CPU core against 0.4). Two retrained networks of different
        seeds are themselves 1.8 points of average gap apart on 10 forgotten digits, 1.4 on 65, 0.1 on a class (3 seeds, test); on
        Fashion-MNIST 0.5 on 10% of 4,000 rows and 0.0 on a class (5 seeds), where doing nothing is 8.6 and 50.1 away.
"""

from __future__ import annotations

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.unlearn._shared import retained


class Config(loop.Recipe):
    """Settings: the recipe of the original training."""


SMOKE = Config(steps=20, batch=16)


@method(
    paper="none: a baseline",
    claim="the forgotten rows look like rows never seen: forget accuracy equals test accuracy",
)
def retrain(model: Net, forget: Dataset, retain: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Net:
    """A network of `model.arch` with fresh weights, trained on the labelled rows of `retain`.

    The pixel mean and deviation in `model.arch` were taken from all rows; they are taken anew, from the retained ones.
    Raises UserError where the sets are empty, share a row or do not fit the model.
    """
    images, labels, synthetic = retained(model, forget, retain)
    mean, std = loop.pixel_stats(images)
    with loop.seeded(seed) as generator:
        net = networks.build({**model.arch, "mean": round(mean, 6), "std": round(std, 6)})
        return loop.fit_supervised(net, images, labels, synthetic, generator=generator, device=device, what="retrain", **cfg.model_dump())
