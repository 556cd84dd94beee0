"""A `ConvNet` made smaller: layers split in two of a low rank, weights that are 8-bit integers, and a head behind the first block.

Self-contained as `networks.py` is: a copy of both travels with registered models.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core.networks import ConvNet

LARGEST = 127  # of the integers, on either side of 0
LEAST = 1e-12  # of what a row's largest weight is taken to be: a row of zeros has a scale too


class Int8Linear(nn.Linear):
    """A linear layer whose weights are 8-bit integers with a scale for each output; they are multiplied where they are used."""

    scale: nn.Parameter

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, self.weight.to(self.scale.dtype) * self.scale, self.bias)


class Int8Conv2d(nn.Conv2d):
    """A convolution of the same kind."""

    scale: nn.Parameter

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(values, self.weight.to(self.scale.dtype) * self.scale, self.bias)
        return found


class Compact(ConvNet):
    """`ConvNet`, changed after what its arch says besides.

    ranks  by position in the body, as text: the rank of the two layers that stand in one's place
    exit   share of confidence from which the head behind the first block answers, and the rest is left out; None: there is no such head
    bits   8: the weights of all layers, but not the biases, are 8-bit integers; None: they are what they were

    Rows leave one by one: what a row is answered does not depend on the others of its batch. Of a batch that leaves as a whole, such as
    of one row, the rest of the network is not run. `features` are those of the whole network.
    """

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        for at, rank in arch["ranks"].items():
            self.body[int(at)] = pair(self.body[int(at)], rank)
        self.block = 1 + next(at for at, layer in enumerate(self.body) if isinstance(layer, nn.ReLU))
        self.early: nn.Linear | None = None
        if arch["exit"] is not None:
            self.early = nn.Linear(_behind_first(arch), arch["classes"])
        if arch["bits"]:
            self.quantise()

    def quantise(self) -> None:
        """Put 8-bit integers in the place of the weights, for good."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                stored, scale = to_int8(layer.weight.detach())
                layer.__class__ = Int8Conv2d if isinstance(layer, nn.Conv2d) else Int8Linear
                # parameters still, so that they are counted; integers have no gradients
                layer.weight, layer.scale = nn.Parameter(stored, requires_grad=False), nn.Parameter(scale)
        self.arch["bits"] = 8

    def requires_grad_(self, requires_grad: bool = True) -> Compact:
        """As torch has it, but integers are left alone."""
        for weights in self.parameters():
            if weights.is_floating_point():
                weights.requires_grad_(requires_grad)
        return self

    def begin(self, images: Tensor) -> Tensor:
        """What the first block gives of images (N, C, H, W) in [0, 1]."""
        values: Tensor = ((images - self.mean) / self.std).to(memory_format=torch.channels_last)
        for layer in islice(self.body, self.block):
            values = layer(values)
        return values

    def end(self, values: Tensor) -> Tensor:
        """Logits (N, classes) of what the first block gave."""
        for layer in islice(self.body, self.block, None):
            values = layer(values)
        logits: Tensor = self.head(values)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1], by the first head that is confident."""
        values = self.begin(images)
        if self.early is None:
            return self.end(values)
        logits: Tensor = self.early(values.flatten(1))
        stay = logits.softmax(1).amax(1) < self.arch["exit"]
        if not stay.any():
            return logits
        if stay.all():
            return self.end(values)
        logits = logits.clone()
        logits[stay] = self.end(values[stay])
        return logits

    def both(self, images: Tensor) -> list[Tensor]:
        """Logits (N, classes) of each head, the last one's first, for images (N, C, H, W) in [0, 1]."""
        values = self.begin(images)
        return [self.end(values), *([] if self.early is None else [self.early(values.flatten(1))])]


def to_int8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 and scales (out, 1, ...), of weights (out, ...): rounded to the nearest, symmetric around 0.

    What is 0 stays 0, and no weight moves by more than half its scale.
    """
    largest = weights.abs().amax(tuple(range(1, weights.dim())), keepdim=True)
    scale = largest.clamp_min(LEAST) / LARGEST
    return (weights / scale).round().to(torch.int8), scale


def pair(layer: nn.Module, rank: int) -> nn.Sequential:
    """Two layers of a rank that fit in the place of one: of a convolution, the same one with `rank` channels and one of single pixels."""
    if isinstance(layer, nn.Conv2d):
        how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "bias": False}
        return nn.Sequential(nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **how), nn.Conv2d(rank, layer.out_channels, 1))  # type: ignore[arg-type]
    assert isinstance(layer, nn.Linear)
    return nn.Sequential(nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features))


def _behind_first(arch: dict[str, Any]) -> int:
    _, height, width = arch["shape"]
    stride = 2 if min(height, width) >= 16 else 1
    values: int = arch["widths"][0] * (-(-height // stride) // 2) * (-(-width // stride) // 2)
    return values
