"""Train: a teacher on filtered and generated data.

Consumes  data/filtered, the trusted reference rows of data/pool, data/generated, and the sections `recipe` and `train` of params.yaml
Produces  a model, registered as the next version of `<data set>-teacher`
Started   by `retort run`, `retort train`, or a schedule
"""

from __future__ import annotations

from prefect import flow

from flows._registry import find_model, model_name, register, run_of
from flows._runs import TRAINED, alone, emit, one_at_a_time, shown
from flows._session import session, step
from flows._types import Folders, Model
from tasks.core.refs import data_ref
from tasks.core.step import Done, Inputs, Plan

DATA = ("data/filtered", "data/pool:reference", "data/generated")


@flow(name="train")
def train(data: Folders = DATA, start: Model = "") -> Done:
    """Train the method that params.yaml names.

    data   folders of the project: each as it is, one split of it as `folder:split`, or as it was as `folder@revision`
    start  a model to go on from: `NAME@alias` or `NAME/version`; none: from scratch
    """
    here = session()
    name = model_name("teacher")
    with one_at_a_time(here, name), shown(here, 1):
        method, settings = here.method("train")
        inputs: Inputs = {"data": tuple(data_ref(here.settings, spec) for spec in data)}
        if start:
            inputs = {**inputs, "start": find_model(start)}
        done = step(Plan("teacher", method, {**here.params("recipe"), **settings}, inputs, here.seed))
        version = register(name, done)
        words = f"version {version}, {done.figures['parameters']:,.0f} parameters"
        here.record("train", method, done.cached, done.seconds, words, run_of(done))
        if not done.cached and alone():
            emit(here, TRAINED, f"model.{name}", name=name, version=version)
    return done


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(train)
