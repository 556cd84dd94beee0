"""Train: a teacher on filtered and generated data.

Consumes  data/filtered, the trusted reference rows of data/pool, data/generated, and the sections `recipe` and `train` of params.yaml
Produces  a model, registered as the next version of `<data set>-teacher`
Started   by `retort run`, `retort train`, or a schedule
"""

from __future__ import annotations

from prefect import flow

from flows._registry import model_name, register
from flows._session import session, step
from tasks.core.refs import data_ref
from tasks.core.step import Done, Plan

DATA = ("data/filtered", "data/pool:reference", "data/generated")


@flow(name="train")
def train(data: tuple[str, ...] = DATA) -> Done:
    """Train the method that params.yaml names.

    data  folders of the project: each as it is, one split of it as `folder:split`, or as it was as `folder@revision`
    """
    here = session()
    method, settings = here.method("train")
    refs = tuple(data_ref(here.settings, spec) for spec in data)
    done = step(Plan("teacher", method, {**here.params("recipe"), **settings}, {"data": refs}, here.seed))
    version = register(model_name("teacher"), done)
    here.record("train", method, done.cached, done.seconds, f"version {version}, {done.figures['parameters']:,.0f} parameters")
    return done


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(train)
