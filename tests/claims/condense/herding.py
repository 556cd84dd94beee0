"""Herded images have class means of features nearer to those of all images than random ones, and train a better network.

Claim   the distance of class means, in the features that the choice was made in, is at most half of that of random images of each class,
        which is what herding is for; a network trained on 10 herded images of each class is at least .02 more accurate on test rows.
        iCaRL, section 5, shows its exemplars' means to lie nearer; it claims no figure for the network
Arms    herding: `condense.herding`; random: as many images of each class by lot
Equal   teacher, source rows, images of each class, first weights, steps and shifts of the networks, three for each arm
Tuned   nothing of the method: it has no settings of its own, and the teacher's are those of its family
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tasks.condense import _classes, _shared
from tasks.condense.herding import SMOKE, Config, gap
from tasks.core import loop
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.method import Made
from tests.claims.condense import distribution_matching
from tests.claims.condense.distribution_matching import NETS, STEPS, accuracy, samples, sources

CLAIM = Claim(
    text="10 herded images a class have feature means at most half as far off as 10 random ones, and train a better network",
    data=("fashion_mnist",),
    headline=Beats("herding", "random", "mean gap", by=0.5, better="lower", relative=True),
    also=(Beats("herding", "random", "accuracy", by=0.02),),
)


def measure(method: Callable[..., Made], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Distance of the means, and accuracy of networks, for both arms."""
    cfg, each, nets, steps = (SMOKE.model_copy(update={"source_rows": 200}), 2, 1, 2) if small else (Config(), 10, NETS, STEPS)
    source, unseen = sources(data[0], seed, small)
    n = each * len(np.unique(source.labels()))
    with loop.seeded(seed) as generator:  # the method's own teacher once more: its features of all rows
        own = _shared.prepare(source, n, **cfg.for_encoder(), generator=generator, device="cpu")
    labels, places = _classes.labels_of(source, own.ids), {name: at for at, name in enumerate(own.ids)}
    found = []
    for name, call in (("herding", method), ("random", switched_off)):
        made: Made = call(source, unseen, n, cfg, seed=seed)
        chosen = np.array([places[parents[0].as_py()] for parents in made.rows["parents"]])
        right = [accuracy(*samples(made, source), unseen, 100 * seed + net, steps) for net in range(nets)]
        found += [Row(name, "mean gap", gap(own.targets.numpy(), labels, chosen)), Row(name, "accuracy", float(np.mean(right)))]
    return found


def switched_off(data: Dataset, held_out: Dataset, n: int, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """Random images of each class."""
    return distribution_matching.switched_off(data, held_out, n, distribution_matching.Config(**cfg.model_dump()), seed=seed, device=device)
