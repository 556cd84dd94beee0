"""Distil layer by layer: a deep network that trains badly is made to see the same likenesses between images as its guide does.

Paper   Training the Untrainable: Introducing Inductive Bias via Representational Alignment (2024), arXiv 2410.20035
Idea    L = CE + alpha * sum over layers of the guide of 1 - CKA(guide's layer, the target's layer at the same depth). Linear CKA compares
        which rows of a batch lie near each other, whatever the size and scale of the two layers, so any network can guide any other; also
        one that is not trained: then what passes over is what its build prefers, and no knowledge. Guidance may end after the first steps
        and be a kind of first weights, and the guide may look at noise.
Small   Adam with one cycle of the learning rate in place of steps down, and thin networks. CKA token by token, of the paper's language
        models, is left out. Where the guide has more layers than the target, a layer of the target gets the sum of all that fall on it.
Limits  Fashion-MNIST, 3,000 labelled rows, a fully connected target of 40 layers, 600 steps of 128, 6 seeds, test: guided 68.1% (sd 0.8),
        alone 65.4 (1.8), by an untrained guide 65.0, in the first 100 steps only 64.9, by soft labels of the same guide 63.9; the guide, a
        ConvNet a tenth as deep, 82.6. One seed in six lost by the trained guide, and what a build alone prefers did not pass over. A target
        of 20 layers trains well alone: guided 81.8 and 80.4, alone 79.7 and 80.2 (validation, 2 seeds). There without normalisation CKA
        came to .96 and accuracy stayed at chance (1 seed). A step costs half as much again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tasks.core import loop, networks
from tasks.core.dataset import Dataset, Info
from tasks.core.errors import UserError
from tasks.core.method import Taught, method
from tasks.core.networks import Net
from tasks.distill import _shared
from tasks.distill._shared import Images, begun, check, cross_entropy, fit, frozen, labelled, peers

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers that are looked at; what has no weights would shift the map
TINY = 1e-30


class Config(_shared.Student):
    """Settings. A fresh target has `depth` layers of `hidden` values, or of `widths[0]` channels."""

    target: Literal["fcn", "plain_conv", "convnet"] = Field("fcn", description="kind of a fresh target; convnet: of all `widths`")
    depth: int = Field(20, ge=1, description="layers of a fresh target that is no convnet")
    norm: Literal["batch", ""] = Field("batch", description="normalisation in a fresh target that is no convnet")  # authors' code
    dropout: float = Field(0.0, ge=0, lt=1, description="of a fresh target that is no convnet; the authors have 0.1")
    hidden: int = Field(64, ge=1, description="values of each layer of a fresh fully connected target")
    untrained: bool = Field(False, description="guide by the teacher's description with fresh weights")
    alpha: float = Field(1.0, ge=0, description="weight of the sum over layers")  # authors' code
    guided_steps: int | None = Field(None, ge=1, description="guide for the first steps only; none: for all")  # the paper's variant: 300
    noise: bool = Field(False, description="show the guide noise in place of the images")
    optimiser: Literal["adam", "sgd"] = Field("adam", description="adam with `momentum` as its first beta")  # authors' code
    lr: float = Field(3e-3, gt=0, description="peak learning rate; the authors have 1e-3")
    weight_decay: float = Field(0.0, ge=0)  # authors' code
    batch: int = Field(64, ge=64, description="rows of a batch; of fewer CKA says little")


SMOKE = Config(depth=3, hidden=8, steps=6, guided_steps=4)


def cka(one: Tensor, two: Tensor) -> Tensor:
    """Linear CKA of activations (n, ...) and (n, ...) of the same rows: 1 where they are alike up to rotation and scale, at least 0.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), K and L the centred Gram matrices; biased, so n matters. 0 where one of them is the same for
    all rows. In float32 or better.
    """
    ours, theirs = _gram(one), _gram(two)
    return (ours * theirs).sum() / (ours.norm() * theirs.norm()).clamp_min(TINY)


def _gram(activations: Tensor) -> Tensor:
    x = activations.flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    x = x - x.mean(0)
    # CKA knows no scale, and in a deep network's last layers squares of squares would be nothing in float32
    x = x / x.detach().norm().clamp_min(TINY)
    return x @ x.T


def layer_map(guide: int, target: int) -> list[int]:
    """For each layer of the guide the target's layer at the same relative depth: i -> round(i (target - 1) / (guide - 1))."""
    step = (target - 1) / (guide - 1) if guide > 1 else 1
    return [min(round(i * step), target - 1) for i in range(guide)]


