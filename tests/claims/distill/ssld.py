"""A student of a teacher's soft labels, on labelled and mined unlabelled images, beats the same student of the labels.

Claim   accuracy of ssld is at least .01 above that of the same network trained on the labels, and at least .005 above that of ssld without
        the unlabelled images, at equal steps. The paper: +3.8 points over labels for MobileNetV3, of which +1.4 came with the 4M unlabelled
        images; the whole is asked for here at a quarter of that, the part at a third, since one network's seed is worth half a point.
        JS instead of KL is worth less than a seed and is shown, not claimed.
Arms    labels: cross-entropy on the labelled rows; soft: ssld without a pool; ssld: with rows mined from it; kl: ssld with KL; random: ssld
        with as many rows of the pool drawn at random; all labels: cross-entropy on labelled rows and the pool's, with its labels (a
        ceiling that nobody has); teacher
Equal   the labelled rows (the teacher's own, as in the paper), first weights, batch, steps (main stage and fine-tuning counted); no arm
        but the ceiling sees the pool's labels. The pool has rows that the teacher never saw, and a fifth as many blends of two: things of
        no class
Tuned   the learning rate alone, .05, .1 or .15 for each loss, on 5,000 validation rows (the train split's rows 50,000 to 55,000, two
        seeds from 1000): JS .781, .824, .825; KL .828, .827, .816; labels .813, .809, .797. In first trials with a pool of 10,000 a rate
        of .4 ended near chance. There mined rows were no better than random ones; this was left as it is
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core import loop, networks
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill.ssld import Config, ssld
from tasks.train.supervised import Config as Teacher
from tasks.train.supervised import supervised
from tests.claims.samples import Images, dataset, images

CLAIM = Claim(
    text="a student of soft labels on labelled and mined unlabelled images beats the same student trained on the labels, at equal steps",
    data=("fashion_mnist",),
    headline=Beats("ssld", "labels", "accuracy", by=0.01),
    also=(Beats("ssld", "soft", "accuracy", by=0.005),),
)
STUDENT = Config(widths=(8, 16), hidden=32, steps=1400, tune_steps=100, mine=600, lr=0.15)
LABELS_LR = KL_LR = 0.05


def measure(method: Any, seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed: accuracy on the test split."""
    labelled, pool = (100, 300) if small else (2000, 6000)
    cfg = STUDENT.model_copy(update={"steps": 20, "tune_steps": 5, "mine": 20}) if small else STUDENT
    train, test = images(data[0], "train"), images(data[0], "test")
    return arms(method, seed, train, test, labelled, pool, cfg, teacher_steps=30 if small else 1500)


def arms(method: Any, seed: int, train: Images, test: Images, labelled: int, pool: int, cfg: Config, teacher_steps: int) -> list[Row]:
    """All arms, on rows of `train` drawn by the seed, scored on `test`."""
    if len(train.labels) < labelled + pool:
        raise UserError(f"this claim draws {labelled + pool} train rows; the data has {len(train.labels)}")
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(train.labels))
    own, others = train.take(drawn[:labelled]), train.take(drawn[labelled : labelled + pool])
    one, two = rng.integers(0, pool, (2, pool // 5))
    blends = ((others.pixels[one].astype(np.uint16) + others.pixels[two]) // 2).astype(np.uint8)
    known = dataset(own.pixels, own.labels, own.classes, prefix="known")
    spare = dataset(np.concatenate([others.pixels, blends]), np.full(pool + len(blends), -1), own.classes, prefix="pool")
    teacher = supervised(known, Teacher(steps=teacher_steps, widths=(32, 64), hidden=128), seed=seed)

    labels = labels_only([teacher], known, cfg, seed=seed)
    whole = labels_only([teacher], known + dataset(others.pixels, others.labels, own.classes, prefix="all"), cfg, seed=seed)
    mined = method([teacher], known + spare, cfg, seed=seed)
    chance = spare.take(rng.permutation(len(spare))[: cfg.mine * len(own.classes)])
    students = {
        "ssld": mined,
        "labels": labels,
        "soft": ssld([teacher], known, cfg, seed=seed),
        "kl": ssld([teacher], known + spare, cfg.model_copy(update={"loss": "kl", "lr": KL_LR}), seed=seed),
        "random": ssld([teacher], known + chance, cfg.model_copy(update={"mine": len(chance)}), seed=seed),
        "all labels": whole,
        "teacher": teacher,
    }
    return [Row(arm, "accuracy", accuracy(net, test)) for arm, net in students.items()]


def switched_off(
    teachers: Sequence[Net], data: Dataset, cfg: Config = STUDENT, *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """The student of the labels."""
    return labels_only(teachers, data, cfg, seed=seed, device=device)


def labels_only(teachers: Sequence[Net], data: Dataset, cfg: Config, *, seed: int = 0, device: str = "cpu") -> Net:
    """The same student, trained by cross-entropy on the rows that have a label, for all of the steps."""
    rows = data.where(data.labels() >= 0)
    pixels = rows.images()
    mean, std = loop.pixel_stats(pixels)
    with loop.seeded(seed) as generator:
        net = networks.convnet(data.info.shape, len(data.info.classes), widths=cfg.widths, hidden=cfg.hidden, mean=mean, std=std)
        return loop.fit_supervised(
            net, pixels, rows.labels(), rows.synthetic(), steps=cfg.steps + cfg.tune_steps, batch=cfg.batch, lr=LABELS_LR,
            momentum=cfg.momentum, weight_decay=cfg.weight_decay, real_weight=1.0, generator=generator, device=device,
        )  # fmt: skip


def accuracy(net: Net, test: Images) -> float:
    """Share of the test rows that are answered right."""
    return float((loop.predict(net, test.pixels).argmax(1).numpy() == test.labels).mean())
