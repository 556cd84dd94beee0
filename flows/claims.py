"""Claims: measure every claim again, and open a notice where a status is no longer the published one.

Consumes  tests/claims and the data sets of `RETORT_DATA`
Produces  a table of what was measured; where a status changed an event, a notice, and a failed run. Published results are left alone
Started   weekly by its deployment (`retort serve`)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import _claims
from tasks.core import catalog
from tasks.core.errors import UserError

CHANGED = "retort.claim.status-changed"
LOWEST = 19  # the niceness of work that must disturb nobody


# one thread waits for one process, so that as many claims run as there are cores
@flow(name="claims", task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1))  # type: ignore[arg-type]
def claims(methods: list[str] | None = None, first_seed: int = 0, seeds: int = 0, small: bool = False) -> State:
    """Measure claims again, side by side, at low priority.

    methods     those whose claims are measured; none: all
    first_seed  first seed
    seeds       number of seeds; 0: as published
    small       the smallest sizes: that all of it runs, not what it finds
    """
    names = methods or _claims.names()
    if not names:
        raise UserError(f"there are no claims in {_claims.FOLDER}: this runs in a checkout of the source")
    waiting = {name: measure.submit(name, first_seed, seeds, small) for name in names}
    found = {name: future.result(raise_on_failure=False) for name, future in waiting.items()}
    rows = [row(name, one) for name, one in found.items()]
    create_table_artifact(key="claims", table=rows, description="What the claims came to, beside what is published")
    notices = [notice(one) for one in rows if one["measured"] != one["published"]]
    if not notices:
        return Completed(message=f"{len(rows)} claims are what is published")
    text = "\n".join(f"- {line}" for line in notices)
    create_markdown_artifact(key="claims-notice", markdown=f"# Claims that changed\n\n{text}\n", description="Claims that changed")
    for one in rows:
        if one["measured"] != one["published"]:
            emit_event(CHANGED, resource={"prefect.resource.id": f"retort.claim.{one['method']}"}, payload=one)
    return Failed(message="; ".join(notices))


@task(name="claim", task_run_name="claim: {name}", cache_policy=NO_CACHE, persist_result=False)
def measure(name: str, first_seed: int, seeds: int, small: bool) -> dict[str, Any]:
    """One claim in a process of its own, at the lowest priority. Raises RuntimeError with its last words where it fails."""
    command = [sys.executable, "-m", "flows.cli", "claims", "run", name, "--json", "--jobs", "1"]
    command += ["--first-seed", str(first_seed), "--seeds", str(seeds), *(["--small"] if small else [])]
    quieter = ["nice", "-n", str(LOWEST), *command] if os.name == "posix" else command
    ran = subprocess.run(quieter, cwd=catalog.ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    if ran.returncode:
        raise RuntimeError(f"claim of {name}: {ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else 'ended without a word'}")
    return dict(json.loads(ran.stdout))


def row(name: str, measured: Any) -> dict[str, Any]:
    """One line of the table. A claim that could not be measured has the status `failed`, with the reason."""
    published = _claims.published(name) or {}
    failed = isinstance(measured, BaseException) or measured is None
    one = {} if failed else measured
    return {
        "method": name,
        "published": published.get("status", "never measured"),
        "measured": "failed" if failed else one["status"],
        **{f"{key} published": published.get(key) for key in ("effect", "ci_low", "ci_high")},
        **{key: one.get(key) for key in ("effect", "ci_low", "ci_high", "seconds")},
        "why": str(measured) if failed else "",
    }


def notice(one: dict[str, Any]) -> str:
    """What changed, in a line."""
    reason = f" ({one['why']})" if one["why"] else ""
    return f"{one['method']}: published as '{one['published']}', now '{one['measured']}'{reason}"
