"""The training loop's parts: seeds, batches, schedules, prediction, and the one supervised recipe that several families share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core.errors import UserError
from tasks.core.method import MethodConfig
from tasks.core.networks import Net
from tasks.core.progress import track

Module = TypeVar("Module", bound=nn.Module)


class Recipe(MethodConfig):
    """The settings of `fit_supervised`: what `train.supervised` and the retrained reference of unlearning must share."""

    steps: int = Field(600, ge=1, description="batches seen")
    batch: int = Field(64, ge=1, description="rows of each batch term")
    lr: float = Field(0.1, gt=0, description="peak learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    real_weight: float = Field(0.8, ge=0, le=1, description="weight of the real batch term; the synthetic one gets the rest")


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Give a generator made from the seed, and run the block with the global generators seeded too; all are put back afterwards.

    The global ones matter because `torch.nn` and `peft` draw first weights from them.
    """
    numpy_state = np.random.get_state()
    # asking for an accelerator's state would start it: only those already in use are kept
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield torch.Generator().manual_seed(seed)
        finally:
            np.random.set_state(numpy_state)


def to_float(inputs: npt.NDArray[np.uint8], device: str = "cpu") -> Tensor:
    """uint8 images (N, C, H, W) as float32 in [0, 1]; texts, bytes (N, L), stay what they are."""
    values = torch.from_numpy(np.require(inputs, requirements=["C", "W"])).to(device)
    return values if values.ndim == 2 else values.float().div_(255)


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
    """Mean and standard deviation of the pixels, in [0, 1]; at most 10,000 images, evenly spread, are looked at.

    Raises ValueError where there are no images.
    """
    if len(images) == 0:
        raise ValueError("no images to take pixel statistics from")
    some = images[:: -(-len(images) // 10_000)].astype(np.float32) / 255
    return float(some.mean()), float(some.std()) or 1.0


@torch.no_grad()
def predict(net: nn.Module, inputs: npt.NDArray[np.uint8], *, size: int | None = None, device: str = "cpu") -> Tensor:
    """Logits (N, classes) in eval mode, float32, on the CPU, of images (N, C, H, W) or texts (N, L). The network keeps its mode and place.

    `size` rows at once, by default 1,024 images or 64 texts, each of which may be hundreds of states.
    """
    net, size = on(net, device), size or (64 if inputs.ndim == 2 else 1024)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        pieces = [net(to_float(inputs[at : at + size], device)).cpu() for at in range(0, len(inputs), size)]
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(pieces) if pieces else torch.empty(0)


def on(net: Module, device: str) -> Module:
    """The network itself where it already stands on the device, otherwise a copy there."""
    first = next(net.parameters(), None)
    if first is None or first.device == torch.device(device) or (first.device.type == device and first.device.index in (None, 0)):
        return net
    return copy.deepcopy(net).to(device)


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
    after_step: Callable[[int, Net], None] | None = None,
) -> Net:
    """Train in place by SGD with a one-cycle schedule on
    `real_weight * CE(real batch) + (1 - real_weight) * CE(synthetic batch)` (DataDream, section 3); where rows of one kind only are
    there, on their CE alone. Gives the network back on the CPU, in eval mode.

    images (N, C, H, W) uint8, labels (N,) in 0..classes-1, synthetic (N,) bool. `extra_loss(step, net)` is added to the loss;
    `after_step(step, net)` runs after each update. Raises ValueError where there are no rows, UserError where training diverged.
    """
    kinds = [(real_weight, np.flatnonzero(~synthetic)), (1 - real_weight, np.flatnonzero(synthetic))]
    terms = [(weight, torch.from_numpy(at)) for weight, at in kinds if len(at)]
    weights = [1.0] if len(terms) == 1 else [weight for weight, _ in terms]
    if not terms:
        raise ValueError("no rows to train on")
    targets = torch.from_numpy(np.array(labels))
    streams = [index_batches(len(at), batch, steps, generator) for _, at in terms]
    net.to(device).train()
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = one_cycle(optimiser, lr, steps)
    for step in track(range(steps), what):
        # one forward pass over all terms: on small networks its overhead is most of the cost
        at = torch.cat([rows[next(stream)] for (_, rows), stream in zip(terms, streams, strict=True)])
        losses = F.cross_entropy(net(to_float(images[at.numpy()], device)), targets[at].to(device), reduction="none")
        loss = sum((w * part.mean() for w, part in zip(weights, losses.split(batch), strict=True)), start=losses.new_zeros(()))
        if extra_loss is not None:
            loss = loss + extra_loss(step, net)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if after_step is not None:
            after_step(step, net)
    check_finite(net, what, lr)
    return net.cpu().eval()


def check_finite(net: nn.Module, what: str, lr: float) -> None:
    """Raises UserError where a weight is not a finite number."""
    if not all(bool(torch.isfinite(weights).all()) for weights in net.parameters()):
        raise UserError(f"'{what}' diverged: weights are no longer finite numbers; set a smaller lr than {lr:g}")


def one_cycle(optimiser: torch.optim.Optimizer, lr: float, steps: int, warm_up: float = 0.2) -> Any:
    """Learning rate up for a share of the steps, then down to nothing, by cosines; momentum is left alone."""
    total = max(steps, 2)
    if warm_up * total == 1:  # torch divides by the length of the rise less one
        warm_up = 0.0
    return torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=total, pct_start=warm_up, cycle_momentum=False)
