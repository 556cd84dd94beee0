"""Joins versions of one family by stitches to one elastic version: many points of accuracy against FLOPs, one chosen at each request.

Paper   Stitchable Neural Networks (CVPR 2023), arXiv 2302.06586
Idea    a stitch is a linear map from behind a block of a network to before a block of the next larger one, by least squares on the
        activations of 100 images; then each step trains one path, drawn evenly, and with it the networks themselves (the anchors)
Small   `ConvNet`s on Fashion-MNIST, 3 anchors, 6 stitches, 5 seeds: the stitched points reach .835 on average (alone, in as many steps
        together, .835; by least squares untrained .771; random .118), each anchor gains about .01. The largest anchor teaches, its
        class for each image (the paper: a RegNetY). Each block halves the image: a stitch leads to the next block, as in the paper's code
        for ResNets, and none is shared; `window` adds those that change size, on validation rows no better
Limits  It saves training, not accuracy: networks alone that train twice as long are .02 better (one validation seed). Joint training must
        be long enough; untrained, stitches are often below the smaller anchor. Refuses batch normalisation
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, method
from tasks.core.networks import Net, Stitched
from tasks.core.progress import track
from tasks.registry import Offer

Arch = dict[str, Any]


class Config(MethodConfig):
    """Which stitches, and how they are begun and trained."""

    pairs: Literal["same size", "window"] = Field("same size", description="blocks that are stitched")  # paper's code for ResNet and Swin
    init: Literal["least squares", "random"] = Field("least squares", description="first weights of the stitches")  # paper
    samples: int = Field(100, ge=1, description="rows of `train` whose activations the least squares are solved on")  # paper
    steps: int = Field(3600, ge=0, description="batches of joint training; 0: none")  # 400 for each point of three anchors
    batch: int = Field(64, ge=1, description="rows of a batch")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")  # paper: a tenth of that from scratch
    weight_decay: float = Field(0.05, ge=0)  # paper's code
    kd: float = Field(0.5, ge=0, le=1, description="weight of the largest anchor's answer; the label has the rest")  # paper's code
    point: int | Literal["largest"] = Field("largest", description="which answers unasked: an index by FLOPs, or the largest anchor")


SMOKE = Config(pairs="window", samples=20, steps=6, batch=16, point=1)


@method(
    paper="Stitchable Neural Networks (CVPR 2023)",
    arxiv="2302.06586",
    claim="the points of one stitched network are on par with networks trained on their own at the same FLOPs",
)
def stitching(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Net:
    """One network of kind `stitched` with all paths through the offer's networks, its points sorted by FLOPs.

    Needs `nets`, two or more `ConvNet`s without normalisation, of as many blocks each and the same images and classes: the anchors; and
    `data["train"]` with labels. With labelled held-out rows `data["choose"]` each point in the arch gets its accuracy there, `held_out`;
    they decide nothing. Raises UserError where one of these is missing or does not fit, where held-out rows are test rows, where there is
    no such point, and where training diverged.
    """
    check_anchors({name: net.arch for name, net in offer.nets.items()})
    train = labelled(offer, "train")
    choose = labelled(offer, "choose") if "choose" in offer.data else None
    if choose is not None and "test" in choose.column("split").to_pylist():
        raise UserError("rows 'choose' hold rows of the split 'test': what points are chosen by must not measure them; hold out others")
    with loop.seeded(seed) as generator:
        net = joined(offer.nets, window=cfg.pairs == "window")
        if cfg.point != "largest":
            net.arch = at_point(net, cfg.point).arch
        images, labels = train.images(), train.labels()
        net.to(device)
        if cfg.init == "least squares":
            some = torch.randperm(len(images), generator=generator)[: cfg.samples]
            fit_stitches(net, loop.to_float(images[some.numpy()], device))
        sizes = {"steps": cfg.steps, "batch": cfg.batch}
        tune(net, images, labels, **sizes, lr=cfg.lr, weight_decay=cfg.weight_decay, kd=cfg.kd, generator=generator, device=device)
    net.cpu().eval()
    if choose is not None:
        for point, (_, _, accuracy) in zip(net.arch["points"], curve(net, choose), strict=True):
            point["held_out"] = accuracy
    return net


def curve(net: Net, rows: Dataset) -> list[tuple[str, int, float]]:
    """Name, FLOPs and accuracy of each point on labelled rows, by rising FLOPs. Raises UserError for a network without points."""
    images, labels = rows.images(), rows.labels()
    return [
        (point["name"], point["flops"], float((loop.predict(at_point(net, at), images).argmax(1).numpy() == labels).mean()))
        for at, point in enumerate(points(net))
    ]


def within(net: Net, budget: int) -> int:
    """The point of the most FLOPs an image that are not more than the budget. Raises UserError where even the cheapest needs more."""
    fitting = [at for at, point in enumerate(points(net)) if point["flops"] <= budget]
    if not fitting:
        cheapest = points(net)[0]
        raise UserError(f"no point keeps within {budget} FLOPs: the cheapest, {cheapest['name']}, needs {cheapest['flops']}")
    return fitting[-1]


def at_point(net: Net, point: int) -> Net:
    """The same weights, not copied, taking this point where a call names none. Raises UserError where there is no such point."""
    if not 0 <= point < len(points(net)):
        raise UserError(f"there is no point {point}: this network has {len(points(net))}, from 0 on")
    view = copy.copy(net)
    view.arch = {**net.arch, "point": point}
    return view


def flops(net: Net, point: int | None = None) -> int:
    """Multiplications of one image along a point, by default the one taken where a call names none. Raises UserError as `at_point`.

    Of convolutions and linear layers; as in the paper, a multiplication with its addition counts as one.
    """
    view = net if point is None else at_point(net, point)
    return int(points(view)[view.arch["point"]]["flops"])


def points(net: Net) -> list[dict[str, Any]]:
    """The points as they stand in the arch. Raises UserError for a network that has none."""
    if not isinstance(net, Stitched):
        raise UserError(f"a network of kind {net.arch['kind']!r} has no points; registry.stitching makes one that does")
    return list(net.arch["points"])


def blocks(arch: Arch) -> list[tuple[list[int], int]]:
    """What each block of a `ConvNet` gives, (C, H, W) or for the hidden layer (D,), and its multiplications for one image."""
    channels, height, width = arch["shape"]
    found: list[tuple[list[int], int]] = []
    for at, out in enumerate(arch["widths"]):
        stride = 2 if at == 0 and min(height, width) >= 16 else 1
        height, width = -(-height // stride), -(-width // stride)
        cost = 9 * channels * out * height * width
        channels, height, width = out, height // 2, width // 2
        found.append(([channels, height, width], cost))
    return [*found, ([arch["hidden"]], channels * height * width * arch["hidden"])]


def net_flops(arch: Arch, start: int = 0) -> int:
    """Multiplications of one image in a `ConvNet`, from block `start` to its answer."""
    return sum(cost for _, cost in blocks(arch)[start:]) + int(arch["hidden"]) * int(arch["classes"])


def path_flops(arch: Arch, point: Mapping[str, Any]) -> int:
    """Multiplications of one image along a point of a `Stitched`'s arch."""
    first = arch["anchors"][point["anchor"]]
    if point["stitch"] is None:
        return net_flops(first)
    stitch = arch["stitches"][point["stitch"]]
    given, taken = stitch["shapes"]
    begun = sum(cost for _, cost in blocks(first)[: stitch["after"] + 1])
    mapped = (given[0] if given[1:] == taken[1:] else math.prod(given)) * math.prod(taken)
    return begun + mapped + net_flops(arch["anchors"][point["anchor"] + 1], stitch["into"])


