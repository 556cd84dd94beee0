"""Deep networks without short cuts, which plain training does badly on: fully connected ones, and convolutions one behind the other.

Self-contained as `networks.py` is: a copy of both travels with registered models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tasks.core.networks import Net


class Plain(Net):
    """`depth` layers of `width` values or channels each, every one followed by ReLU; a last layer reads what the `body` gives.

    arch besides `shape` and `classes`: `depth`, `width`, `norm` (`batch`: batch normalisation before each ReLU; empty: none) and `dropout`
    (behind each ReLU).
    """

    body: nn.Sequential

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        self.head = nn.Linear(arch["width"], arch["classes"])

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.body((images - self.mean) / self.std)
        return features

    def block(self, layer: nn.Module, norm: nn.Module) -> list[nn.Module]:
        """A layer with what follows it."""
        dropout = self.arch["dropout"]
        return [layer, *([norm] if self.arch["norm"] == "batch" else []), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]


class FCN(Plain):
    """Fully connected layers."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        channels, height, width = arch["shape"]
        layers: list[nn.Module] = [nn.Flatten()]
        given = channels * height * width
        for _ in range(arch["depth"]):
            layers += self.block(nn.Linear(given, arch["width"]), nn.BatchNorm1d(arch["width"]))
            given = arch["width"]
        self.body = nn.Sequential(*layers)


class PlainConv(Plain):
    """3x3 convolutions; the first two halve images of 16 pixels and more. The mean over all places goes to the last layer."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        given, *size = arch["shape"]
        layers: list[nn.Module] = []
        for at in range(arch["depth"]):
            stride = 2 if at < 2 and min(size) >= 16 else 1
            layers += self.block(nn.Conv2d(given, arch["width"], 3, stride, padding=1), nn.BatchNorm2d(arch["width"]))
            given = arch["width"]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
