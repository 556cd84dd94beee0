"""How fast `filter.cascade` reads texts, and how fast it finds near-duplicates beside datasketch at the same recall.

`python -m tests.benchmarks.dedup`. Times are of the CPU, on one core. Both sides get the same shingles, 100 minima in 20 bands of 5, and
the same threshold; datasketch hashes in bulk, its fastest way. They take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer
from tasks.core.settings import shared_data
from tasks.filter import _near
from tasks.filter._text import fault, words
from tasks.filter.cascade import Config, cascade

ROWS, PLANTED, SHINGLE, LEAST = 6_000, 2_000, 3, 0.6
Show = Callable[[str, str, str], None]


def report(show: Show) -> None:
    """Measure and show all figures."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # rensa's threads would be counted as one core's time all the same
    news = pq.read_table(shared_data() / "ag_news" / "train.parquet")["text"].to_pylist()
    for name, texts in (("captions of 60 characters", _cut(news, 60, 30_000)), ("texts of 500 characters", _cut(news, 500, 20_000))):
        with tempfile.TemporaryDirectory() as place:
            pool, reference = _dataset(Path(place) / "pool", texts), _dataset(Path(place) / "reference", news[:1_000])
            for what, cfg in (("rules and duplicates", Config()), ("and a classifier", Config(quality=0.1))):
                rate = len(texts) / _timed(partial(cascade, pool, reference, cfg))
                show(f"cascade on {name}: {what}", f"{rate:,.0f} rows/s", "5,000 rows/s a core or more")
    texts = _cut(news, 500, 5_000)
    rules = len(texts) / _timed(lambda: [fault(text, words(text), Config(), None) for text in texts])
    show("rules of the cascade alone, texts of 500 characters", f"{rules:,.0f} rows/s", "")
    if (peer := _gopher(texts)) is not None:
        show("rules over datatrove's Gopher filters, quality and repetition", f"{rules / peer:.1f}", "1 or more")
    rng = random.Random(0)
    whole = _cut(news, 300, ROWS, rng)
    copies = [(at, _changed(whole[at], rng)) for at in rng.sample(range(ROWS), PLANTED)]
    shingles = [_near.shingles(words(text), SHINGLE) for text in [*whole, *(text for _, text in copies)]]
    found: dict[str, list[tuple[float, float]]] = {"rensa": [], "datasketch": []}
    for _ in range(3):
        for name, search in (("rensa", ours), ("datasketch", theirs)):
            began = time.process_time()
            label = search(shingles)
            spent = time.process_time() - began
            hit = [label[at] == label[ROWS + number] for number, (at, _) in enumerate(copies)]
            found[name].append((spent, sum(hit) / len(hit)))
    seconds = {name: statistics.median(spent for spent, _ in rounds) for name, rounds in found.items()}
    for name, rounds in found.items():
        show(f"near-duplicates by {name}: recall of planted copies", f"{rounds[0][1]:.3f}", "equal")
        show(f"near-duplicates by {name}", f"{len(shingles) / seconds[name]:,.0f} rows/s", "")
    show("near-duplicate search over datasketch", f"{seconds['datasketch'] / seconds['rensa']:.1f}", "5 or more")


def ours(shingles: Sequence[list[str]]) -> list[int]:
    """Groups as `filter.cascade` finds them."""
    keys, slots = _near.sketch(shingles, 0)
    at = np.arange(len(shingles))
    return _near.groups(len(at), (keys[:, band] for band in range(_near.BANDS)), _near.alike_texts(slots, at, LEAST)).tolist()


def theirs(shingles: Sequence[list[str]]) -> list[int]:
    """The same groups by datasketch."""
    from datasketch import MinHash, MinHashLSH

    minima = _near.BANDS * _near.ROWS
    index = MinHashLSH(threshold=LEAST, num_perm=minima, params=(_near.BANDS, _near.ROWS))
    first = list(range(len(shingles)))

    def root(at: int) -> int:
        while first[at] != at:
            first[at] = at = first[first[at]]
        return at

    hashed = MinHash.bulk([[shingle.encode() for shingle in some] for some in shingles], num_perm=minima)
    for at, one in enumerate(hashed):
        for other in index.query(one):
            if root(other) != root(at) and one.jaccard(hashed[other]) >= LEAST:
                first[max(root(at), root(other))] = min(root(at), root(other))
        index.insert(at, one)
    return [root(at) for at in range(len(shingles))]


def _gopher(texts: Sequence[str]) -> float | None:
    """Rows a second of datatrove's filters of the same kind; None where datatrove is not there."""
    try:
        from datatrove.data import Document
        from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    except ImportError:
        return None
    filters = (GopherQualityFilter(), GopherRepetitionFilter())
    documents = [Document(text=text, id=str(at)) for at, text in enumerate(texts)]
    filters[0].filter(documents[0])  # its tokeniser is loaded by the first
    return len(texts) / _timed(lambda: [one.filter(document) for document in documents for one in filters])


def _timed(call: Callable[[], object]) -> float:
    spent = []
    for _ in range(3):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return statistics.median(spent)


def _cut(news: Sequence[str], length: int, count: int, rng: random.Random | None = None) -> list[str]:
    """Texts of about so many characters: news one after another, cut at a word."""
    rng = rng or random.Random(1)
    made = []
    for _ in range(count):
        text = rng.choice(news)
        while len(text) < length:
            text += " " + rng.choice(news)
        made.append(text[: text.rfind(" ", 0, length) if " " in text[:length] else length])
    return made


def _changed(text: str, rng: random.Random) -> str:
    """The text with 5% of its words replaced by others of it."""
    some = text.split()
    for _ in range(max(1, len(some) // 20)):
        some[rng.randrange(len(some))] = rng.choice(some)
    return " ".join(some)


def _dataset(folder: Path, texts: Sequence[str]) -> Dataset:
    n, schema = len(texts), "text" if "text" in SCHEMAS else "image"
    columns = {"sample_id": [f"r{at:06d}" for at in range(n)], "caption": list(texts), "split": ["train"] * n, "parents": [[]] * n}
    wanted = SCHEMAS[schema]
    with Writer(folder, Info(schema)) as out:
        out.write(pa.table({field.name: pa.array(columns.get(field.name, [None] * n), field.type) for field in wanted}, schema=wanted))
    return Dataset.open(folder)


if __name__ == "__main__":
    report(lambda what, figure, asked: print(f"{what:<64} {figure:>18}   asked: {asked}", flush=True))
