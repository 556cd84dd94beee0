"""Names and versions of this project's models, as the flows use them."""

from __future__ import annotations

import re

from flows import _promotion
from flows._session import NeedsRun, session
from tasks.core.dataset import read_info
from tasks.core.errors import UserError
from tasks.core.refs import ModelRef
from tasks.core.step import Done


def model_name(role: str) -> str:
    """The registered model of a role: `<data set>-<role>`."""
    name = read_info(session().settings.root / "data" / "pool").name
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-') or 'pool'}-{role}"


def find_model(spec: str) -> ModelRef:
    """The model that `NAME@alias`, `NAME/version` or `NAME` (its newest version) stands for.

    Raises UserError that lists what there is, or where the alias `champion` was moved past the gate.
    """
    store = session().store
    name, _, which = spec.partition("@") if "@" in spec else spec.partition("/")
    if not which:
        versions = store.versions(name)
        if not versions:
            known = ", ".join(store.names()) or "none yet: make one with 'retort run'"
            raise UserError(f"there is no registered model {name!r}; there are: {known}")
        which = str(versions[-1].version)
    if which == _promotion.CHAMPION and store.known(name):
        _promotion.check(session().settings, store, name)
    return store.version_ref(name, which)


def register(name: str, done: Done) -> int:
    """The version of `name` that holds a step's model, made where there is none."""
    here = session()
    assert isinstance(done.ref, ModelRef)
    if here.planning and here.store.version_of(name, done.ref) is None:
        raise NeedsRun(name)
    return here.store.register(name, done.ref, {"retort.role": done.role, "retort.method": done.method})
