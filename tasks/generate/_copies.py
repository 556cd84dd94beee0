"""Synthetic rows that are near copies of real ones: a copy of somebody's picture is that person's data, whoever drew it.

A row is a near copy if it lies nearer to some real row than all but a small share of real rows lie to each other, in pixels or in features.
So of samples that are as different from the rows as these are from each other, that share goes in either space, and no more. Features are
the magnitudes of the picture's Fourier transform: they do not change where a picture is moved, and hardly where it is a little brighter.
Near copies by distance to the nearest neighbours: Carlini et al., Extracting Training Data from Diffusion Models (2023), arXiv 2301.13188.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.core.dataset import QUARANTINE, Dataset, decode
from tasks.core.errors import UserError
from tasks.core.method import Made

Points = npt.NDArray[np.float64]  # doubles: the difference of near squares must still tell a copy from a neighbour
AT_ONCE = 2048  # real rows in memory
COMPARED = 2000  # real rows whose distance to the others sets the bound
SAME = 1e-4  # far less than one grey level of one pixel
SPACES = ("pixels", "features")


class Found(NamedTuple):
    """By space: each sample's distance (N,) to the nearest real row over the bound; below 1 it is a near copy."""

    pixels: Points
    features: Points

    @property
    def copies(self) -> npt.NDArray[np.bool_]:
        return np.asarray(np.minimum(self.pixels, self.features) < 1)


def points(images: npt.NDArray[np.uint8], space: str) -> Points:
    """Images (N, C, H, W) as vectors (N, D): pixels in 0..1, or the magnitudes of their Fourier transform without its constant term."""
    scaled = images / 255
    if space == "features":
        scaled = np.abs(np.fft.rfft2(scaled, norm="ortho"))
        scaled[..., 0, 0] = 0
    return np.asarray(scaled.reshape(len(images), -1))


def squared(some: Points, others: Points) -> Points:
    """Squared distances (N, M) between rows of vectors (N, D) and (M, D)."""
    found = (some**2).sum(1)[:, None] - 2 * some @ others.T + (others**2).sum(1)
    return np.asarray(found.clip(min=0))


def nearest(some: Points, real: Dataset, space: str, *, own: npt.NDArray[np.int64] | None = None) -> Points:
    """Distance (N,) of each vector to the nearest real row; `own` (N,): the position in `real` that is the vector itself, and left out."""
    best = np.full(len(some), np.inf)
    at = 0
    for _, images in real.image_batches(AT_ONCE):
        distances = squared(some, points(images, space))
        if own is not None:
            mine = np.flatnonzero((own >= at) & (own < at + len(images)))
            distances[mine, own[mine] - at] = np.inf
        np.minimum(best, distances.min(axis=1), out=best)
        at += len(images)
    return np.sqrt(best)


def near_copies(images: npt.NDArray[np.uint8], real: Dataset, share: float, *, seed: int = 0) -> Found:
    """How near samples (N, C, H, W) come to the real rows, by the bound that the share of real rows keeps to the others.

    A real row that is there twice has a distance of 0, which is no bound: such rows are left out of it. With less than two different
    real rows nothing is known, and every distance is infinite.
    """
    rng = np.random.default_rng(seed)
    own = np.sort(rng.permutation(len(real))[:COMPARED])
    sample = real.take(own).images()
    found = []
    for space in SPACES:
        among = nearest(points(sample, space), real, space, own=own)
        among = among[np.isfinite(among) & (among > SAME)]
        bound = np.quantile(among, share) if len(among) else 0.0
        distances = nearest(points(images, space), real, space)
        found.append(distances / bound if bound else np.full(len(images), np.inf))
    return Found(*found)


def without_copies(made: Made, real: Dataset, share: float, *, seed: int = 0) -> tuple[Made, pa.Table]:
    """What was made but for near copies of `real` rows; and these as rows of schema `QUARANTINE`, without their pictures.

    Raises UserError where nothing else was made.
    """
    images = decode(made.rows["image"].combine_chunks().field("bytes").to_pylist(), real.info.shape)
    found = near_copies(images, real, share, seed=seed)
    if found.copies.all():
        raise UserError(f"all {len(images)} generated rows are near copies of real ones: train the generator less, or on more rows")
    names = made.rows["sample_id"].to_pylist()
    aside = []
    for at in np.flatnonzero(found.copies).tolist():
        space = min(SPACES, key=lambda name: getattr(found, name)[at])
        reason = f"near copy of a real row: in {space} at {getattr(found, space)[at]:.2f} of the distance that real rows keep"
        aside.append({"file": "", "row": at, "column": "image", "value": names[at], "reason": reason})
    figures = {f"near_copies_{space}": float((getattr(found, space) < 1).sum()) for space in SPACES}
    kept = made.rows.filter(pa.array(~found.copies))
    return replace(made, rows=kept, figures={**made.figures, **figures}), pa.Table.from_pylist(aside, schema=QUARANTINE)
