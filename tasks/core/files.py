"""Writing so that a reader sees the old or the new, never half; and the md5 that DVC gives a file or a folder."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def bound(folder: Path, *, most_bytes: float, days: float) -> int:
    """Remove from a cache what nobody has used for so many days, then the longest unused until so many bytes are left.

    Entries are the files and folders right below it; hidden ones are being written. Gives the number of entries that went.
    """
    kept = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.startswith("."):
            parts = [part.stat() for part in (path, *path.rglob("*"))]
            kept.append((max(max(part.st_atime, part.st_mtime) for part in parts), sum(part.st_size for part in parts), path))
    kept.sort(reverse=True)
    oldest, total, gone = time.time() - days * 86400, 0.0, 0
    for used, size, path in kept:
        total += size
        if used < oldest or total > most_bytes:
            total -= size
            gone += 1
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return gone


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Give an empty sibling of `target`; when the block ends well, it takes the target's place in one step.

    If the block raises, or the process dies, the target is what it was. Left-over siblings of dead writers are removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.new-"
    for left in target.parent.glob(prefix + "*"):
        shutil.rmtree(left, ignore_errors=True)
    fresh = target.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
    try:
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(fresh)
        if target.exists():
            _exchange(fresh, target)
        else:
            fresh.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Replace a file's text in one step."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, content: bytes) -> None:
    """Replace a file's bytes in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with fresh.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock on a file; wait for it if another process has it. The kernel frees it with its holder, however that one ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_md5(path: Path) -> str:
    """md5 of a file's bytes, as DVC computes it."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def folder_md5(folder: Path) -> str:
    """md5 that DVC gives a folder: of the JSON list of its files' md5 and relative path, ending in `.dir`."""
    entries = [{"md5": file_md5(path), "relpath": path.relative_to(folder).as_posix()} for path in folder.rglob("*") if path.is_file()]
    entries.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _exchange(a: Path, b: Path) -> None:
    """Swap two paths atomically where the kernel can; otherwise by two renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2") and libc.renameat2(_AT_FDCWD, bytes(a), _AT_FDCWD, bytes(b), _RENAME_EXCHANGE) == 0:
            return
    aside = b.with_name(f".{b.name}.old-{uuid.uuid4().hex[:8]}")
    b.rename(aside)
    a.rename(b)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
