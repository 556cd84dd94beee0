"""What the filters share: which rows survive, and their verdicts as one compact table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.core.dataset import SCHEMAS
from tasks.core.errors import UserError

Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def survivors(rows: int, keep: float) -> int:
    """How many of `rows` a share `keep` leaves: int(rows * keep), where 100 rows at 0.29 are 29 and not 28.

    Raises UserError where the pool is empty or where nothing would be left.
    """
    if rows == 0:
        raise UserError("the pool has no rows to judge; give at least one")
    count = int(round(rows * keep, 6))
    if count == 0:
        raise UserError(f"keep={keep} leaves none of the pool's {rows} rows; valid: {1 / rows:.4g} or more")
    return count


def keep_top(scores: Scores, ids: pa.ChunkedArray, count: int) -> tuple[Mask, float]:
    """The `count` best rows as a mask (N,), and the threshold: the score at index `count` of the descending sort (DataComp's rule).

    Every row above the threshold survives and every row below it falls. Rows exactly at it would let too many through, so they fill the
    places that are left in ascending order of `sample_id` (then of position): neither row order nor sharding decides. Where all
    rows survive there is no such index, and the threshold is the next number below the lowest score.
    """
    if count >= len(scores):
        return np.ones(len(scores), dtype=bool), float(np.nextafter(scores.min(), np.float32(-np.inf)))
    at = len(scores) - 1 - count
    threshold = np.partition(scores, at)[at]
    kept = scores > threshold
    places = count - int(kept.sum())
    if places:
        tied = np.flatnonzero(scores == threshold)
        names = ids.take(pa.array(tied)).to_pylist()
        kept[[position for _, position in sorted(zip(names, tied.tolist(), strict=True))[:places]]] = True
    return kept, float(threshold)


def verdicts(ids: pa.ChunkedArray, scores: Scores, kept: Mask, reason: str | list[str]) -> pa.Table:
    """Table of schema `verdicts` (N rows, in the order given); rows that fell carry `reason`, or their own one, kept ones an empty text."""
    survived = pa.array(kept)
    given = pa.scalar(reason, pa.string()) if isinstance(reason, str) else pa.array(reason, pa.string())
    reasons = pc.if_else(survived, pa.scalar("", pa.string()), given)
    return pa.table([ids, pa.array(scores, pa.float32()), survived, reasons], schema=SCHEMAS["verdicts"])
