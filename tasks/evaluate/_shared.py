"""What the evaluation methods share: checks, and labelled rows as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net, takes


@dataclass(frozen=True)
class Rows:
    """The labelled rows of one role: ids (N,), inputs uint8, labels (N,), which are synthetic (N,).

    Inputs are images (N, C, H, W), or the bytes of texts (N, L).
    """

    ids: list[str]
    inputs: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    synthetic: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, mask: npt.NDArray[np.bool_]) -> Rows:
        """The rows at which the mask (N,) is true."""
        ids = [name for name, chosen in zip(self.ids, mask, strict=True) if chosen]
        return Rows(ids, self.inputs[mask], self.labels[mask], self.synthetic[mask])


def labelled(models: Mapping[str, Net], data: Mapping[str, Dataset], *roles: str) -> list[Rows]:
    """The labelled rows of each role. Raises UserError for no model, a missing role, one without labels, or a model that does not fit."""
    if not models:
        raise UserError("there is nothing to evaluate: no model was given")
    found = []
    for role in roles:
        if role not in data:
            raise UserError(f"the evaluation needs data in the role {role!r}; it got {', '.join(sorted(data)) or 'none'}")
        known = data[role].labels() >= 0
        rows = data[role].where(known)
        if len(rows) == 0:
            raise UserError(f"no row in the role {role!r} has a label: nothing can be measured on it")
        shape, classes = tuple(data[role].info.shape), int(rows.labels().max()) + 1
        for name, net in models.items():
            if tuple(net.arch["shape"]) != shape or net.arch["classes"] < classes:
                raise UserError(
                    f"model {name!r} takes {takes(net.arch)} of {net.arch['classes']} classes; "
                    f"role {role!r} has {data[role].holds} and labels below {classes}"
                )
        found.append(Rows(rows.ids(), rows.inputs(), rows.labels(), rows.synthetic()))
    return found
