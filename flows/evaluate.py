"""Evaluate: evidence on models, all measured on the same held-out rows in the same run.

Consumes  models out of the registry and the test rows of data/pool
Produces  evidence, stored in an MLflow run
Started   by `retort run`, `retort evaluate`, or a schedule
"""

from __future__ import annotations

import json
from typing import Any

from prefect import flow

from flows._evidence import ABOUT, TEST
from flows._registry import describe, find_model, model_name, run_of
from flows._runs import shown
from flows._session import GENERATOR, session, step
from flows._types import Folder, Models, Name, Version
from flows.unlearn import Unlearned, newest_trained
from tasks.core.card import DRAWINGS
from tasks.core.errors import UserError
from tasks.core.refs import DataRef, EvidenceRef, ModelRef, Ref, data_ref
from tasks.core.step import Done, Inputs, Plan, read_evidence


@flow(name="evaluate")
def evaluate(models: dict[str, ModelRef] | None = None, names: Models = (), data: Folder = TEST) -> Done:
    """Measure quality, calibration, latency and size on the test rows.

    models  references by the name that the evidence shall use
    names   or `NAME@alias` and `NAME/version` out of the registry; none: the newest of each model of this data set
    data    the rows to measure on
    """
    here = session()
    method, settings = here.method("evaluate")
    settings.pop("shifts", None)  # the gate's
    if models is None:
        mine = model_name("")
        names = names or tuple(name for name in here.store.names() if name.startswith(mine))
        if not names:
            raise UserError("there is no registered model to evaluate: make one with 'retort run' or 'retort train'")
        models = {name: find_model(name) for name in names}
    drawing = {name: ref for name, ref in models.items() if here.store.role(ref) == GENERATOR}
    if drawing:
        done = evaluate_generators(drawing, data)
        models = {name: ref for name, ref in models.items() if name not in drawing}
        if not models:
            return done
    test = data_ref(here.settings, data)
    with shown(here, 1):
        done = step(Plan("evidence", method, settings, {"models": models, "test": test}, here.seed))
        assert isinstance(done.ref, EvidenceRef)
        figures = read_evidence(here.store, done.ref).figures
        best = ", ".join(f"{name} {by['accuracy'].value:.1%}" for name, by in figures.items())
        here.record("evaluate", method, done.cached, done.seconds, best, run_of(done))
        for ref in models.values() if not done.cached else ():
            for name, version in here.store.versions_of(ref):
                describe(name, version)
    return done


def evaluate_generators(models: dict[str, ModelRef], data: str) -> Done:
    """Have the teacher judge what models draw; of a class that one of them forgot, how much of it is left."""
    here = session()
    inputs: dict[str, Any] = {"models": {**models, "judge": newest_trained()}, "test": data_ref(here.settings, data)}
    runs = [json.loads(here.store.client.get_run(ref.run_id).data.tags["retort.inputs"]) for ref in models.values()]
    if forgot := [run["forget"] for run in runs if "forget" in run]:
        inputs["forget"] = tuple(DataRef(**{key: value for key, value in found.items() if key != "kind"}) for found in forgot[0])
    with shown(here, 1):
        done = step(Plan(DRAWINGS, "evaluate.generation", {}, inputs, here.seed))
        assert isinstance(done.ref, EvidenceRef)
        figures = read_evidence(here.store, done.ref).figures
        told = [
            f"{name} {figures[name]['class_accuracy'].value:.1%} of its kind"
            + (f", {figures[name]['ua'].value:.0f}% of the forgotten class are not" if "ua" in figures[name] else "")
            for name in models
        ]
        here.record("evaluate", "evaluate.generation", done.cached, done.seconds, "; ".join(told), run_of(done))
    for ref in models.values() if not done.cached else ():
        for name, version in here.store.versions_of(ref):
            describe(name, version)
    return done


@flow(name="evaluate new")
def evaluate_new(name: Name, version: Version = 0) -> Done:
    """Measure one version, as an automation asks for it after a training.

    name, version  of the registry; version 0: the newest
    """
    done: Done = evaluate(names=(f"{name}/{version}" if version else name,))
    return done


@flow(name="evaluate forgetting")
def evaluate_forgetting(work: Unlearned, scenario: str = "samples") -> Done:
    """Hold an unlearned model and its references against the original and the retrained one.

    scenario  samples, or class where all rows of a class were to be forgotten
    """
    here = session()
    models: dict[str, Ref] = {
        "original": work.original,
        "unlearned": work.chosen.ref,
        **{name: done.ref for name, done in work.references.items()},
    }
    inputs: Inputs = {
        "models": models,
        "forget": work.forget,
        "retain": work.retain,
        "test": data_ref(here.settings, TEST),
    }
    assert isinstance(work.chosen.ref, ModelRef)
    about = {ABOUT: work.chosen.ref.sha256}
    done = step(
        Plan("forgetting", "evaluate.forgetting", {"scenario": scenario} if scenario != "samples" else {}, inputs, here.seed, about)
    )
    assert isinstance(done.ref, EvidenceRef)
    by = read_evidence(here.store, done.ref).figures
    share = work.chosen.seconds / max(work.references["retrain"].seconds, 1e-9)
    words = (
        f"gap to retrain {by['unlearned']['avg_gap'].value:.1f} (original {by['original']['avg_gap'].value:.1f}), {share:.0%} of its time"
    )
    here.record("evaluate", "evaluate.forgetting", done.cached, done.seconds, words, run_of(done))
    return done


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(evaluate)
