"""What a person sees while a run works: a line for each stage, bars with time left, and nothing else.

Standard output and error of this process, and so of every library in it, go to the log; only the console here still reaches the screen.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

LOOK_SECONDS = 0.2


@contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Send everything that is printed to the log; give a console on the real screen."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as out, io.open(kept[0], "w", closefd=False, encoding="utf-8") as screen:  # noqa: UP020
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        try:
            # a table that is piped or logged is not squeezed into the width of a terminal that is not there
            yield Console(file=screen, width=None if screen.isatty() else 120)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            screen.flush()
            for old, number in zip(kept, (1, 2), strict=True):
                os.dup2(old, number)
                os.close(old)


@contextmanager
def watching(console: Console, channel: Path) -> Iterator[None]:
    """Show what the channel says for the length of the block."""
    channel.parent.mkdir(parents=True, exist_ok=True)
    channel.write_text("", encoding="utf-8")
    before = os.environ.get("RETORT_PROGRESS")
    os.environ["RETORT_PROGRESS"] = str(channel)
    over = threading.Event()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<34}"),
        BarColumn(),
        _Left(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        watcher = threading.Thread(target=_watch, args=(console, bars, channel, over), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            if before is None:
                os.environ.pop("RETORT_PROGRESS", None)
            else:
                os.environ["RETORT_PROGRESS"] = before


class _Left(TimeRemainingColumn):
    """Share done and time left; nothing for a stage, of which nobody knows how long it takes."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text.assemble(f"{task.percentage:3.0f}%  ", super().render(task), " left")


def _watch(console: Console, bars: Progress, channel: Path, over: threading.Event) -> None:
    known: dict[str, TaskID] = {}
    waiting = ""
    with channel.open(encoding="utf-8") as source:
        while True:
            last = over.wait(LOOK_SECONDS)
            waiting += source.read()
            *lines, waiting = waiting.split("\n")
            for line in lines:
                _show(console, bars, known, json.loads(line))
            if last:
                return


def _show(console: Console, bars: Progress, known: dict[str, TaskID], event: dict[str, object]) -> None:
    if event.get("state") == "start":
        known[str(event["stage"])] = bars.add_task(f"{event['stage']} ({event['method']})", total=None)
    elif event.get("state") == "end":
        if event["stage"] in known:
            bars.remove_task(known.pop(str(event["stage"])))
        console.print(f"  [green]done[/] {event['stage']:<12} {float(str(event['seconds'])):6.1f} s", highlight=False)
    elif "what" in event:
        what = str(event["what"])
        total, done = int(str(event["total"])), int(str(event["done"]))
        if what not in known:
            known[what] = bars.add_task(f"  {what}", total=total)
        bars.update(known[what], completed=done, total=total)
        if done >= total:
            bars.remove_task(known.pop(what))
