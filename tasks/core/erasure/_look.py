"""Does this file carry a trace of an erased sample? Opens Parquet, Arrow, NumPy, SQLite, archives, pictures, pages and plain bytes.

Files are streamed, and whatever comes by again, such as an object that lies in a cache and in a remote, is taken apart once.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import io
import json
import re
import shutil
import sqlite3
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.core.erased import Traces, image_digest, text_digest
from tasks.core.erasure._words import Words

CHUNK, OVERLAP = 16 << 20, 1 << 20  # bytes of text at a time, and of those that are read again: a picture within text is no larger
REMEMBERED = 1_000_000  # pictures that are known to be none of those looked for
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
BASE64 = re.compile(rb"(?:iVBORw0KGgo|/9j/)[A-Za-z0-9+/]{16,}={0,2}")  # how PNG and JPEG begin in pages and JSON
IDS = ("sample_id", "parents")  # columns of ids alone: compared as they are, since one id may hold another


class Unreadable(Exception):  # noqa: N818 (a finding, not an error)
    """A file that could not be looked through, and why."""


class Look(NamedTuple):
    """What a file carries (`id`, `parent`, `image`, `text`), and how many rows and pictures were looked at."""

    carries: frozenset[str]
    rows: int
    images: int


class Looker:
    """Looks for traces in files.

    shapes  (C, H, W) of the project's images: pictures of other sizes are not decoded; none: every picture is. Zeros: it has texts
            without images, and every value of a column and line of a text is compared with the erased ones
    folder  where archives are unpacked
    """

    def __init__(self, traces: Traces, shapes: Collection[tuple[int, int, int]], folder: Path) -> None:
        self.words = Words(traces.ids)
        self._ids = pa.array(sorted(traces.ids), pa.string())
        shown = [shape for shape in shapes if all(shape)]
        self._contents = traces.contents
        self._has_texts = len(shown) < len(shapes)
        self._sizes = {shape[1:] for shape in shown}
        self._modes = {"L" if shape[0] == 1 else "RGB" for shape in shown} or {"L", "RGB"}
        self._folder = folder
        self._looks: dict[bytes, Look] = {}
        self._others: set[bytes] = set()
        self._rows = self._decoded = 0

    def name(self, path: str) -> bool:
        """Whether a path is named after an erased sample."""
        return self.words.found(path.encode())

    def look(self, path: Path) -> Look:
        """What a file carries. Raises Unreadable."""
        try:
            with path.open("rb") as source:
                content = hashlib.file_digest(source, "blake2b").digest()
            if content not in self._looks:
                rows, decoded = self._rows, self._decoded
                carries = frozenset(self._open(path))
                self._looks[content] = Look(carries, self._rows - rows, self._decoded - decoded)
            return self._looks[content]
        except Unreadable:
            raise
        except (OSError, ValueError, pa.ArrowException, sqlite3.Error, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise Unreadable(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None

    def _open(self, path: Path) -> Iterator[str]:
        with path.open("rb") as source:
            head = source.read(16)
        if head[:4] == b"PAR1":
            yield from self._parquet(path)
        elif head[:6] == b"ARROW1":
            with pa.ipc.open_file(path) as table:
                for at in range(table.num_record_batches):
                    yield from self._batch(table.get_batch(at))
        elif head[:6] == b"\x93NUMPY":
            yield from self._array(path)
        elif head[:15] == b"SQLite format 3":
            yield from self._database(path)
        elif head[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    yield from ["id"] * self.name(member)
                    with archive.open(member) as source:
                        yield from self._unpacked(source)
        elif head[:2] == b"\x1f\x8b":
            with gzip.open(path) as source:
                yield from self._unpacked(source)
        else:
            if head.startswith(PICTURES):
                yield from ["image"] * self._picture(path.read_bytes())
            yield from self._text(path)

    def _unpacked(self, source: Any) -> Iterator[str]:
        with tempfile.NamedTemporaryFile(dir=self._folder) as out:
            shutil.copyfileobj(source, out)
            out.flush()
            yield from self._open(Path(out.name))

    def _text(self, path: Path) -> Iterator[str]:
        packed = path.name.endswith(("-wal", "-journal"))  # of a database
        for part in _parts(path):
            yield from self.text(part, packed)

    def text(self, part: bytes, packed: bool = False) -> Iterator[str]:
        """What some bytes carry, pictures within them included."""
        if self.words.found(part) or (packed and self.words.packed(part)):
            yield "id"
        if self._has_texts:
            yield from ["text"] * any(self._said(line) for line in part.decode("utf-8", "replace").splitlines())
        if self._contents:
            at = part.find(PICTURES[0], 1)
            while at >= 0:
                end = part.find(b"IEND\xaeB`\x82", at)
                yield from ["image"] * self._picture(part[at : end + 8 if end >= 0 else at + OVERLAP])
                at = part.find(PICTURES[0], at + 8)
            for match in BASE64.finditer(part):
                yield from ["image"] * self._picture(_unbase64(match.group()))

    def _parquet(self, path: Path) -> Iterator[str]:
        metadata = pq.read_metadata(path)
        leaves = [metadata.schema.column(at) for at in range(metadata.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING" or leaf.converted_type == "UTF8"]
        blobs = [leaf.path for leaf in leaves if leaf.path not in texts and leaf.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")]
        self._rows += metadata.num_rows
        for key, value in (metadata.metadata or {}).items():
            yield from ["id"] * self.words.found(key + b"\n" + value)
        # the dictionaries themselves are read: one may still hold the value of a row that was taken out
        with pq.ParquetFile(path, read_dictionary=texts) as parquet:
            for group in range(metadata.num_row_groups):
                for at in range(metadata.num_columns):
                    chunk = metadata.row_group(group).column(at)
                    if (known := chunk.statistics) is not None and known.has_min_max and isinstance(known.min, str):
                        yield from self._strings(pa.array([known.min, known.max]), chunk.path_in_schema)
                for text in texts:
                    for batch in parquet.iter_batches(CHUNK >> 8, row_groups=[group], columns=[text]):
                        yield from self._batch(batch)
            if blobs:
                for batch in parquet.iter_batches(256, columns=blobs):
                    yield from self._batch(batch)

    def _batch(self, batch: pa.RecordBatch) -> Iterator[str]:
        for at, name in enumerate(batch.schema.names):
            yield from self._column(batch.column(at), name)

    def _column(self, column: Any, name: str) -> Iterator[str]:
        kind = column.type
        if pa.types.is_dictionary(kind):
            yield from self._column(column.dictionary, name)
        elif pa.types.is_struct(kind):
            for at in range(kind.num_fields):
                yield from self._column(column.field(at), f"{name}.{kind.field(at).name}")
        elif pa.types.is_map(kind):
            yield from self._column(column.keys, name)
            yield from self._column(column.items, name)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            yield from self._column(column.flatten(), name)
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            yield from self._strings(column, name)
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            others = []
            for blob in column.to_pylist():
                if blob and blob.startswith(PICTURES):
                    yield from ["image"] * self._picture(blob)
                elif blob:
                    others.append(blob)
            yield from ["id"] * self.words.found(b"\n".join(others))

    def _strings(self, column: Any, name: str) -> Iterator[str]:
        column_of = name.partition(".")[0]
        what = "parent" if column_of == "parents" else "id"
        if pc.any(pc.is_in(column, value_set=self._ids.cast(column.type))).as_py():
            yield what
        elif column_of not in IDS:
            values = [text for text in column.to_pylist() if text]
            yield from [what] * self.words.found("\n".join(values).encode())
            yield from ["text"] * (self._has_texts and any(map(self._said, values)))

    def _said(self, text: str) -> bool:
        """Whether a text is one of those looked for, as it stands or as JSON writes it."""
        return text_digest(text) in self._contents or (text.startswith("{") and self._told(text))

    def _told(self, line: str) -> bool:
        """Whether one of the values of an object in JSON is."""
        try:
            values = json.loads(line).values()
        except ValueError:
            return False
        return any(isinstance(value, str) and text_digest(value) in self._contents for value in values)

    def _array(self, path: Path) -> Iterator[str]:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype == np.uint8 and array.ndim == 4:
            if not self._sizes or array.shape[2:] in self._sizes:
                self._decoded += len(array)
                yield from ["image"] * (bool(self._contents) and any(image_digest(image) in self._contents for image in array))
        elif array.dtype.kind == "U":
            yield from self._strings(pa.array(np.ravel(array).tolist(), pa.string()), "")
        else:
            yield from self._text(path)

    def _database(self, path: Path) -> Iterator[str]:
        for part in _parts(path):  # what was deleted may still stand in its pages
            yield from ["id"] * self.words.packed(part)
        database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True, timeout=20)
        try:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                cells: list[bytes] = []
                size = 0
                for row in database.execute(f'SELECT * FROM "{table}"'):  # noqa: S608 (a name out of the file's own schema)
                    self._rows += 1
                    for cell in row:
                        if isinstance(cell, str | bytes):
                            cells.append(cell.encode() if isinstance(cell, str) else cell)
                            size += len(cells[-1])
                    if size > CHUNK:
                        yield from self.text(b"\n".join(cells))
                        cells, size = [], 0
                yield from self.text(b"\n".join(cells))
        finally:
            database.close()

    def rows(self, batch: pa.RecordBatch) -> bool:
        """Whether some rows of a table carry a trace."""
        return any(True for _ in self._batch(batch))

    def result(self, path: Path) -> Iterator[str]:
        """What a result that Prefect stored carries: its content is packed once more."""
        try:
            packed = json.loads(path.read_bytes())["result"]
            yield from self.text(binascii.a2b_base64(packed.encode()))
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            return

    def _picture(self, blob: bytes) -> bool:
        """Whether a picture, in the form of the project's images, is one of those looked for."""
        from PIL import Image

        if not self._contents:
            return False
        digest = hashlib.blake2b(blob, digest_size=16).digest()
        if digest in self._others:
            return False
        try:
            with Image.open(io.BytesIO(blob)) as image:
                if self._sizes and (image.height, image.width) not in self._sizes:
                    return False
                self._decoded += 1
                for mode in self._modes:
                    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
                    if image_digest(pixels.reshape(image.height, image.width, -1).transpose(2, 0, 1)) in self._contents:
                        return True
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False  # no picture, only something that begins like one
        if len(self._others) >= REMEMBERED:
            self._others.clear()
        self._others.add(digest)
        return False


def _parts(path: Path) -> Iterable[bytes]:
    """A file's bytes, part by part, no word cut in two. Each part begins with the end of the one before: what that cut off stands whole."""
    with path.open("rb") as source:
        part, more = source.read(CHUNK), source.read(CHUNK)
        while more:
            end = next((match.start() for match in re.finditer(rb"[^0-9A-Za-z_][0-9A-Za-z_]*\Z", part[-OVERLAP:])), None)
            yield part if end is None else part[: max(len(part) - OVERLAP, 0) + end + 1]
            rest = part[-OVERLAP:]
            begin = re.search(rb"[^0-9A-Za-z_]", rest)
            part, more = (rest[begin.start() :] if begin else rest) + more, source.read(CHUNK)
        yield part


def _unbase64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4))
    except ValueError:
        return b""
