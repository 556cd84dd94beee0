"""The main job: from the source to a promoted model, and a report of how it came to be.

Consumes  params.yaml and the source that it names
Produces  the data stages' outputs, a teacher, a student, of images an unlearned teacher, evidence, verdicts, and one HTML page
Started   by `retort run`, or a schedule
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows._registry import model_name, version_of
from flows._runs import shown
from flows._session import call, session
from flows.curate import curate, follow
from flows.distill import distill
from flows.evaluate import evaluate, evaluate_forgetting
from flows.promote import promote
from flows.report import report
from flows.train import train
from flows.unlearn import unlearn


@flow(name="lifecycle")
def lifecycle() -> str:
    """Curate, train, distill, unlearn, evaluate, promote, report. Gives the path of the report."""
    reads = session().reads
    with shown(session(), 7 if reads else 9) as count:

        def do(flow: Any, *args: Any, **kwargs: Any) -> Any:
            made = call(flow, *args, **kwargs)
            count()
            return made

        do(curate)
        teacher = do(train)
        name, small = model_name("teacher"), model_name("student")
        student = do(distill, teachers=(f"{name}/{version_of(name, teacher)}",))
        models = {"teacher": teacher.ref, "student": student.ref}
        if not reads:  # a model of texts is trained again where it must forget: there is nothing to show
            work = do(unlearn, model=f"{name}/{version_of(name, teacher)}")
            models["unlearned"] = work.chosen.ref
        evidence = do(evaluate, models=models)
        forgetting = None if reads else do(evaluate_forgetting, work)
        decisions = [do(promote, small, version_of(small, student))]
        decisions.append(do(promote, name, version_of(name, teacher if reads else work.chosen)))
        page = str(do(report, evidence, forgetting, decisions))
        if not session().planning:
            follow(session().settings)
        return page


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(lifecycle)
