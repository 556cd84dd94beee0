"""Tables: CSV, TSV or lines of JSON with each image's path, relative to the table, and its caption or label; or with texts alone."""

from __future__ import annotations

import csv
import gzip
import io
import json
import posixpath
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from tasks.core.errors import UserError, without_secrets
from tasks.pool._base import FILE_BYTES, Files, Flaw, Labels, Raw, Source, first_line, in_batches, resolve, suffix, with_image

SUFFIXES = tuple(kind + packed for kind in ("csv", "tsv", "jsonl", "ndjson") for packed in ("", ".gz"))
csv.field_size_limit(FILE_BYTES)  # a text may be longer than the 128 KiB that a cell has by default
Line = dict[str, Any] | None  # None: a line that is no object of JSON


def read(files: Files, columns: Mapping[str, str | None], *, prefix_ids: bool, texts: bool = False) -> Source:
    """Look over tables: columns, row counts and splits. `texts`: they hold texts, and no image is looked for.

    Raises UserError that names the file and the column.
    """
    files = files.only(*SUFFIXES)
    columns = {**columns, "image": None} if texts else columns
    found: dict[str, str] = {}
    first, total = "", 0
    splits: set[str] = set()
    labels = Labels()
    for path in files.paths:
        where = without_secrets(path)
        with _opened(files, path) as text:
            names = _names(text, suffix(path))
        here = resolve(names, columns, {"caption"} if texts else {"image"}, where)
        if not {"caption", "label"} & here.keys():
            raise UserError(f"{where} has neither a label nor a caption column: set columns.label or columns.caption to the right one")
        if first and here != found:
            raise UserError(f"{where} has other columns than {first}; they must agree")
        first, found = first or where, here
        with _opened(files, path) as text:
            for line in _lines(text, suffix(path)):
                total += 1
                if line and "split" in found and line.get(found["split"]):
                    splits.add(str(line[found["split"]]))
                if line and "label" in found:
                    labels.add([_value(line.get(found["label"]))])

    def rows() -> Iterator[Raw]:
        for path in files.paths:
            name = files.name(path)
            prefix = f"{posixpath.basename(name).partition('.')[0]}-" if prefix_ids else ""
            with _opened(files, path) as text:
                for number, line in enumerate(_lines(text, suffix(path))):
                    if line is None:
                        yield Raw(name, number, flaw=Flaw("line", None, "line is no object of JSON"))
                        continue
                    given = {role: _value(line.get(column)) for role, column in found.items()}
                    own = given.get("sample_id")
                    named = prefix + own if own else None
                    place = given.get("image")
                    raw = Raw(name, number, named, None, place, given.get("label"), given.get("caption"), given.get("split"))
                    yield raw if place is None else _beside(files, path, raw)

    def batches() -> Iterator[list[Raw]]:
        return in_batches(rows())

    return Source(
        files.title,
        total,
        batches,
        classes=labels.names(),
        gathered=True,
        splits=frozenset(splits) if "split" in found else None,
        has_ids="sample_id" in found,
        columns=found,
    )


def _value(found: Any) -> str | None:
    """A cell as text; None where it is empty."""
    return None if found is None or found == "" else found if isinstance(found, str) else str(found)


def _beside(files: Files, table: str, raw: Raw) -> Raw:
    """A row with the file that it names. A path outside the table's folder is none of its files."""
    assert raw.place is not None
    folder = posixpath.dirname(table)
    path = posixpath.normpath(posixpath.join(folder, raw.place))
    if not path.startswith(folder.rstrip("/") + "/"):
        return raw._replace(flaw=Flaw("image", raw.place, "path leads out of the table's folder"))
    return with_image(files, path, raw)


@contextmanager
def _opened(files: Files, path: str) -> Iterator[Any]:
    """A table's text; what goes wrong with it, here or while it is read, names it."""
    try:
        with files.open(path) as raw, gzip.open(raw) if suffix(path).endswith(".gz") else nullcontext(raw) as plain:
            yield io.TextIOWrapper(plain, encoding="utf-8-sig", errors="replace", newline="")
    except (csv.Error, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{without_secrets(path)} cannot be read as a table: {first_line(error)}") from None


def _lines(text: Any, kind: str) -> Iterator[Line]:
    if kind.startswith(("csv", "tsv")):
        yield from csv.DictReader(text, delimiter="\t" if kind[0] == "t" else ",", restval="")
        return
    for line in text:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        yield found if isinstance(found, dict) else None


def _names(text: Any, kind: str) -> list[str]:
    """The columns: of the first line, or of the first object of JSON."""
    if kind.startswith(("csv", "tsv")):
        return next(csv.reader(text, delimiter="\t" if kind[0] == "t" else ","), [])
    return next(([*line] for line in _lines(text, kind) if line is not None), [])
