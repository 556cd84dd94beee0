"""Going on from an earlier condensed set: which version that is, whether it may be used, and how a method takes it up.

A start that descends from erased rows is passed over, and condensing begins anew: a deletion must not wait for somebody who edits
`params.yaml`, and what it leaves must not descend from what is gone.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

from tasks.condense import _shared
from tasks.core import erased, refs
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.settings import Settings

CAN = ("distribution_matching", "krr_st")  # methods that learn, and so have something to go on from

Ints = npt.NDArray[np.int64]


def find(settings: Settings, spec: object) -> tuple[Dataset | None, dict[str, str]]:
    """The rows that `condense.start` names, and what the result records of it; None where they must not or cannot be used, and why.

    Raises UserError where it names no fixed version of a data folder, where that holds no condensed rows, and where it cannot be had
    although nothing was erased since.
    """
    commit = _commit(settings, spec)
    try:
        ref = refs.data_ref(settings, str(spec))
    except UserError as error:
        raise UserError(f"params.yaml: 'condense.start': {error}") from None
    about = {"data": str(spec), "md5": ref.md5}
    try:
        rows = refs.open_data(settings, ref)
    except UserError as error:
        if not _erased_since(settings, commit):
            raise UserError(f"params.yaml: 'condense.start': {error}") from None
        return None, {**about, "not_used": "it can no longer be had, and rows were erased since then"}
    if rows.info.schema != "condensed":
        raise UserError(f"params.yaml: 'condense.start' must name condensed rows; those of {spec} are of schema {rows.info.schema!r}")
    if descends(rows, erased.Erased.read(settings.root / erased.FOLDER)):
        return None, {**about, "not_used": "it descends from rows that were erased"}
    return rows, about


def descends(rows: Dataset, gone: erased.Erased) -> bool:
    """Whether condensed rows were made from an erased one, or while a class that was erased as a whole still had rows."""
    if any(gone.has_class(name) for name in rows.info.classes if name not in rows.info.absent):
        return True
    parents = pa.compute.unique(rows.column("parents").combine_chunks().flatten()).to_pylist()
    return any(gone.has_id(name) for name in (*rows.ids(), *parents) if name)


def refuse(method: str, start: Dataset | None) -> None:
    """Raise UserError where a method that chooses among today's rows, and learns nothing, is given a start."""
    if start is not None:
        raise UserError(f"condense.{method} chooses anew each time and cannot go on from a start; {' and '.join(CAN)} can")


@dataclass(frozen=True)
class Start:
    """An earlier condensed set.

    images (n, C, H, W), where 0 is black and 1 white but values may lie outside; targets (n, dim), answers of the encoder of that time;
    labels (n,), -1 where not known; first (n,): the row that each sample began as; parents: all that they were made from.
    """

    images: Tensor
    targets: Tensor
    labels: Ints
    first: list[str]
    parents: list[str]

    def take(self, order: Ints) -> Start:
        """The samples in another order."""
        at = torch.from_numpy(order)
        return Start(self.images[at], self.targets[at], self.labels[order], [self.first[i] for i in order], self.parents)

    def descent(self, ids: list[str]) -> tuple[Ints, list[str]]:
        """For each sample that goes on from this one the position of the row that it began as, among all that it descends from: the rows
        `ids` of today, and the parents of the start."""
        every = list(dict.fromkeys([*ids, *self.parents]))
        at = {name: position for position, name in enumerate(every)}
        return np.array([at[name] for name in self.first], dtype=np.int64), every


