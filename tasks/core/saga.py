"""One lock around a project's work, and a journal that cannot be changed unseen.

The lock is the kernel's, so it dies with its holder. The journal is a file of JSON lines, each with the hash of the one before: an entry
that was edited, removed or put in breaks the chain.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.core.errors import UserError
from tasks.core.settings import Settings

GENESIS = "0" * 64


@contextmanager
def project_lock(settings: Settings, wait: float = 0.0) -> Iterator[None]:
    """Hold the project: around `dvc repro`, promotion and erasure.

    Raises UserError that names the holder where it is still taken after `wait` seconds.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait
    with (settings.home / "lock").open("a+", encoding="utf-8") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    handle.seek(0)
                    raise UserError(f"another run is at work on this project ({handle.read().strip()}); wait for it, or stop it") from None
                time.sleep(0.5)
        handle.truncate(0)
        handle.write(f"process {os.getpid()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n")
        handle.flush()
        yield


class Journal:
    """The append-only record of what was decided and moved."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[dict[str, Any]]:
        """All entries, the oldest first. A last line that a crash cut short is left out.

        Raises UserError that names the line where the chain is broken.
        """
        if not self.path.exists():
            return []
        found: list[dict[str, Any]] = []
        before = GENESIS
        lines = self.path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was never finished
            try:
                entry = json.loads(line)
                sound = entry["before"] == before and entry["hash"] == _hash(entry)
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                raise UserError(f"the journal {self.path} was changed at line {number}; restore it from a backup before going on")
            before = entry["hash"]
            found.append(entry)
        return found

    def append(self, kind: str, **facts: Any) -> dict[str, Any]:
        """Write one entry and wait until it is on the disk."""
        entries = self.entries()
        entry = {"kind": kind, "at": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        entry["before"] = entries[-1]["hash"] if entries else GENESIS
        entry["hash"] = _hash(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as out:
            whole = self.path.read_bytes().rfind(b"\n") + 1
            out.truncate(whole)
            out.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        return entry


def _hash(entry: dict[str, Any]) -> str:
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
