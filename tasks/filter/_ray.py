"""Scores of a pool from many machines: Ray Data with a pool of actors, each of which holds the network and reads its rows itself.

The pieces, the batches within them and the arithmetic are those of one machine, so that the scores are the same to the last bit. All
machines must see the project's folder under the same path, and have the same Python packages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.settings import THREADS
from tasks.filter._shared import Scores


class Scorer:
    """An actor: it scores pieces of the pool, given as first and last row."""

    def __init__(
        self, pool: Dataset, columns: list[str], prepare: Callable[..., Any], score: Callable[..., Scores], size: int, device: str
    ) -> None:
        self.pool, self.columns, self.prepare, self.score, self.size, self.device = pool, columns, prepare, score, size, device

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        """The scores of one piece, as bytes: rows (n,) or (n, k) float32."""
        from tasks.filter._resume import score_pieces

        wanted = [(int(piece["start"]), int(piece["stop"]))]
        ((start, found),) = score_pieces(self.pool, wanted, self.columns, self.prepare, self.score, size=self.size, device=self.device)
        return {"start": start, "width": found.shape[1] if found.ndim == 2 else 0, "scores": found.tobytes()}


def scored(
    pool: Dataset,
    pieces: Sequence[tuple[int, int]],
    columns: list[str],
    prepare: Callable[[pa.RecordBatch], Any],
    score: Callable[[Any], Scores],
    *,
    size: int,
    device: str = "cpu",
) -> Iterator[tuple[int, Scores]]:
    """The first row and the scores of each piece, in whatever order they are done. Raises UserError where Ray cannot be had.

    Where `device` is CUDA each actor asks for a GPU of its own; a UserError says where there is none. A piece whose machine is lost goes
    to another one. Ray is started here, on this machine alone, unless RAY_ADDRESS names a cluster.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'retort[ray]'") from None

    started = not ray.is_initialized()
    if started:
        paths = os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH", "")]))
        runtime = {"env_vars": {**THREADS, "PYTHONPATH": paths}}
        where = os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {"address": where} if where else {"include_dashboard": False}
        try:
            ray.init(**own, runtime_env=runtime, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"Ray does not answer at {where or 'this machine'}: {str(error).splitlines()[0]}") from None
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        own_gpu = device.startswith("cuda")
        there = ray.cluster_resources()
        if own_gpu and there.get("GPU", 0) < 1:
            raise UserError(f"RETORT_DEVICE is {device!r}, but no machine of the cluster offers Ray a GPU: unset it to score on their CPUs")
        most = max(1, int(there.get("GPU" if own_gpu else "CPU", 1)))
        items = [{"start": start, "stop": stop} for start, stop in pieces]
        made = ray.data.from_items(items, override_num_blocks=len(items)).map(
            Scorer,  # type: ignore[arg-type]  # a class is made once for each actor; the annotation knows functions alone
            fn_constructor_args=(pool, columns, prepare, score, size, device),
            compute=ray.data.ActorPoolStrategy(size=min(most, len(items))),  # one that is lost comes again, as often as need be
            num_cpus=1,
            num_gpus=int(own_gpu),
        )
        for row in made.iter_rows():
            found = np.frombuffer(row["scores"], dtype=np.float32)
            yield int(row["start"]), found.reshape(-1, row["width"]) if row["width"] else found
    finally:
        if started:
            ray.shutdown()


def _root() -> Any:
    from pathlib import Path

    return Path(__file__).resolve().parents[2]
