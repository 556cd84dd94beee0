"""Scores of a pool that are kept as they come: a run that was cut off goes on behind the last piece that it finished."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from tasks.core import files
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.progress import track
from tasks.filter._shared import Scores

PIECE = 16_384  # rows whose scores are kept together; a pool of fewer is scored in one go and nothing is kept
DAYS = 30  # that the scores of a run which was never finished are kept


def digest(model: nn.Module, *more: str) -> str:
    """MD5 of a model's weights and buffers, and of what else its scores depend on."""
    total = hashlib.md5("\0".join(more).encode(), usedforsecurity=False)
    for name, value in model.state_dict().items():
        total.update(name.encode() + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def scored(
    pool: Dataset, columns: Iterable[str], score: Callable[[pa.RecordBatch], Scores], *, key: str, size: int, what: str = "score pool"
) -> Scores:
    """The scores (N,) that `score` gives to batches of at most `size` rows with these columns, in the pool's order.

    key: what the scores depend on besides the rows. Pieces lie in the project's cache until all are there; nothing else of the pool is in
    memory than one batch.
    """
    place = _place(pool, key) if len(pool) > PIECE else None
    scores, ticks, columns = np.empty(len(pool), dtype=np.float32), track(range(len(pool)), what), list(columns)
    for start in range(0, len(pool), PIECE):
        stop = min(start + PIECE, len(pool))
        kept = _read(place / f"{start}.npy", stop - start) if place else None
        if kept is None:
            rows, pieces = pool.take(np.arange(start, stop)) if place else pool, []
            for batch in rows.batches(columns, size):
                pieces.append(score(batch))
                sum(1 for _ in islice(ticks, batch.num_rows))
            kept = np.concatenate(pieces)
            if place:
                out = io.BytesIO()
                np.save(out, kept, allow_pickle=False)
                files.write_bytes(place / f"{start}.npy", out.getvalue())
        else:
            sum(1 for _ in islice(ticks, stop - start))
        scores[start:stop] = kept
    next(ticks, None)
    if place:
        shutil.rmtree(place, ignore_errors=True)
    return scores


def _place(pool: Dataset, key: str) -> Path | None:
    """Where pieces are kept; None for a pool that lies in no project."""
    from tasks.core.settings import project

    try:
        folder = project(pool.parts[0].folder).cache / "scores"
    except UserError:
        return None
    files.bound(folder, most_bytes=1e9, days=DAYS)
    return folder / hashlib.md5(f"{key} {pool.md5}".encode(), usedforsecurity=False).hexdigest()


def _read(path: Path, rows: int) -> Scores | None:
    with contextlib.suppress(OSError, ValueError):
        found = np.load(path, allow_pickle=False)
        if found.shape == (rows,):
            return np.asarray(found, dtype=np.float32)
    return None
