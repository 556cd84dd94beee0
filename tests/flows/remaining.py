"""What is left of some samples in a folder: every file is opened, by whatever it is, and read to the bottom.

It shares no code with the project's own search, so that the two cannot be wrong in the same way, and it knows nothing of where the project
keeps what.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

DEPTH = 6  # archives in archives
PNG = b"\x89PNG\r\n\x1a\n"
BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{40,}={0,2}")
HEX = re.compile(rb"(?:[0-9a-fA-F]{2}){64,}")
NUMBERS = re.compile(rb"(?:-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?[\s,;\[\]()]+){63,}-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
NUMBER = re.compile(rb"-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")


class Remain(NamedTuple):
    """A file that something is left in, by its path in the folder, and how: `name`, `id`, `picture`, `numbers`, `bytes`."""

    path: str
    how: str


def remains(folder: Path, pictures: Mapping[str, np.ndarray]) -> set[Remain]:
    """Every file below the folder in which an id or its picture (uint8, (C, H, W)) is left."""
    search = Search(pictures)
    found: set[Remain] = set()
    for where, folders, files in os.walk(folder):
        here = Path(where)
        for name in (*folders, *files):
            path = here / name
            relative = path.relative_to(folder).as_posix()
            if search.ids.search(name.encode()):
                found.add(Remain(relative, "name"))
            if path.is_symlink():
                found |= {Remain(relative, how) for how in search.look(os.fsencode(path.readlink()))}
            elif path.is_file():
                beside = {end: Path(f"{path}{end}") for end in ("-wal", "-shm", "-journal")}
                logs = {end: log for end, log in beside.items() if log.exists()}
                found |= {Remain(relative, how) for how in search.look(path.read_bytes(), logs)}
        if (here / "HEAD").is_file() and (here / "objects").is_dir():
            relative = here.relative_to(folder).as_posix()
            found |= {Remain(relative, how) for content in git_objects(here) for how in search.look(content)}
    return found


def places(found: Collection[Remain]) -> dict[str, set[str]]:
    """The kinds of remains by the folder that they lie in: the first two parts of the path."""
    by: dict[str, set[str]] = {}
    for one in found:
        by.setdefault("/".join(one.path.split("/")[:2]), set()).add(one.how)
    return by


def pool_pictures(folder: Path) -> dict[str, np.ndarray]:
    """The picture of every row of a project's pool, by its id."""
    found = {}
    for shard in sorted((folder / "data" / "pool").glob("part-*.parquet")):
        table = pq.read_table(shard, columns=["sample_id", "image"])
        for name, image in zip(table["sample_id"].to_pylist(), table["image"].to_pylist(), strict=True):
            with Image.open(io.BytesIO(image["bytes"])) as picture:
                pixels = np.asarray(picture)
            found[name] = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return found


