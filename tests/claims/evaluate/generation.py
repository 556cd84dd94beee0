"""A judge's share and the Frechet distance tell a generator that was trained in full from one that was trained a tenth as long.

Claim   the longer training has the smaller Frechet distance, by a fifth, and the larger judged share, by .02: what anybody sees in the
        images of such models at a glance, and less than half of what the literature reports between good and middling generators
Arms    trained  `train.diffusion` as it is set; tenth: the same at a tenth of the steps
        judge    a classifier of the training rows, with first weights of its own
Equal   rows, first weights and noise of both generators; the judge and the test rows; 100 images of each class
Tuned   nothing: steps, images and margins were fixed beforehand
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.evidence import Evidence
from tasks.core.networks import Net
from tasks.evaluate.generation import JUDGE, SMOKE, Config, generation
from tasks.train import diffusion
from tests.claims.samples import dataset
from tests.claims.train.diffusion import classifier, source

CLAIM = Claim(
    text="a judge's share and the Frechet distance tell a generator that was trained in full from one that was trained a tenth as long",
    data=(),
    headline=Beats("trained", "tenth", "frechet", better="lower", relative=True, by=0.2),
    also=(Beats("trained", "tenth", "class_accuracy", by=0.02),),
)


def measure(method: Any, seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Both figures of both generators for one seed."""
    known, held = source(data)
    rows, test = dataset(known.pixels, known.labels, known.classes), dataset(held.pixels, held.labels, held.classes, prefix="t")
    cfg = diffusion.SMOKE.model_copy(update={"steps": 20}) if small else diffusion.Config()
    models: dict[str, Net] = {
        "trained": diffusion.diffusion(rows, cfg, seed=seed),
        "tenth": diffusion.diffusion(rows, cfg.model_copy(update={"steps": cfg.steps // 10}), seed=seed),
    }
    judge = classifier(known, seed + 500, 5 if small else 600)
    found = method({JUDGE: judge, **models}, {"test": test}, SMOKE if small else Config(), seed=seed).figures
    shown = [Row(arm, metric, found[arm][metric].value) for arm in models for metric in ("frechet", "class_accuracy")]
    return [Row(JUDGE, "accuracy", found[JUDGE]["accuracy"].value), *shown]


def switched_off(
    models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Config = Config(), *, seed: int = 0, device: str = "cpu"
) -> Evidence:
    """The same figures, of the first generator's images whichever one is asked about."""
    found = generation(models, data, cfg, seed=seed, device=device)
    first = next(name for name in models if name != JUDGE)
    return replace(found, figures={name: found.figures[first if name != JUDGE else JUDGE] for name in models})
