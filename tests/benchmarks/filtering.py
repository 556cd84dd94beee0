"""A large pool through a filter: rows a second beside the scorer's bare forward pass, memory, and what a killed run does again.

`python -m tests.benchmarks.filtering PROJECT` scores `PROJECT/data/pool` and prints facts as JSON, as the benchmark `filtering` calls it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import catalog, loop
from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer, encode, image_column
from tasks.core.settings import shared_data
from tests.workspace import environment

ROWS = int(os.environ.get("RETORT_ROWS", "1000000"))
AT_ONCE = 4096
REFERENCE = 1500
BARE = 40  # batches of the bare pass


def make_pool(folder: Path, rows: int) -> None:
    """Real images of Fashion-MNIST again and again, each time with other noise, and their class names, every tenth one wrong."""
    from tests.claims.samples import images

    real = images(shared_data() / "fashion_mnist", "train")
    names = np.array(real.classes, dtype=object)

    def piece(start: int) -> pa.Table:
        rng = np.random.default_rng(start)
        count = min(AT_ONCE, rows - start)
        at = rng.integers(0, len(real.labels), count)
        pixels = (real.pixels[at].astype(np.int16) + rng.integers(-8, 9, real.pixels[at].shape)).clip(0, 255).astype(np.uint8)
        wrong = rng.random(count) < 0.1
        told = np.where(wrong, (real.labels[at] + 1) % len(names), real.labels[at])
        columns = {
            "sample_id": [f"p{number:09d}" for number in range(start, start + count)],
            "image": image_column(encode(pixels)),
            "label": real.labels[at],
            "caption": names[told].tolist(),
            "split": ["reference" if start + number < REFERENCE else "train" for number in range(count)],
            "parents": [[]] * count,
            "_clean": ~wrong,
        }
        return pa.table(columns, schema=SCHEMAS["image"])

    info = Info("image", classes=real.classes, shape=(1, 28, 28), name="large")
    with Writer(folder, info) as out, ThreadPoolExecutor(2) as threads:
        for start in range(0, rows, 8 * AT_ONCE):
            for table in threads.map(piece, range(start, min(start + 8 * AT_ONCE, rows), AT_ONCE)):
                out.write(table)


def score(project: Path) -> dict[str, float]:
    """Train a filter, score the pool, and time the network alone on batches that are ready."""
    from tasks.filter import dfn
    from tasks.filter._resume import digest, scored

    whole = Dataset.open(project / "data" / "pool")
    reference, pool = whole.split("reference"), whole.split("train")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with loop.seeded(0) as generator:
        towers, known, _ = dfn._trained(pool, reference, dfn.Config(steps=50), generator, "cpu")
        read, size = dfn.reader(known, pool.info.shape), dfn.SCORED_AT_ONCE
        began = time.perf_counter()
        scores = scored(pool, dfn.PAIR, read, lambda pairs: dfn.score(towers, *pairs), key=digest(towers, *known), size=size)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ready = [read(batch) for batch, _ in zip(pool.batches(dfn.PAIR, size), range(BARE), strict=False)]
        began = time.perf_counter()
        for pairs in ready:
            dfn.score(towers, *pairs)
        bare = sum(len(images) for images, _ in ready) / (time.perf_counter() - began)
        peers = _peers(pool, lambda batch: dfn.score(towers, *read(batch)), size)
        os.environ["RETORT_ENGINE"] = "ray"
        spread = [_on_one_core(pool.take(np.arange(some)), towers, read, size) for some in (len(pool) // 2, len(pool))]
    return {
        **peers, "ray": len(pool) / spread[1], "ray_more": (len(pool) - len(pool) // 2) / (spread[1] - spread[0]),
        "rows": len(pool), "rate": len(pool) / seconds, "bare": bare, "seconds": seconds, "grown_mb": (peak - before) / 1024,
        "sum": float(scores.astype(np.float64).sum()),
    }  # fmt: skip


def _on_one_core(pool: Dataset, towers: object, read: Callable[[pa.RecordBatch], Any], size: int) -> float:
    """Seconds of scoring with Ray on this machine, one core, Ray's own start left out."""
    import ray

    from tasks.filter import dfn
    from tasks.filter._resume import scored

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(catalog.ROOT)}})
    began = time.perf_counter()
    scored(pool, dfn.PAIR, read, lambda pairs: dfn.score(towers, *pairs), key=f"ray {len(pool)}", size=size)
    seconds = time.perf_counter() - began
    ray.shutdown()
    return seconds


def _peers(pool: Dataset, score: Callable[[pa.RecordBatch], Any], size: int) -> dict[str, float]:
    """Rows a second of the same reading and scoring by `datasets.map`, where that library is there."""
    try:
        import datasets
    except ImportError:
        return {}
    datasets.disable_progress_bars()
    shards = sorted(str(path) for part in pool.parts for path in part.folder.glob("part-*.parquet"))
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.Dataset.from_parquet(shards, cache_dir=cache).with_format("arrow")
        began = time.perf_counter()
        done = rows.map(
            lambda table: {"score": score(table.combine_chunks().to_batches()[0])}, batched=True, batch_size=size,
            remove_columns=rows.column_names, load_from_cache_file=False,
        )  # fmt: skip
        return {"datasets": len(done) / (time.perf_counter() - began)}


def thresholds(rows: int = 1_000_000, keep: float = 0.3) -> dict[str, float]:
    """Seconds from a million scores to a sorted file of the kept uids: ours, and by the steps of DataComp's own resharding recipe, which
    sorts all scores, reads the table again, and makes each uid by itself.
    """
    from tasks.core import uids
    from tasks.filter._shared import keep_top

    rng = np.random.default_rng(0)
    names = pa.chunked_array([pa.array([f"{number:032x}" for number in rng.integers(0, 2**63, rows)])])
    scores = rng.normal(size=rows).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "scores.parquet"
        pq.write_table(pa.table({"uid": names, "score": scores}), table)
        began = time.perf_counter()
        read = pq.read_table(table)
        kept, _ = keep_top(read["score"].to_numpy(), read["uid"], round(keep * rows))
        (Path(place) / "ours.npy").write_bytes(uids.to_bytes(uids.uids(read["uid"].filter(pa.array(kept)).to_pylist())))
        ours = time.perf_counter() - began
        began = time.perf_counter()
        threshold = -np.sort(-pq.read_table(table, columns=["score"])["score"].to_numpy())[round(keep * rows)]
        frame = pq.read_table(table).to_pandas()
        some = frame[frame["score"] > threshold]["uid"]
        found = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in some], np.dtype("u8,u8"))
        found.sort()
        np.save(Path(place) / "theirs.npy", found)
        theirs = time.perf_counter() - began
        same = np.array_equal(np.load(Path(place) / "ours.npy"), np.load(Path(place) / "theirs.npy"))
    return {"ours": ours, "theirs": theirs, "same": float(same)}


def run(project: Path, *, killed_at: float = 0.0) -> dict[str, float]:
    """Score in a process of its own; `killed_at`: kill it when so large a share of the pieces is there, and run it once more."""
    command = [sys.executable, "-m", "tests.benchmarks.filtering", str(project)]
    child = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    if killed_at:
        wanted = int(killed_at * ROWS / 16_384)
        while child.poll() is None and len(list((project / ".retort").rglob("scores/*/*.npy"))) < wanted:
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        return run(project)
    said, _ = child.communicate()
    if child.returncode:
        sys.exit(f"{command} failed")
    return dict(json.loads(said.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(score(Path(sys.argv[1]))))
