"""Forget: a deletion request, followed through data and models to a certificate.

Consumes  requests that wait, and what carries their samples: data versions, models, caches, pages
Produces  data without them, versions that take the place of those that saw them, and a signed certificate for each request
Started   by `retort forget`, by the event of a request, or by a poll

Each step may be repeated. What the next ones need of it is kept with the request, so that work that was cut off goes on where it was.
"""

from __future__ import annotations

import pathlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import _dvc, _forget
from flows._descent import plain
from flows._registry import model_name
from flows._runs import CERTIFIED, RECEIVED, STEP_SECONDS, emit, shown
from flows._session import NeedsRun, Session, call, erase_settings, session
from flows._types import Class, Concept, Condition, Path, Policy, Reason
from flows.curate import curate, follow, versions
from tasks.core import erased, refs
from tasks.core.descent import carriers
from tasks.core.erased import Traces, salted
from tasks.core.erasure import certificate, requests
from tasks.core.erasure.purge import irreproducible, purge
from tasks.core.erasure.remains import search
from tasks.core.erasure.requests import Request, Selection
from tasks.core.errors import UserError
from tasks.core.page_certificate import render_certificate
from tasks.core.refs import ModelRef

BEYOND = (
    "Copies of the data or of the models that were taken out of this project: other clones, downloads, backups, caches of build servers.",
    "Older versions that a storage service keeps by itself, such as a bucket with versioning.",
    "What an approximately unlearned network may still betray to attacks other than those that were run; its figures are stated above.",
    "Answers that the revoked models gave while they were in use.",
)


@flow(name="forget")
def forget(
    samples_file: Path = "",
    where: Condition = "",
    class_name: Class = "",
    concept: Concept = "",
    policy: Policy = "auto",
    reason: Reason = "",
) -> list[str]:
    """Do the requests that wait, all together; and the one that is described here, if one is.

    samples_file  a file on this machine with one sample id a line
    where         a condition on label, class, caption, split and source, as in SQL
    class_name    all samples of a class
    concept       all samples whose caption has these words
    policy        auto: unlearn, and retrain where the gate refuses; unlearn; retrain
    reason        kept with the request, and shown on the certificate: never a name
    Gives the ids of the requests that are certified now.
    """
    here = session()
    asked = any((samples_file, where, class_name, concept))
    if here.plain and (asked or requests.unfinished(here.store)):
        raise NeedsRun("forget")
    if asked:
        receive(here, select(here, samples_file, where, class_name, concept), policy, reason)
    finished: list[str] = []
    waiting = requests.unfinished(here.store)
    with shown(here, 8) as count:
        for batch in batches(here, waiting):
            finished += _work(here, batch, count)
        if not waiting:
            here.record("forget", "", True, 0.0, "no request waits")
    return finished


def select(here: Session, samples_file: str, where: str, class_name: str, concept: str) -> Selection:
    """The samples that are meant. Raises UserError where it is not exactly one way of naming them, or names none, or would itself stay
    behind as a trace of them.
    """
    if sum(map(bool, (samples_file, where, class_name, concept))) != 1:
        raise UserError("name the samples in one way: --samples FILE, --where CONDITION, --class NAME or --concept TEXT")
    if samples_file:
        listed = pathlib.Path(samples_file)
        if listed.is_file() and listed.resolve().is_relative_to(here.settings.root.resolve()):
            raise UserError(f"{samples_file} lies in the project, where it would be a trace of the samples itself: move it elsewhere first")
        try:
            lines = listed.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{samples_file} cannot be read: {error}") from None
        return requests.by_ids(here.settings, [line.strip() for line in lines])
    if where:
        return requests.by_expression(here.settings, where)
    return requests.by_class(here.settings, class_name) if class_name else requests.by_concept(here.settings, concept)


def receive(here: Session, selection: Selection, policy: str, reason: str) -> Request:
    """Write a request down and say so. Raises UserError for settings under which it could not be done."""
    erase_settings(here)
    request = requests.receive(here.settings, here.store, selection, policy, reason)
    emit(here, RECEIVED, f"request.{request.id}", request=request.id, samples=request.samples)
    return request


def batches(here: Session, waiting: Sequence[Request]) -> list[list[Request]]:
    """Requests to be done together: those that were begun together, then all the new ones."""
    begun: dict[str, list[Request]] = {}
    for request in waiting:
        found = here.store.client.get_run(request.run_id).data.tags.get("retort.batch", "")
        begun.setdefault(found, []).append(request)
    new = begun.pop("", [])
    return [*begun.values(), *([new] if new else [])]


