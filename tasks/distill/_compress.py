"""What makes a `ConvNet` smaller: channels cut out, layers split in two, weights set to 0, a head behind the first block, 8-bit weights.

A technique that changes the shape gives a new network and leaves the one that came in as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as pruning

from tasks.core import networks
from tasks.core.compact import Compact
from tasks.core.networks import ConvNet, Net

Layer = nn.Conv2d | nn.Linear


def prune_channels(net: ConvNet, share: float) -> ConvNet:
    """A network with a share of the channels of each convolution and of the hidden units: those of the largest L1 norm, in their order."""
    return with_channels(net, [_largest(_ends(net.body[at])[1].weight, share) for at in layers_of(net)])


def layers_of(net: ConvNet) -> list[int]:
    """Positions in the body of the layers that have channels, or hidden units, which can be left out."""
    return [at for at, layer in enumerate(net.body) if isinstance(layer, Layer | nn.Sequential)]


def with_channels(net: ConvNet, kept: list[Tensor]) -> ConvNet:
    """A network with these channels of each layer of `layers_of`, in their order."""
    slim = _built({**net.arch, "widths": [len(rows) for rows in kept[:-1]], "hidden": len(kept[-1])})
    before, given = int(net.arch["shape"][0]), torch.arange(net.arch["shape"][0])
    classes = torch.arange(net.arch["classes"])
    with torch.no_grad():
        for at, rows in zip(layers_of(net), kept, strict=True):
            _narrow(net.body[at], slim.body[at], rows, given, before)
            if isinstance(norm := net.body[at + 1], nn.BatchNorm2d):
                held = slim.body[at + 1].state_dict()
                for name, values in norm.state_dict().items():
                    held[name].copy_(values[rows] if values.dim() else values)
            before, given = len(_ends(net.body[at])[1].weight), rows
        _narrow(net.head, slim.head, classes, given, before)
        if isinstance(net, Compact) and net.early is not None:
            _narrow(net.early, cast(nn.Module, cast(Compact, slim).early), classes, kept[0], net.arch["widths"][0])
    return slim


def low_rank(net: ConvNet, share: float) -> ConvNet:
    """A network whose layers, but the first and the last, are two of a share of their rank, where two are smaller; the best ones by SVD."""
    ranks: dict[str, int] = {}
    for position, layer in enumerate(net.body):
        if isinstance(layer, Layer) and position:
            rows, columns = layer.weight.flatten(1).shape
            rank = max(1, round(share * min(rows, columns)))
            ranks |= {str(position): rank} if rank * (rows + columns) < rows * columns else {}
    thin = _compact(net, ranks={**net.arch.get("ranks", {}), **ranks})
    with torch.no_grad():
        for at, rank in ranks.items():
            whole, (first, last) = cast(Layer, net.body[int(at)]), _ends(thin.body[int(at)])
            u, s, v = torch.linalg.svd(whole.weight.flatten(1), full_matrices=False)
            roots = s[:rank].sqrt()
            first.weight.copy_((roots[:, None] * v[:rank]).view_as(first.weight))
            last.weight.copy_((u[:, :rank] * roots).view_as(last.weight))
            cast(Tensor, last.bias).copy_(cast(Tensor, whole.bias))
    return thin


def prune(net: Net, sparsity: float) -> None:
    """Make the smallest weights of all layers together 0, in place: a share of them."""
    named = [(layer, "weight") for layer in net.modules() if isinstance(layer, Layer)]
    pruning.global_unstructured(named, pruning_method=pruning.L1Unstructured, amount=sparsity)
    for layer, name in named:
        pruning.remove(layer, name)


@contextmanager
def zeros_held(net: Net) -> Iterator[None]:
    """Weights of layers that are 0 now are so afterwards, whatever is learnt between."""
    layers = [layer for layer in net.modules() if isinstance(layer, Layer)]
    for layer in layers:
        pruning.custom_from_mask(layer, "weight", layer.weight != 0)
    yield
    for layer in layers:
        pruning.remove(layer, "weight")


def with_exit(net: ConvNet, threshold: float) -> Compact:
    """A network with a head behind the first block that has learnt nothing. Call it inside `loop.seeded`."""
    return _compact(net, exit=threshold)


def quantised(net: ConvNet) -> Compact:
    """A network whose weights are 8-bit integers."""
    small = _compact(net)
    small.quantise()
    return small


def _built(arch: dict[str, Any]) -> ConvNet:
    return cast(ConvNet, networks.build(arch))


def _compact(net: ConvNet, **change: Any) -> Compact:
    """A copy of a network that can be more than a `ConvNet`; layers whose shape changed are fresh."""
    made = cast(Compact, networks.build({"ranks": {}, "exit": None, "bits": None, **net.arch, "kind": "compact", **change}))
    made.load_state_dict(net.state_dict(), strict=False)
    return made


def _largest(weights: Tensor, share: float) -> Tensor:
    """Sorted positions of a share of the rows, at least one: those of the largest L1 norm."""
    drop = len(weights) - max(1, round(share * len(weights)))
    mask = pruning.LnStructured(drop, n=1, dim=0).compute_mask(weights, torch.ones_like(weights))
    return mask.flatten(1).any(1).nonzero().flatten()


def _ends(layer: nn.Module) -> tuple[Layer, Layer]:
    """The layer that takes a layer's input and the one that gives its output: one and the same, but where it was split."""
    return (cast(Layer, layer[0]), cast(Layer, layer[-1])) if isinstance(layer, nn.Sequential) else (cast(Layer, layer), cast(Layer, layer))


def inputs_of(given: Tensor, inputs: int, channels: int) -> Tensor:
    """Which of a layer's inputs are those of the channels `given`, of so many: behind convolutions a linear layer has several of each."""
    span = inputs // channels
    return (given[:, None] * span + torch.arange(span)).flatten()


def _narrow(old: nn.Module, new: nn.Module, rows: Tensor, given: Tensor, before: int) -> None:
    """Copy what is left of a layer: `rows` of its outputs, and of its inputs those of the channels `given`, of `before`."""
    (first, last), (into, out) = _ends(old), _ends(new)
    weights = first.weight[:, inputs_of(given, first.weight.shape[1], before)]
    into.weight.copy_(weights[rows] if first is last else weights)
    if first is not last:
        out.weight.copy_(last.weight[rows])
    cast(Tensor, out.bias).copy_(cast(Tensor, last.bias)[rows])