@contextmanager
def watched(net: Net) -> Iterator[list[Tensor]]:
    """While it lasts, what the layers with weights give in a call, in the order in which they run, without the last one, is in the list.

    Empty the list between two calls.
    """
    found: list[Tensor] = []
    layers = [module for module in net.modules() if isinstance(module, WEIGHTED) and module is not net.head]
    hooks = [layer.register_forward_hook(lambda _module, _args, given: found.append(given)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def layers_of(net: Net, images: Tensor) -> list[Tensor]:
    """What the layers with weights of a network give for images (n, C, H, W), without the last one."""
    with watched(net) as found:
        net(images)
    return found


def distance(guide: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Sum over the guide's layers of 1 - CKA with the target's layer at the same depth; lists of activations (n, ...)."""
    pairs = zip(guide, layer_map(len(guide), len(target)), strict=True)
    return torch.stack([1 - cka(target[at], one) for one, at in pairs]).sum()


def plain(kind: str, images: Images, info: Info, *, depth: int, width: int, norm: str, dropout: float) -> Net:
    """A fresh deep network of a kind of `tasks.core.plain` for the images (N, C, H, W). Call it inside `loop.seeded`."""
    mean, std = (round(value, 6) for value in loop.pixel_stats(images))
    how = {"depth": depth, "width": width, "norm": norm, "dropout": dropout}
    return networks.build({"kind": kind, "shape": list(info.shape), "classes": len(info.classes), **how, "mean": mean, "std": std})


@method(
    paper="Training the Untrainable: Introducing Inductive Bias via Representational Alignment (2024)",
    arxiv="2410.20035",
    claim="a deep plain network guided layer by layer by a shallow trained one ends at a higher test accuracy than without a guide",
)
def guidance(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Taught:
    """A deep plain network, or a copy of `start`, trained on labels and guided by the teachers (by the mean of several). Cross-entropy is
    that of the rows with a label, likeness that of all.

    Figures: `cka_before` and `cka_after`, the mean over mapped layers and guides, on the first batch of rows as they are.

    Raises UserError where there is no teacher, no label, too few rows, a network has one layer alone, or they do not fit each other.
    """
    check(teachers, data, start)
    labelled(data, "guidance is beside the cross-entropy of labels")
    images, labels = data.images(), torch.from_numpy(data.labels())
    if len(images) < cfg.batch:
        raise UserError(f"CKA is that of {cfg.batch} different rows; the data has {len(images)}")
    with loop.seeded(seed) as generator:
        if start is None and cfg.target != "convnet":
            width = cfg.hidden if cfg.target == "fcn" else cfg.widths[0]
            student = plain(cfg.target, images, data.info, depth=cfg.depth, width=width, norm=cfg.norm, dropout=cfg.dropout)
        else:
            student = begun(start, images, data.info, widths=cfg.widths, hidden=cfg.hidden)
        guides = [frozen(net, device) for net in (peers(teachers) if cfg.untrained else teachers)]
        first = loop.to_float(images[: cfg.batch], device)
        before = likeness(guides, student.to(device), first)
        steps = count()

        def loss(seen: Tensor, at: Tensor) -> Tensor:
            on = cfg.guided_steps is None or next(steps) < cfg.guided_steps
            with watched(student) as own:
                logits = student(seen)
            value = cross_entropy(logits, labels[at].to(device))
            if on and cfg.alpha:
                shown = torch.randn(seen.shape, generator=generator).clamp(0, 1).to(device) if cfg.noise else seen
                value = value + cfg.alpha * torch.stack([distance(layers_of(guide, shown), own) for guide in guides]).mean()
            return value

        fit(student, images, loss, **cfg.for_fit(), generator=generator, device=device, what="guide", adam=cfg.optimiser == "adam")
        after = likeness(guides, student, first)
    return Taught(student.cpu().eval(), {"cka_before": before, "cka_after": after})


def likeness(guides: Sequence[Net], net: Net, images: Tensor) -> float:
    """Mean CKA over mapped layers and guides for images (n, C, H, W), the network in evaluation mode.

    Raises UserError where a network has no layer with weights before its last.
    """
    own = layers_of(net.eval(), images)
    of_guides = [layers_of(guide, images) for guide in guides]
    if not own or not all(of_guides):
        raise UserError("guidance compares layers with weights before the last one, and one of the networks has none")
    return float(np.mean([1 - float(distance(one, own)) / len(one) for one in of_guides]))