class Search:
    """Looks for samples in bytes, and in whatever the bytes are when they are opened. What was opened once is remembered."""

    def __init__(self, pictures: Mapping[str, np.ndarray]) -> None:
        names = [re.escape(name).encode() for name in pictures]
        wide = [re.escape(name.encode("utf-16-le")) for name in pictures]
        self.ids = re.compile(rb"(?:" + b"|".join(names) + rb")(?!\d)|" + b"|".join(wide))
        self.strings = frozenset(pictures)
        self.pictures = list({image.tobytes(): image for image in pictures.values()}.values())
        self.windows = [Window(form) for image in self.pictures for form in (image, 255 - image)]
        self.raw = {pattern for image in self.pictures for pattern in raw_forms(image)}
        self.shortest = min(map(len, self.raw))
        self.seen: dict[bytes, frozenset[str]] = {}

    def look(self, content: bytes, aside: Mapping[str, Path] | None = None, depth: int = 0) -> frozenset[str]:
        """How samples are left in some bytes. `aside`: what lies beside a database, by the end of its name."""
        if not content or depth > DEPTH:
            return frozenset()
        key = hashlib.sha256(content).digest()
        if aside or key not in self.seen:
            self.seen[key] = frozenset()  # whatever holds itself
            self.seen[key] = frozenset(self._open(content, aside or {}, depth))
        return self.seen[key]

    def _open(self, content: bytes, aside: Mapping[str, Path], depth: int) -> Iterator[str]:
        if self.ids.search(content):
            yield "id"
        if len(content) >= self.shortest and any(pattern in content for pattern in self.raw):
            yield "bytes"
        for start in positions(content, PNG):
            yield from self._picture(content[start:])
        if not content.startswith(PNG) and len(content) < 50_000_000:
            yield from self._picture(content)  # JPEG, GIF, WebP, TIFF, BMP
        for inner in opened(content):
            yield from self.look(inner, depth=depth + 1)
        if content[:4] == b"PAR1" == content[-4:]:
            yield from self._table(pq.read_table(io.BytesIO(content)), depth)
        elif content[:6] == b"ARROW1":
            yield from self._table(pa.ipc.open_file(content).read_all(), depth)
        elif content.startswith(b"SQLite format 3\0"):
            for value in database_values(content, aside):
                yield from self._value(value, depth)
        if b"\0" not in content[:4096]:
            for run in NUMBERS.finditer(content):
                yield from self._numbers(np.array(NUMBER.findall(run.group()), dtype=np.float64))

    def _table(self, table: pa.Table, depth: int) -> Iterator[str]:
        for pair in (table.schema.metadata or {}).items():
            for text in pair:
                yield from self.look(text, depth=depth + 1)
        for column in table.columns:
            for value in column.to_pylist():
                yield from self._value(value, depth)

    def _value(self, value: Any, depth: int) -> Iterator[str]:
        if isinstance(value, str):
            if value in self.strings:
                yield "id"
            elif len(value) > 5:
                yield from self.look(value.encode("utf-8", "surrogatepass"), depth=depth + 1)
        elif isinstance(value, bytes):
            yield from self.look(value, depth=depth + 1)
        elif isinstance(value, dict):
            for pair in value.items():
                for part in pair:
                    yield from self._value(part, depth)
        elif isinstance(value, list):
            if value and all(isinstance(part, int | float) for part in value):
                yield from self._numbers(np.array(value, dtype=np.float64))
            else:
                for part in value:
                    yield from self._value(part, depth)

    def _picture(self, content: bytes) -> Iterator[str]:
        try:
            with Image.open(io.BytesIO(content)) as image:
                grey, colour = (np.asarray(image.convert(mode)) for mode in ("L", "RGB"))
        except Exception:  # whatever PIL says of bytes that are no picture
            return
        for window in self.windows:
            if window.shown_by(grey[None] if window.channels == 1 else colour.transpose(2, 0, 1)):
                yield "picture"

    def _numbers(self, numbers: np.ndarray) -> Iterator[str]:
        for image in self.pictures:
            for form in (image, image.transpose(1, 2, 0)):
                flat = form.reshape(-1).astype(np.float64)
                for scale in (1.0, 255.0):
                    if contains(numbers * scale, flat, 0.01 if scale > 1 else 1e-6):
                        yield "numbers"


