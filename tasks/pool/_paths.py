"""Tables of paths: CSV or TSV files with each image's path, relative to the table, and its caption or label, id and split."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tasks.core.errors import UserError, without_secrets
from tasks.pool._base import Files, Flaw, Raw, Source, first_line, in_batches, resolve, suffix, with_image


def read(files: Files, columns: Mapping[str, str | None], *, prefix_ids: bool) -> Source:
    """Look over tables: columns, row counts and splits. Raises UserError that names the file and the column."""
    files = files.only("csv", "tsv")
    found: dict[str, str] = {}
    first, total = "", 0
    splits: set[str] = set()
    for path in files.paths:
        where = without_secrets(path)
        with _opened(files, path) as lines:
            here = resolve([*(lines.fieldnames or ())], columns, {"image"}, where)
            if not {"caption", "label"} & here.keys():
                raise UserError(f"{where} has neither a label nor a caption column: set columns.label or columns.caption to the right one")
            if first and here != found:
                raise UserError(f"{where} has other columns than {first}; they must agree")
            first, found = first or where, here
            for line in _lines(lines, where):
                total += 1
                if "split" in found and line[found["split"]]:
                    splits.add(line[found["split"]])

    def rows() -> Iterator[Raw]:
        for path in files.paths:
            name = files.name(path)
            prefix = f"{posixpath.splitext(posixpath.basename(name))[0]}-" if prefix_ids else ""
            with _opened(files, path) as lines:
                for number, line in enumerate(_lines(lines, without_secrets(path))):
                    given = {role: line[column] or None for role, column in found.items()}
                    own = given.get("sample_id")
                    named = prefix + own if own else None
                    raw = Raw(name, number, named, None, given["image"], given.get("label"), given.get("caption"), given.get("split"))
                    yield raw if raw.place is None else _beside(files, path, raw)

    def batches() -> Iterator[list[Raw]]:
        return in_batches(rows())

    return Source(
        files.title,
        total,
        batches,
        splits=frozenset(splits) if "split" in found else None,
        has_ids="sample_id" in found,
        columns=found,
    )


def _beside(files: Files, table: str, raw: Raw) -> Raw:
    """A row with the file that it names. A path outside the table's folder is none of its files."""
    assert raw.place is not None
    folder = posixpath.dirname(table)
    path = posixpath.normpath(posixpath.join(folder, raw.place))
    if not path.startswith(folder.rstrip("/") + "/"):
        return raw._replace(flaw=Flaw("image", raw.place, "path leads out of the table's folder"))
    return with_image(files, path, raw)


@contextmanager
def _opened(files: Files, path: str) -> Iterator[csv.DictReader[str]]:
    """A table's lines, by column."""
    with files.open(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")
        yield csv.DictReader(text, delimiter="\t" if suffix(path) == "tsv" else ",", restval="")


def _lines(lines: csv.DictReader[str], where: str) -> Iterator[dict[str, str]]:
    try:
        yield from lines
    except csv.Error as error:
        raise UserError(f"{where} cannot be read as a table: line {lines.line_num}, {first_line(error)}") from None