@task(name="erasure", cache_policy=NO_CACHE, persist_result=False, timeout_seconds=STEP_SECONDS)
def purge_and_search(key: str, batch: list[Request], models: list[ModelRef]) -> dict[str, Any]:
    """Remove the bytes, then look for them everywhere. Raises RuntimeError that names the places where some are left."""
    here = session()
    traces = _traces(here, batch)
    lists = [refs.request_file(here.settings, name) for name in dict.fromkeys([key, *(one.id for one in batch)])]
    gone = purge(here.settings, here.store, traces, models=models, keep=lists)
    seen = search(here.settings, here.store, traces, without=lists)
    if seen.found:
        places = sorted({f"{found.place}: {found.path}" for found in seen.found})
        raise RuntimeError(f"{len(seen.found)} traces are left, the first in {places[0]}; nothing is certified")
    counts = seen.counts.values()
    return {
        "purged": [one._asdict() for one in gone],
        "search": {
            "places": sorted(seen.counts),
            "files": sum(count.files for count in counts),
            "rows": sum(count.rows for count in counts),
            "found": 0,
        },
        "unread": [f"{closed.place}: {closed.why}" for closed in seen.unread],
        "irreproducible": irreproducible(here.settings),
    }


def _work(here: Session, batch: list[Request], count: Any) -> list[str]:
    """Do requests together. Gives the ids of those that are certified; none where they wait for somebody."""
    store, lead = here.store, batch[0]
    # once all is purged the lists of samples are no longer needed, and may be gone
    if requests.recall(store, lead, "purged.json") is None and not _erase(here, batch, count):
        return []
    found, outcomes, facts = (requests.recall(store, lead, name) for name in ("found.json", "replaced.json", "purged.json"))
    _reach(here, batch, "purged", count, f"{sum(one['objects'] for one in facts['purged'])} objects gone, none found again")
    for request in batch:
        _certify(here, request, found, outcomes, facts)
    for name in (store.client.get_run(lead.run_id).data.tags["retort.batch"], *(one.id for one in batch)):
        refs.request_file(here.settings, name).unlink(missing_ok=True)
    for request in batch:
        requests.drop_list(store, request)
    _reach(here, batch[::-1], "certified", count)  # the first last: the facts are kept with it
    follow(here.settings)
    here.record("forget", "", False, 0.0, "commit data/erased and dvc.lock, so that every copy of the project keeps these samples out")
    return [one.id for one in batch]


def _erase(here: Session, batch: list[Request], count: Any) -> bool:
    """All up to the purge; False where the requests wait for somebody."""
    lead = batch[0]
    traces = _traces(here, batch)
    key = refs.write_request(here.settings, sorted(traces.ids), sorted(traces.contents))
    for request in batch:
        here.store.client.set_tag(request.run_id, "retort.batch", key)
    found = requests.recall(here.store, lead, "found.json") or requests.remember(
        here.store, lead, "found.json", _found(here, batch, traces)
    )
    _reach(
        here, batch, "found", count, f"{len(found['data'])} data versions and {len(found['models'])} models carry {len(traces.ids)} samples"
    )
    for request in batch:
        rule = {"class": "class_name", "concept": "concept"}.get(request.kind)
        erased.add(here.settings.root / erased.FOLDER, _traces(here, [request]), request.id, **({rule: request.rule} if rule else {}))
    _reach(here, batch, "suppressed", count)
    call(curate, _dvc.made(here.settings))
    _reach(here, batch, "rebuilt", count)

    # once all are replaced nothing is made again: what it would be made from may be gone by now
    outcomes = requests.recall(here.store, lead, "replaced.json")
    if outcomes is None:
        made, waits = _replace(here, batch, key, found)
        if waits:
            requests.advance(here.store, batch, "rebuilt", waiting=waits)
            here.record(
                "forget", "", False, 0.0, f"waits: {waits}; change registry.rules or erase.on_refusal, and run 'retort forget' again"
            )
            return False
        outcomes = requests.remember(here.store, lead, "replaced.json", made)
    _reach(here, batch, "replaced", count)
    for one in outcomes:
        _forget.revoke(here, one["name"], one["version"], f"erasure, request {lead.id}")
    _reach(here, batch, "revoked", count)
    requests.remember(
        here.store, lead, "purged.json", purge_and_search(key, batch, [ModelRef(**model["ref"]) for model in found["models"]])
    )
    return True


