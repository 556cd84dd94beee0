"""The models of a deletion request: which must be replaced and how, and the doing of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from flows import _promotion, _students
from flows._evidence import ABOUT
from flows._registry import describe, register, version_of
from flows._session import GENERATOR, Session, call, erase_settings, step
from flows.distill import SETTINGS
from flows.evaluate import evaluate_forgetting
from flows.promote import promote
from flows.train import trained
from flows.unlearn import Unlearned
from tasks.core.errors import UserError
from tasks.core.lineage import references
from tasks.core.refs import DataRef, EvidenceRef, ModelRef, data_ref, folder_of, open_data
from tasks.core.step import Done, Inputs, Plan, read_evidence
from tasks.core.store import Store

RETRAIN = "unlearn.retrain"


class Target(BaseModel, frozen=True):
    """A version that carries the samples, and what is to be done about it.

    action  unlearn, retrain, distill; revoke: nothing takes its place
    """

    name: str
    version: int
    ref: ModelRef
    role: str
    action: str
    champion: bool
    cost: float  # seconds, as the making of it took


def scenario_of(kinds: Iterable[str]) -> str:
    """What requests of these kinds, done together, are to a model: a class that goes, or samples."""
    return "class" if set(kinds) == {"class"} else "samples"


def targets(here: Session, models: Sequence[Mapping[str, Any]], policy: str, scenario: str) -> list[Target]:
    """What is to be done about each registered version among the carriers, teachers before their students.

    Of each name the champion is replaced, or where there is none the newest version; the others are revoked. A generator can unlearn a
    class, where params.yaml names how; for anything less it is trained again, and so is a model of texts.
    """
    store, found = here.store, []
    for model in models:
        ref = ModelRef(**model["ref"])
        for name, version in model["versions"]:
            tags = store.version(name, version).tags
            if tags.get("revoked", "false") != "false":
                continue
            champion = store.aliases(name).get(_promotion.CHAMPION)
            serves = version == (champion if champion is not None else store.newest(name))
            family = model["method"].partition(".")[0]
            action = "revoke"
            if serves and family == "distill":
                action = "distill"
            elif serves and store.role(ref) == GENERATOR:
                # one that draws in one step has forgotten before, and has no noise levels left to unlearn at
                whole = scenario == "class" and store.arch(ref).get("one_step") is None
                action = "unlearn" if whole and policy != "retrain" and here.generator()[1][0] else "retrain"
            elif serves and store.reads(ref):
                action = "retrain"
            elif serves and family in ("train", "unlearn"):
                action = "retrain" if policy == "retrain" else "unlearn"
            cost = seconds_of(store, ref)
            found.append(
                Target(name=name, version=version, ref=ref, role=model["role"], action=action, champion=version == champion, cost=cost)
            )
    return sorted(found, key=lambda one: (one.action == "distill", one.action == "revoke"))


def seconds_of(store: Store, ref: ModelRef) -> float:
    """How long the method ran that made a model."""
    return float(store.client.get_run(ref.run_id).data.metrics.get("seconds", 0.0))


def replace(
    here: Session, target: Target, request: str, policy: str, replaced: Mapping[str, ModelRef | None], scenario: str
) -> dict[str, Any]:
    """Make the version that takes a target's place, measure and offer it. Gives the facts of what was done, as the certificate has them.

    replaced  by the id of each model that carries the samples, the one that took its place; None where none did
    """
    done = {
        "name": target.name, "version": target.version, "role": target.role, "sha256": target.ref.sha256, "action": "revoked",
        "method": "", "replaced_by": None, "figures": {}, "reference": "", "void": None, "gate": "", "champion": target.champion,
    }  # fmt: skip
    if target.action == "revoke":
        return done
    if target.action == "distill":
        made = _distilled(here, target, replaced)
        if made is None:
            return done
        done |= {"action": "distilled again", "method": made.method}
        return done | _offered(here, target, made)
    whole = tuple(seen_by(here.store, target.ref))
    retain = tuple(dict.fromkeys(_now(here, ref) for ref in whole))
    # a version that an earlier request purged is gone; what was left of it stands in those that came after
    there = [ref for ref in whole if _can_be_had(here, ref)] or retain
    forget = tuple(ref.model_copy(update={"only": request}) for ref in there)
    labels = open_data(here.settings, *forget).labels()
    inputs: Inputs = {"model": target.ref, "forget": forget, "retain": retain}
    about = {"retort.request": request}
    generator = here.store.role(target.ref) == GENERATOR
    # the rows themselves are gone, or the model reads: nothing can be unlearned
    if len(labels) == 0 or here.store.reads(target.ref):
        made = trained(GENERATOR if generator else "teacher", {"data": retain}, about)
        return done | {"action": "retrained", "method": made.method} | _offered(here, target, made)
    if generator:
        method, settings = here.generator()[1]
        if target.action == "unlearn":
            made = step(Plan("unlearned", method, settings, inputs, here.seed, about))
        else:
            made = trained(GENERATOR, {"data": retain}, about)
        return done | {"action": f"{target.action}ed", "method": made.method} | _offered(here, target, made)
    reference, measurable = None, bool((labels >= 0).any())
    if target.action == "retrain" or (measurable and erase_settings(here).reference):
        reference = step(Plan("retrained", RETRAIN, here.params("recipe"), inputs, here.seed, about))
    method, settings = (RETRAIN, {}) if target.action == "retrain" else choose(here)
    made = reference if method == RETRAIN and reference else step(Plan("unlearned", method, settings, inputs, here.seed, about))
    beside = reference if measurable else None
    outcome = _judged(here, target, made, beside, request, forget, retain, scenario)
    if outcome["gate"].startswith("refused") and policy == "auto" and method != RETRAIN:
        made = reference or step(Plan("retrained", RETRAIN, here.params("recipe"), inputs, here.seed, about))
        outcome = _judged(here, target, made, made if measurable else None, request, forget, retain, scenario)
    return done | outcome


def _judged(
    here: Session, target: Target, made: Done, reference: Done | None, request: str, forget: tuple[DataRef, ...],
    retain: tuple[DataRef, ...], scenario: str,
) -> dict[str, Any]:  # fmt: skip
    """Measure how well a version forgot, where there is a reference to hold it against, and offer it."""
    exact = made.method == RETRAIN
    facts: dict[str, Any] = {"action": "retrained" if exact else "unlearned", "method": made.method}
    if reference is not None:
        work = Unlearned(request, target.ref, made, {"retrain": reference}, forget, retain)
        evidence = call(evaluate_forgetting, work, scenario).ref
        assert isinstance(reference.ref, ModelRef)
        assert isinstance(evidence, EvidenceRef)
        by = read_evidence(here.store, evidence).figures["unlearned"]
        facts["reference"] = reference.ref.sha256
        facts["figures"] = {name: round(figure.value, 4) for name, figure in by.items() if name != "void" and figure.value == figure.value}
        facts["void"] = bool(by["void"].value) if "void" in by else None
    return facts | _offered(here, target, made)


def _offered(here: Session, target: Target, made: Done) -> dict[str, Any]:
    """Register a version, and offer it where it is to take a champion's place."""
    register(target.name, made)
    version = version_of(target.name, made)
    if budget := _students.budget_of(here.store.version(target.name, target.version).tags):
        here.store.tag(target.name, version, _students.BUDGET, json.dumps(budget))
    if not target.champion:
        return {"replaced_by": version, "gate": "not asked: it takes no champion's place"}
    decision = call(promote, target.name, version, erasing=True)
    gate = "passed" if decision["promoted"] else f"refused: {decision['verdict'].get('reason', '')}"
    return {"replaced_by": version, "gate": gate}


