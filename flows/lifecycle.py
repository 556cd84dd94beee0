"""The main job: from the source to a promoted model, and a report of how it came to be.

Consumes  params.yaml and the source that it names
Produces  the data stages' outputs, a teacher, a student, an unlearned teacher, evidence, verdicts, and one HTML page
Started   by `retort run`, or a schedule
"""

from __future__ import annotations

from prefect import flow

from flows._registry import model_name
from flows._session import call, session
from flows.curate import curate
from flows.distill import distill
from flows.evaluate import evaluate, evaluate_forgetting
from flows.promote import promote
from flows.report import report
from flows.train import train
from flows.unlearn import unlearn
from tasks.core.refs import ModelRef


@flow(name="lifecycle")
def lifecycle() -> str:
    """Curate, train, distill, unlearn, evaluate, promote, report. Gives the path of the report."""
    call(curate)
    teacher = call(train)
    name = model_name("teacher")
    student = call(distill, teacher=f"{name}/{_version(name, teacher.ref)}")
    work = call(unlearn, model=f"{name}/{_version(name, teacher.ref)}")
    models = {"teacher": teacher.ref, "student": student.ref, "unlearned": work.chosen.ref}
    evidence = call(evaluate, models=models)
    forgetting = call(evaluate_forgetting, work)
    decisions = [
        call(promote, model_name("student"), _version(model_name("student"), student.ref)),
        call(promote, name, _version(name, work.chosen.ref)),
    ]
    return call(report, evidence, forgetting, decisions)


def _version(name: str, ref: object) -> int:
    assert isinstance(ref, ModelRef)
    version = session().store.version_of(name, ref)
    assert version is not None
    return version


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(lifecycle)
