"""The `retort` command. Heavy imports wait until a command needs them: `--help` and `methods` answer at once."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from flows import _certificate_cli, _claims_cli, _find_cli, _forget_cli, _look_cli, _up_cli, _verdicts_cli

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a raw pool of data to a promoted model, and back.",
)
app.add_typer(_claims_cli.claims, name="claims")
app.add_typer(_certificate_cli.certificate, name="certificate")
app.add_typer(_claims_cli.report, name="report")
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Run the command. A user's mistake prints one sentence and exits with 2."""
    from tasks.core.errors import UserError

    try:
        app(standalone_mode=True)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


@app.command()
def run(
    source: Annotated[
        str,
        typer.Option(help="Read this instead: digits, or parquet:, folder:, pairs:, paths:, texts: before a path. Kept in params.yaml."),
    ] = "",
) -> None:
    """Run the main job: from the source to a promoted model and a report."""
    if source:
        from tasks.core.saga import project_lock
        from tasks.core.settings import project

        with project_lock(project()):
            set_source(source)
    execute(lambda: _flow("lifecycle"), summary=True)


@app.command()
def curate(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages of dvc.yaml; none: all.")] = None,
    engine: Annotated[
        Literal["local", "ray"] | None, typer.Option(help="Where filters score; ray: on a cluster. The result is the same.")
    ] = None,
) -> None:
    """Bring the data stages up to date."""
    if engine:
        os.environ["RETORT_ENGINE"] = engine
    execute(lambda: _flow("curate"), targets=tuple(stages or ()))


@app.command()
def train(
    data: Annotated[list[str] | None, typer.Option(help="Folder of the project, or folder@revision; may be repeated.")] = None,
    start: Annotated[str, typer.Option(help="Go on from this model: NAME@alias or NAME/version.")] = "",
    generator: Annotated[bool, typer.Option("--generator", help="Train a generator of images, by the section generator.")] = False,
) -> None:
    """Train a teacher, or a generator of images."""
    execute(lambda: _flow("train"), data=tuple(data or ()), start=start, generator=generator)


@app.command()
def distill(
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="NAME@alias or NAME/version; default: the newest teacher; may be repeated: all teach."),
    ] = None,
    student: Annotated[str, typer.Option(help="Go on from this student: NAME@alias or NAME/version.")] = "",
    budget: Annotated[str, typer.Option(help="Offer the student for promotion if it keeps to this, such as 'latency_ms <= 2'.")] = "",
) -> None:
    """Distill a smaller student from one or more teachers; of several students in params.yaml, the best within the budget."""
    execute(lambda: _flow("distill"), teachers=tuple(teacher or ()), start=student, budget=budget)


@app.command()
def unlearn(
    model: Annotated[str, typer.Option(help="NAME@alias or NAME/version; default: the newest teacher.")] = "",
    class_name: Annotated[str, typer.Option("--class", help="Forget this class; default: some rows drawn by the seed.")] = "",
) -> None:
    """Make a model forget a class or a demonstration request, beside its references."""
    execute(lambda: _flow("unlearn"), model=model, class_name=class_name)


@app.command()
def evaluate(
    models: Annotated[list[str] | None, typer.Argument(help="NAME@alias or NAME/version; default: all, the newest of each.")] = None,
) -> None:
    """Measure models on the held-out test rows."""
    execute(lambda: _flow("evaluate"), names=tuple(models or ()))


@app.command()
def combine(
    method: Annotated[str, typer.Argument(help="soups, stitching or stationary.")],
    versions: Annotated[list[str] | None, typer.Argument(help="NAME@alias or NAME/version, each.")] = None,
    name: Annotated[str, typer.Option(help="Registered model that the result goes by; default: that of the first version.")] = "",
) -> None:
    """Make one version out of several: a soup, a stitched model, or one whose embeddings stay comparable."""
    execute(lambda: _flow("combine"), method=method, versions=tuple(versions or ()), name=name)


