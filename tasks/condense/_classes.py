"""What the condensers that keep classes apart share: the label of each source row, and how many samples each class gets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from tasks.core.dataset import Dataset
from tasks.core.errors import UserError

Ints = npt.NDArray[np.int64]


def labels_of(data: Dataset, ids: list[str]) -> Ints:
    """Labels (R,) of the rows `ids` (R,) in their order, -1 where not known."""
    known = dict(zip(data.ids(), data.labels().tolist(), strict=True))
    return np.array([known[name] for name in ids], dtype=np.int64)


def by_class(labels: Ints) -> dict[int, Ints]:
    """Positions in `labels` (R,) of each class that has any, by label; rows without one are left out. All positions under -1 where no
    row has a label."""
    found = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])}
    return found or {-1: np.arange(len(labels))}


def shares(groups: dict[int, Ints], n: int) -> dict[int, int]:
    """How many of n samples each class gets: equal numbers, no more than it has rows, what is left over to the largest classes.

    Raises UserError where n is below the number of classes, or above that of their rows.
    """
    rows = sum(len(at) for at in groups.values())
    if not len(groups) <= n <= rows:
        raise UserError(f"n = {n} samples cannot stand for {len(groups)} classes of {rows} source rows; valid: {len(groups)} to {rows}")
    order = sorted(groups, key=lambda label: (-len(groups[label]), label))
    turns = sorted((turn, place, label) for place, label in enumerate(order) for turn in range(min(len(groups[label]), n)))
    given = Counter(label for _, _, label in turns[:n])
    return {label: given[label] for label in groups}
