"""Good rows in, a dataset out: repeated ids refused, splits drawn, captions made where there are none, everything counted."""

from __future__ import annotations

import contextlib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import uids
from tasks.core.dataset import QUARANTINE, SCHEMAS, SPLITS, Writer, image_column
from tasks.core.erased import Erased
from tasks.core.errors import UserError
from tasks.pool import _draw
from tasks.pool._base import BATCH, Flaw, Source
from tasks.pool._check import Bad, Checked, Classes, Good, class_name

TEMPLATES = ("a photo of {}", "a picture of {}", "an image showing {}", "a small picture of {}", "{}")


class Quarantine:
    """`quarantine.parquet`: the bad rows, written as they come."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._waiting: list[Bad] = []

    def __enter__(self) -> Quarantine:
        # as `write_parquet` does: equal values, equal bytes
        self._out = pq.ParquetWriter(self.path, QUARANTINE, compression="zstd", write_statistics=False, store_schema=False)
        return self

    def add(self, rows: list[Bad]) -> None:
        self.rows += len(rows)
        self._waiting += rows
        if len(self._waiting) >= BATCH:
            self._flush()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
            self._out.close()
        else:
            with contextlib.suppress(OSError):  # the file goes anyway, and the first error is the one to report
                self._out.close()

    def _flush(self) -> None:
        if self._waiting:
            rows = [
                {"file": short(file), "row": row, "column": flaw.column, "value": short(flaw.value), "reason": flaw.reason}
                for file, row, flaw in self._waiting
            ]
            self._out.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE))
            self._waiting = []


class Intake:
    """Takes rows in. `seed` moves the wording of made captions and nothing else."""

    def __init__(self, writer: Writer, aside: Quarantine, classes: Classes, *, reference_rows: int, seed: int) -> None:
        self.writer, self.aside, self.classes, self.reference_rows, self.seed = writer, aside, classes, reference_rows, seed
        self.seen = _draw.Seen()
        self.rows: Counter[str] = Counter()
        self.train: Counter[int | None] = Counter()  # train rows by label
        self.truth: Counter[bool | None] = Counter()  # train rows by whether the caption is right
        self.top = -1  # highest label
        self.erased = 0  # rows that came again after they were erased
        self.unlisted = 0  # rows that the list of uids lacks
        self.drawn: list[tuple[int, str, Good]] = []  # heap of the reference rows drawn so far, the one with the highest number first

    def take(
        self,
        source: Source,
        batches: Iterable[Checked],
        shares: Mapping[str, float],
        *,
        into: str,
        max_bad: float,
        total: int,
        name: str,
        only: uids.Uids | None = None,
    ) -> None:
        """All rows of a source, or `only` those of these uids. Train rows are split by `shares`; `into` names one split for all rows, or is
        empty.

        Raises UserError as soon as more than the share `max_bad` of the `total` rows is bad.
        """
        bad, reasons = 0, Counter[str]()
        first: Bad | None = None
        for good, flaws, erased in batches:
            self.erased += erased
            if only is not None:
                named = uids.among(uids.uids(row.id for row in good), only)
                self.unlisted += int((~named).sum())
                good = [row for row, there in zip(good, named, strict=True) if there]
            numbers = _draw.numbers([row.id for row in good])
            again = self.seen.add(numbers[:, _draw.SEEN])
            for at in np.flatnonzero(again):
                flaws.append((good[at].file, good[at].row, Flaw(source.column("sample_id"), good[at].id, "sample_id was there before")))
            fresh = [row for row, repeated in zip(good, again, strict=True) if not repeated]
            self._put(fresh, numbers[~again], [into or row.split for row in fresh], shares)
            self.aside.add(flaws)
            bad, first = bad + len(flaws), first or (flaws[0] if flaws else None)
            reasons.update(flaw.reason for _, _, flaw in flaws)
            if first and bad > max_bad * total:
                (reason, times), (file, row, flaw) = reasons.most_common(1)[0], first
                raise UserError(
                    f"{name}: {bad} of {total} rows are bad so far, more than max_bad={max_bad:g} allows; {times} times '{reason}'; "
                    f"the first is in {file}, row {row}, column {flaw.column!r} ({flaw.reason})"
                )

    def finish(self, *, allow_empty_class: bool, erased: Erased, name: str) -> None:
        """Write the drawn reference rows and state the facts. Raises UserError where there are no train rows, or a class has none that was
        not erased.
        """
        rows = [row for _, _, row in sorted(self.drawn, reverse=True)]
        for at in range(0, len(rows), BATCH):
            some = rows[at : at + BATCH]
            self._write(some, _draw.numbers([row.id for row in some]), ["reference"] * len(some))
        if not self.rows.total() and self.unlisted:
            raise UserError(f"none of the {self.unlisted} rows of {name} is in the list of uids that 'only' names")
        if not self.rows.total():
            raise UserError(f"source {name} has no usable row: every one is bad")
        if not self.rows["train"]:
            raise UserError(f"source {name} has no train row, only {', '.join(self.rows)}; add some, or set columns.split to null")
        classes = self.classes or tuple(f"class {label}" for label in range(self.top + 1))
        absent = [label for label in range(len(classes)) if not self.train[label]]
        empty = [label for label in absent if not erased.has_class(classes[label])]
        if empty and not allow_empty_class:
            more = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
            which = f"class {classes[empty[0]]!r} (label {empty[0]}{more})"
            raise UserError(f"{which} has no train row in {name}; add some, or set allow_empty_class to true")
        self.writer.set_info(classes=classes, absent=tuple(classes[label] for label in absent))

    def figures(self) -> dict[str, float]:
        """Rows by split, rows set aside and rows left out, erased or not listed; the share of right captions where that is known."""
        found = {"rows": float(self.rows.total()), **{f"rows_{split}": float(self.rows[split]) for split in SPLITS}}
        left_out = {"erased": float(self.erased), "unlisted": float(self.unlisted)}
        found |= {"quarantined": float(self.aside.rows), **{key: count for key, count in left_out.items() if count}}
        known = self.truth[True] + self.truth[False]
        return found | ({"share_clean": self.truth[True] / known} if known else {})

    def _put(self, rows: list[Good], numbers: _draw.Numbers, own: list[str], shares: Mapping[str, float]) -> None:
        """Draw splits and write. Drawn reference rows wait for the end: those that the cap pushes out are train rows after all."""
        splits = _draw.splits(numbers, own, **shares)
        late = (splits == "reference") & (np.array(own, dtype="<U10") == "train")
        out = []
        for at in np.flatnonzero(late):
            entry = (-int(numbers[at, _draw.REFERENCE]), rows[at].id, rows[at])
            if len(self.drawn) < self.reference_rows:
                heapq.heappush(self.drawn, entry)
            else:
                out.append(heapq.heappushpop(self.drawn, entry)[2])
        self._write([row for row, wait in zip(rows, late, strict=True) if not wait], numbers[~late], splits[~late].tolist())
        self._write(out, _draw.numbers([row.id for row in out]), ["train"] * len(out))

    def _write(self, rows: list[Good], numbers: _draw.Numbers, splits: list[str]) -> None:
        wording = (numbers[:, _draw.WORDING] % np.uint64(2**32)).tolist()
        labels = [row.label for row in rows]
        columns: dict[str, Any] = {
            "sample_id": [row.id for row in rows],
            "label": labels,
            "caption": [row.caption or self._made(row.label, number) for row, number in zip(rows, wording, strict=True)],
            "split": splits,
            "parents": [[]] * len(rows),
            "_clean": [row.clean for row in rows],
        }
        schema = SCHEMAS[self.writer.info.schema]
        if "image" in schema.names:
            columns["image"] = image_column([row.image for row in rows])
        if rows:
            self.writer.write(pa.table(columns, schema=schema))
        self.rows.update(splits)
        self.train.update(row.label for row, split in zip(rows, splits, strict=True) if split == "train")
        self.truth.update(row.clean for row, split in zip(rows, splits, strict=True) if split == "train")
        self.top = max(self.top, *(label for label in labels if label is not None), -1)

    def _made(self, label: int | None, number: int) -> str:
        assert label is not None
        return TEMPLATES[(number + self.seed) % len(TEMPLATES)].format(class_name(label, self.classes))


def short(value: Any, most: int = 80) -> str | None:
    """A value as one line of at most `most` characters; of bytes only how many."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value)[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"
