"""Raw rows in, good rows and flaws out: checked and decoded by threads, in the source's order."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.core.dataset import SPLITS, decode
from tasks.core.erased import Erased, image_digest, text_digest
from tasks.core.errors import UserError
from tasks.core.progress import track
from tasks.pool import _draw, _images
from tasks.pool._base import BATCH, Flaw, Raw, Source, is_number

NOTHING_ERASED = Erased(b"", frozenset(), frozenset())
MAX_CLASSES = 65_536  # where there are no class names to say how many
Classes = tuple[str, ...] | None


class Good(NamedTuple):
    """A row that may enter the pool, if its id is new."""

    file: str
    row: int
    id: str
    image: bytes  # empty in a pool of texts
    label: int | None
    caption: str | None
    split: str
    clean: bool | None


Bad = tuple[str, int, Flaw]  # file, row, flaw


class Checked(NamedTuple):
    """A batch, parted; and how many of its rows were erased once and are left out."""

    good: list[Good]
    bad: list[Bad]
    erased: int


def first_image(source: Source, *, size: int | None, mode: str, name: str) -> _images.Want:
    """What the first readable image asks of all others. Raises UserError where none can be read."""
    problem = "there is none"
    for batch in source.batches():
        for raw in batch:
            try:
                if raw.image:
                    return _images.wanted(raw.image, size, mode)
            except _images.ImageError as flaw:
                problem = f"{raw.file}, row {raw.row}: {flaw}"
    raise UserError(f"source {name} has no image that can be read ({problem}); valid: PNG, JPEG, WebP or BMP bytes")


def checked(
    source: Source, want: _images.Want | None, classes: Classes, *, limit: int | None, name: str, erased: Erased = NOTHING_ERASED
) -> Iterator[Checked]:
    """Stream a source's rows, parted into good and bad: with images as `want` has them, or texts alone where it is None.

    Few batches wait at a time, so memory does not grow with the source.
    """
    chosen = _draw.sample(source.total, limit)
    workers = min(4, os.cpu_count() or 1)
    waiting: deque[Future[Checked]] = deque()
    with ThreadPoolExecutor(workers) as threads:
        for batch in _selected(_tracked(source.batches(), source.total, name), chosen):
            waiting.append(threads.submit(check, batch, source, want, classes, erased))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def check(batch: list[Raw], source: Source, want: _images.Want | None, classes: Classes, erased: Erased = NOTHING_ERASED) -> Checked:
    """Part a batch into good rows and bad ones. An erased row is neither: where it was flawed, quarantine would keep its id."""
    good: list[Good] = []
    bad: list[Bad] = []
    gone = 0
    for raw in batch:
        if raw.id and erased.has_id(raw.id):
            gone += 1
            continue
        found = check_row(raw, source, want, classes)
        if isinstance(found, Flaw):
            bad.append((raw.file, raw.row, found))
        elif was_erased(found, want, classes, erased):
            gone += 1
        else:
            good.append(found)
    return Checked(good, bad, gone)


def was_erased(row: Good, want: _images.Want | None, classes: Classes, erased: Erased) -> bool:
    """Whether a row is on the list: by its id, its class, its caption, or its content: pixels in the pool's form, or the text."""
    if erased.has_id(row.id) or erased.has_concept(row.caption or ""):
        return True
    if row.label is not None and erased.has_class(class_name(row.label, classes)):
        return True
    if not erased.contents:
        return False
    if want is None:
        return erased.has_content(text_digest(row.caption or ""))
    shape = (1 if want.mode == "L" else 3, want.height, want.width)
    return erased.has_content(image_digest(decode([row.image], shape)[0]))


def check_row(raw: Raw, source: Source, want: _images.Want | None, classes: Classes) -> Good | Flaw:
    """One row, decoded, or what is wrong with it."""
    if raw.flaw:
        return raw.flaw
    if source.has_ids and not raw.id:
        return Flaw(source.column("sample_id"), raw.id, "sample_id is missing")
    if source.splits is not None and raw.split not in SPLITS:
        return Flaw(source.column("split"), raw.split, f"split is not one of {', '.join(SPLITS)}")
    label = None if raw.label is None else whole(raw.label, classes)
    if isinstance(label, str):
        return Flaw(source.column("label"), raw.label, label)
    caption = raw.caption if raw.caption and raw.caption.strip() else None
    if want is None and caption is None:
        return Flaw(source.column("caption"), None, "text is missing")
    if label is None and caption is None:
        return Flaw(source.column("label"), None, "neither a label nor a caption")
    image, pixels = b"", b""
    if want is not None:
        if not raw.image:
            return Flaw(source.column("image"), raw.place, "image is missing")
        try:
            image, pixels = _images.standard(raw.image, want, pixels=not source.has_ids)
        except _images.ImageError as flaw:
            return Flaw(source.column("image"), raw.place or raw.image, str(flaw))
    # where the caption will be made from the class name, the name counts: the wording itself is drawn from the id
    about = caption or ("" if label is None else class_name(label, classes))
    name = raw.id or hashlib.md5(pixels + about.encode(), usedforsecurity=False).hexdigest()
    split = "train" if source.splits is None else str(raw.split)
    return Good(raw.file, raw.row, name, image, label, caption, split, raw.clean)


def whole(value: Any, classes: Classes) -> int | str:
    """A label as an integer, from an integer, its text or the class name; or the reason why it is none."""
    if isinstance(value, str) and classes and value in classes:
        return classes.index(value)
    told = isinstance(value, str) and is_number(value)
    counted = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value == int(value)
    if not told and not counted:
        return "label is not an integer" + (" or a class name" if classes else "")
    label, top = int(value), len(classes) if classes else MAX_CLASSES
    return label if 0 <= label < top else f"label is out of range: 0 to {top - 1}"


def class_name(label: int, classes: Classes) -> str:
    return classes[label] if classes else f"class {label}"


def _selected(batches: Iterator[list[Raw]], chosen: npt.NDArray[np.int64]) -> Iterator[list[Raw]]:
    """The rows at the sorted positions `chosen`."""
    at = 0
    for batch in batches:
        low, high = np.searchsorted(chosen, [at, at + len(batch)])
        picked = batch if high - low == len(batch) else [batch[position] for position in chosen[low:high] - at]
        at += len(batch)
        if picked:
            yield picked


def _tracked(batches: Iterator[list[Raw]], total: int, name: str) -> Iterator[list[Raw]]:
    """The batches, whatever their sizes, with progress counted in steps of `BATCH` rows."""
    done = 0
    for step in track(range(math.ceil(total / BATCH)), "read pool"):
        while done < min((step + 1) * BATCH, total):
            batch = next(batches, None)
            if batch is None:
                raise UserError(f"source {name} lost rows while it was read: {total} at first, then {done}; run again when it is at rest")
            done += len(batch)
            yield batch
