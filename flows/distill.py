"""Distill: a smaller student from a teacher's predictions alone.

Consumes  a teacher out of the registry, the kept rows of data/filtered, the reference rows of data/pool, and the images of the rejected
          rows, whose labels nobody trusts
Produces  a model, registered as the next version of `<data set>-student`
Started   by `retort run`, `retort distill`, or a schedule
"""

from __future__ import annotations

from prefect import flow

from flows._registry import find_model, model_name, register
from flows._session import session, step
from tasks.core.refs import data_ref
from tasks.core.step import Done, Inputs, Plan

TRUSTED = "data/pool:reference"


@flow(name="distill")
def distill(teacher: str = "", data: str = "data/filtered") -> Done:
    """Distill with the method that params.yaml names.

    teacher  `NAME@alias` or `NAME/version`; none: the newest version of the project's teacher
    data     a folder of verdicts: its kept rows are the labelled images, its rejected rows the unlabelled ones
    """
    here = session()
    method, settings = here.method("distill")
    kept = data_ref(here.settings, data)
    unlabelled = data_ref(here.settings, data, kept=False, labelled=False, apart_from=("validation", "test"))
    trusted = data_ref(here.settings, TRUSTED)
    inputs: Inputs = {"teachers": (find_model(teacher or model_name("teacher")),), "data": (kept, trusted, unlabelled)}
    done = step(Plan("student", method, settings, inputs, here.seed))
    version = register(model_name("student"), done)
    here.record("distill", method, done.cached, done.seconds, f"version {version}, {done.figures['parameters']:,.0f} parameters")
    return done


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(distill)
