"""Keeps a random share of the pool: what any filter must beat at equal size.

Paper   none: a baseline
Idea    each row draws a number from a hash of the seed and its sample_id; the rows with the highest draws survive. A row's draw does not
        depend on what else is in the pool, so that deleting some rows leaves the other draws as they were.
Small   nothing
Limits  as good as the pool: the share of right captions stays what it was, and the subset is smaller
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
from pydantic import Field

from tasks.core.dataset import Dataset
from tasks.core.method import Made, MethodConfig, method
from tasks.filter._shared import Scores, keep_top, survivors, verdicts


class Config(MethodConfig):
    """Settings of `random`."""

    keep: float = Field(0.3, gt=0, le=1, description="share of the pool that survives")  # as in filter.dfn


SMOKE = Config(keep=0.5)


def draws(ids: pa.ChunkedArray, seed: int) -> Scores:
    """Uniform numbers (N,) in [0, 1), one for each id: the first 24 bits of BLAKE2b(id) keyed with the seed."""
    keyed = hashlib.blake2b(digest_size=8, key=str(seed).encode())
    bits = np.empty(len(ids), dtype=np.uint32)
    for at, name in enumerate(text for chunk in ids.chunks for text in chunk.to_pylist()):
        own = keyed.copy()
        own.update(name.encode())
        bits[at] = int.from_bytes(own.digest()[:3], "big")
    return bits.astype(np.float32) / np.float32(2**24)  # 24 bits are what a float32 holds exactly


@method(paper="none: a baseline", claim="keeps the pool's own share of right captions")
def random(pool: Dataset, reference: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """Judge every row of `pool` by a draw. Raises UserError where nothing would be left."""
    count = survivors(len(pool), cfg.keep)
    ids = pool.column("sample_id")
    scores = draws(ids, seed)
    kept, threshold = keep_top(scores, ids, count)
    rows = verdicts(ids, scores, kept, f"draw below the top {100 * cfg.keep:.4g}%")
    return Made(rows, {"rows": float(len(pool)), "kept": float(count), "threshold": threshold})
