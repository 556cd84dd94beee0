"""One run of one flow, from the plan to the closing table."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows import _dvc, _server
from flows._screen import watching
from flows._session import NeedsRun, Session, open_store, use
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tasks.core.step import preload
from tasks.core.store import Store

SHOWN = 20  # versions of a model in the closing lines
DIRECT = ("promote", "audit")  # flows that may be done without Prefect, where no server runs that would show them
DATA_FIRST = ("lifecycle", "curate")  # flows that begin with the data stages


def work(
    settings: Settings, console: Console, log: Path, load: Callable[[], Any], arguments: dict[str, Any], began: float, *, summary: bool
) -> int:
    """Do the work and show it. Gives the exit status: 0, 1 for a fault, 2 for a user's mistake, 130 for an interrupt."""
    try:
        _server.reap(settings)
        _dvc.mend(settings)
        flow = load()
        served = bool(os.environ.get("PREFECT_API_URL"))  # before a server of this run alone is named there
        here = Session(settings, planning=True, log=log)
        here.check()
        result, ran = _plan(here, flow, arguments), False
        if result is None and flow.name in DIRECT and not served:
            ran = True
            here = Session(settings, direct=True, log=log)
            result = _directly(here, flow, arguments)
        if result is None:
            ran = True
            here = Session(settings, served=served, log=log)
            result = _do(here, console, flow, arguments)
        _close(here, console, result, ran, time.monotonic() - began, summary)
        status = 0
    except UserError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        status = 2
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        status = 130
    except Exception as error:  # the screen gets one sentence, the log all of it
        traceback.print_exc()
        console.print(f"[red]failed:[/] {type(error).__name__}: {escape(str(error))}", highlight=False, soft_wrap=True)
        status = 1
    console.print(f"log: {log}", highlight=False, soft_wrap=True)
    return status


def _plan(here: Session, flow: Any, arguments: dict[str, Any]) -> Any:
    """The flow's result where every step is done already, else None. No step is run."""
    if not (here.settings.root / "dvc.lock").exists() or not _has_store(here.settings):
        return None
    try:
        with use(here):
            return flow.fn(**arguments) or ""
    except NeedsRun:
        return None


def _directly(here: Session, flow: Any, arguments: dict[str, Any]) -> Any:
    """The flow's result where all it takes is there: no server is started for it, and the journal says what was done. Else None."""
    here.check_settings()
    open_store(here)
    try:
        with use(here):
            return flow.fn(**arguments)
    except NeedsRun:
        return None


def _do(here: Session, console: Console, flow: Any, arguments: dict[str, Any]) -> Any:
    settings = here.settings
    with watching(console, here.channel), here.aside, _server.server(settings, here.log) as server:
        # the server takes ten seconds to come, and at the first start the store as well. The data stages need neither; one after the
        # other, the two leave them a core
        if flow.name in DATA_FIRST and not arguments.get("targets"):
            here.early = here.aside.submit(_dvc.repro, settings, log=here.log, channel=here.channel)
        try:
            server.ready(here.early)
            here.check_settings()
            here.opening = here.aside.submit(_opened, settings)
            with use(here), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                result = flow(**arguments)
        except BaseException:  # an interrupt too: what runs aside would otherwise be waited for to its end
            _server.end_all(settings)
            raise
        if here.pushed is not None and not here.pushed.result():
            console.print(f"[yellow]note:[/] the data could not be pushed to the DVC remote; 'dvc push' says why, and so does {here.log}")
        return result


def _opened(settings: Settings) -> Store:
    """Open the store, clean up after a run that was cut off, and import what the first step will need."""
    store = open_store(Session(settings))
    preload()
    return store


def _has_store(settings: Settings) -> bool:
    return settings.mlflow_db.exists() or not settings.tracking_uri.startswith("sqlite")


def _close(here: Session, console: Console, result: Any, ran: bool, seconds: float, summary: bool) -> None:
    table = Table("stage", "method", "", "seconds", "figure", title_justify="left")
    for row in here.rows:
        shown = "" if row.cached else f"{row.seconds:.1f}"
        table.add_row(row.stage, escape(row.method), "cached" if row.cached else "run", shown, escape(row.figure))
    console.print(table)
    if not ran:
        console.print(f"Everything was up to date ({seconds:.1f} s).", highlight=False)
    else:
        console.print(f"{seconds:.1f} s in all.", highlight=False)
    if summary:
        for name in here.store.names():
            aliases = here.store.aliases(name)
            listed = []
            for version in here.store.versions(name):
                # a champion was a candidate once; that it still is says nothing
                stands = [alias for alias in ("champion", "candidate") if aliases.get(alias) == int(version.version)][:1]
                listed.append(f"{version.version}{''.join(f' ({alias})' for alias in stands)}")
            if listed:
                more = f"{len(listed) - SHOWN:,} older ones and " if len(listed) > SHOWN else ""
                console.print(f"{escape(name)}: versions {more}{', '.join(listed[-SHOWN:])}", highlight=False)
        console.print(f"report: {result}", highlight=False, soft_wrap=True)
        console.print("pages:  retort ui", highlight=False)