def take_up(start: Dataset, data: Dataset, n: int, dim: int) -> Start:
    """Read a start. Raises UserError where it does not fit n samples, the images and classes of `data`, or targets of length `dim`."""
    if start.info.schema != "condensed":
        raise UserError(f"a start must hold condensed rows, such as data/condensed; these are of schema {start.info.schema!r}")
    if len(start) != n:
        raise UserError(f"the start has {len(start)} samples, but n is {n}: set n to {len(start)}, or begin without a start")
    if start.info.shape != data.info.shape:
        raise UserError(
            f"the start's images are of shape {start.info.shape}, those of the data of {data.info.shape}: begin without a start"
        )
    if start.info.classes != data.info.classes:
        ours, theirs = (", ".join(info.classes) or "none" for info in (data.info, start.info))
        raise UserError(f"the start is of the classes {theirs}, the data of {ours}: begin without a start")
    images, targets = (_floats(start, column) for column in ("pixels", "target"))
    if images.shape[1] != np.prod(data.info.shape) or targets.shape[1] != dim:
        raise UserError(
            f"the start has {images.shape[1]} pixels and targets of length {targets.shape[1]}, wanted are {np.prod(data.info.shape)} and "
            f"{dim}: set dim to {targets.shape[1]}, or begin without a start"
        )
    parents = start.column("parents").to_pylist()
    if not all(parents):
        raise UserError("a row of the start names no parents, so nobody could tell what its descendants are made from")
    every = list(dict.fromkeys(name for own in parents for name in own))
    return Start(images.reshape(n, *data.info.shape), targets, start.labels(), [own[0] for own in parents], every)


def targets_today(
    start: Start, source: _shared.Source, data: Dataset, *, measuring: dict[str, Any], seed: int, device: str
) -> tuple[Tensor, bool]:
    """Targets (n, dim) to go on from, and whether they are the start's own: of these and of what today's encoder says of the images, those
    with the lower loss on rows of `data`.

    An encoder that was trained on other rows speaks another language: then the start's own targets say nothing.
    """
    answers = answered(start, source, device)
    arms = {"own": (start.images, start.targets), "answers": (start.images, answers)}
    losses = _shared.held_out_losses(arms, data, source, **measuring, seed=seed, device=device)
    own = losses["own"] <= losses["answers"]
    return (start.targets if own else answers), own


@torch.no_grad()
def answered(start: Start, source: _shared.Source, device: str) -> Tensor:
    """What today's encoder says (n, dim) of the start's images."""
    answers: Tensor = source.encoder(start.images.to(device)).cpu()
    return answers


def _floats(rows: Dataset, name: str) -> Tensor:
    """A column of lists of floats (n, length); length 0 where they are not all of one length."""
    column = rows.column(name).combine_chunks()
    lengths = np.unique(pa.compute.list_value_length(column).fill_null(0).to_numpy())
    if len(lengths) != 1:
        return torch.zeros(len(rows), 0)
    return torch.from_numpy(np.array(column.flatten(), dtype=np.float32)).reshape(len(rows), -1)


def _commit(settings: Settings, spec: object) -> str:
    """The commit that a spec names for good. Raises UserError where it names none, or one that changes as work goes on."""
    path, _, revision = str(spec).partition("@")
    if not isinstance(spec, str) or not path or not revision:
        raise UserError(
            f"params.yaml: 'condense.start' must name an earlier version, such as data/condensed@v1.0, not {spec!r}: what lies in the "
            "folder now is what the stage replaces, and the result could not be made again"
        )
    found = _git(settings, "rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}")
    if found is None:
        raise UserError(f"params.yaml: 'condense.start': git knows no revision {revision!r}")
    commit = found.decode().strip()
    tag = _git(settings, "show-ref", "--verify", "--quiet", f"refs/tags/{revision.removeprefix('refs/tags/')}")
    if tag is None and not (len(revision) >= 4 and commit.startswith(revision.lower())):
        raise UserError(
            f"params.yaml: 'condense.start': {revision!r} names another version as work goes on, which DVC cannot see: write the commit, "
            f"{path}@{commit[:12]}, or a tag"
        )
    return commit


def _erased_since(settings: Settings, commit: str) -> bool:
    """Whether the list of what is erased is another than at that commit."""
    here = settings.root / erased.FOLDER / erased.LIST
    then = _git(settings, "show", f"{commit}:./{erased.FOLDER}/{erased.LIST}")
    return (here.read_bytes() if here.exists() else None) != then


def _git(settings: Settings, *words: str) -> bytes | None:
    """What git says; None where it fails."""
    ran = subprocess.run(["git", "-C", str(settings.root), *words], capture_output=True, check=False)  # noqa: S603, S607
    return ran.stdout if ran.returncode == 0 else None
