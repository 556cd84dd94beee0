"""`retort certificate`: check the certificate of a deletion request, here or on any machine, and show those that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tasks.core.erasure.certificate import Check
    from tasks.core.settings import Settings
    from tasks.core.store import Store

certificate = typer.Typer(help="Certificates of deletion requests: check, list, show, key.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
MARKS = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "[yellow]?[/yellow]"}


@certificate.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The certificate, a .json file.")],
    key: Annotated[
        Path | None, typer.Option(help="File with the public key that the project published; default: this project's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a certificate: its signature, and inside a project its facts once more. Ends with 1 where a check fails.

    A question mark is what cannot be seen from here, which is no failure.
    """
    from tasks.core.erasure.certificate import Check, known_key, parse, read_key, recheck
    from tasks.core.erasure.certificate import verify as signed

    found, settings = parse(_content(file)), _project()
    trusted = read_key(key) if key else known_key(settings) if settings else None
    checks = signed(found, trusted)
    if settings is None:
        checks.append(Check("its facts", None, "not looked at: this is not inside a Retort project"))
    elif any(check.ok is False for check in checks):
        checks.append(Check("its facts", None, "not looked at: what is not this project's word says nothing about it"))
    else:
        checks += recheck(settings, _store(settings), found)
    good = all(check.ok is not False for check in checks)
    if as_json:
        print(json.dumps({"good": good, "checks": [check._asdict() for check in checks]}, indent=1))  # noqa: T201
    else:
        _show(checks)
    raise typer.Exit(0 if good else 1)


@certificate.command("list")
def kept(as_json: Json = False) -> None:
    """List the certificates of this project."""
    from tasks.core.erasure import certificate as core
    from tasks.core.settings import project

    settings = project()
    found = core.kept(settings)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Column, Table

    columns = (Column("request", no_wrap=True, min_width=18), "finished", "what", "samples", "models", "found again")
    table = Table(*columns, title=f"Certificates: {len(found)}", title_justify="left")
    for one in found:
        waiting = sum(model["action"] == "waiting" for model in one["models"])
        models = f"{len(one['models'])}, {waiting} waiting" if waiting else str(len(one["models"]))
        table.add_row(one["request"], one["finished_at"], one["kind"], str(one["samples"]["count"]), models, str(one["search"]["found"]))
    Console().print(table)
    known = {core.place(settings, one["request"]) for one in found}
    for path in sorted((settings.home / "certificates").glob("*.json")):
        if path not in known:
            print(f"{path} cannot be read: restore it from a backup")  # noqa: T201


@certificate.command()
def show(request: Annotated[str, typer.Argument(help="Id of a request.")]) -> None:
    """Print where the page of a request's certificate is."""
    from tasks.core.erasure import certificate as core
    from tasks.core.errors import UserError
    from tasks.core.settings import project

    settings = project()
    found = {one["request"]: one for one in core.kept(settings)}
    if request not in found:
        raise UserError(f"there is no certificate of {request!r}; there are: {', '.join(found) or 'none'}")
    page = core.place(settings, request).with_suffix(".html")
    if not page.exists():
        core.keep(settings, found[request])
    print(page)  # noqa: T201


@certificate.command()
def key() -> None:
    """Print the project's public key, to be published: whoever has it can check every certificate."""
    from tasks.core.erasure.certificate import public_key
    from tasks.core.settings import project

    print(public_key(project()), end="")  # noqa: T201


def _content(path: Path) -> bytes:
    from tasks.core.errors import UserError

    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _project() -> Settings | None:
    from tasks.core.errors import UserError
    from tasks.core.settings import project

    try:
        return project()
    except UserError:
        return None


def _store(settings: Settings) -> Store | None:
    """The registry; None where there is none, or its server is down: to look at a certificate makes no new one."""
    from tasks.core.errors import UserError
    from tasks.core.store import Store

    try:
        if settings.tracking_uri == f"sqlite:///{settings.mlflow_db}" and not settings.mlflow_db.exists():
            return None
    except UserError:
        return None
    return Store(settings)


def _show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "what", "why")
    for check in checks:
        table.add_row(MARKS[check.ok], escape(check.what), escape(check.why))
    console = Console()
    console.print(table)
    failed, unseen = (sum(check.ok is value for check in checks) for value in (False, None))
    said = f"[red]{failed} of {len(checks)} checks failed[/red]" if failed else "[green]good[/green]"
    console.print(said + (f", {unseen} could not be made from here" if unseen else ""))
