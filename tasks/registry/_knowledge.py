"""What a version knows, from its answers: boundary images between the classes that it names, embedded; a task likewise; both compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.errors import UserError
from tasks.core.networks import Net

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Probed(NamedTuple):
    """What a version answered: `cells` (draws, K, K, D), at [i, j] the mean embedding where class i turns into j, at [i, i] the
    class's own; `calls`, the images that it was asked about."""

    cells: Floats
    calls: int


def probed(
    net: Net, probes: Pixels, embed: Callable[[Pixels], Floats], *, draws: int, candidates: int, others: int, anchors: int, bisections: int,
    most: int, device: str = "cpu",
) -> Probed:  # fmt: skip
    """Ask a network about probes (P, C, H, W) and mixtures of them; its labels are all that is looked at.

    Of the classes that it names the `most` frequent count. A class's anchors are those of its candidates that keep their label longest on
    the way to `others` probes of other classes: a network names images foreign to it too, but gives them up sooner. A class's own cell is
    the mean of the embedding of its anchors and that of all probes it was given to, both of length 1. From each anchor the way to an
    anchor of each other class gives a boundary image.
    """
    net = loop.on(net, device)
    said = answers(net, probes, device)
    classes, counts = np.unique(said, return_counts=True)
    members = [np.flatnonzero(said == at) for at in np.sort(classes[np.argsort(-counts, kind="stable")[:most]])]
    k, features, calls, half = len(members), embed(probes), len(probes), -(-bisections // 2)
    plain = np.stack([features[own].mean(0) for own in members])
    cells = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        found = [rng.choice(own, min(candidates, len(own)), replace=False) for own in members]
        if k > 1:
            # classes in turn, so that a large one does not crowd out a small one
            other = [
                rng.choice(found[(i + 1 + (n + r) % (k - 1)) % k]) for i in range(k) for n in range(len(found[i])) for r in range(others)
            ]
            start = np.repeat(np.concatenate(found), others)
            reach = boundary(net, probes, start, np.array(other), said, half, device)[0].reshape(-1, others).mean(1)
            calls += len(start) * half
            ends = np.cumsum([len(own) for own in found])[:-1]
            found = [own[np.argsort(-far, kind="stable")] for own, far in zip(found, np.split(reach, ends), strict=True)]
        found = [own[:anchors] for own in found]
        own_cells = unit(unit(plain) + unit(np.stack([features[own].mean(0) for own in found])))
        grid = np.repeat(own_cells[:, None], k, axis=1)
        if k > 1:
            pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
            start = np.concatenate([found[i] for i, _ in pairs])
            end = np.concatenate([np.resize(found[j], len(found[i])) for i, j in pairs])
            turned = embed(boundary(net, probes, start, end, said, bisections, device)[1])
            calls += len(start) * bisections
            of = np.repeat(np.arange(len(pairs)), [len(found[i]) for i, _ in pairs])
            for at, (i, j) in enumerate(pairs):
                grid[i, j] = turned[of == at].mean(0)
        cells.append(grid)
    return Probed(np.stack(cells).astype(np.float32), calls)


def boundary(net: Net, probes: Pixels, start: Labels, end: Labels, said: Labels, steps: int, device: str = "cpu") -> tuple[Floats, Pixels]:
    """Where, on the straight way from probes `start` (n,) to `end` (n,), the answer stops to be that of the start.

    Gives the share of the way (n,) in (0, 1], to 2^-steps, and the images (n, C, H, W) there. `said` (P,): the answers to the probes.
    Each step is one call for each pair; the answer may turn into a third class.
    """
    low, high = np.zeros(len(start), np.float32), np.ones(len(start), np.float32)
    for _ in range(steps):
        middle = ((low + high) / 2).astype(np.float32)
        same = answers(net, blend(probes[start], probes[end], middle), device) == said[start]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return high, blend(probes[start], probes[end], high)


def blend(one: Pixels, other: Pixels, share: Floats) -> Pixels:
    """Images (n, C, H, W) with a share (n,) of the other in each."""
    part = share[:, None, None, None]
    return np.rint(one * (1 - part) + other * part).astype(np.uint8)


def task_cells(features: Floats, labels: Labels, most: int) -> Floats:
    """Cells (K, K, D) of a task, as those of a network that does it perfectly: class means, and half-way between two of them.

    features (N, D) with labels (N,), -1 where not known. Raises UserError where there are fewer than two classes.
    """
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    if len(classes) < 2:
        raise UserError(f"the query's rows name {len(classes)} classes; valid: two or more, with a few labelled rows each")
    classes = np.sort(classes[np.argsort(-counts, kind="stable")[:most]])
    means = np.stack([features[labels == at].mean(0) for at in classes])
    cells: Floats = (means[:, None] + means[None]) / 2
    return cells


@torch.no_grad()
def embedded(encoder: Net, images: Pixels, mean: Tensor) -> Floats:
    """Features (N, D) of images (N, C, H, W), less the mean (D,)."""
    pieces = [encoder.features(loop.to_float(images[at : at + 1024])) - mean for at in range(0, len(images), 1024)]
    return torch.cat(pieces).numpy()


def answers(net: Net, images: Pixels, device: str = "cpu") -> Labels:
    """Labels (N,) that a network gives images (N, C, H, W)."""
    said: Labels = loop.predict(net, images, device=device).argmax(1).numpy()
    return said


def unit(values: Floats) -> Floats:
    """Vectors (..., D) of length 1; those of length 0 stay."""
    made: Floats = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-9)
    return made


def zoo_tasks(classes: int, sizes: Sequence[int], zoo: int, seed: int) -> list[tuple[int, ...]]:
    """The classes, sorted, that each of the zoo's networks tells apart: random ones, none twice before all of that size were drawn."""
    rng, drawn = np.random.default_rng(seed), []
    left: dict[int, set[tuple[int, ...]]] = {}
    for at in range(zoo):
        size = sizes[at % len(sizes)]
        seen = left.setdefault(size, set())
        if len(seen) == comb(classes, size):
            seen.clear()
        task = None
        while task is None or task in seen:
            task = tuple(sorted(rng.choice(classes, size, replace=False).tolist()))
        seen.add(task)
        drawn.append(task)
    return drawn


def in_order(cells: Tensor) -> Tensor:
    """Cells (B, K, K, D) of length 1, each row's own cell moved to its front, then the classes by falling cosine of their anchors."""
    anchors = cells.diagonal(dim1=1, dim2=2).transpose(1, 2)
    near = anchors @ anchors.transpose(1, 2) + 3 * torch.eye(cells.shape[1], device=cells.device)
    order = near.argsort(dim=2, descending=True, stable=True)
    return cells.gather(2, order[..., None].expand_as(cells))


def ranking_loss(model: Tensor, query: Tensor, same: Tensor, margin: float) -> Tensor:
    """Mean over n pairs of max(0, margin + hardest other - own) of cosines, for the hardest other model and the hardest other query.

    model, query (n, size) of length 1, pairs by row; `same` (n, n): true where a model and a query are of one task, so no other.
    """
    cosine = model @ query.T
    own, others = cosine.diagonal(), cosine.masked_fill(same, -4.0)
    return sum((F.relu(margin + others.max(side).values - own).mean() for side in (0, 1)), start=cosine.new_zeros(()))