@app.command()
def refresh() -> None:
    """Bring the data up to date, and the models where the data is another."""
    execute(lambda: _flow("refresh"))


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int, typer.Option(help="Its version; 0: the newest.")] = 0,
) -> None:
    """Offer a version for promotion: the gate decides, the alias moves last."""
    execute(lambda: _flow("promote"), name=name, version=version)


@app.command()
def methods(as_json: Json = False, family: Annotated[str, typer.Option(help="Only this family.")] = "") -> None:
    """List every method with its paper and claim."""
    from tasks.core import catalog
    from tasks.core.errors import UserError

    cards = [card for card in catalog.cards().values() if family in ("", card.family)]
    if not cards:
        raise UserError(f"there is no family {family!r}; there are: {', '.join(catalog.families())}")
    if as_json:
        print(json.dumps([card.__dict__ for card in cards], indent=1))  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "paper", "claim", title=f"{len(cards)} methods", title_justify="left")
    for card in cards:
        table.add_row(card.name, f"{card.paper} (arXiv {card.arxiv})" if card.arxiv else card.paper or "baseline", card.claim)
    Console().print(table)


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Prefect page, where PREFECT_API_URL names no server.")] = 4200,
) -> None:
    """Serve the deployments, schedules and all, until Ctrl-C."""
    _environment()
    from flows._ui import serve_deployments
    from tasks.core.settings import project

    serve_deployments(project(), port)


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Prefect page.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the MLflow page.")] = 5000,
) -> None:
    """Open the Prefect and MLflow pages until Ctrl-C."""
    _environment()
    from flows._ui import serve_pages
    from tasks.core.settings import project

    serve_pages(project(), prefect_port, mlflow_port)


for _command in (
    *(_look_cli.rollback, _look_cli.history, _look_cli.card, _look_cli.lineage, _verdicts_cli.verdicts),
    *(_forget_cli.forget, _forget_cli.audit),
    *(_find_cli.fit, _find_cli.find_model),
    *(_up_cli.up, _up_cli.down, _up_cli.status),
):
    app.command(_command.__name__.replace("_", "-"))(_command)


def run_alone(flow: Any) -> None:
    """Run one flow with its defaults, as `python -m flows.<name>` does."""
    from tasks.core.errors import UserError

    try:
        execute(lambda: flow)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def set_source(source: str) -> None:
    """Write `pool.source` into params.yaml, its comments kept: DVC must see what the data was made from."""
    from io import StringIO

    from ruamel.yaml import YAML

    from tasks.core import files
    from tasks.core.settings import project
    from tasks.core.stage import section
    from tasks.pool import read

    settings = project()
    own, _ = section(settings, "pool")
    if own.get("source") == source:
        return
    read.fingerprint(read.configure({**own, "source": source}))  # what cannot be read is not written down
    yaml = YAML()
    yaml.preserve_quotes = True
    content = yaml.load(settings.params.read_text(encoding="utf-8"))
    content["pool"]["source"] = source
    text = StringIO()
    yaml.dump(content, text)
    files.write_text(settings.params, text.getvalue())


def execute(load: Callable[[], Any], *, summary: bool = False, **arguments: Any) -> None:
    """Run a flow under the project's lock: first as a plan, and with a server only where the plan finds work."""
    _environment()
    from flows._screen import quiet
    from tasks.core.saga import project_lock
    from tasks.core.settings import project

    settings = project()
    log = settings.logs / f"{time.strftime('%Y%m%d-%H%M%S')}.log"
    began = time.monotonic()
    with project_lock(settings), quiet(log) as console:
        from flows._work import work

        own_server = not os.environ.get("PREFECT_API_URL")
        status = work(settings, console, log, load, arguments, began, summary=summary)
    if own_server:  # Prefect's clean-up would wait seconds for a server that is gone; all there is to keep is on the disk
        os._exit(status)
    sys.exit(status)


def _flow(name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"flows.{name}"), name)


def _environment() -> None:
    """Set what Prefect and MLflow read when they are imported."""
    from flows import _server
    from tasks.core import store
    from tasks.core.settings import THREADS, project

    settings = project()
    os.environ.update({**_server.environment(settings), **store.environment(settings)})
    for name, value in {"PYTHONWARNINGS": "ignore", **THREADS}.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()
