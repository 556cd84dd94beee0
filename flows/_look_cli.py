"""Looking at what there is, and taking it back: `retort rollback`, `history`, `card` and `lineage`."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def rollback(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept in the journal.")] = "",
) -> None:
    """Give the alias `champion` back to the last good champion before the present one."""
    from flows.cli import _environment

    _environment()
    from flows import _promotion
    from tasks.core.saga import project_lock
    from tasks.core.settings import project
    from tasks.core.store import Store

    settings = project()
    with project_lock(settings):
        store = Store(settings)
        for sentence in _promotion.settle(settings, store):
            print(f"first: {sentence}")  # noqa: T201
        version = _promotion.rollback(settings, store, name, reason)
    left = [e for e in _promotion.history(settings, name) if e["kind"] in _promotion.OPEN.values() and e["champion"] == version]
    why = f"; it was left on {left[-1]['at'][:10]} for version {left[-1]['version']}: {left[-1]['reason']}" if left else ""
    print(f"version {version} of {name} is champion again{why}", flush=True)  # noqa: T201
    os._exit(0)  # a client that has loaded a model may wait for its threads for minutes; all there is to keep is on the disk


def history(name: Annotated[str, typer.Argument(help="Registered model.")], as_json: Json = False) -> None:
    """List what became of a model's versions: every verdict and every move of its champion."""
    from flows import _promotion
    from tasks.core.errors import UserError
    from tasks.core.settings import project

    found = _promotion.history(project(), name)
    if not found:
        raise UserError(f"the journal knows nothing of {name!r}: no version of it was offered for promotion here")
    if as_json:
        print(json.dumps(found, indent=1))  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("when", "what", "version", "champion before", "why")
    for entry in found:
        table.add_row(entry["at"], entry["kind"], str(entry["version"]), str(entry["champion"] or ""), entry.get("reason", ""))
    Console().print(table)


def card(spec: Annotated[str, typer.Argument(help="NAME@alias, NAME/version, or NAME: its newest version.")]) -> None:
    """Write a version's model card as one page, and print where it is."""
    from flows.cli import _environment

    _environment()
    from flows._registry import find_model
    from flows._session import Session, use
    from tasks.core import files
    from tasks.core.card import gather
    from tasks.core.page import render_card
    from tasks.core.settings import project

    with use(Session(project())) as here:
        name = spec.replace("@", "/").partition("/")[0]
        version = here.store.version_of(name, find_model(spec, revoked=True))
        assert version is not None
        path = here.settings.reports / f"card-{name}-{version}.html"
        files.write_text(path, render_card(gather(here.settings, here.store, name, version)))
    print(path, flush=True)  # noqa: T201
    os._exit(0)


def lineage(
    spec: Annotated[str, typer.Argument(help="NAME@alias, NAME/version, or a data folder.")] = "",
    sample: Annotated[list[str] | None, typer.Option(help="Id of a sample: show everything made from it. May be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a model or a data folder was made from, down to the source; or everything that was made from a sample."""
    from flows.cli import _environment

    _environment()
    from tasks.core.errors import UserError
    from tasks.core.lineage import made_from, print_tree
    from tasks.core.settings import project

    if bool(spec) == bool(sample):
        raise UserError("name either a model or data folder, or a sample with --sample ID")
    if sample:
        from flows._descent import show

        show(project(), sample, as_json)
        return
    tree = made_from(project(), spec)
    if as_json:
        print(json.dumps(tree, indent=1))  # noqa: T201
    else:
        print_tree(tree)
