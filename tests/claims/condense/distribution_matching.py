"""A network trained on ten learned images of each class beats one trained on as many real ones, random or herded.

Claim   on test rows, by at least .02 over either; 10 images of each class is the middle of the paper's 1, 10 and 50. The bound was set
        beforehand, small, since Fashion-MNIST leaves little room and steps are few here
Arms    distribution_matching: `condense.distribution_matching`; herding: `condense.herding`; random: the images that learning starts from
Equal   source rows, number of images of each class; first weights, steps, shifts and rotations of the networks that are trained on them,
        three for each arm and seed
Tuned   on 3,000 other train rows, seed 1000, two networks for each figure. Learning: 200 steps at rate 1 moved pixels by .53 standard
        deviations and gave .728, at .3 by .25; 500 steps at .3 gave .742 (random .677, herding .702); 64 channels instead of 32, 200 steps,
        .734 for twice the time; without augmentation .733 at rate 1. A last layer that is not pooled is too rough: .608 at rate 1.
        Learning rate of the networks, the same for all arms: .05 rather than .1, where all arms lose .1 to 5 points.
        Better but seven times as dear a step: three layers of 32 without halving, 64 real images, rate 1: .758 after 200 steps, where
        random gave .665 and herding .716 (three networks, 300 steps)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.condense import _shared, herding
from tasks.condense.distribution_matching import SMOKE, Config
from tasks.core import loop, networks
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Made
from tests.claims.samples import dataset, images

CLAIM = Claim(
    text="a network trained on 10 learned images a class beats one trained on as many random real images, and on as many herded ones",
    data=("fashion_mnist",),
    headline=Beats("distribution_matching", "random", "accuracy", by=0.02),
    also=(Beats("distribution_matching", "herding", "accuracy", by=0.02),),
)
CONDENSE = Config(encoder_steps=0, nets=1, held_out_rows=100)  # neither the choice nor the learning looks at the teacher
NETS, STEPS = 3, 150


def sources(path: Path, seed: int, small: bool) -> tuple[Dataset, Dataset]:
    """Train rows to condense and test rows to judge by, drawn by the seed. Raises UserError where there are too few."""
    rows, held = (200, 50) if small else (6000, 5000)
    train, test = images(path, "train"), images(path, "test")
    if len(train.labels) < rows or len(test.labels) < held:
        raise UserError(f"this claim draws {rows} train and {held} test rows; the data has {len(train.labels)} and {len(test.labels)}")
    rng = np.random.default_rng(seed)
    one, two = train.take(rng.permutation(len(train.labels))[:rows]), test.take(rng.permutation(len(test.labels))[:held])
    source = dataset(one.pixels, one.labels, one.classes)
    return source, dataset(two.pixels, two.labels, two.classes, prefix="u", split="test")


def measure(method: Callable[..., Made], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Accuracy of networks trained on each arm's images."""
    cfg, each, nets, steps = (SMOKE.model_copy(update={"source_rows": 200}), 2, 1, 20) if small else (CONDENSE, 10, NETS, STEPS)
    source, unseen = sources(data[0], seed, small)
    n = each * len(np.unique(source.labels()))
    sets = {
        "distribution_matching": samples(method(source, unseen, n, cfg, seed=seed), source),
        "herding": samples(herding.herding(source, unseen, n, teacher(cfg, small), seed=seed), source),
        "random": samples(switched_off(source, unseen, n, cfg, seed=seed), source),
    }
    found = []
    for name, (pixels, labels) in sets.items():
        right = [accuracy(pixels, labels, unseen, 100 * seed + net, steps) for net in range(nets)]
        found.append(Row(name, "accuracy", float(np.mean(right))))
    return found


def switched_off(data: Dataset, held_out: Dataset, n: int, cfg: Config = CONDENSE, *, seed: int = 0, device: str = "cpu") -> Made:
    """Nothing is learned: the random real images of each class that learning starts from."""
    from tasks.condense.distribution_matching import distribution_matching

    return distribution_matching(data, held_out, n, cfg.model_copy(update={"outer_steps": 0}), seed=seed, device=device)


def teacher(cfg: Config, small: bool) -> herding.Config:
    """The same settings for herding, which needs the teacher."""
    settings = cfg.model_dump(include=set(_shared.Settings.model_fields))
    return herding.Config(**settings | ({} if small else {"encoder_steps": 250}))


def samples(made: Made, source: Dataset) -> tuple[Tensor, Tensor]:
    """Exact pixels (n, C, H, W) and labels (n,)."""
    pixels = torch.from_numpy(np.array(made.rows["pixels"].to_pylist(), np.float32)).reshape(-1, *source.info.shape)
    return pixels, torch.tensor(made.rows["label"].to_pylist())


def accuracy(pixels: Tensor, labels: Tensor, unseen: Dataset, seed: int, steps: int, lr: float = 0.05) -> float:
    """Accuracy on the unseen rows of a network trained on these samples, all of them in each step, shifted and turned a little."""
    shape, classes = unseen.info.shape, len(unseen.info.classes)
    with loop.seeded(seed) as generator:
        mean, std = float(pixels.mean()), float(pixels.std())
        net = networks.convnet(shape, classes, widths=(32, 64), hidden=128, mean=mean, std=std).train()
        optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        schedule = loop.one_cycle(optimiser, lr, steps)
        for _ in range(steps):
            seen = _shared.augment(pixels, 0.1, 10.0, False, generator)
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(net(seen), labels).backward()
            optimiser.step()
            schedule.step()
    return float((loop.predict(net.eval(), unseen.images()).argmax(1).numpy() == unseen.labels()).mean())
