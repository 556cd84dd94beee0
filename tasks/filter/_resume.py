"""Scores of a pool that are kept as they come: a run that was cut off goes on behind the last piece that it finished."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
THREADS = 4  # that prepare batches for an accelerator; beside a network on the CPU one is enough
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
    device: str = "cpu",
) -> Scores:
    """The scores (N,) or (N, k) of all rows, in order: `prepare` reads a batch of at most `size` rows with these columns,
    `score` judges it.

    key: what the scores depend on besides the rows. Pieces lie in the project's cache until all are there; nothing else of the pool is in
    memory than three batches for each thread that prepares them. With RETORT_ENGINE=ray the pieces are scored by a cluster, to the same
    bits; where `device` is CUDA each of its actors has a GPU.
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

        found: Iterator[tuple[int, Scores]] = _ray.scored(pool, left, columns, prepare, score, size=size, device=device)
    else:
        found = score_pieces(pool, left, columns, prepare, score, size=size, device=device, tick=tick)
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


def score_pieces(
    pool: Dataset,
    pieces: Sequence[tuple[int, int]],
    columns: list[str],
    prepare: Callable[[pa.RecordBatch], T],
    score: Callable[[T], Scores],
    *,
    size: int,
    device: str = "cpu",
    tick: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, Scores]]:
    """The first row and the scores of each piece, which are given in order as first row and the one behind the last.

    The pool is read once and in one go: while a batch is judged the next ones are read and prepared. `tick` hears of each batch.
    """
    if not pieces:
        return
    rows = pool.take(np.concatenate([np.arange(start, stop) for start, stop in pieces]))
    batches = _cut(rows.batches(columns, size), [stop - start for start, stop in pieces])
    threads = 1 if device == "cpu" else THREADS
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(threads) as preparing:
        ready = _prepared(batches, prepare, reading, preparing, 2 + threads)
        for start, stop in pieces:
            found: list[Scores] = []
            while sum(map(len, found)) < stop - start:
                found.append(score(next(ready)))
                tick(len(found[-1]))
            yield start, np.concatenate(found)


def engine() -> str:
    """Where scores are computed: `local`, or `ray`, as RETORT_ENGINE says. Raises UserError for anything else."""
    wanted = os.environ.get("RETORT_ENGINE", ENGINES[0])
    if wanted not in ENGINES:
        raise UserError(f"RETORT_ENGINE is {wanted!r}, but there are: {', '.join(ENGINES)}")
    return wanted


def place(device: str = "cpu", here: bool = True) -> str:
    """Where a scorer runs: on what RETORT_DEVICE names, such as `cuda`, else on `device`.

    Raises UserError for no name of a device, and where torch has it not on this machine, if it is to be used `here`.
    """
    wanted = os.environ.get("RETORT_DEVICE") or device
    try:
        named = torch.device(wanted)
        torch.empty(0, device=named if here else "cpu")
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"RETORT_DEVICE is {wanted!r}, but torch has no such device here: unset it to score on the CPU") from None
    return wanted


def _cut(batches: Iterator[pa.RecordBatch], lengths: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """The batches, parted where a run of so many rows ends: each piece has the batches that it would have alone."""
    ends = iter(np.cumsum(lengths).tolist())
    at, end = 0, next(ends)
    for batch in batches:
        while batch.num_rows:
            part = batch.slice(0, end - at)
            batch, at = batch.slice(part.num_rows), at + part.num_rows
            yield part
            if at == end:
                end = next(ends, at)


def _prepared(
    batches: Iterator[pa.RecordBatch],
    prepare: Callable[[pa.RecordBatch], T],
    reading: ThreadPoolExecutor,
    preparing: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[T]:
    """Prepared batches in order, so many of them in flight; one thread reads."""

    def ready(coming: Future[pa.RecordBatch | None]) -> T | None:
        batch = coming.result()
        return None if batch is None else prepare(batch)

    waiting: deque[Future[T | None]] = deque()
    while True:
        while len(waiting) < ahead:
            waiting.append(preparing.submit(ready, reading.submit(next, batches, None)))
        some = waiting.popleft().result()
        if some is None:
            return
        yield some


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
