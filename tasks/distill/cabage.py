"""Extract a model of one's own from outside, by its answers alone: it shows how much of it so many queries give away.

Paper   CaBaGE: Data-Free Model Extraction using ClAss BAlanced Generator Ensemble (2024), arXiv 2409.10643; its loop is that of DisGUIDE
Idea    Two clones learn what a victim answers on images that nobody took: generators make such as the clones disagree on, of all classes
        alike (L = -disagreement + balance * sum_k p_k log p_k). Four parts are added: several generators; more candidates than queries,
        of which those are paid for that the clones disagree on most, of each class as many; replay of what the clones have not learnt
        yet; and no need to know the number of classes: the clones get an output when the victim says a new label. The victim is asked
        for labels, or for probabilities, and each image counts.
Small   thousands of queries in place of millions, images of 8 to 32 pixels. Of the four parts only what the abstract says was known:
        their rules are our own. Images are rounded to bytes before they are asked about and learnt.
Limits  It is for testing one's own model: teachers come out of one's own registry, and the budget is a number to compare with what a
        served model allows its users. A low agreement is no proof of safety: others may have data. 8x8 digits, labels alone, 6 seeds,
        test: a victim of 98.4% gives clones of 85.2% for 3,000 queries (sd 3.2), 90.4 for 6,000, 92.0 for 12,000; the plain loop 79.6
        (sd 8.3), 84.9, 87.3. Ahead on every seed at 3,000, but the plain loop's spread is such that it is not certain. The filter alone
        gives 83.0, replay alone 80.2, several generators alone 85.5: the other parts add nothing to these. Uniform noise, 80.2, is no
        worse than the plain loop on images so small, and with the filter, 85.1, as good as all. All classes were always found.
        Fashion-MNIST, 6,000 queries, 1,400 steps, 3 seeds, test: a victim of 83.9% gives clones of 49.3% (sd 7.4).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Taught, method
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.distill import _shared
from tasks.distill._extraction import (
    Clones,
    Generator,
    Generators,
    Store,
    Told,
    Victim,
    disagreement,
    entropy,
    in_order,
    joined,
    worth,
)
from tasks.distill._shared import Images, check

CLONES = 2  # DisGUIDE
MEAN, STD = 0.5, 0.25  # of pixels, by which clones standardise: nobody has data to take them from


class Config(_shared.Student):
    """Settings. `widths` and `hidden` are those of each of two clones, `steps` theirs in all, spread evenly over the rounds of queries."""

    queries: int = Field(6000, ge=1, description="images that the victim is asked about, and no more")
    answers: Told = Field("labels", description="what the victim says of an image")
    classes_known: bool = Field(False, description="whether the number of classes is known before the first answer; with a start it is")
    per_round: int = Field(32, ge=1, description="queries between two turns of training")
    generators: int = Field(3, ge=0, description="networks that make images; none: uniform noise")
    over: int = Field(4, ge=1, description="candidates made for each one that is paid for; 1: no filter")
    hard: float = Field(0.9, ge=0, le=1, description="how far replay goes by what the clones have not learnt yet; 0: all answers alike")
    balance: float = Field(0.2, ge=0, description="weight of class balance in the generators' loss")  # DisGUIDE, for 10 classes
    generator_steps: int = Field(1, ge=1, description="batches of the generators in each round")  # DisGUIDE
    generator_lr: float = Field(2e-4, gt=0, description="learning rate of Adam")  # DisGUIDE: 1e-4, for many more steps
    channels: int = Field(12, ge=1, description="of a generator's last layers")
    noise: int = Field(64, ge=1, description="values that a generator makes an image of")
    contrast: float = Field(4.0, gt=0, description="how far a generator's pixels are spread; 1: around grey, 4: most are black or white")
    remember: int = Field(100_000, ge=1, description="answers kept for replay, the last ones")  # DisGUIDE: 1,000,000
    steps: int = Field(800, ge=1, description="batches of the clones")
    lr: float = Field(0.05, gt=0, description="peak learning rate of the clones' SGD")  # DisGUIDE: 0.03
    shift: int = Field(0, ge=0, le=0, description="images are not moved: each would be one more query")


SMOKE = Config(widths=(8,), hidden=16, queries=48, per_round=16, steps=9, batch=16, channels=4, noise=8)


@torch.no_grad()
def chosen(clones: Clones, images: Images, store: Store, n: int) -> npt.NDArray[np.int64]:
    """Positions of the `n` of the candidates (m, C, H, W) to ask about: the clones disagree on them, and the store gets even classes."""
    clones.mode(training=False)
    probabilities = clones.logits(loop.to_float(images, clones.device)).softmax(2).cpu()
    have = np.bincount(store.labels(), minlength=probabilities.shape[2])
    return worth(disagreement(probabilities), probabilities.mean(0).argmax(1), have, n)


@method(
    paper="CaBaGE: Data-Free Model Extraction using ClAss BAlanced Generator Ensemble (2024)",
    arxiv="2409.10643",
    claim="for equally many queries a clone by filtered, balanced, replayed queries of several generators beats the plain loop's",
)
def cabage(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Taught:
    """A clone of the one teacher: two networks side by side in one or, from a `start`, the one that went on from a copy of it.

    No row of `data` is learnt from or asked about. It tells the shape of an image and, when all is done and for the figures alone, has
    rows of the owner's to compare both on; these are not queries. An output stands there for each class of the data; one that the victim
    was never heard to say never wins.

    Figures: `queries`; `queries_filtered`, candidates that were made and not asked about; `label_entropy` of all answers, in nats;
    `classes_found`; where rows have labels, `agreement` with the victim on these, and `accuracy_share`, the clone's accuracy over the
    victim's, unless that is 0.

    Raises UserError where there is no teacher or more than one, no row, networks and data do not fit, or training diverged.
    """
    check(teachers, data, start)
    if len(teachers) > 1:
        raise UserError(f"an extraction has one victim; got {len(teachers)} teachers")
    shape, classes = data.info.shape, len(data.info.classes)
    victim, store = Victim(teachers[0], cfg.queries, cfg.answers, device), Store(min(cfg.queries, cfg.remember), shape)
    rounds = -(-cfg.queries // cfg.per_round)
    made, said = 0, np.zeros(classes, np.int64)

    def begin(labels: Sequence[int]) -> Clones:
        fresh = [
            networks.convnet(shape, len(labels), widths=cfg.widths, hidden=cfg.hidden, mean=MEAN, std=STD)
            for _ in range(CLONES if start is None else CLONES - 1)
        ]
        nets = fresh if start is None else [copy.deepcopy(start).requires_grad_(True), *fresh]
        how = cfg.model_dump(include={"steps", "lr", "momentum", "weight_decay"})
        return Clones(nets, labels, device=device, **how)

    with loop.seeded(seed) as generator:
        makers = [Generator(shape, cfg.noise, cfg.channels, cfg.contrast) for _ in range(cfg.generators)]
        generators = Generators(makers, shape, cfg.noise, cfg.generator_lr, device)
        clones = begin(range(classes)) if cfg.classes_known or start is not None else None
        for turn in track(range(rounds), "extract"):
            n = min(cfg.per_round, cfg.queries - victim.queries)
            for _ in range(cfg.generator_steps):
                generators.learn(clones, cfg.batch, cfg.balance, generator)
            images = generators.images(n * cfg.over, generator)
            made += len(images)
            if len(images) > n:
                images = images[chosen(clones, images, store, n)] if clones else images[:n]
            answers = victim(images)
            labels = answers if cfg.answers == "labels" else answers.argmax(1)
            said += np.bincount(labels.numpy(), minlength=classes)
            clones = clones or begin(labels.unique().tolist() if cfg.answers == "labels" else range(answers.shape[1]))
            at = store.add(images, clones.outputs(answers))
            begun = turn * cfg.steps // rounds
            for step in range(begun, (turn + 1) * cfg.steps // rounds):
                clones.learn(store, at if step == begun else store.draw(cfg.batch, cfg.hard, generator))
        assert clones is not None
        for net in clones.nets:
            loop.check_finite(net, "extract", cfg.lr)
        found = [in_order(net, clones.labels, classes).cpu().eval() for net in clones.nets]
        clone = (joined(found) if start is None else found[0]).eval()
    figures = {"queries": victim.queries, "queries_filtered": made - victim.queries, "classes_found": (said > 0).sum()}
    named = {name: float(value) for name, value in figures.items()} | {"label_entropy": entropy(said)}
    return Taught(clone, named | compared(clone, teachers[0], data, device))


def compared(clone: Net, victim: Net, data: Dataset, device: str = "cpu") -> dict[str, float]:
    """`agreement` and `accuracy_share` on the rows that have a label."""
    rows = data.where(data.labels() >= 0)
    if len(rows) == 0:
        return {}
    images, truth = rows.images(), rows.labels()
    ours, theirs = (loop.predict(net, images, device=device).argmax(1).numpy() for net in (clone, victim))
    right = float((theirs == truth).mean())
    share = {"accuracy_share": float((ours == truth).mean()) / right} if right else {}
    return {"agreement": float((ours == theirs).mean()), **share}
