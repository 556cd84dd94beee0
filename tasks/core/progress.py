"""How far a long loop is: one call for methods, wherever they run.

A method says `for step in track(range(n), "train filter"):`. Under `retort run` the counts travel as JSON lines in the file named by
`RETORT_PROGRESS`; in a terminal of its own a bar is drawn on standard error; otherwise nothing happens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
EVERY = 0.25  # seconds between two reports


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items and report how many are done."""
    total = len(items)
    channel = os.environ.get("RETORT_PROGRESS")
    if channel is None and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, leave=False, file=sys.stderr)
        return
    if channel is None:
        yield from items
        return
    last = 0.0
    for done, item in enumerate(items):
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            report(channel, what, done, total)
        yield item
    report(channel, what, total, total)


def report(channel: str, what: str, done: int, total: int) -> None:
    """Append one line to the channel. A short append is atomic, so several processes may share the file."""
    with Path(channel).open("a", encoding="utf-8") as out:
        out.write(json.dumps({"what": what, "done": done, "total": total}) + "\n")
