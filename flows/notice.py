"""Notice: write down, where people look, what an automation was told.

Consumes  the facts of an event, such as a candidate that the gate refused
Produces  an artifact on Prefect's page, and a line of .retort/notices.jsonl
Started   by the automation of its deployment
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows._types import Text
from tasks.core.settings import project

KEEP = 1000  # lines


@flow(name="notice")
def notice(event: Text, about: Text, reason: Text = "") -> None:
    """Write a notice. It needs neither the project's lock nor its store, so that it never waits for the run that it speaks of.

    event   name of the event
    about   the model or data that it is about
    reason  why, in a sentence
    """
    at = datetime.now(UTC).isoformat(timespec="seconds")
    path = project().home / "notices.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines()[1 - KEEP :] if path.exists() else []
    path.write_text("\n".join([*lines, json.dumps({"at": at, "event": event, "about": about, "reason": reason})]) + "\n", encoding="utf-8")
    create_markdown_artifact(key="notice", markdown=f"**{event}**: {about}\n\n{reason}\n", description=f"{event}: {about}")
    get_run_logger().log(logging.WARNING, "%s: %s: %s", event, about, reason)
