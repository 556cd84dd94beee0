"""`retort forget`: write a deletion request down, show what it would take, or do it."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer


def forget(
    samples: Annotated[str, typer.Option(help="File with one sample id a line.", metavar="FILE")] = "",
    where: Annotated[str, typer.Option(help="Condition on label, class, caption, split and source, as in SQL.")] = "",
    class_name: Annotated[str, typer.Option("--class", help="All samples of this class, and new ones that come.")] = "",
    concept: Annotated[str, typer.Option(help="All samples whose caption has these words, and new ones that come.")] = "",
    policy: Annotated[str, typer.Option(help="auto: unlearn, and retrain where the gate refuses; unlearn; retrain.")] = "auto",
    reason: Annotated[str, typer.Option(help="Kept with the request and shown on the certificate: never a name.")] = "",
    later: Annotated[
        bool, typer.Option("--later", help="Only write the request down: the next 'retort forget' or a server's does it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what carries the samples, what would be done and what it costs.")
    ] = False,
) -> None:
    """Erase samples from the data and from all that was made of it, and write a certificate. Without samples: go on with what waits."""
    from flows.cli import _environment, _flow, execute

    _environment()
    from flows._session import Session, use
    from tasks.core.erasure.requests import POLICIES, STATES
    from tasks.core.errors import UserError
    from tasks.core.saga import project_lock
    from tasks.core.settings import project

    if policy not in POLICIES:
        raise UserError(f"--policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    asked = (samples, where, class_name, concept)
    if any(asked):
        settings = project()
        with project_lock(settings), use(Session(settings, served=bool(os.environ.get("PREFECT_API_URL")))) as here:
            request = _known(here, *asked)
            if request is not None and request.state == STATES[-1]:
                print(f"these samples were erased already: request {request.id}, see 'retort certificate show {request.id}'")  # noqa: T201
                return
            from flows.forget import receive, select

            if dry_run:
                _show(here, select(here, *asked), policy)
                return
            if request is None:
                request = receive(here, select(here, *asked), policy, reason)
            print(f"request {request.id}: {request.samples} samples, {request.state}", flush=True)  # noqa: T201
            if later:
                return
    elif dry_run:
        raise UserError("--dry-run shows a request: name its samples with --samples, --where, --class or --concept")
    execute(lambda: _flow("forget"))


def audit() -> None:
    """Check every certificate against the project as it is now."""
    from flows.cli import _flow, execute

    execute(lambda: _flow("audit"))


def _known(here: Any, samples: str, where: str, class_name: str, concept: str) -> Any:
    """The request for the same samples, class or concept, certified or at work, or None. Once it is purged, its samples are known by its
    list or its certificate alone.
    """
    from pathlib import Path

    from tasks.core import refs
    from tasks.core.erased import words
    from tasks.core.erasure import certificate, requests

    every = {one.id: one for one in requests.every(here.store)}
    if samples and Path(samples).is_file():
        lines = Path(samples).read_text(encoding="utf-8", errors="replace").splitlines()
        ids = {line.strip() for line in lines if line.strip()}
        for found in certificate.kept(here.settings) if ids else ():
            if found["request"] in every and all(certificate.names(found, name) for name in ids):
                return every[found["request"]]
        for one in every.values() if ids else ():
            if refs.request_file(here.settings, one.id).exists() and ids <= refs.request_traces(here.settings, one.id).ids:
                return one
    rule = class_name or " ".join(words(concept))
    same = [one for one in every.values() if rule and one.rule == rule and one.kind == ("class" if class_name else "concept")]
    return same[-1] if same else None


def _show(here: Any, selection: Any, policy: str) -> None:
    """What carries the samples, what would be done to each model, and what it costs."""
    from rich.console import Console
    from rich.table import Table

    from flows import _forget
    from flows._descent import plain, tables
    from tasks.core.descent import carriers

    found = carriers(here.settings, here.store, selection.traces.ids)
    console = Console()
    console.print(f"{len(selection.traces.ids)} samples", *tables(found), sep="\n", highlight=False)
    actions = Table("model", "would be", "seconds to retrain")
    for target in _forget.targets(here, plain(found)["models"], policy, _forget.scenario_of([selection.kind])):
        words = {"unlearn": "unlearned", "retrain": "retrained", "distill": "distilled again", "revoke": "revoked"}[target.action]
        actions.add_row(f"{target.name}/{target.version}" + (" (champion)" if target.champion else ""), words, f"{target.cost:.1f}")
    console.print(actions)
    loose = [model for model in found.models if not model.versions]
    console.print(
        f"The data stages run again; {len(loose)} models that are not registered lose their weights; then the old bytes go from the "
        "project, DVC's cache and remotes, and MLflow. Nothing was changed.",
        highlight=False,
    )
