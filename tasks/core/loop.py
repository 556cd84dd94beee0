"""The training loop's parts: seeds, batches, schedules, prediction, and the one supervised recipe that several families share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core.method import MethodConfig
from tasks.core.networks import Net
from tasks.core.progress import track


class Recipe(MethodConfig):
    """The settings of `fit_supervised`: what `train.supervised` and the retrained reference of unlearning must share."""

    steps: int = Field(800, ge=1, description="batches seen")
    batch: int = Field(64, ge=1, description="rows of each batch term")
    lr: float = Field(0.1, gt=0, description="peak learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    real_weight: float = Field(0.8, ge=0, le=1, description="weight of the real batch term; the synthetic one gets the rest")


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Give a generator made from the seed, and run the block with the global generators seeded too; both are put back afterwards.

    The global ones matter because `torch.nn` and `peft` draw first weights from them.
    """
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield torch.Generator().manual_seed(seed)
        finally:
            np.random.set_state(numpy_state)


def to_float(images: npt.NDArray[np.uint8], device: str = "cpu") -> Tensor:
    """uint8 images (N, C, H, W) as float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).float().div_(255)


def index_batches(n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Exactly `steps` batches of `size` positions below n: shuffled passes over all of them, one after another.

    Raises ValueError where there is nothing to draw from.
    """
    if n == 0:
        raise ValueError("no rows to draw batches from")
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(n, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


def pixel_stats(images: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and standard deviation of the pixels, in [0, 1]; at most 10,000 images are looked at."""
    some = images[:: max(1, len(images) // 10_000)].astype(np.float32) / 255
    return float(some.mean()), float(some.std()) or 1.0


@torch.no_grad()
def predict(net: nn.Module, images: npt.NDArray[np.uint8], *, size: int = 1024, device: str = "cpu") -> Tensor:
    """Logits (N, classes) in eval mode, float32, on the CPU. The network's mode is left as it was."""
    was, _ = net.training, net.eval()
    pieces = [net(to_float(images[at : at + size], device)).cpu() for at in range(0, len(images), size)]
    net.train(was)
    return torch.cat(pieces) if pieces else torch.empty(0)


def fit_supervised(
    net: Net,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    synthetic: npt.NDArray[np.bool_],
    *,
    steps: int,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    real_weight: float,
    generator: torch.Generator,
    device: str = "cpu",
    what: str = "train",
    extra_loss: Callable[[int, Net], Tensor] | None = None,
) -> Net:
    """Train in place by SGD with a one-cycle schedule on
    `real_weight * CE(real batch) + (1 - real_weight) * CE(synthetic batch)` (DataDream, section 3); without synthetic rows, CE alone.

    images (N, C, H, W) uint8, labels (N,) in 0..classes-1, synthetic (N,) bool. `extra_loss(step, net)` is added to the loss.
    Raises ValueError where there are no real rows.
    """
    real_at, made_at = torch.from_numpy(np.flatnonzero(~synthetic)), torch.from_numpy(np.flatnonzero(synthetic))
    targets = torch.from_numpy(labels)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = one_cycle(optimiser, lr, steps)
    real = index_batches(len(real_at), batch, steps, generator)
    made = index_batches(len(made_at), batch, steps, generator) if len(made_at) else None

    def loss_on(at: Tensor) -> Tensor:
        return F.cross_entropy(net(to_float(images[at.numpy()], device)), targets[at].to(device))

    net.to(device).train()
    for step in track(range(steps), what):
        loss = loss_on(real_at[next(real)])
        if made is not None:
            loss = real_weight * loss + (1 - real_weight) * loss_on(made_at[next(made)])
        if extra_loss is not None:
            loss = loss + extra_loss(step, net)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def one_cycle(optimiser: torch.optim.Optimizer, lr: float, steps: int, warm_up: float = 0.2) -> Any:
    """Learning rate up for a share of the steps, then down to nothing, by cosines; momentum is left alone."""
    return torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=max(steps, 2), pct_start=warm_up, cycle_momentum=False)
