"""Networks that can be rebuilt from a small dictionary. Self-contained: a copy of this file travels with every registered model.

A network takes images (N, C, H, W) as float32 in [0, 1], standardises them itself and gives logits (N, classes); one that reads takes the
bytes of texts (N, L) in their place. Its `arch` is all that is needed, besides the weights, to build it again.
"""

from __future__ import annotations

from importlib import import_module
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


class Simplex(ConvNet):
    """`ConvNet`, then a linear map to an embedding of K - 1 values, then a last layer that is fixed: vertices of a regular simplex.

    arch besides that of `ConvNet`: `vertices` (K), `names` (class names by label) and `table` (the vertex of each class name; it may hold
    classes that are no longer told apart, so that their vertices stay taken).
    """

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        size = arch["vertices"] - 1
        self.embed = nn.Linear(arch["hidden"], size, bias=False)
        self.head = nn.Linear(size, arch["classes"], bias=False)
        self.head.weight = nn.Parameter(simplex(arch["vertices"])[[arch["table"][name] for name in arch["names"]]], requires_grad=False)

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.embed(super().features(images))
        return features


def simplex(vertices: int) -> Tensor:
    """The K vertices (K, K - 1) of a regular simplex around 0: of length 1, the cosine of any two is -1 / (K - 1).

    Raises ValueError for fewer than two.
    """
    if vertices < 2:
        raise ValueError(f"a simplex needs two vertices or more, got {vertices}")
    size = vertices - 1
    last = torch.full((1, size), (1 - (1 + size) ** 0.5) / size, dtype=torch.float64)
    corners = torch.cat([torch.eye(size, dtype=torch.float64), last])
    corners = corners - corners.mean(0)
    placed: Tensor = corners / corners.norm(dim=1, keepdim=True)
    return placed.float()


class Stitched(Net):
    """Several `ConvNet`s without normalisation in one: a path is one of them whole, or the first blocks of one, a stitch, and the last
    blocks of the next.

    arch: `anchors` (their archs, the cheapest first); `stitches`, each with `anchor` a, `after` block j of it, `into` block k of anchor
    a + 1, and `shapes` (what block j gives, what block k takes); `points`, the paths, each with `name`, `flops`, the `anchor` that it
    begins in and `stitch` (its position, or None); `point`, the path where a call names none. A net's last block is its hidden layer.
    A call leaves nothing behind on the network: calls at the same time may take different paths.
    """

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        self.anchors = nn.ModuleList([build(anchor) for anchor in arch["anchors"]])
        self.stitches = nn.ModuleList([_stitch(*stitch["shapes"]) for stitch in arch["stitches"]])

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        """The last layer of the path that is taken where a call names none."""
        head: nn.Linear = self._path(None)[-1].head
        return head

    def features(self, images: Tensor, point: int | None = None) -> Tensor:
        """Features (N, D) of images (N, C, H, W) before the last layer of a path. Raises ValueError where there is no such path."""
        first, *rest = self._path(point)
        features: Tensor = ((images - first.mean) / first.std).to(memory_format=torch.channels_last)
        if not rest:
            features = first.body(features)
            return features
        at = self.arch["points"][self.arch["point"] if point is None else point]["stitch"]
        stitch = self.arch["stitches"][at]
        # a block is a convolution, a pooling and a ReLU
        features = first.body[: 3 * (stitch["after"] + 1)](features)
        features = rest[0].body[3 * stitch["into"] :](self.stitches[at](features))
        return features

    def forward(self, images: Tensor, point: int | None = None) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1], by a path of `points`. Raises ValueError where there is no such path."""
        logits: Tensor = self._path(point)[-1].head(self.features(images, point))
        return logits

    def _path(self, point: int | None) -> list[Any]:
        points = self.arch["points"]
        at = self.arch["point"] if point is None else point
        if not 0 <= at < len(points):
            raise ValueError(f"there is no point {at}; points are 0 to {len(points) - 1}")
        first = points[at]["anchor"]
        return [self.anchors[first]] if points[at]["stitch"] is None else [self.anchors[first], self.anchors[first + 1]]


def _stitch(given: list[int], taken: list[int]) -> nn.Module:
    """A linear map between activations of these shapes: of channels where height and width are the same, else of all values."""
    if len(given) == len(taken) == 3 and given[1:] == taken[1:]:
        return nn.Conv2d(given[0], taken[0], 1)
    flat = nn.Linear(torch.Size(given).numel(), torch.Size(taken).numel())
    return nn.Sequential(nn.Flatten(), flat, nn.Unflatten(1, tuple(taken)))


KINDS: dict[str, type[Net]] = {"convnet": ConvNet, "simplex": Simplex, "stitched": Stitched}
# in modules of their own, which import this one: they are read when one is wanted
DRAWING = {"denoiser": ("tasks.core.denoiser", "ClassDenoiser"), "text_denoiser": ("tasks.core.text_to_image", "TextDenoiser")}
PLAIN = {"fcn": ("tasks.core.plain", "FCN"), "plain_conv": ("tasks.core.plain", "PlainConv")}
STREAMS = {"continual": ("tasks.core.continual", "Continual")}
READING = {"text": ("tasks.core.encoder", "TextClassifier")}
CHANGED = {"clip": ("tasks.core.clip", "ClipClassifier"), "compact": ("tasks.core.compact", "Compact")}
ELSEWHERE = {**DRAWING, **PLAIN, **STREAMS, **READING, **CHANGED}


def draws(arch: dict[str, Any]) -> bool:
    """Whether a network of this description draws images, and tells none apart."""
    return arch["kind"] in DRAWING


def reads(arch: dict[str, Any]) -> bool:
    """Whether a network of this description takes texts, and no images."""
    return arch["kind"] in READING


def takes(arch: dict[str, Any]) -> str:
    """What a network of this description is given, in words: texts, or images and their shape."""
    return "texts" if reads(arch) else f"images {tuple(arch['shape'])}"


def build(arch: dict[str, Any]) -> Net:
    """Make a network from its description. Raises ValueError for a kind that is not known."""
    kind = arch["kind"]
    if kind not in KINDS and kind in ELSEWHERE:
        module, name = ELSEWHERE[kind]
        KINDS[kind] = getattr(import_module(module), name)
    if kind not in KINDS:
        raise ValueError(f"network kind {kind!r} is not known; known: {', '.join([*KINDS, *ELSEWHERE])}")
    return KINDS[kind](arch)


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
