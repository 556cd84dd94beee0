"""`retort up`, `retort down` and `retort status`: the servers of a project on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def up(
    database: Annotated[
        str | None,
        typer.Option(
            envvar="RETORT_DATABASE",
            show_envvar=True,
            help="postgresql://user:password@host:port/name; Prefect gets the database NAME_prefect, MLflow NAME_mlflow. Default: SQLite.",
        ),
    ] = None,
    artifacts: Annotated[str | None, typer.Option(help="Where models are kept: s3://bucket/prefix. Default: .retort/artifacts.")] = None,
    prefect_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of Prefect; default 4200.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of MLflow; default 5000.")] = None,
) -> None:
    """Start Prefect, MLflow and a worker on 127.0.0.1, until `retort down`. Every command of the project then uses them."""
    from flows import _up
    from tasks.core.settings import project

    _up.up(project(), _up.Wish(database, artifacts, prefect_port, mlflow_port), _say)


def down() -> None:
    """Stop what `retort up` has started."""
    from flows import _up
    from tasks.core.settings import project

    _up.down(project(), _say)


def status(as_json: Json = False) -> None:
    """Say how the servers are. The exit status is 0 where all are up, else 1."""
    from flows import _up
    from tasks.core.settings import project

    found = _up.status(project())
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))  # noqa: T201
    else:
        for one in found:
            typer.echo(f"{_up.SHOWN[one.name]:9}{one.state:11}{one.pid or '':<9}{one.url:23}{one.since:27}{one.log}")
    raise typer.Exit(0 if all(one.state == "up" for one in found) else 1)


def _say(line: str) -> None:
    typer.echo(line)
