"""Networks that can be rebuilt from a small dictionary. Self-contained: a copy of this file travels with every registered model.

A network takes images (N, C, H, W) as float32 in [0, 1], standardises them itself and gives logits (N, classes). Its `arch` is all that
is needed, besides the weights, to build it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Base: `arch` describes the network, `features` gives what stands before the last layer, `head` is that layer."""

    arch: dict[str, Any]
    head: nn.Linear
    mean: Tensor
    std: Tensor

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        self.arch = dict(arch)
        self.register_buffer("mean", torch.tensor(float(arch["mean"])))
        self.register_buffer("std", torch.tensor(float(arch["std"])))

    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) of images (N, C, H, W)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits


class ConvNet(Net):
    """3x3 convolutions, each with 2x2 max-pooling and ReLU, then one hidden layer. Images of 16 pixels and more are halved first.

    `norm` may be `batch`: batch normalisation behind each convolution.

    Raises ValueError where the image is too small for so many poolings.
    """

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        channels, height, width = arch["shape"]
        layers: list[nn.Module] = []
        for at, out in enumerate(arch["widths"]):
            stride = 2 if at == 0 and min(height, width) >= 16 else 1
            # pooling and ReLU commute; this order leaves ReLU a quarter of the values
            norm = [nn.BatchNorm2d(out)] if arch.get("norm") == "batch" else []
            layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), *norm, nn.MaxPool2d(2), nn.ReLU()]
            height, width = -(-height // stride) // 2, -(-width // stride) // 2
            channels = out
        if min(height, width) == 0:
            raise ValueError(f"images of {arch['shape'][1]}x{arch['shape'][2]} are too small for {len(arch['widths'])} poolings")
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, arch["hidden"]), nn.ReLU())
        self.head = nn.Linear(arch["hidden"], arch["classes"])

    def features(self, images: Tensor) -> Tensor:
        # channels last is nearly twice as fast on a CPU, and the weights stay as they are
        images = ((images - self.mean) / self.std).to(memory_format=torch.channels_last)
        features: Tensor = self.body(images)
        return features


KINDS: dict[str, type[Net]] = {"convnet": ConvNet}


def build(arch: dict[str, Any]) -> Net:
    """Make a network from its description. Raises ValueError for a kind that is not known."""
    if arch["kind"] not in KINDS:
        raise ValueError(f"network kind {arch['kind']!r} is not known; known: {', '.join(KINDS)}")
    return KINDS[arch["kind"]](arch)


def convnet(
    shape: tuple[int, int, int], classes: int, *, widths: tuple[int, ...], hidden: int, mean: float, std: float, norm: str = ""
) -> Net:
    """A fresh `ConvNet`. Its first weights come from torch's global generator: call it inside `loop.seeded`."""
    kind = {"kind": "convnet", "shape": list(shape), "classes": classes, "widths": list(widths), "hidden": hidden}
    kind |= {"norm": norm} if norm else {}
    return build({**kind, "mean": round(mean, 6), "std": round(std, 6)})


def parameters(net: nn.Module) -> int:
    """Number of trainable values."""
    return sum(weights.numel() for weights in net.parameters())
