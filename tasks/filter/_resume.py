"""Scores of a pool that are kept as they come: a run that was cut off goes on behind the last piece that it finished."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from tasks.core import files
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.progress import track
from tasks.filter._shared import Scores

T = TypeVar("T")
PIECE = 16_384  # rows whose scores are kept together; a pool of fewer is scored in one go and nothing is kept
ENGINES = ("local", "ray")
DAYS = 30  # that the scores of a run which was never finished are kept


def digest(model: nn.Module, *more: str) -> str:
    """MD5 of a model's weights and buffers, and of what else its scores depend on."""
    total = hashlib.md5("\0".join(more).encode(), usedforsecurity=False)
    for name, value in model.state_dict().items():
        total.update(name.encode() + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def scored(
    pool: Dataset,
    columns: Iterable[str],
    prepare: Callable[[pa.RecordBatch], T],
    score: Callable[[T], Scores],
    *,
    key: str,
    size: int,
    what: str = "score pool",
) -> Scores:
    """The scores (N,) or (N, k) of all rows, in order: `prepare` reads a batch of at most `size` rows with these columns,
    `score` judges it.

    key: what the scores depend on besides the rows. Pieces lie in the project's cache until all are there; nothing else of the pool is in
    memory than three batches. With RETORT_ENGINE=ray the pieces are scored by a cluster, to the same bits.
    """
    place = _place(pool, key) if len(pool) > PIECE else None
    pieces = [(start, min(start + PIECE, len(pool))) for start in range(0, len(pool), PIECE)]
    ticks, columns = track(range(len(pool)), what), list(columns)
    done = {start: kept for start, stop in pieces if place and (kept := _read(place / f"{start}.npy", stop - start)) is not None}
    ticked = 0

    def tick(rows: int) -> None:
        nonlocal ticked
        ticked += sum(1 for _ in islice(ticks, rows))

    tick(sum(map(len, done.values())))
    left = [(start, stop) for start, stop in pieces if start not in done]
    if engine() == "ray" and left:
        from tasks.filter import _ray

        found: Iterator[tuple[int, Scores]] = _ray.scored(pool, left, columns, prepare, score, size=size)
    else:
        found = ((start, score_piece(pool, start, stop, columns, prepare, score, size, tick)) for start, stop in left)
    for start, scores in found:
        if place:
            out = io.BytesIO()
            np.save(out, scores, allow_pickle=False)
            files.write_bytes(place / f"{start}.npy", out.getvalue())
        done[start] = scores
        tick(sum(map(len, done.values())) - ticked)
    next(ticks, None)
    if place:
        shutil.rmtree(place, ignore_errors=True)
    return np.concatenate([done[start] for start, _ in pieces]) if pieces else np.empty(0, dtype=np.float32)


def score_piece(
    pool: Dataset,
    start: int,
    stop: int,
    columns: list[str],
    prepare: Callable[[pa.RecordBatch], T],
    score: Callable[[T], Scores],
    size: int,
    tick: Callable[[int], None] = lambda _: None,
) -> Scores:
    """The scores of the rows from `start` to before `stop`; the next batch is prepared while one is judged. `tick` hears of each batch."""
    rows, found = pool if stop - start == len(pool) else pool.take(np.arange(start, stop)), []
    with ThreadPoolExecutor(1) as ahead:
        for some in _prepared(rows.batches(columns, size), prepare, ahead):
            found.append(score(some))
            tick(len(found[-1]))
    return np.concatenate(found)


def engine() -> str:
    """Where scores are computed: `local`, or `ray`, as RETORT_ENGINE says. Raises UserError for anything else."""
    wanted = os.environ.get("RETORT_ENGINE", ENGINES[0])
    if wanted not in ENGINES:
        raise UserError(f"RETORT_ENGINE is {wanted!r}, but there are: {', '.join(ENGINES)}")
    return wanted


def _prepared(batches: Iterator[pa.RecordBatch], prepare: Callable[[pa.RecordBatch], T], ahead: ThreadPoolExecutor) -> Iterator[T]:
    """Prepared batches in order, two of them in flight."""
    waiting: deque[Future[T]] = deque()
    for batch in batches:
        waiting.append(ahead.submit(prepare, batch))
        if len(waiting) > 2:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
        if len(found) == rows:
            return np.asarray(found, dtype=np.float32)
    return None
