"""Measure classifiers on test rows that were shifted as cameras and light shift them, and on rows of other origin.

Paper   Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (2019), arXiv 1903.12261
Idea    the same labelled rows are spoiled by noise, blur, low contrast, glare and coarse pixels at a stated severity, and answered again.
        A row's share of shifts that are answered right is kept, so that two models can be compared sample by sample. Rows of another
        origin (roles that begin with `shift `) are measured as they are
Small   five of the fifteen corruptions, one of each kind, with the constants that the authors' code has for images of 32 pixels
Limits  nothing is said of shifts that are not in the list. Below 32 pixels a blur of the same width takes more away, so that figures of
        image sizes do not compare
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, metrics
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.method import MethodConfig, method
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.evaluate._shared import labelled

PER_SAMPLE = pa.schema([("model", pa.string()), ("sample_id", pa.string()), ("shifted", pa.float64())])
OTHER = "shift "

# constants of the authors' code for 32-pixel images, by severity 1 to 5
NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
GLARE = (0.05, 0.1, 0.15, 0.2, 0.3)
PIXELS = (0.95, 0.9, 0.85, 0.75, 0.65)


class Config(MethodConfig):
    """Settings."""

    severity: int = Field(3, ge=1, le=5, description="how strong the shifts are")  # the middle one of the paper's five


SMOKE = Config(severity=1)


@method(
    paper="Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (2019)",
    arxiv="1903.12261",
    claim="accuracy under common shifts, paired by sample, tells apart models that are equal on clean rows",
)
def shifts(
    models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Config = Config(), *, seed: int = 0, device: str = "cpu"
) -> Evidence:
    """Figures of each model: `shifted_accuracy`, the mean over the shifts of role `test`; `worst_shift_accuracy`, the lowest of all; and
    `accuracy_<shift>` of each, those of roles `shift <name>` included.

    Raises UserError where there is no model, no labelled row in a role, or a model does not fit the data.
    """
    if "test" in data and data["test"].reads:
        raise UserError("the shifts are those of images, and these rows are texts: take the rules on shifts out of registry.rules")
    others = sorted(role for role in data if role.startswith(OTHER))
    rows, *elsewhere = labelled(models, data, "test", *others)
    figures: dict[str, dict[str, Figure]] = {}
    tables = []
    spoiled = {name: spoil(rows.inputs, name, cfg.severity, seed) for name in SHIFTS}
    for model, net in zip(models, track(list(models.values()), "shifts"), strict=True):
        hits = {name: loop.predict(net, images, device=device).argmax(1).numpy() == rows.labels for name, images in spoiled.items()}
        of_row = np.mean(list(hits.values()), axis=0)
        for role, part in zip(others, elsewhere, strict=True):
            hits[role.removeprefix(OTHER)] = loop.predict(net, part.inputs, device=device).argmax(1).numpy() == part.labels
        by = {f"accuracy_{name}": metrics.share(found) for name, found in hits.items()}
        worst = min(by.values(), key=lambda figure: figure.value)
        figures[model] = {"shifted_accuracy": metrics.mean(of_row, seed=seed), "worst_shift_accuracy": worst, **by}
        tables.append(pa.table({"model": [model] * len(rows), "sample_id": rows.ids, "shifted": of_row}, schema=PER_SAMPLE))
    details: dict[str, Any] = {"shifts": [*SHIFTS, *(role.removeprefix(OTHER) for role in others)], "severity": cfg.severity}
    return Evidence(figures, {role: data[role].md5 for role in ("test", *others)}, details, pa.concat_tables(tables))


def spoil(images: npt.NDArray[np.uint8], shift: str, severity: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Images (N, C, H, W), uint8, under one of `SHIFTS` at severity 1 to 5; the seed draws the noise. KeyError for an unknown one."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for at in range(0, len(images), 1024):
        clean = loop.to_float(images[at : at + 1024])
        pieces.append((SHIFTS[shift](clean, severity - 1, generator).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    return np.concatenate(pieces)


def noise(images: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise, drawn for every value."""
    return images + NOISE[at] * torch.randn(images.shape, generator=generator)


def blur(images: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Gaussian blur; edges are mirrored. Two passes, along rows and along columns, do what one over the plane would."""
    steps = torch.arange(-3, 4, dtype=torch.float32)
    weights = torch.exp(-(steps**2) / (2 * BLUR[at] ** 2))
    weights = (weights / weights.sum()).repeat(images.shape[1], 1, 1, 1)
    images = F.conv2d(F.pad(images, (3, 3, 0, 0), mode="reflect"), weights, groups=images.shape[1])
    return F.conv2d(F.pad(images, (0, 0, 3, 3), mode="reflect"), weights.mT, groups=images.shape[1])


def contrast(images: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Values drawn towards each channel's mean."""
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * CONTRAST[at] + mean


def glare(images: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """More light everywhere."""
    return images + GLARE[at]


def pixelate(images: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Fewer pixels, then as many as before."""
    height, width = images.shape[2:]
    small = (max(1, int(height * PIXELS[at])), max(1, int(width * PIXELS[at])))
    return F.interpolate(F.interpolate(images, small, mode="area"), (height, width), mode="nearest")


SHIFTS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "glare": glare,
    "pixelate": pixelate,
}