def paired(depth: int, kernel: int = 2, stride: int = 1) -> list[tuple[int, int]]:
    """Pairs (behind block j, before block k > 0) that a window sliding over block numbers meets, each once. Section 3.3 of the paper."""
    found: list[tuple[int, int]] = []
    for at in range(0, depth, stride):
        window = range(at, min(at + kernel, depth))
        found += [(j, k) for j in window for k in window if k > 0 and (j, k) not in found]
    return found


def joined(nets: Mapping[str, Net], *, window: bool) -> Stitched:
    """Copies of the networks as anchors, sorted by FLOPs, with stitches of random weights between neighbours, and all points.

    Stitches lead from the smaller to the larger network only, and a path has one at most. `window`: of all pairs of `paired`, else of
    those whose activations have one height and width.
    """
    ordered = sorted(nets, key=lambda name: net_flops(nets[name].arch))
    archs = [copy.deepcopy(nets[name].arch) for name in ordered]
    found: list[dict[str, Any]] = [{"name": name, "anchor": at, "stitch": None} for at, name in enumerate(ordered)]
    stitches: list[dict[str, Any]] = []
    for at in range(len(archs) - 1):
        ours, theirs = ([shape for shape, _ in blocks(arch)] for arch in archs[at : at + 2])
        for after, into in paired(len(ours)):
            if window or ours[after][1:] == theirs[into - 1][1:]:
                name = f"{ordered[at]}[:{after + 1}] > {ordered[at + 1]}[{into}:]"
                found.append({"name": name, "anchor": at, "stitch": len(stitches)})
                stitches.append({"anchor": at, "after": after, "into": into, "shapes": [ours[after], theirs[into - 1]]})
    shared = {key: archs[-1][key] for key in ("classes", "mean", "std")}
    arch: Arch = {"kind": "stitched", "shape": list(archs[-1]["shape"]), **shared, "anchors": archs, "stitches": stitches}
    arch["points"] = sorted(({**point, "flops": path_flops(arch, point)} for point in found), key=lambda point: point["flops"])
    arch["point"] = next(at for at, point in enumerate(arch["points"]) if point["anchor"] == len(archs) - 1)
    made = Stitched(arch)
    for anchor, name in zip(made.anchors, ordered, strict=True):
        anchor.load_state_dict(nets[name].state_dict())
    return made


