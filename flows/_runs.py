"""What flow runs have in common: who may run when, what is tried again, what others are told, and what their page shows.

Events and concurrency limits are for servers that stay (`retort up`, or `PREFECT_API_URL`): a run of the command line alone has the
project's lock, and nobody hears it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_link_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact

from tasks.core.errors import UserError

if TYPE_CHECKING:
    from flows._session import Row, Session

DATA_CHANGED = "retort.data.changed"
TRAINED = "retort.model.trained"
REFUSED = "retort.gate.refused"
PROMOTED = "retort.model.promoted"
RECEIVED = "retort.request.received"
CERTIFIED = "retort.request.certified"
BROKEN = "retort.certificate.broken"
HOUR = 3600
STEP_SECONDS = 12 * HOUR  # of one method
WAIT_SECONDS = 6 * HOUR  # for another run of the same model, or of the same project
PAGES = {"prefect": "http://127.0.0.1:4200", "mlflow": "http://127.0.0.1:5000"}  # where `retort ui` shows them, if no server is up


def can_pass(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a failure may be gone the next time: a server or database that did not answer. A mistake stays a mistake."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, UserError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    words = f"{type(error).__module__}.{type(error).__name__}: {error}".lower()
    return any(
        part in words for part in ("operationalerror", "connectionerror", "connecttimeout", "database is locked", "max retries exceeded")
    )


@contextmanager
def one_at_a_time(here: Session, model: str) -> Iterator[None]:
    """Hold a registered model: of all the runs that share a server, one works on it at a time. The others wait.

    Raises TimeoutError after hours of waiting.
    """
    if not here.served or here.planning:
        yield
        return
    from prefect.client.orchestration import get_client
    from prefect.concurrency.sync import concurrency

    limit = f"retort-{model}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(limit, 1)
    with concurrency(limit, occupy=1, timeout_seconds=WAIT_SECONDS, strict=True):
        yield


def emit(here: Session, event: str, about: str, **facts: Any) -> None:
    """Tell automations what happened. `about` names the model or the data; facts are plain, and never the id of a sample."""
    if here.served and not here.planning:
        from prefect.events import emit_event

        emit_event(event, resource={"prefect.resource.id": f"retort.{about}", "prefect.resource.name": about}, payload=facts)


def alone() -> bool:
    """Whether the current flow run was started by itself, and not by another flow."""
    from prefect.runtime import flow_run

    return flow_run.parent_flow_run_id is None


def flow_run_page(served: bool) -> str:
    """Where Prefect shows the flow run that is at work; empty outside one. A server of one run alone has no pages: they come later."""
    from prefect.runtime import flow_run

    if not flow_run.id:
        return ""
    api = os.environ.get("PREFECT_API_URL", "") if served else ""
    return f"{os.environ.get('PREFECT_UI_URL') or api.removesuffix('/api') or PAGES['prefect']}/runs/flow-run/{flow_run.id}"


def mlflow_page(here: Session, run_id: str) -> str:
    """Where MLflow shows a run."""
    uri = here.settings.tracking_uri
    return f"{uri if uri.startswith('http') else PAGES['mlflow']}/#/experiments/{here.store.experiment()}/runs/{run_id}"


@contextmanager
def shown(here: Session, steps: int) -> Iterator[Callable[[], None]]:
    """Show a flow run's progress on its page, and at the end its table and the way to MLflow. Gives the function that counts a step.

    Nothing is shown while a run is only planned, nor by a flow within a flow, whose lines are the outer one's too.
    """
    if here.plain or not alone():
        yield lambda: None
        return
    bar, done, before = create_progress_artifact(0.0, key="progress", description="Steps of this run"), 0, len(here.rows)

    def step() -> None:
        nonlocal done
        done += 1
        update_progress_artifact(bar, progress=100.0 * min(done, steps) / steps)  # type: ignore[arg-type]

    yield step
    update_progress_artifact(bar, progress=100.0)  # type: ignore[arg-type]
    publish(here, here.rows[before:])


def publish(here: Session, rows: list[Row]) -> None:
    """Put a flow run's lines on its page, and a link to each run of MLflow that it made or found."""
    table = [
        {"stage": row.stage, "method": row.method, "": "cached" if row.cached else f"{row.seconds:.1f} s", "figure": row.figure}
        for row in rows
    ]
    create_table_artifact(key="stages", table=table, description="What was done")
    for run_id, what in dict.fromkeys((row.run_id, f"{row.stage}: {row.method}") for row in rows if row.run_id):
        create_link_artifact(mlflow_page(here, run_id), link_text=f"{what}, in MLflow", key="mlflow")
