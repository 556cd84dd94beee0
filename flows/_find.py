"""Asking the registry: which versions run on a device."""

from __future__ import annotations

import json
from typing import Any

from flows._registry import FACTS
from flows._session import session
from tasks.core.errors import UserError
from tasks.core.settings import read_params
from tasks.core.store import Store
from tasks.registry import Offer, Ranking


def fit(device: str, task: str, names: tuple[str, ...]) -> tuple[Ranking, dict[str, list[str]], Any]:
    """The versions that run on a device of params.yaml, the best first; of the others why not; and the graph that was asked.

    Raises UserError where params.yaml describes no device, or not this one.
    """
    from tasks.registry import semantic_management as semantic
    from tasks.registry._graph import graph

    here = session()
    devices = read_params(here.settings).get("devices") or {}
    if not devices:
        raise UserError(f"{here.settings.params} describes no device: add 'devices:' with a name, its flash, ram and sensors each")
    versions = facts_of(here.store, names)
    cfg = semantic.Config(device=device, task=task)
    ranking = semantic.semantic_management(Offer(facts={"versions": versions, "devices": devices}), cfg)
    fits = {place.version for place in ranking.places}
    chosen = devices[semantic.one_device(devices, device)]
    others = {name: semantic.why_not(facts, chosen, task) for name, facts in versions.items() if name not in fits}
    return ranking, others, graph(versions, devices)


def facts_of(store: Store, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What is known of every version that is not revoked, by `NAME/version`."""
    found = {}
    for name in names or store.names():
        for version in store.versions(name):
            if version.tags.get("revoked", "false") == "false" and FACTS in version.tags:
                found[f"{name}/{version.version}"] = json.loads(version.tags[FACTS])
    if not found:
        raise UserError("there is no registered model to ask about: make one with 'retort run'")
    return found
