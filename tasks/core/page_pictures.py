"""Rows of datasets as the report shows them: a few are chosen by column, and only those are decoded.

This may read what is known only for scoring, such as whether a caption is right: it judges methods, and no method sees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from tasks.core.dataset import Dataset, Part, decode, read_info
from tasks.core.page import ClassRow, Gallery, Moment, Picture, Scores

Ints = npt.NDArray[np.int64]


def rows_at(data: Dataset, positions: Iterable[int]) -> list[Picture]:
    """Pictures of the rows at the positions, in the order of the positions, with captions and, where it is known, their truth."""
    wanted = np.asarray(list(positions), dtype=np.int64)
    if len(wanted) == 0:
        return []
    order = np.unique(wanted)
    some = data.take(order)
    blobs = [blob for batch in some.batches(["image"]) for blob in batch.column(0).field("bytes").to_pylist()]
    images, captions, labels = decode(blobs, some.info.shape), some.captions(), some.labels()
    truth = some.audit("_clean").to_pylist() if some.info.schema == "image" else [None] * len(some)
    names = some.info.classes
    return [
        Picture(images[i], captions[i], truth[i], names[labels[i]] if 0 <= labels[i] < len(names) else "")
        for i in np.searchsorted(order, wanted)
    ]


def spread(n: int, count: int) -> list[int]:
    """At most `count` positions, evenly spread over n rows."""
    return [] if n == 0 else np.unique(np.linspace(0, n - 1, min(n, count)).round().astype(np.int64)).tolist()


def judged(pool: Path, verdicts: Path) -> tuple[Dataset, Scores]:
    """The rows of the pool that were judged, and their scores in the same order; rows without a finite score are left out."""
    raw = Dataset((Part(verdicts, None, read_info(verdicts).rows),), read_info(verdicts))
    whole = Dataset.open(pool)
    at = pa.compute.index_in(whole.column("sample_id"), value_set=raw.column("sample_id").combine_chunks())
    at = at.fill_null(-1).to_numpy().astype(np.int64)
    scores = raw.column("score").fill_null(np.nan).to_numpy().astype(np.float64)
    good = at >= 0
    good[good] = np.isfinite(scores[at[good]])
    rows, at = whole.where(good), at[good]
    truth = rows.audit("_clean")
    clean = None if truth.null_count or len(rows) == 0 else truth.to_numpy().astype(bool)
    return rows, Scores(scores[at], raw.column("kept").to_numpy()[at].astype(bool), clean)


def extremes(rows: Dataset, scores: Scores, count: int) -> tuple[Gallery, Gallery]:
    """The rejected rows with the lowest scores, and the kept rows with the highest."""
    order = np.argsort(scores.values, kind="stable")
    low = order[~scores.kept[order]][:count]
    high = order[scores.kept[order]][::-1][:count]
    shown = rows_at(rows, [*low, *high])
    noted = [
        Picture(p.image, p.caption, p.right, f"{scores.values[i]:.3f}") for p, i in zip(shown, [*low, *high], strict=True)
    ]  # fmt: skip
    return (
        Gallery("Rejected", "The lowest scores: what the filter trusts least.", tuple(noted[: len(low)]), "rejected image"),
        Gallery("Kept", "The highest scores: what the filter trusts most.", tuple(noted[len(low) :]), "kept image"),
    )


def from_pool(pool: Dataset, count: int) -> Gallery:
    """Train rows as they came, evenly spread over the pool."""
    rows = pool.split("train")
    text = f"{len(rows):,} train rows as they came, every {max(len(rows) // max(count, 1), 1):,}th or so."
    pictures = tuple(Picture(p.image, p.caption, p.right) for p in rows_at(rows, spread(len(rows), count)))
    return Gallery("The pool", text, pictures, "pool image")


def condensed(data: Dataset, count: int) -> Gallery:
    """Condensed samples in the order of their labels."""
    order = np.argsort(data.labels(), kind="stable")
    chosen = order[spread(len(data), count)]
    text = f"{len(data):,} learned samples that stand for all kept rows" + (f"; {len(chosen)} of them." if len(chosen) < len(data) else ".")
    pictures = tuple(Picture(p.image, p.note or p.caption) for p in rows_at(data, chosen))
    return Gallery("Condensed", text, pictures, "condensed sample", small=True)


def course(folder: Path) -> tuple[Moment, ...]:
    """A few condensed samples at some moments while they were learned; none where nobody kept them."""
    path = folder / "course.parquet"
    if not path.exists():
        return ()
    table, shape = pq.read_table(path), read_info(folder).shape
    images = decode(table["image"].combine_chunks().field("bytes").to_pylist(), shape)
    steps = table["step"].to_numpy()
    return tuple(Moment(int(step), tuple(images[steps == step])) for step in np.unique(steps))


def by_class(real: Dataset, made: Dataset, count: int, classes: int) -> tuple[ClassRow, ...]:
    """For each of the first `classes` classes that have generated rows, a few real and a few generated images."""
    names = made.info.classes
    of_made, of_real = _by_label(made.labels(), len(names)), _by_label(real.labels(), len(names))
    shown = [label for label in range(len(names)) if len(of_made[label])][:classes]
    real_at = [of_real[label][:count] for label in shown]
    made_at = [of_made[label][spread(len(of_made[label]), count)] for label in shown]
    pictures = [iter(rows_at(data, np.concatenate(at) if at else [])) for data, at in ((real, real_at), (made, made_at))]
    return tuple(
        ClassRow(names[label], tuple(next(pictures[0]).image for _ in r), tuple(next(pictures[1]).image for _ in m))
        for label, r, m in zip(shown, real_at, made_at, strict=True)
    )


def _by_label(labels: Ints, classes: int) -> list[Ints]:
    return [np.flatnonzero(labels == label) for label in range(classes)]
