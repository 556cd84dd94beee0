"""What the claims of distillation share: rows drawn by the seed, a teacher, a student of the labels alone, and figures of a student.

Rows of the train split are drawn by the seed: labelled ones, and a pool of others. The teacher is `train.supervised` on the labelled rows.
Accuracy and calibration error (15 bins) are those of the rows that are given as test.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tasks.core import loop, metrics
from tasks.core.claim import Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill._shared import Student
from tasks.train.supervised import Config as Teacher
from tasks.train.supervised import supervised
from tests.claims.samples import Images, dataset


class Drawn(NamedTuple):
    """Rows for one seed: labelled ones, and a pool of others, whose labels are away in `pool` and there in `told`."""

    known: Dataset
    pool: Dataset
    told: Dataset


def drawn(train: Images, seed: int, labelled: int, pool: int = 0) -> Drawn:
    """Rows of `train`. Raises UserError where it has too few."""
    if len(train.labels) < labelled + pool:
        raise UserError(f"this claim draws {labelled + pool} train rows; the data has {len(train.labels)}")
    order = np.random.default_rng(seed).permutation(len(train.labels))
    own, others = train.take(order[:labelled]), train.take(order[labelled : labelled + pool])
    known = dataset(own.pixels, own.labels, own.classes, prefix="known")
    told = dataset(others.pixels, others.labels, own.classes, prefix="pool")
    return Drawn(known, told.without_labels(), told)


def teacher(data: Dataset, seed: int, steps: int, widths: tuple[int, ...] = (32, 64), hidden: int = 128) -> Net:
    """A network several times the students' size, trained on the labelled rows."""
    return supervised(data, Teacher(steps=steps, widths=widths, hidden=hidden), seed=seed)


def labels_only(data: Dataset, cfg: Student, seed: int, device: str = "cpu") -> Net:
    """The student that `cfg` describes, trained by cross-entropy on the rows that have a label, for as many steps."""
    recipe = cfg.model_dump(include={"widths", "hidden", "steps", "batch", "lr", "momentum", "weight_decay"})
    return supervised(data, Teacher(**recipe), seed=seed, device=device)


def figures(arm: str, net: Net, test: Images, gap: str = "") -> list[Row]:
    """Accuracy and calibration error of a network; `gap` goes before the metrics' names."""
    probabilities = loop.predict(net, test.pixels).softmax(1).numpy()
    hits = probabilities.argmax(1) == test.labels
    values = {"accuracy": float(hits.mean()), "error": 1 - float(hits.mean()), "ece": metrics.ece(probabilities.max(1), hits)}
    return [Row(arm, f"{gap} {metric}".strip(), value) for metric, value in values.items()]