class Window:
    """A picture (C, H, W) that is looked for in others."""

    def __init__(self, wanted: np.ndarray) -> None:
        self.wanted = wanted
        self.channels, self.height, self.width = wanted.shape
        self.anchor = max(range(self.height), key=lambda y: len(set(wanted[0, y].tolist())))  # its richest row, which few others equal
        self.row = wanted[0, self.anchor].tobytes()

    def shown_by(self, picture: np.ndarray) -> bool:
        """Whether a picture is the wanted one, or has it somewhere, as it is or enlarged by a whole number."""
        high, wide = picture.shape[1:]
        for scale in range(1, min(high // self.height, wide // self.width, 16) + 1):
            exact = (high, wide) == (self.height * scale, self.width * scale)
            for top, left in [(0, 0)] if exact else [(y, x) for y in range(scale) for x in range(scale)]:
                if self._within(picture[:, top::scale, left::scale]):
                    return True
        return False

    def _within(self, picture: np.ndarray) -> bool:
        if picture.shape == self.wanted.shape:
            return bool((picture == self.wanted).all())
        for y in range(self.anchor, picture.shape[1] - self.height + self.anchor + 1):
            top = y - self.anchor
            for x in positions(picture[0, y].tobytes(), self.row):
                if np.array_equal(picture[:, top : top + self.height, x : x + self.width], self.wanted):
                    return True
        return False


def raw_forms(image: np.ndarray) -> Iterator[bytes]:
    """An image as it may lie in memory, channels first or last: bytes, upright or inverted; floats, from 0 to 255 or from 0 to 1."""
    for form in (image, image.transpose(1, 2, 0)):
        whole = np.ascontiguousarray(form)
        yield whole.tobytes()
        yield (255 - whole).tobytes()
        for kind in (np.float32, np.float64):
            yield whole.astype(kind).tobytes()
            yield (whole.astype(kind) / kind(255)).tobytes()


def positions(content: bytes, mark: bytes) -> Iterator[int]:
    """Where the mark begins in the content, each time."""
    at = content.find(mark)
    while at >= 0:
        yield at
        at = content.find(mark, at + 1)


def opened(content: bytes) -> Iterator[bytes]:
    """What is within: unpacked, decompressed, and decoded from base64 and hex."""
    for unpack, mark in (
        (gzip.decompress, b"\x1f\x8b"),
        (bz2.decompress, b"BZh"),
        (lzma.decompress, b"\xfd7zXZ"),
        (zlib.decompress, b"\x78"),
    ):
        if content.startswith(mark):
            try:
                yield unpack(content)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
                continue
    if content.startswith(b"PK") and zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                yield member.filename.encode()
                yield archive.read(member)
    if content[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for entry in archive:
                yield entry.name.encode()
                if (file := archive.extractfile(entry)) is not None:
                    yield file.read()
    if b"\0" in content[:4096]:
        return
    for text in BASE64.findall(content):
        body = text.rstrip(b"=").replace(b"-", b"+").replace(b"_", b"/")
        try:
            yield base64.b64decode(body + b"=" * (-len(body) % 4))
        except binascii.Error:
            continue
    for text in HEX.findall(content):
        yield bytes.fromhex(text.decode())


def database_values(content: bytes, aside: Mapping[str, Path]) -> Iterator[Any]:
    """Every value of every table. The file is read from a copy, with its log beside it, and left as it is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.db"
        path.write_bytes(content)
        for end, source in aside.items():
            shutil.copyfile(source, f"{path}{end}")
        database = sqlite3.connect(path)
        try:
            database.text_factory = bytes
            tables = [name.decode() for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for table in tables:
                quoted = table.replace('"', '""')
                for row in database.execute(f'SELECT * FROM "{quoted}"'):
                    yield from (value for value in row if isinstance(value, str | bytes))
        finally:
            database.close()


def git_objects(folder: Path) -> Iterator[bytes]:
    """The content of every object of a git folder, whether something still names it or not."""
    listed = subprocess.run(["git", "--git-dir", folder, "cat-file", "--batch-all-objects", "--batch"], capture_output=True, check=True)
    rest, at = listed.stdout, 0
    while at < len(rest):
        end = rest.index(b"\n", at)
        size = int(rest[at:end].split()[2])
        yield rest[end + 1 : end + 1 + size]
        at = end + 1 + size + 1


def contains(numbers: np.ndarray, wanted: np.ndarray, tolerance: float) -> bool:
    """Whether the wanted numbers stand among others, one after the other."""
    if len(numbers) < len(wanted):
        return False
    anchor = int(np.argmax(wanted))
    starts = np.flatnonzero(np.abs(numbers - wanted[anchor]) <= tolerance) - anchor
    return any(
        0 <= start <= len(numbers) - len(wanted) and bool((np.abs(numbers[start : start + len(wanted)] - wanted) <= tolerance).all())
        for start in starts.tolist()
    )
