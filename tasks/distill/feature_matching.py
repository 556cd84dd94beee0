"""Distil by hints: the student's lower half first learns to give the teacher's features, then the whole student learns to answer.

Paper   FitNets: Hints for Thin Deep Nets (2014), arXiv 1412.6550
Idea    Stage one: from the student's middle layer (guided) a regressor predicts the teacher's middle layer (hint); its squared error
        trains the regressor and the student up to that layer. Stage two, without the regressor: CE(y, p_s) + lam * KL(p_t || p_s) at
        temperature tau, lam falling evenly from `lam_first` to `lam_last`. Hints and the second stage's KL take all rows, CE those that
        have a label. Several teachers: each has its hint and its regressor, errors are averaged; stage two has the mean of their
        probabilities.
        `layers` maps: the maps after the block in the middle, a 3x3 convolution from one to the other, where both networks are built of
        blocks; features: what stands before the last layer, which every network has; auto: maps where they can be had.
Small   a three-layer ConvNet in place of 17 layers. Adam stands for the first stage's RMSProp, SGD with one cycle for the second's. The
        error is divided by the hint's mean square, so that several teachers count alike. Maps of another size are pooled to the hint's
        instead of having the regressor's kernel chosen to fit.
Limits  Fashion-MNIST, 2,000 labelled and 6,000 unlabelled rows, a student of three thin blocks, 1,000 steps, 5 seeds, test: 80.7% (sd 0.6),
        without hints 79.3 (1.2), with those of features in place of maps 78.8; but the same network on the labels 80.8: the second
        stage's loss, with its weight of 4 at the start, loses here what the hints win. Teacher 83.8. By SGD the first stage left units
        that answer nothing; a learning rate of 0.04 in the second ends near half the accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.distill import _shared
from tasks.distill._shared import Answers, begun, check, cross_entropy, fit, frozen, kl, log_mean

Layers = Literal["auto", "maps", "features"]


class Config(_shared.Student):
    """Settings; `steps` are those of the second stage."""

    lr: float = Field(0.02, gt=0, description="peak learning rate of SGD in the second stage")
    hint_steps: int = Field(300, ge=0, description="batches of the first stage; 0: distillation without hints")
    hint_lr: float = Field(0.03, gt=0, description="peak learning rate of Adam in the first stage")
    layers: Layers = Field("auto", description="what is matched")
    depth: float = Field(0.5, gt=0, le=1, description="share of each network's layers up to its hint")  # paper, section 2.2: the middle
    tau: float = Field(3.0, gt=0, description="temperature of the second stage")  # paper, section 3
    lam_first: float = Field(4.0, ge=0, description="weight of the teachers' term in the first batch")  # paper, section 3
    lam_last: float = Field(1.0, ge=0, description="and in the last")


SMOKE = Config(widths=(8,), hidden=16, hint_steps=5, steps=10, batch=16, shift=1)


def cut(net: Net, layers: Layers, depth: float) -> int | None:
    """Position in `net.body` up to which it is its first ceil(depth * layers) blocks; None: its features are meant.

    A block ends with a ReLU; the layers are the blocks and the hidden one above them, which is never taken.

    Raises UserError where `layers` is maps and the network is not built of blocks.
    """
    body = getattr(net, "body", None) if layers != "features" else None
    found = list(body) if isinstance(body, nn.Sequential) else []
    flat = next((at for at, layer in enumerate(found) if isinstance(layer, nn.Flatten)), len(found))
    ends = [at + 1 for at, layer in enumerate(found[:flat]) if isinstance(layer, nn.ReLU)]
    if ends:
        return ends[min(int(np.ceil(depth * (len(ends) + 1))), len(ends)) - 1]
    if layers == "maps":
        raise UserError(f"a network of kind {net.arch['kind']!r} has no maps to match; set 'layers' to features")
    return None


def middle(net: Net, images: Tensor, end: int | None) -> Tensor:
    """Maps (N, C, h, w) after `body[:end]`, or features (N, D) where `end` is None, of images (N, C, H, W) in [0, 1]."""
    if end is None:
        return net.features(images)
    below: nn.Sequential = net.body[:end]  # type: ignore[assignment, index]
    maps: Tensor = below(((images - net.mean) / net.std).to(memory_format=torch.channels_last))
    return maps


def regressor(guided: Tensor, hint: Tensor) -> nn.Module:
    """A fresh map from activations like `guided` to ones like `hint`: both maps (N, C, h, w), or both features (N, D)."""
    if hint.dim() == 2:
        return nn.Linear(guided.shape[1], hint.shape[1])
    return nn.Sequential(nn.AdaptiveAvgPool2d(tuple(hint.shape[2:])), nn.Conv2d(guided.shape[1], hint.shape[1], 3, padding=1))


def hint_loss(predicted: Tensor, hint: Tensor) -> Tensor:
    """Squared error as a share of the hint's mean square: 1 for a regressor that says nothing. Any shape. Paper, equation 3, rescaled."""
    return F.mse_loss(predicted, hint) / hint.square().mean().clamp_min(1e-8)