def _distilled(here: Session, target: Target, replaced: Mapping[str, ModelRef | None]) -> Done | None:
    """The student made anew, by the same method and settings, from the models that took its teachers' places, and that of the one it went
    on from, and the data as it is now. None where nothing took the place of one of them.
    """
    tags = here.store.client.get_run(target.ref.run_id).data.tags
    stored = json.loads(tags["retort.inputs"])
    method, settings = tags["retort.method"], json.loads(tags.get(SETTINGS, "null"))
    if settings is None:  # from before these were noted
        method, settings, _ = _students.section(here)
    known = [heir(here, _model(found), replaced) for found in references(stored["teachers"])]
    teachers = tuple(found for found in known if found is not None)
    if len(teachers) < len(known):
        return None
    inputs: Inputs = {"teachers": teachers, "data": tuple(_now(here, _data(found)) for found in references(stored["data"]))}
    if "start" in stored:
        start = heir(here, _model(stored["start"]), replaced)
        if start is None:
            return None
        inputs = {**inputs, "start": start}
    return step(Plan("student", method, settings, inputs, here.seed, {SETTINGS: json.dumps(settings)}))


def heir(here: Session, ref: ModelRef, replaced: Mapping[str, ModelRef | None]) -> ModelRef | None:
    """The model to learn from in a model's place: itself where it carries nothing and is not revoked, else what took its place, else what
    serves under its name. None where all of these carry the samples.
    """
    store = here.store
    names = store.versions_by_model().get(ref.model_id, [])
    if ref.model_id not in replaced and not (names and all(revoked for _, _, revoked in names)):
        return ref
    if found := replaced.get(ref.model_id):
        return found
    for name, _, _ in names:
        standing = store.aliases(name).get(_promotion.CHAMPION) or store.newest(name)
        if standing is not None:
            serving = store.version_ref(name, standing)
            if (found := replaced.get(serving.model_id, serving)) is not None:
                return found
    return None


