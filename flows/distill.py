"""Distill: a smaller student from one or more teachers; of several students, the one that is worth its cost.

Consumes  teachers out of the registry, the kept rows of data/filtered, the reference rows of data/pool, the images of the rejected rows,
          whose labels nobody trusts; for a sweep the validation rows of data/pool; the section `distill` of params.yaml
Produces  a model, registered as the next version of `<data set>-student`; of a sweep also evidence on all students, and their front
Started   by `retort run`, `retort distill`, or a schedule
"""

from __future__ import annotations

import json

from prefect import flow

from flows import _students
from flows._registry import find_model, model_name, register, run_of
from flows._runs import TRAINED, alone, emit, one_at_a_time, shown
from flows._session import NeedsRun, call, session, step
from flows._students import Candidate, Figures
from flows._types import Budget, Folder, Model, Teachers
from flows.promote import promote
from tasks.core.errors import UserError
from tasks.core.refs import EvidenceRef, Ref, data_ref
from tasks.core.step import Done, Inputs, Plan, read_evidence

TRUSTED = "data/pool:reference"
CHOOSE = "data/pool:validation"
MEASURED = "students"  # the role of the evidence on a sweep
SETTINGS = "retort.settings"  # tag of a student's run: its method's settings, by which it is distilled again


@flow(name="distill")
def distill(teachers: Teachers = (), data: Folder = "data/filtered", start: Model = "", budget: Budget = "") -> Done:
    """Distill with the method that params.yaml names; where it lists `students`, sweep over them and keep the best within the budget.

    teachers  `NAME@alias` or `NAME/version` each; none: the newest version of the project's teacher
    data      a folder of verdicts: its kept rows are the labelled images, its rejected rows the unlabelled ones
    start     a student to go on from; none: a fresh one
    budget    such as `latency_ms <= 2`: the student is offered for promotion under it; none: that of params.yaml
    """
    here = session()
    name = model_name("student")
    sweep = _students.section(here)[2]
    limits = _students.bounds(budget or sweep.budget)
    students = _students.candidates(here)
    with one_at_a_time(here, name), shown(here, len(students)):
        inputs = _inputs(teachers, data, start)
        done = _swept(students, inputs, sweep.early, limits, budget or sweep.budget) if len(students) > 1 else _made(students[0], inputs)
        version = register(name, done)
        if limits and _students.budget_of(here.store.version(name, version).tags) != limits:
            if here.planning:
                raise NeedsRun(name)
            here.store.tag(name, version, _students.BUDGET, json.dumps(limits))
        words = ", ".join([f"version {version}", f"{done.figures['parameters']:,.0f} parameters", *_told(done)])
        here.record("distill", done.method, done.cached, done.seconds, words, run_of(done))
        if not done.cached and alone():
            emit(here, TRAINED, f"model.{name}", name=name, version=version)
    if budget and (here.plain or alone()):
        call(promote, name, version)
    return done


def _told(done: Done) -> list[str]:
    """What the method alone knows, such as how often it asked its teacher."""
    return [f"{name} {value:,.4g}" for name, value in done.figures.items() if name not in ("parameters", "rows")]


def _inputs(teachers: tuple[str, ...], data: str, start: str) -> Inputs:
    here = session()
    kept = data_ref(here.settings, data)
    unlabelled = data_ref(here.settings, data, kept=False, labelled=False, apart_from=("validation", "test"))
    trusted = data_ref(here.settings, TRUSTED)
    named = tuple(find_model(spec) for spec in teachers or (model_name("teacher"),))
    inputs: Inputs = {"teachers": named, "data": (kept, trusted, unlabelled)}
    return {**inputs, "start": find_model(start)} if start else inputs


def _made(one: Candidate, inputs: Inputs, role: str = "student") -> Done:
    return step(Plan(role, one.method, one.settings, inputs, session().seed, {SETTINGS: json.dumps(one.settings)}))


def _swept(students: tuple[Candidate, ...], inputs: Inputs, early: float, limits: _students.Bounds, budget: str) -> Done:
    """Train the students, the hopeless ones only for a share of their steps. Gives the chosen one."""
    here = session()
    stopped: dict[str, str] = {}
    first: Figures = {}
    if early:
        # a method without steps is not shortened: it is done, and stands as it is
        begun = {one.name: _made(one.shortened(early) or one, inputs, "first steps") for one in students}
        found = read_evidence(here.store, EvidenceRef(run_id=run_of(_measured(begun, "first steps measured"))))
        first, stopped = found.figures, _students.hopeless(found, limits)
        if len(stopped) == len(students):
            told = "; ".join(f"{name}: {reason}" for name, reason in stopped.items())
            raise UserError(f"no student keeps to the budget {budget!r} ({told}): allow more, or list smaller students")
    made = {one.name: _made(one, inputs) for one in students if one.name not in stopped}
    done = _measured(made, MEASURED)
    run = run_of(done)
    last = read_evidence(here.store, EvidenceRef(run_id=run)).figures
    chosen = _students.choose(last, limits)
    points = _students.picture(first, stopped, last, chosen, limits)
    if not here.planning:
        here.store.log_json(run, _students.PICTURE, _students.to_json(points, budget))
    for point in points:
        one = made.get(point.name)
        here.record("student", one.method if one else "", one.cached if one else done.cached, one.seconds if one else 0.0, point.words, run)
    return made[chosen]


def _measured(made: dict[str, Done], role: str) -> Done:
    """Measure students on the validation rows."""
    here = session()
    method, settings = here.method("evaluate")
    settings.pop("shifts", None)  # the gate's
    models: dict[str, Ref] = {name: done.ref for name, done in made.items()}
    return step(Plan(role, method, settings, {"models": models, "test": data_ref(here.settings, CHOOSE)}, here.seed))


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(distill)
