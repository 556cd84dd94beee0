"""A large pool through a filter: rows a second beside the scorer's bare forward pass, memory, and what a killed run does again.

`python -m tests.benchmarks.filtering PROJECT` scores `PROJECT/data/pool` and prints facts as JSON, as the benchmark `filtering` calls it;
with `clip` behind it, by a CLIP of the size of ViT-B/32, with `scores` nothing but the scoring. How far it is stands on standard error.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import catalog, loop
from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer, encode, image_column
from tasks.core.settings import THREADS, shared_data
from tests.workspace import environment

ROWS = int(os.environ.get("RETORT_ROWS", "1000000"))
AT_ONCE = 4096
REFERENCE = 1500
BARE = 48  # batches of a bare pass
ROUNDS = 5  # of a bare pass and the whole way, in turns, so that what else the machine does hits both
CLIP_BATCH = 16
CLIP_SECONDS = 75  # that the large scorer may take, both ways together
PEAKS = {  # TFLOP/s of dense bfloat16, by what the card calls itself, as its maker says
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "RTX 4090": 165,
}  # fmt: skip


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
            say(f"making the pool: {start:,} of {rows:,} rows", every=10)
            for table in threads.map(piece, range(start, min(start + 8 * AT_ONCE, rows), AT_ONCE)):
                out.write(table)


def score(project: Path, alone: bool = False) -> dict[str, float]:
    """Train a filter, score the pool, and time the network alone on batches that are ready; `alone`: score only."""
    import torch

    from tasks.filter import dfn
    from tasks.filter._resume import digest, scored
    from tasks.filter._shared import keep_top, verdicts

    whole = Dataset.open(project / "data" / "pool")
    reference, pool = whole.split("reference"), whole.split("train")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with loop.seeded(0) as generator:
        towers, known, _ = dfn._trained(pool, reference, dfn.Config(steps=50), generator, "cpu")
        read, size, judge = dfn.reader(known, pool.info.shape), dfn.SCORED_AT_ONCE, dfn.judge(towers)
        began = time.perf_counter()
        scores = scored(pool, dfn.PAIR, read, telling(judge, len(pool)), key=digest(towers, *known), size=size)
        seconds = time.perf_counter() - began
        if alone:
            return {"seconds": seconds, "sum": float(scores.astype(np.float64).sum())}
        ids = pool.column("sample_id")
        kept, _ = keep_top(scores, ids, len(pool) // 3)
        verdicts(ids, scores, kept, "low")
        dfn.unknown_words(pool, known)
        all_seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        say("in turns with the bare forward pass")
        some = pool.take(np.arange(min(BARE * size, len(pool))))
        ready = [read(batch) for batch in some.batches(dfn.PAIR, size)]
        turns = in_turns(lambda: [judge(pairs) for pairs in ready], lambda: _through(some, dfn.PAIR, read, judge, size))
        with on_one_core():
            alone = in_turns(lambda: [judge(pairs) for pairs in ready], lambda: _through(some, dfn.PAIR, read, judge, size))
        say("datasets.map")
        peers = _peers(pool, lambda batch: judge(read(batch)), size)
        os.environ["RETORT_ENGINE"] = "ray"
        say("Ray, half of the pool and all of it")
        spread = [_on_one_core(pool.take(np.arange(some)), judge, read, size) for some in (len(pool) // 2, len(pool))]
    return {
        **peers, "ray": len(pool) / spread[1], "ray_more": (len(pool) - len(pool) // 2) / (spread[1] - spread[0]),
        "rows": len(pool), "rate": len(pool) / seconds, "rate_with_verdicts": len(pool) / all_seconds, "seconds": seconds,
        "bare": len(some) / turns[0], "ratio": turns[1], "bare_one_core": len(some) / alone[0], "ratio_one_core": alone[1],
        "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "grown_mb": (peak - before) / 1024,
        "sum": float(scores.astype(np.float64).sum()),
    }  # fmt: skip


def score_by_clip(project: Path) -> dict[str, float]:
    """Score some rows by a CLIP of the size of ViT-B/32 at 224 pixels, random weights, in the way of users who name a folder or hub id.

    On the device that RETORT_DEVICE names. Each caption is a different one. So many rows as CLIP_SECONDS allow.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tasks.filter import dfn
    from tasks.filter._clip import Pretrained
    from tasks.filter._resume import place

    pool, device = Dataset.open(project / "data" / "pool").split("train"), place()
    size = CLIP_BATCH if device == "cpu" else dfn.SCORED_AT_ONCE
    with tempfile.TemporaryDirectory() as folder:
        _save_clip(Path(folder))
        network = Pretrained(folder, device)
    plain = network.reader(pool.info.shape)

    def read(batch: pa.RecordBatch) -> Any:
        texts, names = batch["caption"].to_pylist(), batch["sample_id"].to_pylist()
        told = [f"{text}, number {name[1:]}" for text, name in zip(texts, names, strict=True)]
        return plain(pa.record_batch([batch["image"], pa.array(told)], names=["image", "caption"]))

    columns = ["sample_id", *dfn.PAIR]
    first = next(batch for batch in pool.batches(columns, size) if batch.num_rows == size)
    with FlopCounterMode(display=False) as counter:
        network.score(read(first))
    work = counter.get_total_flops() / first.num_rows
    began = time.perf_counter()
    network.score(read(first))
    once = time.perf_counter() - began
    rounds = 3
    batches = max(1, min(int(CLIP_SECONDS / (2 * (rounds + 1) * once)), 64, len(pool) // size))
    some = pool.take(np.arange(batches * size))
    say(f"ViT-B/32 on {device}: {rounds} rounds of {len(some)} rows, bare and through the filter")
    ready = [read(batch) for batch in some.batches(columns, size)]
    bare, ratio = in_turns(
        lambda: [network.score(pairs) for pairs in ready], lambda: _through(some, columns, read, network.score, size, device), rounds
    )
    found = {"rows": len(some), "bare": len(some) / bare, "ratio": ratio, "rate": ratio * len(some) / bare, "flops": work}
    found |= {"threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0)), "cuda": device.startswith("cuda")}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_name(device)
        known = next((peak for name, peak in PEAKS.items() if name in card), 0)
        found["peak"] = float(os.environ.get("RETORT_PEAK_TFLOPS", known)) * 1e12
    return found


def _save_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from tasks.core.text_to_image import make_tokenizer, quiet

    tokenizer = make_tokenizer(["number 0 1 2 3 4 5 6 7 8 9 ankle boot bag coat dress pullover sandal shirt sneaker t-shirt top trouser"])
    tokenizer.model_max_length = 77
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with quiet(), loop.seeded(0):
        # transformers' own defaults are ViT-B/32; its tokens are 49,408, which cost memory and no time
        CLIPModel(CLIPConfig(text_config={"vocab_size": 49_408, **special})).save_pretrained(folder)
        CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)


def _through(
    pool: Dataset, columns: list[str] | tuple[str, ...], read: Callable[..., Any], judge: Callable[..., Any], size: int, device: str = "cpu"
) -> None:
    """All the way as `scored` goes it, each time anew."""
    from tasks.filter._resume import scored

    scored(pool, columns, read, judge, key=f"turn {time.time_ns()}", size=size, device=device)


def in_turns(bare: Callable[[], object], whole: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median seconds of the bare pass, and the median over rounds of its seconds over those of the whole way."""
    pairs = []
    for turn in range(rounds + 1):
        pairs.append([_seconds(way) for way in ((bare, whole) if turn % 2 else (whole, bare))][:: 1 if turn % 2 else -1])
    del pairs[0]  # the first is for caches and memory to settle
    return statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)


def _seconds(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


@contextmanager
def on_one_core() -> Iterator[None]:
    """All threads of this process, and those that they start, on one core."""
    cores = os.sched_getaffinity(0)
    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    try:
        for thread in threads:
            os.sched_setaffinity(thread, {min(cores)})
        yield
    finally:
        for path in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(path.name), cores)


_last = 0.0


def say(what: str, every: float = 0.0) -> None:
    """A line on standard error; `every`: not within so many seconds of the last one."""
    global _last
    if time.monotonic() - _last >= every:
        _last = time.monotonic()
        print(f"    {what}", file=sys.stderr, flush=True)


def telling(judge: Callable[[Any], Any], rows: int) -> Callable[[Any], Any]:
    """The same judge, which says how far it is."""
    done = 0

    def told(pairs: Any) -> Any:
        nonlocal done
        say(f"scored {done:,} of {rows:,} rows", every=10)
        scores = judge(pairs)
        done += len(scores)
        return scores

    return told


def _on_one_core(pool: Dataset, judge: Callable[[Any], Any], read: Callable[[pa.RecordBatch], Any], size: int) -> float:
    """Seconds of scoring with Ray on this machine, one core, Ray's own start left out."""
    import ray

    from tasks.filter import dfn
    from tasks.filter._resume import scored

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(catalog.ROOT)}})
    began = time.perf_counter()
    scored(pool, dfn.PAIR, read, judge, key=f"ray {len(pool)}", size=size)
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


def run(project: Path, *, killed_at: float = 0.0, what: str = "towers") -> dict[str, float]:
    """Score in a process of its own, with a stage's threads; `killed_at`: kill it when so large a share of the pieces is there, and run it
    once more.
    """
    command = [sys.executable, "-m", "tests.benchmarks.filtering", str(project), what]
    child = subprocess.Popen(command, env={**THREADS, **environment()}, stdout=subprocess.PIPE, text=True)
    if killed_at:
        wanted = int(killed_at * ROWS / 16_384)
        while child.poll() is None and len(list((project / ".retort").rglob("scores/*/*.npy"))) < wanted:
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        return run(project, what="scores")
    said, _ = child.communicate()
    if child.returncode:
        sys.exit(f"{command} failed")
    return dict(json.loads(said.splitlines()[-1]))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(json.dumps(score_by_clip(place) if sys.argv[2] == "clip" else score(place, alone=sys.argv[2] == "scores")))
