"""Deletion requests: what is asked for, which samples that means, and how far it has come.

A request is a run in MLflow's experiment `erasure`. Its tags say what everybody may know: its state, its kind, how many samples. The
samples themselves, ids and contents, lie in one file of the project and as an artifact of the run, for other copies of the project; both go
with the purge. A request's id is a keyed hash of them: the same samples asked for twice are one request, and it says nothing about them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from tasks.core import erased, refs
from tasks.core.dataset import Dataset
from tasks.core.erased import LONGEST_CONCEPT, Traces, words
from tasks.core.errors import UserError
from tasks.core.lineage import data_versions
from tasks.core.refs import DataRef, open_data
from tasks.core.settings import Settings
from tasks.core.store import Store

EXPERIMENT = "erasure"
POLICIES = ("auto", "unlearn", "retrain")
# forward only; `waiting` is left by the next attempt, for the state that it was in
STATES = ("received", "found", "suppressed", "rebuilt", "replaced", "revoked", "purged", "certified")
POOL = "data/pool"


@dataclass(frozen=True)
class Selection:
    """The samples that a request names.

    kind     samples, where, class or concept
    rule     for a class or a concept: its name, which also keeps new rows of it out
    """

    kind: str
    traces: Traces
    rule: str = ""


@dataclass(frozen=True)
class Request:
    """A request as its run tells it. `found`: what carried the samples when the work began."""

    id: str
    run_id: str
    state: str
    kind: str
    policy: str
    reason: str
    rule: str
    asked_at: str
    samples: int
    waiting: str = ""


# what is asked for


def by_ids(settings: Settings, ids: Sequence[str]) -> Selection:
    """Samples by their ids. Raises UserError where one is not known in any data version that can be read."""
    wanted = [name for name in dict.fromkeys(ids) if name]
    if not wanted:
        raise UserError("the request names no sample: give one id a line")
    found = _traces(settings, lambda rows: rows.with_ids(wanted))
    unknown = [name for name in wanted if name not in found.ids]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(wanted)} ids are not known here, the first is {unknown[0]!r}: no data version that can be read holds "
            "them; take them out, or get the version with 'dvc pull'"
        )
    return Selection("samples", found)


def by_expression(settings: Settings, where: str) -> Selection:
    """Samples by a condition on `label`, `class`, `caption`, `split` and `source`, in SQL. Raises UserError where it finds none."""
    if "sample_id" in where.lower():
        raise UserError("a condition may not name ids, since it is kept with the request: name samples with --samples FILE")

    def chosen(rows: Dataset) -> Dataset:
        labels = rows.labels()
        names = [rows.info.classes[label] if 0 <= label < len(rows.info.classes) else None for label in labels]
        columns = (labels.tolist(), names, rows.captions(), rows.column("split").to_pylist(), [rows.info.source] * len(rows))
        with sqlite3.connect(":memory:") as table:
            table.execute("CREATE TABLE pool (label INTEGER, class TEXT, caption TEXT, split TEXT, source TEXT)")
            table.executemany("INSERT INTO pool VALUES (?, ?, ?, ?, ?)", zip(*columns, strict=True))
            try:
                hits = table.execute(f"SELECT rowid - 1 FROM pool WHERE {where}").fetchall()  # noqa: S608 (a table in memory, nothing else)
            except (sqlite3.Error, sqlite3.Warning) as error:
                raise UserError(f"{where!r} is no condition on label, class, caption, split and source: {error}") from None
        return rows.take(np.array([at for (at,) in hits], dtype=np.int64))

    return _some(Selection("where", _traces(settings, chosen)), f"no row meets {where!r}")


def by_class(settings: Settings, name: str) -> Selection:
    """All samples of a class. Raises UserError where there is no such class, or no row of it."""
    known: dict[str, None] = {}

    def chosen(rows: Dataset) -> Dataset:
        known.update(dict.fromkeys(rows.info.classes))
        at = rows.info.classes.index(name) if name in rows.info.classes else -2
        return rows.where(rows.labels() == at)

    found = _traces(settings, chosen)
    if name not in known:
        raise UserError(f"there is no class {name!r}; there are: {', '.join(known)}")
    return _some(Selection("class", found, name), f"class {name!r} has no row")


def by_concept(settings: Settings, text: str) -> Selection:
    """All samples whose caption has these words, one after the other. Raises UserError where there is none."""
    wanted = words(text)
    if not wanted or len(wanted) > LONGEST_CONCEPT:
        raise UserError(f"a concept is one to {LONGEST_CONCEPT} words")

    def chosen(rows: Dataset) -> Dataset:
        return rows.where(np.array([has_words(words(caption), wanted) for caption in rows.captions()], dtype=bool))

    return _some(Selection("concept", _traces(settings, chosen), " ".join(wanted)), f"no caption speaks of {text!r}")


def has_words(text: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the wanted words stand in the text one after the other."""
    n = len(wanted)
    return any(list(text[at : at + n]) == list(wanted) for at in range(len(text) - n + 1))


def _some(selection: Selection, none: str) -> Selection:
    if not selection.traces.ids:
        raise UserError(f"{none} in any data version that can be read")
    return selection


