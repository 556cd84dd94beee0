"""Refresh: bring the data up to date, and the models where the data is another.

Consumes  params.yaml and the source that it names
Produces  data versions; where they changed, a teacher, a student, evidence and verdicts
Started   nightly by its deployment (`retort serve`, `retort up`), when the data changed, or by `retort refresh`
"""

from __future__ import annotations

from prefect import flow

from flows._registry import model_name, version_of
from flows._runs import shown
from flows._session import NeedsRun, call, session
from flows.curate import curate, follow, followed
from flows.distill import distill
from flows.evaluate import evaluate
from flows.promote import promote
from flows.train import train


@flow(name="refresh")
def refresh() -> str:
    """Curate; train, distill, evaluate and promote only if the data is another than the models were last made from. Says which it was."""
    here = session()
    with shown(here, 6) as count:
        call(curate)
        count()
        if followed(here.settings):
            here.record("refresh", "", True, 0.0, "the models follow this data already")
            return "nothing changed"
        if here.planning:
            raise NeedsRun("refresh")
        teacher, name, small = call(train), model_name("teacher"), model_name("student")
        count()
        student = call(distill, teachers=(f"{name}/{version_of(name, teacher)}",))
        count()
        call(evaluate, models={"teacher": teacher.ref, "student": student.ref})
        count()
        for model, done in ((name, teacher), (small, student)):
            call(promote, model, version_of(model, done))
            count()
        follow(here.settings)
    return "refreshed"


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(refresh)
