"""Learns a few images per class whose mean embedding in ever new untrained networks is that of the class's real images.

Paper   Dataset Condensation with Distribution Matching (WACV 2023), arXiv 2110.04181
Idea    each step draws a fresh ConvNet psi with random weights and for every class c one augmentation A, the same for real and learned
        images; SGD on the images minimises sum_c || mean psi(A(real_c)) - mean psi(A(learned_c)) ||^2. No network is ever trained
Small   networks of two layers of 32 channels, the first of which halves larger images, instead of three of 128; 32 real images of a class
        instead of 256 and 500 steps instead of 20,000, with a learning rate to match, which does not fall with the number of images of a
        class. The augmentation is whole: colour, crop, cutout, scale, rotation, and flips on demand, since letters and digits do not
        survive them. Here each sample has a target too, as its family wants: the encoder's answer to the learned image. Where no row has
        a label, all rows are one class
Limits  10 images of each class of Fashion-MNIST, 5 seeds, accuracy of networks trained on them: .727 (sd .008), herded images .700 (.004),
        random ones .681 (.014). The targets are the encoder's, not learned: for those, `condense.krr_st`. Every sample depends on all
        source rows, those of other classes through the encoder: erasing one row means condensing anew. What an earlier result saves as a
        start was not measured here
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.condense import _classes, _shared, _start
from tasks.condense._course import Course
from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Made, method
from tasks.core.progress import track


class Config(_shared.Settings):
    """Settings of the matching, besides those of the encoder and of measuring."""

    outer_steps: int = Field(500, ge=0, description="steps on the images, each with a fresh network")  # original code: 20,000
    start_steps: int | None = Field(None, ge=0, description="as many where there is a start; none: outer_steps")
    outer_batch: int = Field(32, ge=1, description="real images of each class in a step")  # original code: 256
    outer_lr: float = Field(0.3, gt=0, description="learning rate of SGD on standardised pixels, times the images of the class")  # tuned
    embed_widths: tuple[int, ...] = Field(
        (32, 32), min_length=1, description="channels of the untrained networks"
    )  # paper: 128 three times
    augmentation: bool = Field(True, description="the same random change for the real and the learned images of a class")


SMOKE = Config(
    source_rows=60,
    widths=(4, 8),
    dim=8,
    encoder_steps=3,
    encoder_batch=16,
    inner_steps=3,
    nets=1,
    held_out_rows=20,
    outer_steps=6,
    outer_batch=4,
    embed_widths=(4, 4),
)
KINDS = ("color", "crop", "cutout", "scale", "rotate")  # and flip, on demand
MOMENTUM = 0.5  # original code, as all strengths below


def augmented(images: Tensor, kind: str, draw: list[float]) -> Tensor:
    """Standardised images (N, C, H, W), all changed in the same way: `kind` by `draw`, three numbers in [0, 1). Differentiable.

    Source: differentiable siamese augmentation (arXiv 2102.08259), in the strengths of its public code. What comes in from outside is 0.
    """
    one, two, three = draw
    _, _, height, width = images.shape
    if kind == "color":
        images = images + (one - 0.5)
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * 2 * two
        middle = images.mean((1, 2, 3), keepdim=True)
        return middle + (images - middle) * (0.5 + three)
    if kind == "flip":
        return images.flip(3) if one < 0.5 else images
    if kind == "crop":
        down, right = (int(u * (2 * reach + 1)) - reach for u, reach in ((one, round(height / 8)), (two, round(width / 8))))
        padded = F.pad(images, [max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)])
        return padded[:, :, max(-down, 0) :, max(-right, 0) :][:, :, :height, :width]
    if kind == "cutout":
        top, left = int(one * height) - height // 4, int(two * width) - width // 4
        mask = torch.ones(height, width, device=images.device)
        mask[max(top, 0) : top + height // 2, max(left, 0) : left + width // 2] = 0
        return images * mask
    if kind == "scale":
        across, along = (1 / 1.2 + u * (1.2 - 1 / 1.2) for u in (one, two))
        theta = [[across, 0.0, 0.0], [0.0, along, 0.0]]
    else:
        angle = (2 * one - 1) * math.radians(15)
        theta = [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    grid = F.affine_grid(torch.tensor([theta], device=images.device).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def embedder(shape: tuple[int, int, int], widths: tuple[int, ...]) -> nn.Sequential:
    """A fresh network from images (N, C, H, W) to embeddings (N, D): convolutions, each with instance norm, ReLU and mean pooling while a
    side is 4 or more; images of 16 pixels and more are halved by the first. Its weights come from torch's global generator."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for at, wide in enumerate(widths):
        stride = 2 if at == 0 and min(height, width) >= 16 else 1
        layers += [nn.Conv2d(channels, wide, 3, stride=stride, padding=1), nn.InstanceNorm2d(wide), nn.ReLU()]
        channels, height, width = wide, -(-height // stride), -(-width // stride)
        if min(height, width) >= 4:
            layers.append(nn.AvgPool2d(2))
            height, width = height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten()).requires_grad_(False)


def matching_loss(real: Tensor, learned: Tensor) -> Tensor:
    """Squared distance between the mean embeddings of real (R, D) and learned (n, D) images. (Equation 5 of the paper.)"""
    return (real.mean(0) - learned.mean(0)).square().sum()


