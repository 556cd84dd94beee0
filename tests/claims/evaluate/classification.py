"""Of 100 intervals of accuracy about 95 hold what a far larger sample shows; the usual ones do not where a classifier is good.

Claim   the share of samples of 60 whose 95% interval of accuracy holds the accuracy on all test rows is .95, or short of it by .03 at most;
        and it is .10 above that of the usual intervals, p +- 1.96 sqrt(p (1 - p) / n), which shrink to nothing where no answer is wrong
Arms    method: the intervals of `evaluate.classification`; usual: those, from the same answers; nominal: .95
Equal   one classifier a seed, the same samples for both; only rows of the three classes that it tells best on rows apart from both
        training and test, so that accuracy is high: there intervals are hard
Tuned   nothing: the method has no setting here. Three classes and 60 rows were fixed beforehand
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core import loop, metrics
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.evaluate.classification import Config, classification
from tasks.train.supervised import Config as Training
from tasks.train.supervised import supervised
from tests.claims.samples import dataset, images

CLAIM = Claim(
    text="95% intervals of accuracy from 60 rows hold the accuracy of a far larger sample in 95 of 100 cases; the usual ones do not",
    data=("fashion_mnist",),
    headline=Beats("method", "nominal", "coverage", by=-0.03),
    also=(Beats("method", "usual", "coverage", by=0.10),),
)
CLASSES, ROWS = 3, 60


def measure(method: Any, seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Coverage of both intervals over many samples of one classifier's answers."""
    training, checked, trials = (100, 100, 5) if small else (3000, 2000, 300)
    rng = np.random.default_rng(seed)
    train, test = images(data[0], "train"), images(data[0], "test")
    if len(train.labels) < training + checked:
        raise UserError(f"this claim draws {training + checked} train rows; the data has {len(train.labels)}")
    drawn = rng.permutation(len(train.labels))
    known, apart = train.take(drawn[:training]), train.take(drawn[training : training + checked])
    rows = dataset(known.pixels, known.labels, known.classes)
    net = supervised(rows, Training(steps=20 if small else 600), seed=seed)
    told = loop.predict(net, apart.pixels).argmax(1).numpy()
    best = np.argsort(metrics.per_class_accuracy(apart.labels, told, len(train.classes)))[-CLASSES:]
    chosen = test.take(np.isin(test.labels, best))
    truth = float((loop.predict(net, chosen.pixels).argmax(1).numpy() == chosen.labels).mean())
    held: dict[str, list[bool]] = {"method": [], "usual": []}
    widths: dict[str, list[float]] = {"method": [], "usual": []}
    for trial in range(trials):
        some = chosen.take(rng.permutation(len(chosen.labels))[:ROWS])
        sample = {"test": dataset(some.pixels, some.labels, some.classes, split="test")}
        for arm, evaluate in (("method", method), ("usual", switched_off)):
            figure = evaluate({"net": net}, sample, Config(draws=10, repeats=1), seed=trial).figures["net"]["accuracy"]
            held[arm].append(figure.low <= truth <= figure.high)
            widths[arm].append(figure.high - figure.low)
    found = [Row(arm, metric, float(np.mean(of[arm]))) for metric, of in (("coverage", held), ("width", widths)) for arm in of]
    return [*found, Row("nominal", "coverage", 0.95), Row("net", "accuracy", truth)]


def switched_off(
    models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Config = Config(), *, seed: int = 0, device: str = "cpu"
) -> Evidence:
    """The same evidence, its intervals of accuracy the usual ones."""
    found = classification(models, data, cfg, seed=seed, device=device)
    figures = {name: {**of, "accuracy": usual(of["accuracy"], len(data["test"]))} for name, of in found.figures.items()}
    return replace(found, figures=figures)


def usual(figure: Figure, n: int) -> Figure:
    """p +- 1.96 standard errors."""
    half = 1.96 * math.sqrt(figure.value * (1 - figure.value) / n)
    return Figure(figure.value, figure.value - half, figure.value + half)
