"""WebDataset shards: tar files in which `0001.jpg`, `0001.txt`, `0001.json` and `0001.cls` are one sample. Nothing is unpacked to disk."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from tasks.core.errors import UserError, without_secrets
from tasks.pool._base import (
    BATCH,
    BATCH_BYTES,
    DEFAULT_COLUMNS,
    FILE_BYTES,
    IMAGE_SUFFIXES,
    Files,
    Flaw,
    Raw,
    Source,
    first_line,
)

TEXTS = ("json", "txt", "cls")


def read(files: Files, columns: Mapping[str, str | None], *, prefix_ids: bool) -> Source:
    """Look over tar shards: how many samples there are, and their splits where the JSON members have one.

    A sample's id is its JSON `sample_id`, else its key; its caption the .txt member, else in the JSON; its label the .cls member, else in
    the JSON. Raises UserError that names a damaged shard.
    """
    files = files.only("tar")
    keys = {role: (columns[role],) if role in columns else names for role, names in DEFAULT_COLUMNS.items()}
    total, splits = 0, set()
    for path in files.paths:
        for _, members in _samples(files, path, ("json",)):
            total += 1
            split = _first(_json(members.get("json")) or {}, keys["split"])
            if split is not None:
                splits.add(str(split))

    def batches() -> Iterator[list[Raw]]:
        for path in files.paths:
            prefix = f"{PurePosixPath(files.name(path)).stem}-" if prefix_ids else ""
            batch: list[Raw] = []
            size = 0
            for number, (key, members) in enumerate(_samples(files, path, (*TEXTS, *IMAGE_SUFFIXES))):
                batch.append(_row(files.name(path), number, prefix, key, members, keys))
                size += len(batch[-1].image or b"")
                if len(batch) == BATCH or size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
            if batch:
                yield batch

    return Source(files.title, total, batches, splits=frozenset(splits) if splits else None)


Members = dict[str, bytes | None]  # by suffix; None: too large to be read


def _samples(files: Files, path: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Members]]:
    """Samples of a shard in order: the members that follow each other and share a key. Only the named suffixes are read."""
    key, members = "", Members()
    with _opened(files, path) as (tar, stream):
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            folder, _, base = member.name.rpartition("/")
            name, dot, suffix = base.partition(".")
            suffix = suffix.lower()
            if not (member.isfile() and name and dot):
                continue
            here = "/".join(part for part in (*folder.split("/"), name) if part not in ("", ".", ".."))
            if (here != key or suffix in members) and members:
                yield key, members
                members = {}
            key = here
            members[suffix] = _content(tar, member) if suffix in suffixes else None
        if members:
            yield key, members
        stream.seek(tar.offset)  # tarfile takes a damaged header for the end
        if stream.read(512).strip(b"\0"):
            raise UserError(f"{without_secrets(path)} is damaged at byte {tar.offset}: no tar header there; fetch the shard again")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    source = tar.extractfile(member) if member.size <= FILE_BYTES else None
    return source.read() if source else None


@contextmanager
def _opened(files: Files, path: str) -> Iterator[tuple[tarfile.TarFile, Any]]:
    try:
        with files.open(path) as stream, tarfile.open(fileobj=stream, mode="r:", errors="replace") as tar:
            yield tar, stream
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{without_secrets(path)} cannot be read as a tar file, it may be damaged or cut short: {first_line(error)}"
        ) from None


def _row(file: str, number: int, prefix: str, key: str, members: Members, keys: Mapping[str, Any]) -> Raw:
    suffix = next((s for s in IMAGE_SUFFIXES if s in members), "")
    raw = Raw(file, number, prefix + key, members.get(suffix), place=f"{key}.{suffix}" if suffix else None)
    if suffix and raw.image is None:
        return raw._replace(flaw=Flaw("image", raw.place, f"file is larger than {FILE_BYTES >> 20} MiB"))
    about = _json(members.get("json"))
    if about is None:
        return raw._replace(flaw=Flaw("json", f"{key}.json", "not a JSON object"))
    own = _first(about, keys["sample_id"])
    text, label = members.get("txt"), members.get("cls")
    caption = _first(about, keys["caption"]) if text is None else text.decode("utf-8", "replace").strip()
    split = _first(about, keys["split"])
    return raw._replace(
        id=raw.id if own is None else prefix + _clean(own),
        label=_first(about, keys["label"]) if label is None else label.decode("utf-8", "replace").strip(),
        caption=None if caption is None else _clean(caption),
        split=None if split is None else _clean(split),
    )


def _json(blob: bytes | None) -> dict[str, Any] | None:
    """The object in a JSON member, empty where there is none; None where it is no object."""
    try:
        about = json.loads(blob or b"{}")
    except (ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None


def _first(about: Mapping[str, Any], names: tuple[str | None, ...]) -> Any:
    return next((about[name] for name in names if name is not None and name in about), None)


def _clean(value: Any) -> str:
    """Text that Arrow can hold: JSON allows halves of surrogate pairs."""
    return str(value).encode("utf-8", "replace").decode()