def learn(
    images: Tensor,
    real: Tensor,
    groups: list[npt.NDArray[np.int64]],
    counts: list[int],
    *,
    widths: tuple[int, ...],
    steps: int,
    batch: int,
    lr: float,
    kinds: tuple[str, ...],
    generator: torch.Generator,
    device: str,
    watch: Course,
) -> tuple[Tensor, tuple[dict[str, float], ...]]:
    """Learned images (n, C, H, W) and the course of the loss for each class.

    images (n, C, H, W): the first `counts[0]` are those of the first class, and so on; real (R, C, H, W), of which class i has the rows
    `groups[i]`. All are standardised; without `kinds` nothing is augmented.
    """
    images = images.to(device).clone().requires_grad_()
    watch(0, images)
    optimiser = torch.optim.SGD([images], lr=lr, momentum=MOMENTUM)
    curve, since, every = [], [], max(1, steps // 50)
    for step in track(range(1, steps + 1), "condense"):
        net = embedder((images.shape[1], images.shape[2], images.shape[3]), widths).to(device)
        drawn = [real[at[torch.randperm(len(at), generator=generator)[:batch].numpy()]].to(device) for at in groups]
        own = list(images.split(counts))
        if kinds:
            for at in range(len(groups)):
                kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
                draw = torch.rand(3, generator=generator).tolist()
                drawn[at], own[at] = augmented(drawn[at], kind, draw), augmented(own[at], kind, draw)
        with torch.no_grad():
            wanted = net(torch.cat(drawn)).split([len(part) for part in drawn])
        losses = [matching_loss(*pair) for pair in zip(wanted, net(torch.cat(own)).split(counts), strict=True)]
        # the gradient for an image falls with the number of images of its class
        loss = torch.stack([part * count for part, count in zip(losses, counts, strict=True)]).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        watch(step, images)
        since.append(sum(part.item() for part in losses) / len(losses))
        if step % every == 0 or step == steps:
            curve.append({"step": float(step), "loss": sum(since) / len(since)})
            since = []
    return images.detach(), tuple(curve)


def by_class(
    start: _start.Start, groups: dict[int, npt.NDArray[np.int64]], classes: tuple[str, ...]
) -> tuple[_start.Start, dict[int, int]]:
    """The samples of a start class by class, in the order of `groups`, and how many each class has.

    Raises UserError where they are not of the very classes that the data has rows of.
    """
    counts = {label: int((start.labels == label).sum()) for label in groups}
    if not all(counts.values()) or sum(counts.values()) < len(start.labels):
        theirs, ours = (
            ", ".join("no class" if label < 0 else classes[label] for label in sorted(found))
            for found in (set(start.labels.tolist()), groups)
        )
        raise UserError(f"the start has samples of {theirs}, but the data rows of {ours}: valid is one of the same classes, or no start")
    return start.take(np.concatenate([np.flatnonzero(start.labels == label) for label in groups])), counts


@method(
    paper="Dataset Condensation with Distribution Matching (WACV 2023)",
    arxiv="2110.04181",
    claim="a network trained on a few learned images of each class beats one trained on as many random or herded real ones",
)
def distribution_matching(
    data: Dataset, held_out: Dataset, n: int, cfg: Config = Config(), *, start: Dataset | None = None, seed: int = 0, device: str = "cpu"
) -> Made:
    """Condense to n samples. Raises UserError where n or the start does not fit the rows and classes, or there are no held-out rows."""
    begun = None if start is None else _start.take_up(start, data, n, cfg.dim)
    steps = cfg.outer_steps if begun is None or cfg.start_steps is None else cfg.start_steps
    with loop.seeded(seed) as generator:
        source = _shared.prepare(data, n, **cfg.for_encoder(), generator=generator, device=device)
        drawn = _shared.random_positions(len(source.ids), n, generator)
        labels = _classes.labels_of(data, source.ids)
        groups = _classes.by_class(labels)
        counts = _classes.shares(groups, n)
        first = np.concatenate([at[torch.randperm(len(at), generator=generator)[: counts[c]].numpy()] for c, at in groups.items()])
        real = (loop.to_float(source.images) - source.mean) / source.std
        arms = {"random": (loop.to_float(source.images[drawn]), source.targets[drawn])}
        before, of, origins, every = real[first], labels[first], first, source.ids
        if begun is not None:
            begun, counts = by_class(begun, groups, data.info.classes)
            before, of = (begun.images - source.mean) / source.std, begun.labels
            origins, every = begun.descent(source.ids)
            arms["start"] = (begun.images, _start.answered(begun, source, device))
        course = Course(steps, source.mean, source.std)
        learned, curve = learn(
            before,
            real,
            list(groups.values()),
            list(counts.values()),
            widths=cfg.embed_widths,
            steps=steps,
            batch=cfg.outer_batch,
            lr=cfg.outer_lr,
            kinds=(*KINDS, *(["flip"] if cfg.flips else [])) if cfg.augmentation else (),
            generator=generator,
            device=device,
            watch=course,
        )
        pixels = learned.cpu() * source.std + source.mean
        with torch.no_grad():
            targets = source.encoder(pixels.to(device)).cpu()
        arms["learned"] = (pixels, targets)
        losses = _shared.held_out_losses(arms, held_out, source, **cfg.for_measuring(), seed=seed, device=device)
    figures = {
        "heldout_loss": losses["learned"],
        "heldout_loss_random": losses["random"],
        "encoder_loss": source.encoder_loss,
        "pixels_moved": float((learned.cpu() - before).abs().mean()),
    }
    if begun is not None:
        figures["heldout_loss_start"] = losses["start"]
    if curve:
        figures |= {"matching_loss_first": curve[0]["loss"], "matching_loss": curve[-1]["loss"]}
    rows = _shared.condensed_rows("distribution_matching", pixels, targets, origins, every, of)
    return Made(rows, figures, curve, course.rows(rows["sample_id"].to_pylist()))
