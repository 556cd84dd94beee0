"""Concepts that a network tells apart, and where in an image they sit: a post-hoc concept bottleneck and integrated gradients.

A concept is a kind of patch: patches are shown to the network alone, at their place on black, and their features are clustered. Its vector
is the normal of a linear SVM between a cluster and the other patches (a CAV); what an image has of it is the signed distance to that
plane. A sparse linear classifier on these distances says what concepts a class hangs on (Post-hoc Concept Bottleneck Models, 2205.15480).
"""

from __future__ import annotations

from collections.abc import Callable
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
Corners = npt.NDArray[np.int64]
SVM_ROWS = 100  # of a cluster, and as many of the others; the public code of concept bottlenecks takes 50 or 100


class Bank(NamedTuple):
    """Planes of K concepts: unit normals (K, D) and offsets (K,)."""

    vectors: Tensor
    offsets: Tensor

    def distances(self, features: Tensor) -> Tensor:
        """Signed distance of features (N, D) to each plane, (N, K), positive on the concept's side."""
        return features @ self.vectors.T + self.offsets


class Grid(NamedTuple):
    """Windows of `size` pixels, each `stride` from the next."""

    size: int
    stride: int

    def corners(self, shape: tuple[int, ...]) -> Corners:
        """Top left corners (W, 2) of all windows in images (..., H, W), row by row; the last end at the image's edge or before it."""
        tops, lefts = (np.arange(0, side - self.size + 1, self.stride) for side in shape[-2:])
        return np.stack(np.meshgrid(tops, lefts, indexing="ij"), axis=-1).reshape(-1, 2)


def grid_of(shape: tuple[int, ...], window: float, stride: float) -> Grid:
    """Windows by their share of the shorter side of images (..., H, W); a pixel at the least."""
    side = min(shape[-2:])
    return Grid(max(1, round(window * side)), max(1, round(stride * side)))


def alone(images: Pixels, corners: Corners, size: int) -> Pixels:
    """Each image (N, C, H, W) with all but its window at corners (N, 2) black."""
    shown = np.zeros_like(images)
    for at, (top, left) in enumerate(corners):
        window = np.s_[at, :, top : top + size, left : left + size]
        shown[window] = images[window]
    return shown


@torch.no_grad()
def features_of(net: Net, images: Pixels, device: str = "cpu", size: int = 1024) -> Tensor:
    """What stands before the last layer of a network in eval mode, (N, D), on the CPU."""
    return torch.cat([net.features(loop.to_float(images[at : at + size], device)).cpu() for at in range(0, len(images), size)])


def learn_bank(features: Tensor, concepts: int, svm_c: float, seed: int) -> Bank:
    """Concepts of the features (N, D) of patches: k-means, and for each cluster an SVM against as many patches of the others.

    Of a large cluster those next to its centre count. Raises UserError where the patches look all the same to the network.
    """
    from sklearn.cluster import KMeans
    from sklearn.svm import SVC

    points = features.numpy()
    distinct = len(np.unique(points, axis=0))
    if distinct < 2:
        raise UserError("all patches of these images look the same to the model: it has no concepts that could be told apart")
    rng = np.random.default_rng(seed)
    kmeans = KMeans(min(concepts, distinct), n_init=1, random_state=seed % 2**32).fit(points)
    own = kmeans.transform(points)
    vectors, offsets = [], []
    for cluster in range(kmeans.n_clusters):
        inside = kmeans.labels_ == cluster
        near = np.flatnonzero(inside)[np.argsort(own[inside, cluster], kind="stable")][:SVM_ROWS]
        others = rng.permutation(np.flatnonzero(~inside))[: len(near)]
        svm = SVC(C=svm_c, kernel="linear", random_state=0).fit(
            points[np.concatenate([near, others])], np.repeat([1, 0], [len(near), len(others)])
        )
        norm = float(np.linalg.norm(svm.coef_)) or 1.0
        vectors.append(svm.coef_[0] / norm)
        offsets.append(float(svm.intercept_[0]) / norm)
    return Bank(torch.tensor(np.array(vectors), dtype=torch.float32), torch.tensor(offsets, dtype=torch.float32))


def class_weights(distances: Tensor, inside: npt.NDArray[np.bool_], sparsity: float, seed: int) -> npt.NDArray[np.float64]:
    """Weight of each concept (K,) for a class: logistic regression with an elastic net on standardised distances (N, K).

    inside (N,): which rows are of the class; some must be and some must not.
    """
    from sklearn.linear_model import SGDClassifier

    values = distances.numpy()
    values = (values - values.mean(0)) / np.maximum(values.std(0), 1e-8)
    layer = SGDClassifier(
        loss="log_loss", penalty="elasticnet", alpha=sparsity, l1_ratio=0.99, tol=1e-3, max_iter=200, random_state=seed % 2**32
    )
    weights: npt.NDArray[np.float64] = layer.fit(values, inside).coef_[0]
    return weights


def integrated_gradients(score: Callable[[Tensor], Tensor], images: Tensor, steps: int) -> Tensor:
    """What each pixel (N, C, H, W) adds to the score (N,) of an image (N, C, H, W), from a black one on: they sum to the difference of
    the two, up to an error that falls with `steps` (midpoint rule). Axiomatic Attribution for Deep Networks, arXiv 1703.01365.
    """
    total = torch.zeros_like(images)
    for step in range(steps):
        along = (images * ((step + 0.5) / steps)).requires_grad_(True)
        total += torch.autograd.grad(score(along).sum(), along)[0]
    return images * total / steps


def peaks(maps: Tensor, grid: Grid) -> Corners:
    """Corner (N, 2) of the window in which maps (N, C, H, W) sum to most; the first of equal ones."""
    sums = F.avg_pool2d(maps.sum(1, keepdim=True), grid.size, grid.stride).flatten(1)
    return grid.corners(maps.shape)[sums.argmax(1).numpy()]


def locate(net: Net, bank: Bank, concept: int, images: Pixels, grid: Grid, steps: int, device: str = "cpu") -> Corners:
    """Where a concept sits in each image (N, C, H, W): corner (N, 2) of the window that adds most to the distance on its side."""
    vector = bank.vectors[concept].to(device)

    def score(batch: Tensor) -> Tensor:
        return net.features(batch) @ vector

    pieces = [loop.to_float(images[at : at + 256], device) for at in range(0, len(images), 256)]
    return np.concatenate([peaks(integrated_gradients(score, piece, steps).cpu(), grid) for piece in pieces])
