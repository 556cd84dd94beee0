"""Real images nearest to k-means centres stand for a data set better than real images drawn by lot.

Claim   held-out KRR loss of 50 images is at least 10% lower; half of what the learned samples of KRR-ST are asked for
Arms    kmeans: `condense.kmeans`; random: as many rows by lot, with the same teacher's features
Equal   teacher, source rows, number of images, fresh nets and steps that measure
Tuned   nothing: the method's defaults, on another data set than that on which they were chosen
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tasks.condense import random
from tasks.condense.kmeans import SMOKE, Config
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Made
from tests.claims.samples import dataset, images

CLAIM = Claim(
    text="50 real images nearest to k-means centres give a held-out KRR loss at least 10% below that of 50 random ones",
    data=("fashion_mnist",),
    headline=Beats("kmeans", "random", "held-out loss", by=0.10, better="lower", relative=True),
)


def measure(method: Callable[..., Made], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Held-out loss of both arms."""
    cfg, n, rows, held = (SMOKE, 10, 100, 50) if small else (Config(), 50, 6000, 1000)
    train, test = images(data[0], "train"), images(data[0], "test")
    if len(train.labels) < rows or len(test.labels) < held:
        raise UserError(f"this claim draws {rows} train and {held} test rows; the data has {len(train.labels)} and {len(test.labels)}")
    rng = np.random.default_rng(seed)
    source = dataset(train.pixels[rng.permutation(len(train.labels))[:rows]], np.full(rows, -1), train.classes)
    unseen = dataset(test.pixels[rng.permutation(len(test.labels))[:held]], np.full(held, -1), test.classes, prefix="u", split="test")
    figures = method(source, unseen, n, cfg, seed=seed).figures
    lot = switched_off(source, unseen, n, cfg, seed=seed).figures
    return [Row("kmeans", "held-out loss", figures["heldout_loss"]), Row("random", "held-out loss", lot["heldout_loss"])]


def switched_off(data: Dataset, held_out: Dataset, n: int, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """Rows by lot."""
    return random.random(data, held_out, n, random.Config(**cfg.model_dump()), seed=seed, device=device)
