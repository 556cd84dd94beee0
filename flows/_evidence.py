"""What a gate needs to know of a candidate and the champion, gathered from the evaluations that its rules ask for."""

from __future__ import annotations

import math
from typing import Any

from flows._session import session, step
from tasks.core.evidence import Evidence
from tasks.core.metrics import Figure
from tasks.core.refs import EvidenceRef, ModelRef, Ref, data_ref
from tasks.core.step import Done, Plan, read_evidence

TEST = "data/pool:test"
GALLERY = "data/pool:reference"
CANDIDATE, CHAMPION = "candidate", "champion"
OF_SHIFTS = ("shifted_accuracy", "worst_shift_accuracy", "accuracy_")
TO_RETRAINED = ("avg_gap", "relearn_ratio")  # no numbers where the comparison with a retrained model is void
OF_FORGETTING = (*TO_RETRAINED, "ua", "ra", "ta", "mia", "zrf", "relearn", "head", "activation_distance", "ks", "ks_p")
ABOUT = "retort.about"  # tag of a run of evidence: the model whose forgetting it measured


def gather(models: dict[str, ModelRef], rules: dict[str, Any]) -> list[str]:
    """Measure what the rules ask for, or find it measured. Gives the runs that hold the evidence, the main one first.

    models  `candidate`, and where there is one to compare with, `champion`
    rules   the settings of the gate
    """
    here = session()
    method, settings = here.method("evaluate")
    shifts = dict(settings.pop("shifts", None) or {})
    test = data_ref(here.settings, TEST)
    found = [_run(step(Plan("gate evidence", method, settings, {"models": models, "test": test}, here.seed)))]
    asked = tuple(rules.get("rules") or ())
    if any(metric.startswith(OF_SHIFTS) for metric in asked):
        roles: dict[str, Ref] = {f"shift {name}": data_ref(here.settings, spec) for name, spec in shifts.items()}
        found.append(_run(step(Plan("shift evidence", "evaluate.shifts", {}, {"models": models, "test": test, **roles}, here.seed))))
    if rules.get("compatible_with") and CHAMPION in models:
        rows: dict[str, Ref] = {"test": test, "gallery": data_ref(here.settings, GALLERY)}
        found.append(_run(step(Plan("embedding evidence", "evaluate.compatibility", {}, {"models": models, **rows}, here.seed))))
    if any(metric in OF_FORGETTING for metric in asked):
        found += [run for run in [here.store.newest_run({ABOUT: models[CANDIDATE].sha256})] if run]
    return found


def read(runs: list[str]) -> Evidence:
    """The evidence of several runs as one: figures by model, answers joined by sample."""
    whole: Evidence | None = None
    for run in runs:
        more = _renamed(read_evidence(session().store, EvidenceRef(run_id=run)))
        whole = more if whole is None else _joined(whole, more)
    assert whole is not None
    return whole


def _renamed(found: Evidence) -> Evidence:
    """Evidence on forgetting speaks of the model `unlearned`: that is the candidate. A gap that is void is no number."""
    if "unlearned" not in found.figures:
        return found
    by = dict(found.figures["unlearned"])
    if "void" in by and by["void"].value:
        by |= dict.fromkeys(TO_RETRAINED, Figure.exact(math.nan))
    return Evidence({CANDIDATE: by}, {f"forgetting {role}": md5 for role, md5 in found.data.items()})


def _joined(one: Evidence, other: Evidence) -> Evidence:
    figures = {name: {**other.figures.get(name, {}), **by} for name, by in one.figures.items()}
    rows = one.per_sample
    if rows is not None and other.per_sample is not None:
        rows = rows.join(other.per_sample, ["model", "sample_id"])
    return Evidence(figures, {**other.data, **one.data}, one.details, rows)


def _run(done: Done) -> str:
    assert isinstance(done.ref, EvidenceRef)
    return done.ref.run_id
