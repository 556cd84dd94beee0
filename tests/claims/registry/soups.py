"""A greedy soup of fine-tuned networks beats the one that is best on held-out rows, on the test set and on shifted images.

Claim   accuracy of the greedy soup is at least .003 above that of the network that is best on the held-out rows, and on shifted images at
        least .01. The paper (CLIP ViT-B/32): +.0064 on ImageNet, +.029 over five shifted test sets; half and a third of it are asked for.
        With it: averaging alone is not enough. A uniform soup whose batch normalisation is re-estimated beats one with averaged
        statistics (`stale`), and a mean of two networks from different starts falls by .10 or more
Arms    best: the highest held-out accuracy; fresh: it, with statistics re-estimated like a soup's; greedy, uniform, learned: of
        `registry.soups`; stale: uniform with averaged statistics; two starts: the best and its twin from another start, averaged;
        ensemble: mean logits of all, at ten times the cost; mean: what one of the ten has on average; start
Equal   the start (10,000 rows of the first four fifths of the classes), ten fine-tunes on 1,000 rows of all classes, random in learning
        rate, weight decay, label smoothing and shifts; 2,000 held-out rows choose for every arm; statistics come from the fine-tuning rows
Tuned   the fine-tunes' settings, on validation rows (the train split's rows from 50,000 on, two or three seeds from 1000). A learning rate
        up to .05 was chosen, since there the best single network too is better (.852, greedy .858) than up to .1 (.850, .853). Up to .2,
        or with 400 fine-tuning rows, greedy kept fewer and gained from -.002 to +.008. Pre-training on turned or inverted images: none.
        Seeds, `by` and conditions were fixed before any test row was seen, the third one though averaged statistics had been hardly
        worse on validation rows
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.claim import Beats, Claim, Row
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.registry import Offer
from tasks.registry.soups import Config, accuracy, held_out, re_estimate
from tests.claims.samples import Images, dataset, images

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

CLAIM = Claim(
    text="a greedy soup of networks fine-tuned from one start beats the one that is best on held-out rows, at the cost of one network",
    data=("fashion_mnist",),
    headline=Beats("greedy", "best", "accuracy", by=0.003),
    also=(
        Beats("greedy", "best", "shifted", by=0.01),
        Beats("uniform", "stale", "accuracy"),
        Beats("best", "two starts", "accuracy", by=0.10),
    ),
    seeds=10,
)


class Sizes(NamedTuple):
    """Rows, steps and the size of the network."""

    early: int = 10_000
    early_steps: int = 600
    tune: int = 1000
    tune_steps: int = 300
    choose: int = 2000
    ingredients: int = 10
    scored: int = 10_000
    widths: tuple[int, ...] = (16, 32)
    hidden: int = 64


class Setting(NamedTuple):
    """One training's settings; `shift`: pixels by which images are moved at random, `batch`: rows of a step."""

    lr: float
    weight_decay: float
    smoothing: float
    shift: int
    steps: int
    batch: int


