"""Distill: a smaller student from a teacher's predictions alone.

Consumes  a teacher out of the registry, the kept rows of data/filtered, the reference rows of data/pool, and the images of the rejected
          rows, whose labels nobody trusts
Produces  a model, registered as the next version of `<data set>-student`
Started   by `retort run`, `retort distill`, or a schedule
"""

from __future__ import annotations

from prefect import flow

from flows._registry import find_model, model_name, register, run_of
from flows._runs import TRAINED, alone, emit, one_at_a_time, shown
from flows._session import session, step
from flows._types import Folder, Model
from tasks.core.refs import data_ref
from tasks.core.step import Done, Inputs, Plan

TRUSTED = "data/pool:reference"


@flow(name="distill")
def distill(teacher: Model = "", data: Folder = "data/filtered") -> Done:
    """Distill with the method that params.yaml names.

    teacher  `NAME@alias` or `NAME/version`; none: the newest version of the project's teacher
    data     a folder of verdicts: its kept rows are the labelled images, its rejected rows the unlabelled ones
    """
    here = session()
    name = model_name("student")
    with one_at_a_time(here, name), shown(here, 1):
        method, settings = here.method("distill")
        kept = data_ref(here.settings, data)
        unlabelled = data_ref(here.settings, data, kept=False, labelled=False, apart_from=("validation", "test"))
        trusted = data_ref(here.settings, TRUSTED)
        inputs: Inputs = {"teachers": (find_model(teacher or model_name("teacher")),), "data": (kept, trusted, unlabelled)}
        done = step(Plan("student", method, settings, inputs, here.seed))
        version = register(name, done)
        words = f"version {version}, {done.figures['parameters']:,.0f} parameters"
        here.record("distill", method, done.cached, done.seconds, words, run_of(done))
        if not done.cached and alone():
            emit(here, TRAINED, f"model.{name}", name=name, version=version)
    return done


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(distill)
