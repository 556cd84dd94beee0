"""What the unlearning methods share: their checks, the rows as arrays, and the loss on forget rows with wrong labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.bool_]]


def check(model: Net, forget: Dataset, retain: Dataset) -> None:
    """Raises UserError where there is nothing to forget, the two sets share a row, or their images do not fit the model."""
    if len(forget) == 0:
        raise UserError("there is nothing to forget: the forget set has no rows")
    kept = set(retain.ids())
    shared = [at for at, name in enumerate(forget.ids()) if name in kept]
    if shared:  # named by its place: the id of a row to be forgotten must not reach a log
        raise UserError(f"row {shared[0]} of the forget set is to retain too ({len(shared)} such): take it out of the retain set")
    shape = tuple(model.arch["shape"])
    for name, rows in (("retain", retain), ("forget", forget)):
        if shape != tuple(rows.info.shape):
            raise UserError(f"the model takes images {shape}; the {name} set has {tuple(rows.info.shape)}")


def retained(model: Net, forget: Dataset, retain: Dataset) -> Arrays:
    """Images (N, C, H, W), labels (N,) and which are synthetic (N,) of the labelled rows of `retain`.

    Raises UserError where there is nothing to forget or to retain, the two share a row, or the data does not fit the model.
    """
    check(model, forget, retain)
    rows = retain.where(retain.labels() >= 0)
    labels = rows.labels()
    if len(rows) == 0:
        raise UserError("there is nothing to retain: no row of the retain set has a label")
    if labels.max() >= model.arch["classes"]:
        raise UserError(f"label {labels.max()} of the retain set does not fit the model, which has {model.arch['classes']} classes")
    return rows.images(), labels, rows.synthetic()


def forgotten(model: Net, forget: Dataset) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (N, C, H, W) and labels (N,) of the labelled rows of `forget`. Raises UserError where there are none, or one does not fit."""
    rows = forget.where(forget.labels() >= 0)
    labels = rows.labels()
    if len(rows) == 0:
        raise UserError("no row of the forget set has a label: this method takes back what was learnt of labels")
    if labels.max() >= model.arch["classes"]:
        raise UserError(f"label {labels.max()} of the forget set does not fit the model, which has {model.arch['classes']} classes")
    return rows.images(), labels


def other_labels(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """For each label (N,) another one, drawn evenly. Raises UserError where there is no other."""
    if classes < 2:
        raise UserError("a network of one class has no other label to draw")
    return (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes


def wrong_label_loss(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    *,
    classes: int,
    steps: int,
    batch: int,
    weight: float,
    generator: torch.Generator,
    device: str = "cpu",
) -> Callable[[int, Net], Tensor]:
    """A loss to add at each step: `weight` * CE on a batch of these rows, with wrong labels that are drawn anew whenever a row is seen."""
    batches = loop.index_batches(len(labels), min(batch, len(labels)), steps, generator)
    true = torch.from_numpy(np.array(labels))

    def loss(_: int, net: Net) -> Tensor:
        at = next(batches)
        drawn = other_labels(true[at], classes, generator).to(device)
        return weight * F.cross_entropy(net(loop.to_float(images[at.numpy()], device)), drawn)

    return loss
