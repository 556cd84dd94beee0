"""Train: a teacher on filtered and generated data, or a generator on filtered data.

Consumes  data/filtered, the trusted reference rows of data/pool, data/generated, and the sections `recipe` and `train`, or `generator`, of
          params.yaml; data/condensed where `train.pretrain` says so
Produces  a model, registered as the next version of `<data set>-teacher` or `<data set>-generator`
Started   by `retort run`, `retort train`, or a schedule
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows._registry import find_model, model_name, register, run_of
from flows._runs import TRAINED, alone, emit, one_at_a_time, shown
from flows._session import GENERATOR, session, step
from flows._types import Folders, Generator, Model
from tasks.core.refs import data_ref
from tasks.core.step import Done, Inputs, Plan

DATA = ("data/filtered", "data/pool:reference", "data/generated")
REAL = ("data/filtered", "data/pool:reference")
FEW = ("data/condensed",)


@flow(name="train")
def train(data: Folders = (), start: Model = "", generator: Generator = False) -> Done:
    """Train the method that params.yaml names.

    data       folders of the project: each as it is, one split of it as `folder:split`, or as it was as `folder@revision`; none: what
               stands at the top
    start      a model to go on from: `NAME@alias` or `NAME/version`; none: from scratch, or from what `train.pretrain` makes
    generator  train a network that draws images, by the section `generator`, on real rows
    """
    here = session()
    role = GENERATOR if generator else "teacher"
    name = model_name(role)
    data = data or (REAL if generator or here.reads else DATA)
    with one_at_a_time(here, name), shown(here, 1):
        inputs: Inputs = {"data": tuple(data_ref(here.settings, spec) for spec in data)}
        done = trained(role, {**inputs, "start": find_model(start)} if start else inputs)
        version = register(name, done)
        words = f"version {version}, {done.figures['parameters']:,.0f} parameters"
        here.record("train", done.method, done.cached, done.seconds, words, run_of(done))
        if not done.cached and alone() and not generator:  # what answers measures classifiers
            emit(here, TRAINED, f"model.{name}", name=name, version=version)
    return done


def trained(role: str, inputs: Inputs, about: Mapping[str, Any] | None = None) -> Done:
    """Train by the section of params.yaml: a generator where `role` says so, else a teacher, on from what `train.pretrain` makes unless the
    inputs name a start. `about`: tags for the run.
    """
    here = session()
    if role == GENERATOR:
        method, settings = here.generator()[0]
        return step(Plan(role, method, settings, inputs, here.seed, about or {}))
    method, settings = here.method("train")
    settings.pop("pretrain", None)
    if "start" not in inputs and (first := here.pretraining()):
        before = step(Plan("pretrained", *first, {"data": tuple(data_ref(here.settings, spec) for spec in FEW)}, here.seed))
        here.record("train", before.method, before.cached, before.seconds, f"a start from {before.figures['rows']:.0f} condensed rows")
        inputs = {**inputs, "start": before.ref}
    return step(Plan(role, method, {**here.params("recipe"), **settings}, inputs, here.seed, about or {}))


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(train)
