"""Promote: a version becomes champion when the gate lets it through. The alias moves last.

Consumes  a registered model and the test rows of data/pool
Produces  a verdict on the version (tags and an artifact), a journal entry, and where the gate is passed the alias `champion`
Started   by `retort run`, `retort promote`, or a schedule
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import _evidence, _promotion
from flows._registry import describe, find_model
from flows._runs import HOUR, PROMOTED, REFUSED, emit, one_at_a_time, shown
from flows._session import NeedsRun, erase_settings, session
from flows._students import budget_of
from flows._types import Erasing, Name, Version
from tasks.core import catalog
from tasks.core.errors import UserError
from tasks.core.page import render_verdict
from tasks.core.refs import ModelRef
from tasks.registry import Decision, Offer, Rule


@flow(name="promote")
def promote(name: Name, version: Version = 0, erasing: Erasing = False) -> dict[str, Any]:
    """Offer a version of a registered model for promotion.

    name     registered model
    version  its version; 0: the newest
    erasing  by the rules for a version that takes the place of one that must go: where `erase.rules` differ, they count
    """
    here = session()
    with one_at_a_time(here, name), shown(here, 1):
        return offer(name, version, erase_settings(here).rules if erasing else {})


def offer(name: str, version: int, differing: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Measure what the gate asks for, have it decide, and say what came of it. `differing`: by metric, what replaces a part of its rule."""
    here = session()
    store, began = here.store, time.perf_counter()
    number = version or store.newest(name) or _missing(name)
    there = store.version(name, number)
    if there is None:
        store.version_ref(name, number)  # says what there is
    _promotion.check(here.settings, store, name)
    champion = store.aliases(name).get(_promotion.CHAMPION)
    if champion == number:
        verdict = json.loads(there.tags.get("retort.verdict", "{}"))
        here.record("promote", "registry.gate", True, 0.0, f"{name} version {number} is champion")
        return {"name": name, "version": number, "promoted": True, "verdict": verdict}
    models: dict[str, ModelRef] = {_evidence.CANDIDATE: find_model(f"{name}/{number}")}
    apart = ""
    if champion is not None:
        other = find_model(f"{name}/{champion}")
        apart = _apart(models[_evidence.CANDIDATE], other, champion)
        if not apart:
            models[_evidence.CHAMPION] = other
    gate, rules = here.method("registry")
    mode = rules.pop("mode", "enforce")
    for more in (differing, budget_of(there.tags)):
        known = rules.get("rules") or {}
        rules["rules"] = {**known, **{metric: {**known.get(metric, {}), **own} for metric, own in more.items()}}
    runs = _evidence.gather(models, rules)
    found = there.tags.get("retort.verdict")
    verdict = json.loads(found) if found else {}
    basis = {"evidence": runs[0], "also": runs[1:], "gate": gate, "settings": rules, "against": champion, "apart": apart, "mode": mode}
    if verdict.get("basis") != basis or (verdict["promote"] and mode != "dry-run"):
        if here.planning:
            raise NeedsRun("promote")
        verdict = (decide.fn if here.direct else decide)(name, number, champion, basis)
    promoted = verdict["promote"] and mode != "dry-run"
    would = "would be " if mode == "dry-run" else ""
    outcome = ("is champion" if promoted else "would be champion") if verdict["promote"] else f"{would}refused: {verdict['reason']}"
    here.record("promote", gate, False, time.perf_counter() - began, f"{name} version {number} {outcome}", runs[0])
    return {"name": name, "version": number, "promoted": promoted, "verdict": verdict}


@task(
    name="registry.gate", task_run_name="gate: {name} version {number}", cache_policy=NO_CACHE, persist_result=False, timeout_seconds=HOUR
)
def decide(name: str, number: int, champion: int | None, basis: dict[str, Any]) -> dict[str, Any]:
    """Apply the gate, store the verdict, then move the alias.

    Each part may be repeated: what was cut off is done again by the next run.
    """
    here = session()
    store, gate = here.store, basis["gate"]
    evidence = _evidence.read([basis["evidence"], *basis["also"]])
    if basis["mode"] == "off":
        verdict: dict[str, Any] = {"promote": True, "reason": "the gate is off", "rules": [], "basis": basis}
    else:
        decision = catalog.get(gate).entry(Offer(evidence=evidence), catalog.configure(gate, basis["settings"]), seed=here.seed)
        if basis["apart"]:
            unlike = Rule("what the champion knows", False, math.nan, None, math.nan, math.nan, basis["apart"])
            decision = Decision(False, (unlike, *decision.rules))
        rules = [asdict(rule) for rule in decision.rules]
        verdict = {"promote": decision.promote, "reason": decision.reason, "rules": rules, "basis": basis}
    verdict["data"] = evidence.data
    store.log_json(basis["evidence"], f"verdict-{name}-{number}.json", verdict)
    store.log_text(
        basis["evidence"], f"verdict-{name}-{number}.html", render_verdict(name, number, verdict, evidence.data, f"{date.today()}")
    )
    store.tag(name, number, "retort.verdict", json.dumps(verdict))
    store.set_alias(name, "candidate", number)
    if basis["mode"] == "dry-run":
        return verdict
    if verdict["promote"]:
        _promotion.move(here.settings, store, name, number, champion, "promoting", verdict["reason"])
        describe(name, number)
        emit(here, PROMOTED, f"model.{name}", name=name, version=number, reason=verdict["reason"])
    else:
        refused = {"name": name, "version": number, "champion": champion, "reason": verdict["reason"]}
        _promotion.journal_of(here.settings).append("refused", **refused)
        describe(name, number)
        emit(here, REFUSED, f"model.{name}", name=name, version=number, reason=verdict["reason"])
    return verdict


def _apart(candidate: ModelRef, champion: ModelRef, number: int) -> str:
    """Why the two cannot be held against each other; empty where they can."""
    mine, theirs = (session().store.arch(ref) for ref in (candidate, champion))
    for what, key in (("classes", "class_names"), ("images of shape", "shape")):
        if mine[key] != theirs[key]:
            return (
                f"it knows other {what} than champion version {number} ({_short(mine[key])} against {_short(theirs[key])}): "
                "no paired comparison can be made; register it under a name of its own, or set registry.mode to off for one promotion"
            )
    return ""


def _short(values: list[Any]) -> str:
    return ", ".join(map(str, values[:4])) + (f" and {len(values) - 4} more" if len(values) > 4 else "")


def _missing(name: str) -> Any:
    known = ", ".join(session().store.names()) or "none yet: make one with 'retort run'"
    raise UserError(f"there is no registered model {name!r}; there are: {known}")


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(promote)
