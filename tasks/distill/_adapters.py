"""Structured pruning adapters: a `ConvNet` whose weights stay as they are, what is learnt beside them, and its cut to some channels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tasks.core.networks import ConvNet
from tasks.distill._compress import Layer, inputs_of, layers_of, with_channels


class LowRank(nn.Module):
    """What is added to the weights (out, in, ...) of a layer: `cols` (out, r) times `rows` (r, in)."""

    def __init__(self, rows: Tensor, cols: Tensor) -> None:
        super().__init__()
        self.rows, self.cols = nn.Parameter(rows), nn.Parameter(cols)

    def added_to(self, weights: Tensor) -> Tensor:
        """The weights with the adapter; of a convolution's kernel, of odd height and width, the tap in the middle alone changes."""
        added = self.cols @ self.rows
        if weights.dim() == 2:
            return weights + added
        height, width = weights.shape[2] // 2, weights.shape[3] // 2
        return weights + F.pad(added[:, :, None, None], (width, width, height, height))


class Adapted(nn.Module):
    """A network whose body's weights are frozen, with adapters by position in the body; where there are none, it learns whole.

    Learnt besides are what the body has of biases and normalisation, and the last layer.
    """

    def __init__(self, net: ConvNet, adapters: dict[str, LowRank]) -> None:
        super().__init__()
        self.net, self.adapters = net.requires_grad_(True), nn.ModuleDict(adapters)
        for at in adapters:
            self._layer(int(at)).weight.requires_grad_(False)

    def weights(self, at: int) -> Tensor:
        """The weights (out, in, ...) by which the layer at a position of the body answers."""
        own = self._layer(at).weight
        return cast(LowRank, self.adapters[str(at)]).added_to(own) if str(at) in self.adapters else own

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        adapted = {f"body.{at}.weight": self.weights(int(at)) for at in self.adapters}
        logits: Tensor = functional_call(self.net, adapted, (images,))
        return logits

    def cut(self, kept: list[Tensor]) -> Adapted:
        """The same with some channels of each layer, in their order: rows and columns of the weights, and of the adapters."""
        before, given, adapters = int(self.net.arch["shape"][0]), torch.arange(self.net.arch["shape"][0]), {}
        for at, channels in zip(layers_of(self.net), kept, strict=True):
            if str(at) in self.adapters:
                one = cast(LowRank, self.adapters[str(at)])
                inputs = inputs_of(given, one.rows.shape[1], before)
                adapters[str(at)] = LowRank(one.rows.detach()[:, inputs], one.cols.detach()[channels])
            before, given = len(self._layer(at).weight), channels
        return Adapted(with_channels(self.net, kept), adapters)

    @torch.no_grad()
    def merged(self) -> ConvNet:
        """One dense network that answers the same, without adapters."""
        net = copy.deepcopy(self.net).requires_grad_(True)
        for at in map(int, self.adapters):
            cast(Layer, net.body[at]).weight.copy_(self.weights(at))
        return net

    def learnt(self) -> int:
        """How many values are learnt: never those that are frozen."""
        return sum(values.numel() for values in self.parameters() if values.requires_grad)

    def _layer(self, at: int) -> Layer:
        return cast(Layer, self.net.body[at])


def adapted(base: ConvNet, rank: int, init_range: float) -> Adapted:
    """A copy of the base with an adapter for each layer of its body, of a rank that is no larger than it can make use of.

    Rows begin as a linear layer's do, columns evenly within `init_range` of 0. Call it inside `loop.seeded`.
    """
    adapters = {}
    for at in layers_of(base):
        outputs, inputs = cast(Layer, base.body[at]).weight.shape[:2]
        size = min(rank, inputs, outputs)
        rows, cols = torch.empty(size, inputs), torch.empty(outputs, size).uniform_(-init_range, init_range)
        nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        adapters[str(at)] = LowRank(rows, cols)
    return Adapted(copy.deepcopy(base), adapters)


def whole(base: ConvNet) -> Adapted:
    """A copy of the base that learns with all its weights."""
    return Adapted(copy.deepcopy(base), {})


def by_magnitude(net: Adapted) -> list[Tensor]:
    """L1 norm of what makes each channel, for each layer: weights and adapter together."""
    return [net.weights(at).detach().abs().flatten(1).sum(1) for at in layers_of(net.net)]


def by_taylor(net: Adapted, loss: Callable[[], Tensor]) -> list[Tensor]:
    """What leaving each channel out would change of a loss, to first order, for each layer: |activation * gradient|.

    Of each row the mean over pixels, then the sum over rows (Molchanov et al. 2017, equation 8). `loss()` calls the network.
    """
    seen: dict[int, Tensor] = {}

    def remember(at: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], made: Tensor) -> None:
            made.retain_grad()
            seen[at] = made

        return hook

    hooks = [net.net.body[at].register_forward_hook(remember(at)) for at in layers_of(net.net)]
    training = net.training
    net.eval()  # statistics of a normalisation stay as they are
    try:
        loss().backward()  # type: ignore[no-untyped-call]
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    net.zero_grad(set_to_none=True)
    gained = [(seen[at] * cast(Tensor, seen[at].grad)).detach() for at in layers_of(net.net)]
    return [rows.flatten(2).mean(2).abs().sum(0) if rows.dim() > 2 else rows.abs().sum(0) for rows in gained]


def largest(score: Tensor, number: int) -> Tensor:
    """Positions, in their order, of so many of the channels: those of the largest score."""
    return score.cpu().topk(number).indices.sort().values
