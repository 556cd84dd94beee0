"""`retort fit` and `retort find-model`: questions to the registry."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Names = Annotated[list[str] | None, typer.Argument(help="Registered models; none: all.")]
UNFIT = 20  # versions that do not fit, shown with why


def fit(
    names: Names = None,
    device: Annotated[str, typer.Option(help="A device of params.yaml, section devices; default: the only one.")] = "",
    task: Annotated[str, typer.Option(help="Only models for this task, which is the data set's name.")] = "",
    as_json: Json = False,
    turtle: Annotated[bool, typer.Option("--turtle", help="Print the RDF graph that is asked, as Turtle.")] = False,
) -> None:
    """Say which versions run on a device: flash, RAM, sensors, task."""
    from flows import _find
    from tasks.registry import _graph

    with _asking():
        if turtle:
            print(_graph.turtle(_graph.graph(*_find.described(tuple(names or ())))))  # noqa: T201
            _end()
        ranking, others = _find.fit(device, task, tuple(names or ()))
    if as_json:
        places = [place.__dict__ for place in ranking.places]
        print(json.dumps({"fit": places, "unfit": others}, indent=1))  # noqa: T201
    else:
        _table(("version", "why it fits"), [(place.version, place.reason) for place in ranking.places], "No version fits.")
        _table(("does not fit", "why"), [(name, "; ".join(why)) for name, why in list(others.items())[:UNFIT]])
        if len(others) > UNFIT:
            print(f"and {len(others) - UNFIT} more that do not fit")  # noqa: T201
    _end()


def find_model(
    data: Annotated[str, typer.Option(help="Rows of the new task: a folder of the project, folder:split, or parquet:PATH, folder:PATH.")],
    names: Names = None,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
    as_json: Json = False,
) -> None:
    """Rank the registry's versions for a new task, without running them on it."""
    from flows import _find

    with _asking():
        ranking = _find.find_model(data, tuple(names or ()))
    if as_json:
        print(json.dumps([place.__dict__ for place in ranking.places], indent=1))  # noqa: T201
    else:
        _table(("version", "score", "why"), [(p.version, f"{p.score:.3f}", p.reason) for p in ranking.places[:top]], "No version fits.")
    _end()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], none: str = "") -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        if none:
            print(none)  # noqa: T201
        return
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def _asking() -> Iterator[Any]:
    """A session that only reads: it needs no lock."""
    from flows.cli import _environment

    _environment()
    from flows._session import Session, use
    from tasks.core.settings import project

    with use(Session(project())) as here:
        yield here


def _end() -> None:
    import sys

    sys.stdout.flush()
    os._exit(0)  # a client that has loaded a model may wait for its threads for minutes
