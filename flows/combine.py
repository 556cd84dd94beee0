"""Combine: one model out of several versions of the registry, or one that goes on from the old one.

Consumes  versions, the data that a teacher is trained on, the validation rows of data/pool, and the section `combine` of params.yaml
Produces  a model, registered as a further version
Started   by `retort combine`, or by hand
"""

from __future__ import annotations

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from flows._registry import find_model, model_name, register, run_of, started_from
from flows._runs import TRAINED, alone, emit, one_at_a_time, shown
from flows._session import session, step
from flows._types import Folders, Models
from flows.train import DATA
from tasks.core.errors import UserError
from tasks.core.refs import ModelRef, data_ref
from tasks.core.settings import read_params
from tasks.core.step import Done, Inputs, Plan

CHOOSE = "data/pool:validation"
How = Annotated[Literal["soups", "stitching", "stationary"], Field(title="Method", description="A method of the family registry")]
Target = Annotated[str, Field(title="Registered model", description="Name that the result goes by; empty: that of the first version")]


@flow(name="combine")
def combine(method: How, versions: Models = (), name: Target = "", data: Folders = ()) -> Done:
    """Make one model out of versions, and register it.

    method    `soups` averages fine-tuned ones, `stitching` joins a family of sizes, `stationary` trains one whose embeddings stay
              comparable with the given version's, or a first such one where none is given
    versions  `NAME@alias` or `NAME/version` each
    name      registered model; none: that of the first version
    data      folders to train or re-estimate on; none: those that a teacher is trained on; it is chosen by the validation rows of the pool
    """
    here = session()
    models: dict[str, ModelRef] = {spec: find_model(spec) for spec in versions}
    if not models and method != "stationary":
        raise UserError(f"{method} needs versions: name each as NAME@alias or NAME/version")
    target = name or (next(iter(versions)).replace("@", "/").partition("/")[0] if versions else model_name("teacher"))
    settings = dict((read_params(here.settings).get("combine") or {}).get(method) or {})
    inputs: Inputs = {
        "models": models,
        "train": tuple(data_ref(here.settings, spec) for spec in data or DATA),
        "choose": data_ref(here.settings, CHOOSE),
    }
    facts = {"versions": {spec: {"start": started_from(here.store, ref)} for spec, ref in models.items()}}
    with one_at_a_time(here, target), shown(here, 1):
        done = step(Plan(method, f"registry.{method}", settings, inputs, here.seed, facts=facts))
        version = register(target, done)
        words = f"{target} version {version}, {done.figures['parameters']:,.0f} parameters"
        here.record("combine", f"registry.{method}", done.cached, done.seconds, words, run_of(done))
        if not done.cached and alone():
            emit(here, TRAINED, f"model.{target}", name=target, version=version)
    return done
