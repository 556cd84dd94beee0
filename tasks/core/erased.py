"""What must not come back: the suppression list that the pool stage reads, and the traces by which an erased sample is known.

A sample is known by its id and by its content: the pixels in the form that the pool gives them, or the words of a text. The list,
`data/erased/erased.parquet`, holds neither, but hashes under the project's salt, so that it can lie in git beside `dvc.yaml` and every
copy of the project obeys it. A salt keeps a list from being read; who holds it and guesses an id can check the guess.
"""

from __future__ import annotations

import hashlib
import io
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import files
from tasks.core.dataset import Dataset, write_parquet
from tasks.core.errors import UserError

FOLDER = "data/erased"
LIST = "erased.parquet"
SCHEMA = pa.schema([("request", pa.string()), ("kind", pa.string()), ("hash", pa.binary(16))])


class Traces(NamedTuple):
    """The ids and the contents (`contents`) of erased samples, plain: for the time of one request, and only in memory."""

    ids: frozenset[str]
    contents: frozenset[bytes]


def image_digest(pixels: npt.NDArray[np.uint8]) -> bytes:
    """16 bytes that stand for an image (C, H, W): its shape and its pixels."""
    shape = ",".join(map(str, pixels.shape)).encode()
    return hashlib.blake2b(shape + b":" + np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text: its words, in lower case, whatever stands between them; of one without words all of it."""
    return hashlib.blake2b(b"text:" + (" ".join(words(text)) or text).encode(), digest_size=16).digest()


def contents(rows: Dataset) -> Iterator[tuple[list[str], list[bytes]]]:
    """Stream ids and contents of rows: `image_digest`, or where they are texts alone `text_digest`."""
    if rows.info.schema == "text":
        for batch in rows.batches(["sample_id", "caption"]):
            yield batch.column(0).to_pylist(), [text_digest(text) for text in batch.column(1).to_pylist()]
    else:
        for ids, images in rows.image_batches():
            yield ids, [image_digest(image) for image in images]


def traces_of(rows: Dataset) -> Traces:
    """Ids and contents of some rows."""
    found = list(contents(rows))
    return Traces(frozenset(name for ids, _ in found for name in ids), frozenset(one for _, digests in found for one in digests))


def salted(value: bytes, salt: bytes) -> bytes:
    """16 bytes of a value under a salt of at most 64 bytes."""
    return hashlib.blake2b(value, key=salt, digest_size=16).digest()


LONGEST_CONCEPT = 5  # words


@dataclass(frozen=True)
class Erased:
    """The list: salted hashes of ids and of contents; and of the names of classes and the words of concepts that are gone as a whole."""

    salt: bytes
    ids: frozenset[bytes]
    contents: frozenset[bytes]
    classes: frozenset[bytes] = frozenset()
    concepts: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        return len(self.ids)

    def has_id(self, name: str) -> bool:
        """Whether a row of this id was erased."""
        return bool(self.ids) and salted(name.encode(), self.salt) in self.ids

    def has_content(self, digest: bytes) -> bool:
        """Whether a row of this content (`image_digest`, `text_digest`) was erased."""
        return bool(self.contents) and salted(digest, self.salt) in self.contents

    def has_class(self, name: str) -> bool:
        """Whether a class was erased as a whole."""
        return bool(self.classes) and salted(name.encode(), self.salt) in self.classes

    def has_concept(self, caption: str) -> bool:
        """Whether a caption speaks of something that was erased as a whole."""
        if not self.concepts:
            return False
        found = words(caption)
        spans = (found[at : at + n] for n in range(1, LONGEST_CONCEPT + 1) for at in range(len(found) - n + 1))
        return any(salted(" ".join(span).encode(), self.salt) in self.concepts for span in spans)

    @staticmethod
    def read(folder: Path) -> Erased:
        """Read the list of a project's `data/erased`; empty where there is none. Raises UserError where it cannot be read."""
        table, salt = _stored(folder)
        hashes: dict[str, list[Any]] = {"id": [], "content": [], "class": [], "concept": []}
        for kind, value in zip(table["kind"].to_pylist(), table["hash"].to_pylist(), strict=True):
            hashes["content" if kind == "image" else kind].append(value)  # `image`: of lists from before there were texts
        return Erased(salt, *(frozenset(found) for found in hashes.values()))


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def add(folder: Path, traces: Traces, request: str, *, class_name: str = "", concept: str = "") -> bool:
    """Put the traces of a request on the list, and the class or concept that it names; False where all stood there already.

    The file is replaced whole or not at all.
    """
    table, salt = _stored(folder)
    there = {(kind, value) for kind, value in zip(table["kind"].to_pylist(), table["hash"].to_pylist(), strict=True)}
    salt = salt or secrets.token_bytes(16)
    wanted = {("id", salted(name.encode(), salt)) for name in traces.ids}
    wanted |= {("content", salted(digest, salt)) for digest in traces.contents}
    wanted |= {(kind, salted(text.encode(), salt)) for kind, text in (("class", class_name), ("concept", " ".join(words(concept)))) if text}
    fresh = sorted(wanted - there)
    if not fresh:
        return False
    rows = {"request": [request] * len(fresh), "kind": [kind for kind, _ in fresh], "hash": [value for _, value in fresh]}
    whole = pa.concat_tables([table, pa.table(rows, schema=SCHEMA)]).replace_schema_metadata({"salt": salt.hex()})
    content = io.BytesIO()
    write_parquet(content, whole)
    files.write_bytes(folder / LIST, content.getvalue())
    return True


def requests(folder: Path) -> list[str]:
    """The requests that put something on the list, in their order."""
    return list(dict.fromkeys(_stored(folder)[0]["request"].to_pylist()))


def _stored(folder: Path) -> tuple[pa.Table, bytes]:
    path = folder / LIST
    if not path.exists():
        return SCHEMA.empty_table(), b""
    try:
        table = pq.read_table(path)
        return table.cast(SCHEMA), bytes.fromhex((table.schema.metadata or {})[b"salt"].decode())
    except (pa.ArrowException, OSError, KeyError, ValueError):
        raise UserError(f"{path} cannot be read: restore it from git; without it erased samples could come back") from None
