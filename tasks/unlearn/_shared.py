"""What the unlearning methods share: their checks, and the retained rows as arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.bool_]]


def retained(model: Net, forget: Dataset, retain: Dataset) -> Arrays:
    """Images (N, C, H, W), labels (N,) and which are synthetic (N,) of the labelled rows of `retain`.

    Raises UserError where there is nothing to forget or to retain, the two share a row, or the data does not fit the model.
    """
    if len(forget) == 0:
        raise UserError("there is nothing to forget: the forget set has no rows")
    kept = set(retain.ids())
    shared = [at for at, name in enumerate(forget.ids()) if name in kept]
    if shared:  # named by its place: the id of a row to be forgotten must not reach a log
        raise UserError(f"row {shared[0]} of the forget set is to retain too ({len(shared)} such): take it out of the retain set")
    shape, classes = tuple(model.arch["shape"]), model.arch["classes"]
    if shape != tuple(retain.info.shape):
        raise UserError(f"the model takes images {shape}; the retain set has {tuple(retain.info.shape)}")
    rows = retain.where(retain.labels() >= 0)
    labels = rows.labels()
    if len(rows) == 0:
        raise UserError("there is nothing to retain: no row of the retain set has a label")
    if labels.max() >= classes:
        raise UserError(f"label {labels.max()} of the retain set does not fit the model, which has {classes} classes")
    return rows.images(), labels, rows.synthetic()
