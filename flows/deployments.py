"""What runs on a schedule, and the process that starts it."""

from __future__ import annotations

from typing import Any

from prefect import serve

from flows.claims import claims

WEEKLY = "0 3 * * 0"  # Sunday, 3 in the morning, UTC


def deployments() -> list[Any]:
    """Every deployment, as `prefect serve` takes them."""
    return [
        claims.to_deployment(
            name="weekly",
            cron=WEEKLY,
            description="Measure every method's claim again; a changed status opens a notice",
            tags=["claims"],
            concurrency_limit=1,
        )
    ]


def serve_all() -> None:
    """Serve every deployment until it is stopped. Schedules stay on when this process restarts."""
    serve(*deployments(), pause_on_shutdown=False, limit=2)
