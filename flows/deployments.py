"""Every deployment: what runs on a schedule, what reacts to an event, and each flow by hand.

`retort serve` and the worker of `retort up` serve them from one process; `flows/prefect.yaml` has the same ones for work pools and is
written by `python -m flows.deployments`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Flow, serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.events import DeploymentEventTrigger
from prefect.schedules import Cron

from flows._runs import BROKEN, DATA_CHANGED, RECEIVED, REFUSED, TRAINED

FILE = Path(__file__).with_name("prefect.yaml")
POOL = "retort"
AT_ONCE = 4  # runs of one serving process; runs on one project wait for each other
JINJA = "jinja"


@dataclass(frozen=True)
class Deployment:
    """One deployment.

    cron     its schedule, UTC; empty: none
    on       the event that starts it; empty: none
    given    parameters that it takes from the event, as Jinja templates
    """

    flow: str  # module of `flows`, and where it differs `.name`
    name: str
    text: str
    cron: str = ""
    on: str = ""
    given: dict[str, str] = field(default_factory=dict)

    @property
    def entry(self) -> Flow[Any, Any]:
        """The flow itself."""
        module, _, name = self.flow.rpartition(".")
        found: Flow[Any, Any] = getattr(importlib.import_module(f"flows.{module or name}"), name)
        return found

    @property
    def title(self) -> str:
        """What Prefect calls it."""
        return f"{self.entry.name}/{self.name}"

    @property
    def parameters(self) -> dict[str, Any]:
        """What the automation gives the run."""
        return {name: {"__prefect_kind": JINJA, "template": text} for name, text in self.given.items()}


ALL = (
    Deployment("refresh", "nightly", "Bring the data up to date, and the models where it changed", cron="0 2 * * *"),
    Deployment("refresh", "on-new-data", "Refresh when a curation by hand has changed the data", on=DATA_CHANGED),
    Deployment(
        "evaluate.evaluate_new", "on-training", "Measure a version that a training by hand has made", on=TRAINED,
        given={"name": "{{ event.payload.name }}", "version": "{{ event.payload.version }}"},
    ),
    Deployment(
        "notice", "on-refusal", "Write a notice when the gate refuses a candidate", on=REFUSED,
        given={
            "event": "{{ event.event }}",
            "about": "{{ event.payload.name }} version {{ event.payload.version }}",
            "reason": "{{ event.payload.reason }}",
        },
    ),
    Deployment("claims", "weekly", "Measure every method's claim again; a changed status opens a notice", cron="0 3 * * 0"),
    Deployment("forget", "on-request", "Do the deletion requests that wait, when one was received", on=RECEIVED),
    Deployment("forget", "poll", "Do the deletion requests that wait: one whose event was missed is not forgotten", cron="30 * * * *"),
    Deployment("forget", "by-hand", "Receive a deletion request and do it, with all that wait"),
    Deployment("audit", "weekly", "Check every certificate against the project as it is now", cron="0 4 * * 0"),
    Deployment(
        "notice", "on-broken-certificate", "Write a notice when a certificate no longer holds", on=BROKEN,
        given={"event": "{{ event.event }}", "about": "{{ event.payload.request }}", "reason": "{{ event.payload.reason }}"},
    ),
    Deployment("lifecycle", "by-hand", "The main job: from the source to a promoted model and a report"),
    Deployment("curate", "by-hand", "Bring the data stages up to date"),
    Deployment("train", "by-hand", "Train a teacher"),
    Deployment("distill", "by-hand", "Distill a smaller student from a teacher"),
    Deployment("unlearn", "by-hand", "Make a model forget a request, beside its references"),
    Deployment("evaluate", "by-hand", "Measure models on the held-out test rows"),
    Deployment("promote", "by-hand", "Offer a version for promotion"),
    Deployment("combine", "by-hand", "Make one version out of several: a soup, or a stitched model"),
)  # fmt: skip


def deployments() -> list[Any]:
    """Every deployment, as `prefect serve` takes them."""
    return [
        one.entry.to_deployment(
            name=one.name,
            # a slug keeps the schedule the same one when it is deployed again
            schedules=[Cron(one.cron, timezone="UTC", slug=one.name)] if one.cron else None,
            triggers=[trigger(one)] if one.on else None,
            description=one.text,
            tags=["retort"],
            concurrency_limit=ConcurrencyLimitConfig(limit=1),
        )
        for one in ALL
    ]


def trigger(one: Deployment) -> DeploymentEventTrigger:
    """What starts a deployment when its event is heard."""
    return DeploymentEventTrigger(name=one.title, expect={one.on}, match={"prefect.resource.id": "retort.*"}, parameters=one.parameters)


def as_yaml() -> dict[str, Any]:
    """The same deployments, as `prefect deploy --prefect-file flows/prefect.yaml --all` takes them."""
    listed = []
    for one in ALL:
        found: dict[str, Any] = {
            "name": one.name,
            "description": one.text,
            "tags": ["retort"],
            "entrypoint": f"flows/{one.flow.partition('.')[0]}.py:{one.entry.fn.__name__}",
            "concurrency_limit": {"limit": 1, "collision_strategy": "ENQUEUE"},
            "work_pool": {"name": POOL},
        }
        if one.cron:
            found["schedules"] = [{"cron": one.cron, "timezone": "UTC", "slug": one.name}]
        if one.on:
            found["triggers"] = [
                {
                    "type": "event", "name": one.title, "enabled": True, "expect": [one.on],
                    "match": {"prefect.resource.id": "retort.*"}, "parameters": one.parameters,
                }
            ]  # fmt: skip
        listed.append(found)
    # flows run in the project itself: a clone elsewhere would have neither its data nor its journal
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $RETORT_PROJECT }}"}}]
    return {"name": "retort", "pull": pull, "deployments": listed}


def serve_all() -> None:
    """Serve every deployment until it is stopped. Schedules stay on when this process restarts."""
    serve(*deployments(), pause_on_shutdown=False, limit=AT_ONCE)


def write() -> None:
    """Write `flows/prefect.yaml`."""
    import yaml

    from tasks.core import files

    head = "# Written by `python -m flows.deployments`: the deployments that `retort serve` serves, for work pools.\n"
    files.write_text(FILE, head + yaml.safe_dump(as_yaml(), sort_keys=False, width=140))


if __name__ == "__main__":
    write()