def activations(anchor: Any, images: Tensor) -> list[Tensor]:
    """What each block gives for images (N, C, H, W) in [0, 1], the hidden layer last."""
    found, depth = [(images - anchor.mean) / anchor.std], len(anchor.arch["widths"])
    for at in range(depth + 1):
        found.append(anchor.body[3 * at : 3 * (at + 1) if at < depth else None](found[-1]))
    return found[1:]


def least_squares(given: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (E, D) and bias (E,) of the linear map from rows (N, D) to rows (N, E) of the least squared error, by the pseudo-inverse.

    Of several such maps the smallest. Section 3.2 of the paper.
    """
    rows = F.pad(given.double(), (0, 1), value=1.0)  # the bias
    solved = (torch.linalg.pinv(rows) @ taken.double()).to(given.dtype)
    return solved[:-1].T, solved[-1]


@torch.no_grad()
def fit_stitches(net: Stitched, images: Tensor) -> None:
    """Set each stitch, in place, to the least squares between what its blocks give and take for images (N, C, H, W) in [0, 1]."""
    found = [activations(anchor, images) for anchor in net.anchors]
    for layer, stitch in zip(net.stitches, net.arch["stitches"], strict=True):
        given, taken = found[stitch["anchor"]][stitch["after"]], found[stitch["anchor"] + 1][stitch["into"] - 1]
        linear: Any = layer
        if isinstance(layer, nn.Sequential):
            linear, given, taken = layer[1], given.flatten(1), taken.flatten(1)
        else:  # each place is a row
            given, taken = (maps.permute(0, 2, 3, 1).flatten(0, 2) for maps in (given, taken))
        weight, bias = least_squares(given, taken)
        linear.weight.copy_(weight.reshape(linear.weight.shape))
        linear.bias.copy_(bias)


def tune(
    net: Stitched,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    kd: float,
    generator: torch.Generator,
    device: str = "cpu",
) -> None:
    """Train the stitches and all anchors in place, one path a batch: `(1 - kd) * CE(label) + kd * CE(class by the largest anchor)`.

    images (N, C, H, W), labels (N,). The largest anchor teaches as it was before. Weights that a step's path does not touch stay as they
    are. Raises UserError where training diverged.
    """
    teacher = copy.deepcopy(net.anchors[-1])
    targets = torch.from_numpy(np.array(labels))
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = loop.one_cycle(optimiser, lr, steps, warm_up=0.1)
    batches = loop.index_batches(len(images), batch, steps, generator)
    for _ in track(range(steps), "stitching"):
        at = next(batches)
        point = int(torch.randint(len(net.arch["points"]), (), generator=generator))
        seen = loop.to_float(images[at.numpy()], device)
        with torch.no_grad():
            given = teacher(seen).argmax(1)
        logits = net(seen, point)
        loss = (1 - kd) * F.cross_entropy(logits, targets[at].to(device)) + kd * F.cross_entropy(logits, given)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    loop.check_finite(net, "stitching", lr)


def check_anchors(archs: Mapping[str, Arch]) -> None:
    """Raises UserError where there are fewer than two networks, or one cannot be an anchor beside the others."""
    if len(archs) < 2:
        raise UserError(f"stitching needs two or more versions, got {len(archs)}")
    first = next(iter(archs))
    for name, arch in archs.items():
        if arch["kind"] != "convnet":
            raise UserError(f"{name} cannot be stitched: it is of kind {arch['kind']!r}, and blocks are known of 'convnet' alone")
        if arch.get("norm"):
            raise UserError(f"{name} cannot be stitched: each path would need batch normalisation of its own; train without 'norm'")
        for key, of in {"images": "shape", "classes": "classes"}.items():
            if arch[of] != archs[first][of]:
                raise UserError(f"{first} and {name} cannot be stitched: they differ in {key} ({archs[first][of]} and {arch[of]})")
        if len(arch["widths"]) != len(archs[first]["widths"]):
            raise UserError(f"{first} and {name} cannot be stitched: they have different numbers of blocks")


def labelled(offer: Offer, role: str) -> Dataset:
    """The labelled rows of a role. Raises UserError where there are none, or where they are not what the networks take."""
    rows = offer.data.get(role)
    known = rows.where(rows.labels() >= 0) if rows is not None and len(rows) else None
    if known is None or len(known) == 0:
        raise UserError(f"stitching needs labelled rows {role!r}")
    arch = next(iter(offer.nets.values())).arch
    ours, theirs = (tuple(known.info.shape), len(known.info.classes)), (tuple(arch["shape"]), arch["classes"])
    if ours != theirs:
        raise UserError(f"rows {role!r} are images {ours[0]} of {ours[1]} classes; the versions take {theirs[0]} and {theirs[1]}")
    return known
