"""What is drawn for a row from its id alone: its split, its caption's wording; and which ids were seen before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]
SEEN, TEST, VALIDATION, REFERENCE, WORDING = range(5)  # columns of `numbers`


def numbers(ids: Sequence[str]) -> Numbers:
    """Five independent 64-bit numbers for each id (N, 5), the same on every machine and in every version."""
    digests = b"".join([hashlib.blake2b(i.encode(), digest_size=40).digest() for i in ids])
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 5)


def unit(column: Numbers) -> npt.NDArray[np.float64]:
    """Numbers as floats in [0, 1)."""
    return np.asarray((column >> np.uint64(11)) * 2.0**-53)


def splits(drawn: Numbers, own: Sequence[str], *, test: float, validation: float, reference: float) -> npt.NDArray[Any]:
    """Splits (N,): `own`, but of its train rows a share goes to test, of the rest one to validation, of the rest one to reference.

    Each row's split depends on its own numbers only, so rows that come or go later move no other row.
    """
    result = np.array(own, dtype="<U10")
    for name, column, share in (("test", TEST, test), ("validation", VALIDATION, validation), ("reference", REFERENCE, reference)):
        result[(result == "train") & (unit(drawn[:, column]) < share)] = name
    return result


def sample(total: int, limit: int | None) -> npt.NDArray[np.int64]:
    """At most `limit` of the positions 0..total-1, sorted: chosen at random once and for all, since files are often sorted by class."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, limit, replace=False))


class Seen:
    """The ids so far as sorted runs of 64-bit numbers, 8 bytes for an id; runs of like length are merged, so there are few of them.

    Two different ids share a number with odds n**2 / 2**65: 3e-8 for a pool of a million rows, 3e-4 for a hundred million. The price of
    such an accident is one good row in quarantine.
    """

    def __init__(self) -> None:
        self._runs: list[Numbers] = []

    def add(self, batch: Numbers) -> npt.NDArray[np.bool_]:
        """Which of the numbers (N,) were there before, in this batch or an earlier one; the others are there from now on."""
        fresh, first = np.unique(batch, return_index=True)
        known = np.zeros(len(fresh), dtype=bool)
        for run in self._runs:
            at = np.searchsorted(run, fresh)
            known |= run[np.minimum(at, len(run) - 1)] == fresh
        again = np.ones(len(batch), dtype=bool)
        again[first[~known]] = False
        if not known.all():
            self._push(fresh[~known])
        return again

    def _push(self, run: Numbers) -> None:
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")
        self._runs.append(run)
