"""Simulated devices: who holds which rows, what their sensors do to them, and learning from one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig
from tasks.core.networks import Net

Labels = Literal["names", "slots"]


class Fleet(MethodConfig):
    """What the devices are like, and the network that they share."""

    rounds: int = Field(1500, ge=1, description="devices that are asked, one after another")
    ways: int = Field(5, ge=2, description="classes that one device sees")
    shots: int = Field(5, ge=1, description="rows of each class in a device's stream")
    labels: Labels = Field(
        "names", description="names: a device's labels are the data's classes; slots: its own 0 to ways - 1, in an order of its own"
    )
    gain: float = Field(0.3, ge=0, lt=1, description="a device's sensor multiplies by 1 - gain to 1 + gain")
    offset: float = Field(0.1, ge=0, le=1, description="and adds -offset to offset, in units of the full range")
    widths: tuple[int, ...] = Field((8, 8), min_length=1, description="channels of each convolution of a fresh network")
    hidden: int = Field(32, ge=1, description="features before the last layer of a fresh network")


class Stream(NamedTuple):
    """What one device senses, in order: images (n, C, H, W) float32 in [0, 1], and labels (n,)."""

    images: Tensor
    labels: Tensor


class Pool(NamedTuple):
    """Labelled rows that devices are made from: images (N, C, H, W) uint8, and the positions of each class that has any."""

    images: npt.NDArray[np.uint8]
    of_class: dict[int, Tensor]


def pool_of(data: Dataset, ways: int) -> Pool:
    """The labelled rows by class. Raises UserError where fewer than `ways` classes have one, or a label has no class name."""
    labels = data.labels()
    rows = data.where(labels >= 0)
    labels = labels[labels >= 0]
    found = {int(c): torch.from_numpy(np.flatnonzero(labels == c)) for c in np.unique(labels)}
    if len(found) < ways:
        raise UserError(f"a device sees {ways} classes, but only {len(found)} have labelled rows; set ways to {max(len(found), 2)} or less")
    if max(found) >= len(data.info.classes):
        raise UserError(f"label {max(found)} has no class name: labels must lie below {len(data.info.classes)}")
    return Pool(rows.images(), found)


def first_network(pool: Pool, data: Dataset, start: Net | None, *, ways: int, labels: Labels, widths: tuple[int, ...], hidden: int) -> Net:
    """A copy of `start`, or a fresh `ConvNet`. Raises UserError where `start` does not fit the images or the number of outputs."""
    outputs = ways if labels == "slots" else len(data.info.classes)
    shape = data.info.shape
    if start is None:
        mean, std = loop.pixel_stats(pool.images)
        return networks.convnet(shape, outputs, widths=widths, hidden=hidden, mean=mean, std=std)
    if tuple(start.arch["shape"]) != tuple(shape) or start.arch["classes"] != outputs:
        raise UserError(
            f"the model to start from takes images {tuple(start.arch['shape'])} of {start.arch['classes']} classes; "
            f"here they are {tuple(shape)} and {outputs}"
        )
    return copy.deepcopy(start)


def sensor(gain: float, offset: float, generator: torch.Generator) -> tuple[float, float]:
    """One device's gain, even in 1 - gain to 1 + gain, and its offset, even in -offset to offset."""
    draw = (2 * torch.rand(2, generator=generator) - 1).tolist()
    return 1 + gain * draw[0], offset * draw[1]


def sensed(images: Tensor, gain: float, offset: float) -> Tensor:
    """What a sensor gives of images in [0, 1]: gain times the value and the offset, cut to its range."""
    return (gain * images + offset).clamp(0, 1)


def draw_stream(
    pool: Pool, *, ways: int, shots: int, labels: Labels, gain: float, offset: float, generator: torch.Generator, device: str = "cpu"
) -> Stream:
    """A new device's stream: `shots` rows of each of `ways` classes drawn by chance, in one shuffled order, through its own sensor.

    A class with fewer rows gives those that it has.
    """
    classes = list(pool.of_class)
    drawn = [classes[at] for at in torch.randperm(len(classes), generator=generator)[:ways].tolist()]
    rows, given = [], []
    for slot, name in enumerate(drawn):
        of = pool.of_class[name]
        rows.append(of[torch.randperm(len(of), generator=generator)[:shots]])
        given.append(torch.full((len(rows[-1]),), slot if labels == "slots" else name))
    order = torch.randperm(sum(len(part) for part in rows), generator=generator)
    images = loop.to_float(pool.images[torch.cat(rows)[order].numpy()], device)
    return Stream(sensed(images, *sensor(gain, offset, generator)), torch.cat(given)[order].to(device))


def learn_online(
    net: nn.Module,
    stream: Stream,
    lr: float,
    only: list[nn.Parameter] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:
    """One step of plain SGD on the loss of each sample, in the stream's order; nothing is kept and nothing seen twice.

    Changes the weights `only`, by default all. (TinyOL, TinyReptile: batch 1, no momentum.)
    """
    weights: list[Tensor] = [*(net.parameters() if only is None else only)]
    for image, label in zip(stream.images.split(1), stream.labels.split(1), strict=True):
        slopes = torch.autograd.grad(loss(net(image), label), weights)
        with torch.no_grad():
            torch._foreach_add_(weights, slopes, alpha=-lr)


def decayed(step: float, at: int, rounds: int) -> float:
    """A step size that falls in a line from `step` in round 0 to nothing behind the last."""
    return step * (1 - at / rounds)
