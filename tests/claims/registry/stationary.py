"""A version trained on its own finds its queries in the old version's gallery if both have the fixed classifier, and not if it is learned.

Claim   a query's answer is the closest row of the old gallery, which is not indexed again. With the simplex .30 more queries find their
        class than with a learned classifier, where the new version saw more rows and where it saw more classes too: the paper's abstract
        promises no number, and less than a third of all queries would not be worth a fixed classifier. HOC finds at most .05 less than
        the replaced version did, and .02 more than plain fine-tuning where classes are new
Arms    simplex, fine-tuned, hoc: `registry.stationary`, each `how`; learned, learned tuned: the same network, its last layer trained, on
        its own or on from the old one; logits: `learned`, with its logits as the embedding; old, learned old: what is replaced, in its own
        gallery. `..., own`: each version in its own gallery; `..., means`: queries compared with class means, as in the paper's code
Equal   the rows: old ones 300 of all classes, or those of 6 classes out of 3,000; new ones all 3,000; size, steps, batch, learning rate.
        Gallery: 2,000 rows that nothing was trained on; queries: 4,000 test rows
Tuned   the learning rate alone, for both kinds of classifier alike, on 2,500 validation rows (train rows from 50,000 on; two seeds from
        1000; the method's default size): own galleries .02 .785 and .784 (simplex and learned), .05 .800 and .803, .1 .800 and .808; at .2
        the learned one diverged. Tried and not taken up: 1,500 steps instead of 600 (simplex .05 less in the old gallery, HOC .04 more);
        for the simplex alone 16 vertices (less) and more weight decay (less, but more with new classes), one seed. The margins were fixed
        after the first of these trials, before any test row was read
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from tasks.core import loop, networks
from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.evaluate.compatibility import Config as Search
from tasks.evaluate.compatibility import compatibility
from tasks.registry import Offer
from tasks.registry.stationary import Config
from tests.claims.samples import Images, dataset, images

CLAIM = Claim(
    text="queries of a version trained on its own find their class in the old gallery with a fixed simplex, not with a learned classifier",
    data=("fashion_mnist",),
    headline=Beats("simplex", "learned", "more rows", by=0.30),
    also=(
        Beats("simplex", "learned", "new classes", by=0.30),
        Beats("hoc", "old", "more rows", by=-0.05),
        Beats("hoc", "fine-tuned", "new classes", by=0.02),
    ),
)
SETTING = Config(widths=(8, 16), hidden=32)
HOW = {"simplex": "independent", "fine-tuned": "fine-tuned", "hoc": "hoc"}


def measure(method: Callable[..., Net], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Both cases for one seed: retrieval in the old version's gallery, and in each version's own."""
    few, many, stored, asked = (60, 200, 100, 100) if small else (300, 3000, 2000, 4000)
    cfg = SETTING.model_copy(update={"steps": 10, "vertices": 16} if small else {})
    train, test = images(data[0], "train"), images(data[0], "test")
    classes = len(train.classes)
    if len(train.labels) < many + stored or not 3 <= classes <= cfg.vertices:
        raise UserError(f"this claim draws {many + stored} train rows of 3 to {cfg.vertices} classes")
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(train.labels))
    rows, gallery = train.take(drawn[:many]), train.take(drawn[many : many + stored])
    queries = test.take(rng.permutation(len(test.labels))[:asked])
    search = {"test": told(queries, classes, "q"), "gallery": told(gallery, classes, "g")}
    new, start = told(rows, classes, "r"), {}
    start["more rows"] = told(rows.take(np.arange(few)), classes, "r")
    known = max(2, classes * 6 // 10)
    start["new classes"] = told(rows.take(rows.labels < known), known, "r")

    later, found = seed + 1_000_000, []  # a new version never has the old one's first weights
    learned = switched_off(Offer(data={"train": new}), cfg, seed=later)
    for case, few_rows in start.items():
        old, usual = method(Offer(data={"train": few_rows}), cfg, seed=seed), switched_off(Offer(data={"train": few_rows}), cfg, seed=seed)
        line, others = {"champion": old}, {"champion": usual, "learned": learned}
        for arm, how in HOW.items():
            line[arm] = method(Offer({"line/1": old}, {"train": new}), cfg.model_copy(update={"how": how}), seed=later)
        tuned = cfg.model_copy(update={"how": "fine-tuned"})
        others["learned tuned"] = switched_off(Offer({"line/1": usual}, {"train": new}), tuned, seed=later)
        found += [*compared(case, "old", line, search), *compared(case, "learned old", others, search)]
        if case == "more rows":
            logits = compared(case, "logits old", {"champion": Logits(usual), "logits": Logits(learned)}, search)
            found += [row for row in logits if row.arm == "logits"]
    return found


def compared(case: str, champion: str, models: dict[str, Net], search: dict[str, Dataset]) -> list[Row]:
    """Each model's queries in the champion's gallery and in its own; those of the champion itself under its name here."""
    rows = []
    for metric, against in ((case, "rows"), (f"{case}, means", "classes")):
        figures = compatibility(models, search, Search(against=against)).figures
        for name, of in figures.items():
            arm = champion if name == "champion" else name
            rows.append(Row(arm, metric, of["self_retrieval" if name == "champion" else "cross_retrieval"].value))
            if against == "rows":
                rows.append(Row(arm, f"{case}, own", of["self_retrieval"].value))
    return rows


def switched_off(offer: Offer, cfg: Config = SETTING, *, seed: int = 0, device: str = "cpu") -> Net:
    """The same network, its last layer trained like the rest; a later version that does not start anew goes on from the old weights."""
    data = offer.data["train"]
    pixels, names = data.images(), list(data.info.classes)
    mean, std = loop.pixel_stats(pixels)
    sizes = {"shape": list(data.info.shape), "widths": list(cfg.widths), "hidden": cfg.hidden, "vertices": cfg.vertices}
    table = {name: at for at, name in enumerate(names)}
    with loop.seeded(seed) as generator:
        net = networks.build({"kind": "simplex", **sizes, "mean": mean, "std": std, "classes": len(names), "names": names, "table": table})
        net.head.weight.requires_grad_(True)
        net.head.reset_parameters()
        if offer.nets and cfg.how in ("fine-tuned", "hoc"):
            (old,) = offer.nets.values()
            weights = old.state_dict()
            fresh = net.head.weight.detach().clone()
            fresh[: len(weights["head.weight"])] = weights["head.weight"]  # classes that are new stand behind the old ones
            net.load_state_dict({**weights, "head.weight": fresh})
        return loop.fit_supervised(
            net, pixels, data.labels(), data.synthetic(), steps=cfg.steps, batch=cfg.batch, lr=cfg.lr, momentum=cfg.momentum,
            weight_decay=cfg.weight_decay, real_weight=1.0, generator=generator, device=device,
        )  # fmt: skip


class Logits(Net):
    """A network whose embedding is its logits, less their mean."""

    def __init__(self, net: Net) -> None:
        super().__init__(net.arch)
        self.net = net

    def features(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits - logits.mean(1, keepdim=True)


def told(rows: Images, classes: int, prefix: str) -> Dataset:
    """The rows as a data set of the first classes."""
    return dataset(rows.pixels, rows.labels, rows.classes[:classes], prefix=prefix)