def _traces(settings: Settings, chosen: Callable[[Dataset], Dataset]) -> Traces:
    """Ids and contents of the chosen rows of every version of the pool; and the ids of all rows of the same content."""
    pools = [_pool(settings, md5) for path, md5, _ in data_versions(settings) if path == POOL]
    versions = [rows for rows in pools if rows is not None]
    if not versions:
        raise UserError("there is no data yet to forget from: 'retort run' makes it")
    ids: set[str] = set()
    wanted: set[bytes] = set()
    for rows in versions:
        named, digests = erased.traces_of(chosen(rows))
        ids |= named
        wanted |= digests
    for rows in versions if wanted else ():  # the same picture or text may have come in twice
        for names, found in erased.contents(rows):
            ids.update(name for name, content in zip(names, found, strict=True) if content in wanted)
    return Traces(frozenset(ids), frozenset(wanted))


def _pool(settings: Settings, md5: str) -> Dataset | None:
    try:
        return open_data(settings, DataRef(path=POOL, md5=md5))
    except UserError:
        return None


# how far it has come


def receive(settings: Settings, store: Store, selection: Selection, policy: str, reason: str) -> Request:
    """Write a request down, or give the one that asks for the same samples already."""
    request = refs.write_request(settings, sorted(selection.traces.ids), sorted(selection.traces.contents))
    if there := get(store, request):
        return there
    run = store.client.create_run(
        store.experiment(EXPERIMENT),
        run_name=request,
        tags={
            "retort.request": request,
            "retort.kind": selection.kind,
            "retort.rule": selection.rule,
            "retort.policy": policy,
            "retort.reason": reason,
            "retort.samples": str(len(selection.traces.ids)),
            "retort.asked_at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    store.log_file(run.info.run_id, refs.request_file(settings, request))
    store.client.set_tag(run.info.run_id, "retort.state", "received")  # last: without it nobody works on the request
    found = get(store, request)
    assert found is not None
    return found


def get(store: Store, request: str) -> Request | None:
    """A request by its id, or None."""
    found = [one for one in every(store) if one.id == request]
    return found[0] if found else None


def every(store: Store) -> list[Request]:
    """All requests that were written down whole, the oldest first."""
    runs = store.client.search_runs([store.experiment(EXPERIMENT)], "tags.`retort.state` LIKE '%'", order_by=["attributes.start_time ASC"])
    return [_request(run.info.run_id, run.data.tags) for run in runs]


def unfinished(store: Store) -> list[Request]:
    """Requests that are not certified yet, the oldest first."""
    return [one for one in every(store) if one.state != STATES[-1]]


def _request(run_id: str, tags: dict[str, str]) -> Request:
    return Request(
        id=tags["retort.request"],
        run_id=run_id,
        state=tags["retort.state"],
        kind=tags["retort.kind"],
        policy=tags["retort.policy"],
        reason=tags.get("retort.reason", ""),
        rule=tags.get("retort.rule", ""),
        asked_at=tags["retort.asked_at"],
        samples=int(tags["retort.samples"]),
        waiting=tags.get("retort.waiting", ""),
    )


def advance(store: Store, requests: Iterable[Request], state: str, waiting: str = "") -> None:
    """Note that requests have come to a state, and what they wait for; a state that is behind them changes nothing."""
    for request in requests:
        now = get(store, request.id)
        assert now is not None
        store.client.set_tag(request.run_id, "retort.waiting", waiting)
        if STATES.index(state) > STATES.index(now.state):
            store.client.set_tag(request.run_id, "retort.state", state)
        if state == STATES[-1]:
            store.client.set_terminated(request.run_id, "FINISHED")


def remember(store: Store, request: Request, name: str, facts: Any) -> Any:
    """Keep facts with a request, once: what was written first is what counts. Gives what is kept."""
    kept = recall(store, request, name)
    if kept is None:
        store.log_json(request.run_id, name, facts)
        kept = json.loads(json.dumps(facts))
    return kept


def recall(store: Store, request: Request, name: str) -> Any:
    """Facts that are kept with a request, or None; half a file, which a kill has left, is none, since nothing was built on it yet."""
    if not any(item.path == name for item in store.client.list_artifacts(request.run_id)):
        return None
    try:
        return json.loads(store.artifact(request.run_id, name).read_text(encoding="utf-8"))
    except ValueError:
        return None


def traces_of(settings: Settings, store: Store, request: Request) -> Traces:
    """The samples of a request. Raises UserError where their list is gone."""
    path = refs.request_file(settings, request.id)
    if not path.exists():  # another copy of the project has received it
        listed = [item.path for item in store.client.list_artifacts(request.run_id)]
        if path.name not in listed:
            raise UserError(f"the list of samples of request {request.id} is gone: ask for them again")
        from tasks.core import files

        files.write_bytes(path, store.artifact(request.run_id, path.name).read_bytes())
    found = refs.request_traces(settings, request.id)
    if len(found.ids) != request.samples:  # a purge has emptied it, in another copy of the project
        path.unlink()
        raise UserError(f"request {request.id} was purged in another copy of the project: finish it there with 'retort forget'")
    return found


def drop_list(store: Store, request: Request) -> None:
    """Remove the list of samples that lies with a request's run."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    name = f"{request.id}.parquet"
    if any(item.path == name for item in store.client.list_artifacts(request.run_id)):
        get_artifact_repository(store.client.get_run(request.run_id).info.artifact_uri).delete_artifacts(name)
