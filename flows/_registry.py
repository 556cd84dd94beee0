"""Names and versions of this project's models, as the flows use them."""

from __future__ import annotations

import json
import re
from typing import Any

from flows import _promotion
from flows._session import NeedsRun, session
from tasks.core import card
from tasks.core.dataset import read_info
from tasks.core.errors import UserError
from tasks.core.page import render_card
from tasks.core.refs import EvidenceRef, ModelRef
from tasks.core.step import Done
from tasks.core.store import Store

FACTS = "retort.facts"  # tag of a version: what `retort fit` reads


def model_name(role: str) -> str:
    """The registered model of a role: `<data set>-<role>`."""
    name = read_info(session().settings.root / "data" / "pool").name
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-') or 'pool'}-{role}"


def run_of(done: Done) -> str:
    """The run of MLflow that holds a step's result."""
    assert isinstance(done.ref, ModelRef | EvidenceRef)
    return done.ref.run_id


def version_of(name: str, done: Done) -> int:
    """The version of a registered model that holds a step's result."""
    assert isinstance(done.ref, ModelRef)
    version = session().store.version_of(name, done.ref)
    assert version is not None
    return version


def find_model(spec: str, *, revoked: bool = False) -> ModelRef:
    """The model that `NAME@alias`, `NAME/version` or `NAME` (its newest version that is not revoked) stands for.

    revoked  give a revoked version too: to be looked at, not to be used

    Raises UserError that lists what there is, or where the version is revoked or the alias `champion` was moved past the gate.
    """
    store = session().store
    name, _, which = spec.partition("@") if "@" in spec else spec.partition("/")
    if not which:
        newest = store.newest(name)
        if newest is None:
            known = ", ".join(store.names()) or "none yet: make one with 'retort run'"
            raise UserError(f"there is no registered model {name!r}; there are: {known}")
        which = str(newest)
    if which == _promotion.CHAMPION and store.known(name):
        _promotion.check(session().settings, store, name)
    ref = store.version_ref(name, which)
    number = store.aliases(name).get(which) or int(which)
    tags = store.version(name, number).tags
    if tags.get("revoked", "false") != "false" and not revoked:
        why = tags.get("retort.revoked_reason") or "no reason was given"
        raise UserError(f"{name}/{number} is revoked ({why}): name another version; without a number the newest that may be used is taken")
    return ref


def register(name: str, done: Done) -> int:
    """The version of `name` that holds a step's model, made where there is none."""
    here = session()
    assert isinstance(done.ref, ModelRef)
    if here.planning and here.store.version_of(name, done.ref) is None:
        raise NeedsRun(name)
    there = here.store.version_of(name, done.ref)
    if there is not None:
        return there
    tags = here.store.client.get_run(done.ref.run_id).data.tags
    inputs = json.loads(tags["retort.inputs"])
    sources = card.provenance(here.settings, inputs)
    facts = {
        "retort.role": done.role,
        "retort.method": done.method,
        "retort.licence": "; ".join(dict.fromkeys(s.licence or "not known" for s in sources)) or "not known",
        "retort.start": started_from(here.store, done.ref),
        "retort.flow_run": tags.get("retort.flow_run", ""),
        "retort.source": "; ".join(dict.fromkeys(s.source or "not known" for s in sources)) or "not known",
    }
    version = here.store.register(name, done.ref, facts)
    describe(name, version)
    return version


def started_from(store: Store, ref: ModelRef) -> str:
    """The model that this one was fine-tuned from, and that one from, back to the first: what versions that may be mixed have in common."""
    tags = store.client.get_run(ref.run_id).data.tags
    inputs = json.loads(tags.get("retort.inputs", "{}"))
    method = tags.get("retort.method", "")
    before = inputs.get("start")
    if method.startswith("unlearn.") and method != "unlearn.retrain":
        before = inputs["model"]
    elif method == "registry.soups":
        before = next(iter(inputs["models"].values()))
    if before is None:
        return ref.sha256
    return started_from(store, ModelRef(**{key: value for key, value in before.items() if key != "kind"}))


def describe(name: str, version: int) -> card.Card:
    """Write a version's model card as it is known now: its description, and a page beside its weights."""
    here = session()
    found = card.gather(here.settings, here.store, name, version)
    here.store.describe(name, version, card.markdown(found))
    here.store.log_text(here.store.version_ref(name, version).run_id, f"card-{name}-{version}.html", render_card(found))
    measured = found.figures.get("accuracy")
    if not found.draws:
        here.store.tag(name, version, FACTS, json.dumps(_facts(name, version) | ({"accuracy": measured.value} if measured else {})))
    return found


def _facts(name: str, version: int) -> dict[str, Any]:
    """What a device must know of a version: memory, input, task. Taken from its network once."""
    store = session().store
    stored: dict[str, Any] = json.loads(store.version(name, version).tags.get(FACTS, "{}"))
    if stored:
        return stored
    from tasks.registry.semantic_management import describe as look

    return {**look(store.load_net(store.version_ref(name, version))), "task": name.rpartition("-")[0] or name, "sensor": "camera"}
