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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.core import loop
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
    return {
        "rows": len(pool), "rate": len(pool) / seconds, "bare": bare, "seconds": seconds, "grown_mb": (peak - before) / 1024,
        "sum": float(scores.astype(np.float64).sum()),
    }  # fmt: skip


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