def choose(here: Session) -> tuple[str, dict[str, Any]]:
    """The method for `auto` and `unlearn`: the cheapest whose last evidence meets the gate's bound on `avg_gap`, else that of section
    unlearn. Its own settings are those of the section where it is the one named there.
    """
    first, settings = here.method("unlearn")
    settings.pop("demonstration_rows", None)
    bound = ((here.params("registry").get("rules") or {}).get("avg_gap") or {}).get("max")
    best: tuple[float, str] | None = None
    for name in erase_settings(here).methods:
        method = f"unlearn.{name}"
        past = here.store.newest_run({"retort.method": method, "retort.done": "%"}, like=True)
        gap = _past_gap(here.store, past) if past else None
        if past and gap is not None and bound is not None and gap <= bound:
            cost = float(here.store.client.get_run(past).data.metrics.get("seconds", 0.0))
            best = min(best, (cost, method)) if best else (cost, method)
    method = best[1] if best else first
    return method, settings if method == first else {}


def _past_gap(store: Store, run_id: str) -> float | None:
    """The measured distance to retraining of the model that a run made; None where there is none, or it says nothing."""
    result = json.loads(store.client.get_run(run_id).data.tags["retort.result"])
    about = store.newest_run({ABOUT: result["model"]["sha256"]})
    if about is None:
        return None
    by = read_evidence(store, EvidenceRef(run_id=about)).figures.get("unlearned", {})
    void = by.get("void")
    return None if "avg_gap" not in by or (void is not None and void.value) else by["avg_gap"].value


def seen_by(store: Store, ref: ModelRef) -> Iterator[DataRef]:
    """The data that a model and those that it was made from were trained on, each once."""
    given: dict[DataRef, None] = {}

    def walk(ref: ModelRef) -> None:
        stored = json.loads(store.client.get_run(ref.run_id).data.tags["retort.inputs"])
        for role, value in stored.items():
            for found in references(value):
                if found["kind"] == "DataRef" and role in ("data", "retain", "train"):
                    given.setdefault(_data(found))
                elif found["kind"] == "ModelRef":
                    walk(_model(found))

    walk(ref)
    yield from given


def _can_be_had(here: Session, ref: DataRef) -> bool:
    try:
        folder_of(here.settings, ref)
    except UserError:
        return False
    return True


def _now(here: Session, ref: DataRef) -> DataRef:
    """The same view of the data as it is now; what an earlier request left out is gone from it."""
    return ref.model_copy(update={"md5": data_ref(here.settings, ref.path).md5, "without": "", "only": ""})


def _data(found: Mapping[str, Any]) -> DataRef:
    return DataRef(**{key: value for key, value in found.items() if key != "kind"})


def _model(found: Mapping[str, Any]) -> ModelRef:
    return ModelRef(**{key: value for key, value in found.items() if key != "kind"})


def revoke(here: Session, name: str, version: int, reason: str) -> None:
    """Take a version out of service for good: nobody is served it silently, and it is never promoted again."""
    store = here.store
    if store.version(name, version).tags.get("revoked", "false") != "false":
        return
    _promotion.unseat(here.settings, store, name, version, reason)
    store.tag(name, version, "retort.revoked_reason", reason)
    store.tag(name, version, "revoked", "true")
    for alias, stands in store.aliases(name).items():
        if stands == version:
            store.delete_alias(name, alias)
    describe(name, version)