def _replace(here: Session, batch: Sequence[Request], key: str, found: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Replace each version that serves. Gives the facts of what was done, and what the request must wait for, if anything."""
    scenario = _forget.scenario_of(one.kind for one in batch)
    outcomes: list[dict[str, Any]] = []
    replaced: dict[str, ModelRef | None] = {model["ref"]["model_id"]: None for model in found["models"]}
    for target in (_forget.Target(**one) for one in found["targets"]):
        outcome = _forget.replace(here, target, key, policy_of(batch), replaced, scenario)
        outcomes.append(outcome)
        if outcome["replaced_by"] is not None:
            replaced[target.ref.model_id] = here.store.version_ref(target.name, outcome["replaced_by"])
            words = f"{target.name}/{target.version} {outcome['action']}: version {outcome['replaced_by']}, gate {outcome['gate']}"
            here.record("forget", outcome["method"], False, 0.0, words)
    refused = [one for one in outcomes if one["gate"].startswith("refused")]
    if not refused or erase_settings(here).on_refusal == "revoke":
        return outcomes, ""
    first = refused[0]
    return outcomes, (
        f"the gate refuses {first['name']}/{first['replaced_by']}, which is to replace version {first['version']} ({first['gate']})"
    )


def _found(here: Session, batch: Sequence[Request], traces: Traces) -> dict[str, Any]:
    """What carries the samples as the work begins; and the samples as the certificate will have them: their list will be gone by then."""
    samples = {}
    for request in batch:
        salt, own = secrets.token_bytes(16), _traces(here, [request])
        samples[request.id] = {
            "count": len(own.ids),
            "salt": salt.hex(),
            "ids": sorted(salted(name.encode(), salt).hex() for name in own.ids),
            "contents": sorted(salted(content, salt).hex() for content in own.contents),
        }
    found = plain(carriers(here.settings, here.store, traces.ids))
    scenario = _forget.scenario_of(one.kind for one in batch)
    goals = [one.model_dump() for one in _forget.targets(here, found["models"], policy_of(batch), scenario)]
    return {**found, "targets": goals, "before": versions(here.settings), "samples": samples}


def policy_of(batch: Iterable[Request]) -> str:
    """The strictest policy of requests that are done together."""
    asked = {one.policy for one in batch}
    return next((choice for choice in ("retrain", "unlearn") if choice in asked), "auto")


def _certify(here: Session, request: Request, found: Mapping[str, Any], outcomes: Iterable[Any], facts: Mapping[str, Any]) -> None:
    """Sign the facts of a request and keep them, in the project and with its run; once."""
    path = certificate.place(here.settings, request.id)
    if not path.exists():
        certificate.keep(here.settings, _signed(here, request, found, outcomes, facts))
    signed = certificate.parse(path.read_bytes())
    here.store.log_file(request.run_id, path)
    here.store.log_text(request.run_id, f"{request.id}.html", render_certificate(signed))
    here.record("forget", "certificate", False, 0.0, str(path), request.run_id)
    emit(here, CERTIFIED, f"request.{request.id}", request=request.id)


def _signed(here: Session, request: Request, found: Mapping[str, Any], outcomes: Iterable[Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate of a request, and the journal's entry that it follows."""
    from flows._promotion import journal_of

    after = versions(here.settings)
    held = {one["md5"]: one["samples"] for one in found["data"]}
    data = [{"path": path, "before": md5, "after": after.get(path, ""), "rows": held.get(md5, 0)} for path, md5 in found["before"].items()]
    lost = [
        f"Version {md5} of {path} could not be read when the work began: whether it held the samples is not known."
        for path, md5 in found["unknown"]
    ]
    journal = journal_of(here.settings)
    written = [one for one in journal.entries() if one["kind"] == "erased" and one["request"] == request.id]
    entry = written[0] if written else journal.append("erased", name=model_name("teacher"), request=request.id, samples=request.samples)
    return certificate.sign(
        here.settings,
        {
            "version": 1, "request": request.id, "kind": request.kind, "reason": request.reason, "policy": request.policy,
            "asked_at": request.asked_at, "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "samples": found["samples"][request.id],
            "data": data,
            "models": list(outcomes), "purged": facts["purged"], "search": facts["search"],
            "irreproducible": facts["irreproducible"],
            "beyond": [*BEYOND, *lost, *(f"Could not be read, and so not searched: {place}" for place in facts["unread"])],
            "tools": _tools(), "journal": entry["hash"],
        },
    )  # fmt: skip


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("retort", "torch", "mlflow", "dvc", "prefect", "pyarrow")}


def _traces(here: Session, batch: Iterable[Request]) -> Traces:
    each = [requests.traces_of(here.settings, here.store, request) for request in batch]
    return Traces(frozenset().union(*(one.ids for one in each)), frozenset().union(*(one.contents for one in each)))


def _reach(here: Session, batch: Sequence[Request], state: str, count: Any, words: str = "") -> None:
    requests.advance(here.store, batch, state)
    count()
    if words:
        here.record("forget", "", False, 0.0, words)


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(forget)
