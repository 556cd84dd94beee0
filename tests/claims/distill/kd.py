"""A student of a teacher's softened probabilities beats the same student trained on the labels, on the same rows and beyond them.

Claim   accuracy of kd is at least .005 above that of the same network trained on the same rows' labels; at least .01 with unlabelled rows
        besides; at least .02 where the student sees a twentieth of the teacher's rows. The paper: 146 errors on MNIST become 74, the
        teacher's being 67; the rows may be unlabelled; on 3% of the teacher's speech frames 57.0% against 44.5%. One network's seed is
        worth half a point here, so .005 is asked of the first; the others are asked for more than that, well below the paper's
Arms    labels, kd: on the teacher's own 2,000 rows; pool: kd with 6,000 unlabelled rows besides; few labels, few: on 10 rows a class of
        the teacher's; teacher
Equal   rows (but for the pool), first weights, batch, steps: 1,000 of 64
Tuned   on 5,000 validation rows (the train split's rows 50,000 to 55,000), two seeds from 1000, the learning rate alone, three for each
        arm: labels .02, .05, .1: .816, .817, .813 (few: .05 .654); kd .0025 (one seed), .005, .01: .818, .828, .821; few kd .005, .01:
        .677, .699; pool .01: .833. At .02 a temperature of 2 in place of 4 was a point worse, and the same network on temperature 4 learnt
        nothing at .05. The weight of the labels' term was left at .1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.networks import Net
from tasks.distill.kd import Config
from tests.claims import students
from tests.claims.samples import images

CLAIM = Claim(
    text="a student of softened probabilities beats the same student of the labels: on equal rows, with unlabelled ones, and on few",
    data=("fashion_mnist",),
    headline=Beats("kd", "labels", "accuracy", by=0.005),
    also=(Beats("pool", "labels", "accuracy", by=0.01), Beats("few", "few labels", "accuracy", by=0.02)),
    seeds=8,
)
STUDENT = Config(widths=(8, 16), hidden=32, steps=1000, lr=0.005)
OTHERS_LR, LABELS_LR = 0.01, 0.05


def measure(method: Any, seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed: accuracy and calibration error on the test split."""
    labelled, pool, each = (100, 200, 3) if small else (2000, 6000, 10)
    cfg = STUDENT.model_copy(update={"steps": 20}) if small else STUDENT
    other = cfg.model_copy(update={"lr": OTHERS_LR})
    test = images(data[0], "test")
    rows = students.drawn(images(data[0], "train"), seed, labelled, pool)
    few = first_of_each(rows.known, each)
    teacher = students.teacher(rows.known, seed, 30 if small else 1000)
    arms = {
        "kd": method([teacher], rows.known, cfg, seed=seed),
        "labels": switched_off([teacher], rows.known, cfg, seed=seed),
        "pool": method([teacher], rows.known + rows.pool, other, seed=seed),
        "few": method([teacher], few, other, seed=seed),
        "few labels": switched_off([teacher], few, other, seed=seed),
        "teacher": teacher,
    }
    return [row for arm, net in arms.items() for row in students.figures(arm, net, test)]


def first_of_each(data: Dataset, each: int) -> Dataset:
    """The first rows of each class."""
    labels = data.labels()
    return data.take(np.sort(np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(len(data.info.classes))])))


def switched_off(
    teachers: Sequence[Net], data: Dataset, cfg: Config = STUDENT, *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """The student of the labels."""
    return students.labels_only(data, cfg.model_copy(update={"lr": LABELS_LR}), seed, device)