@method(
    paper="FitNets: Hints for Thin Deep Nets (2014)",
    arxiv="1412.6550",
    claim="a thin and deeper student that begins with hints beats the same student of plain distillation at equal steps, on test error",
)
def feature_matching(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """A small student of the teachers' features, then of their mean probabilities and of the labels; fresh or on from a copy of `start`.

    Raises UserError where there is no teacher, no data, they do not fit each other, or `layers` asks for maps that are not there.
    """
    check(teachers, data, start)
    images, labels = data.images(), torch.from_numpy(data.labels())
    said = Answers(teachers, data, images, shift=cfg.shift, device=device)
    with loop.seeded(seed) as generator:
        student = begun(start, images, data.info, widths=cfg.widths, hidden=cfg.hidden)
        if cfg.hint_steps:
            how = {**cfg.for_fit(), "steps": cfg.hint_steps, "lr": cfg.hint_lr}
            hinted(student, teachers, images, how, layers=cfg.layers, depth=cfg.depth, generator=generator, device=device)
        lam = iter(np.linspace(cfg.lam_first, cfg.lam_last, cfg.steps))

        def loss(seen: Tensor, at: Tensor) -> Tensor:
            logits = student(seen)
            soft = kl(log_mean(said(at, seen), cfg.tau), F.log_softmax(logits / cfg.tau, 1)).mean()
            return cross_entropy(logits, labels[at].to(device)) + next(lam) * soft

        fit(student, images, loss, **cfg.for_fit(), generator=generator, device=device)
        return student.cpu().eval()


def hinted(
    student: Net,
    teachers: Sequence[Net],
    images: _shared.Images,
    how: dict[str, Any],
    *,
    layers: Layers,
    depth: float,
    generator: torch.Generator,
    device: str,
) -> nn.ModuleList:
    """Train the student in place up to its guided layer, and give the regressors, one for each teacher; `how`: arguments of `fit`."""
    live = [frozen(net, device) for net in teachers]
    # maps go with maps: one network without any has all of them match features
    ends = [cut(net, layers, depth) for net in (student, *live)]
    ends = ends if all(ends) else [None] * len(ends)
    few = loop.to_float(images[:1], device)
    student.to(device)
    with torch.no_grad():
        guided = middle(student, few, ends[0])
        hints = [middle(net, few, end) for net, end in zip(live, ends[1:], strict=True)]
    regressors = nn.ModuleList([regressor(guided, hint) for hint in hints])

    def loss(seen: Tensor, at: Tensor) -> Tensor:
        ours = middle(student, seen, ends[0])
        with torch.no_grad():
            theirs = [middle(net, seen, end) for net, end in zip(live, ends[1:], strict=True)]
        return torch.stack([hint_loss(to(ours), hint) for to, hint in zip(regressors, theirs, strict=True)]).mean()

    # what stands above the guided layer gets no gradient, so that it stays
    fit(nn.ModuleList([student, regressors]), images, loss, **how, generator=generator, device=device, what="hints", adam=True)
    return regressors