def measure(method: Callable[..., Net], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed, on the test split as it is and shifted."""
    sizes = Sizes(200, 10, 60, 4, 60, 3, 200, (8, 8), 16) if small else Sizes()
    return arms(method, seed, images(data[0], "train"), images(data[0], "test"), sizes)


def arms(method: Callable[..., Net], seed: int, train: Images, test: Images, sizes: Sizes) -> list[Row]:
    """All arms, on rows of `train` drawn by the seed, scored on `test`."""
    wanted = sizes.tune + sizes.choose + sizes.early
    if len(train.labels) < wanted:
        raise UserError(f"this claim draws {wanted} train rows; the data has {len(train.labels)}")
    rng = np.random.default_rng(seed)
    cuts = np.split(rng.permutation(len(train.labels))[:wanted], [sizes.tune, sizes.tune + sizes.choose])
    tune, choose, early = (train.take(at) for at in cuts)
    early = early.take(early.labels < max(2, len(train.classes) * 4 // 5))

    mean, std = loop.pixel_stats(early.pixels)
    starts = []
    for at in (0, 1):
        with loop.seeded(2 * seed + at):
            fresh = networks.convnet(
                early.pixels.shape[1:], len(train.classes), widths=sizes.widths, hidden=sizes.hidden, mean=mean, std=std, norm="batch"
            )
        starts.append(fit(fresh, early, Setting(0.1, 5e-4, 0.0, 0, sizes.early_steps, 64), seed))
    settings = [drawn(rng, sizes.tune_steps) for _ in range(sizes.ingredients)]
    nets = {f"tuned/{at}": fit(starts[0], tune, setting, 100 * seed + at) for at, setting in enumerate(settings)}
    rows = {
        "train": dataset(tune.pixels, tune.labels, tune.classes, prefix="tune"),
        "choose": dataset(choose.pixels, choose.labels, choose.classes, prefix="choose"),
    }
    offer = Offer(nets, rows, None, {"versions": {name: {"start": "start/0"} for name in nets}})
    best = best_held_out(offer)
    at = next(at for at, net in enumerate(nets.values()) if net is best)
    twins = {"one": best, "other": fit(starts[1], tune, settings[at], 100 * seed + at)}
    fresh = copy.deepcopy(best)
    re_estimate(fresh, tune.pixels, batch=256)
    found = {
        "greedy": method(offer, Config(), seed=seed),
        "best": best,
        "fresh": fresh,
        "uniform": method(offer, Config(kind="uniform"), seed=seed),
        "stale": method(offer, Config(kind="uniform", bn_rows=0), seed=seed),
        "learned": method(offer, Config(kind="learned"), seed=seed),
        "two starts": method(Offer(twins, rows), Config(kind="uniform", trust_start=True), seed=seed),
        "start": starts[0],
    }
    return scores(found, nets, test.take(np.arange(min(sizes.scored, len(test.labels)))), rng)


def scores(found: dict[str, Net], nets: dict[str, Net], test: Images, rng: np.random.Generator) -> list[Row]:
    """Accuracy of each network, of the ingredients' mean logits and of an ingredient on average; `shifted` is the mean over the shifts."""
    made: list[Row] = []
    shifts = {"noise": noisy(test.pixels, rng), "dim": test.pixels // 2}
    for metric, pixels in {"accuracy": test.pixels, **shifts}.items():
        logits = {name: loop.predict(net, pixels) for name, net in {**found, **nets}.items()}
        right = {name: hits(answer, test.labels) for name, answer in logits.items()}
        made += [Row(arm, metric, right[arm]) for arm in found]
        made.append(Row("ensemble", metric, hits(torch.stack([logits[name] for name in nets]).mean(0), test.labels)))
        made.append(Row("mean", metric, float(np.mean([right[name] for name in nets]))))
    every = {arm: [row.value for row in made if row.arm == arm and row.metric in shifts] for arm in {row.arm: None for row in made}}
    return made + [Row(arm, "shifted", float(np.mean(values))) for arm, values in every.items()]


def switched_off(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Net:
    """The network that is best on the held-out rows."""
    return copy.deepcopy(best_held_out(offer))


def best_held_out(offer: Offer) -> Net:
    """The network of the highest held-out accuracy, of several the first one."""
    pixels, labels = held_out(offer, "best")
    return max(offer.nets.values(), key=lambda net: accuracy(net, pixels, labels))


def drawn(rng: np.random.Generator, steps: int) -> Setting:
    """Settings by lot, as in the paper's search."""
    lr, weight_decay = 10 ** rng.uniform(-2, -1.3), 10 ** rng.uniform(-4, -2)
    return Setting(lr, weight_decay, float(rng.choice([0, 0.1, 0.2])), int(rng.choice([0, 1, 2])), steps, 32)


def fit(net: Net, rows: Images, setting: Setting, seed: int) -> Net:
    """A copy of the network, trained on from there."""
    net = copy.deepcopy(net).train()
    targets = torch.from_numpy(rows.labels)
    with loop.seeded(seed) as generator:
        optimiser = torch.optim.SGD(net.parameters(), lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay)
        schedule = loop.one_cycle(optimiser, setting.lr, setting.steps)
        for at in loop.index_batches(len(rows.labels), setting.batch, setting.steps, generator):
            seen = moved(loop.to_float(rows.pixels[at.numpy()]), setting.shift, generator)
            loss = F.cross_entropy(net(seen), targets[at], label_smoothing=setting.smoothing)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    loop.check_finite(net, "fine-tune", setting.lr)
    return net.eval()


def moved(seen: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each moved by up to `shift` pixels in each direction, edges repeated."""
    if shift == 0:
        return seen
    n, _, height, width = seen.shape
    down, right = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    padded = F.pad(seen, [shift] * 4, mode="replicate")
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def noisy(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """The images under normal noise of a fifth of the range."""
    return np.clip(pixels + rng.normal(0, 51, pixels.shape), 0, 255).astype(np.uint8)


def hits(logits: Tensor, labels: Labels) -> float:
    """Share of logits (N, K) whose largest is the label's."""
    return float((logits.argmax(1).numpy() == labels).mean())
