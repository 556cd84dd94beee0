"""Purging: the bytes of erased samples go from DVC's cache and remotes, from caches and pages, from MLflow's files and Prefect's results.

What goes last is what says what else must go: in DVC first the run cache, then the manifests, then the shards, each in every store before
the next; the request's own list after everything. So a purge that was killed finds, run again, what it found before, less what is gone.
The caller holds the project's lock.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.erased import Traces
from tasks.core.erasure import _stores
from tasks.core.erasure._artifacts import Artifacts, artifact_homes
from tasks.core.erasure._caches import purge_artifacts, purge_caches, purge_requests, purge_weights
from tasks.core.erasure._look import Looker, Unreadable
from tasks.core.erasure._stores import DvcStore, oid_of
from tasks.core.erasure.remains import looking, opened, shapes_of
from tasks.core.errors import UserError
from tasks.core.refs import ModelRef
from tasks.core.settings import Settings
from tasks.core.store import Store

MD5 = re.compile(r"[0-9a-f]{32}(?:\.dir)?")


class Purged(NamedTuple):
    """What went from one place: files that were removed or rewritten, and the bytes that they lost."""

    place: str
    objects: int
    bytes: int


class _Plan(NamedTuple):
    """What to remove from DVC's stores: three lists of store and path, in the order in which they must go."""

    run_cache: list[tuple[DvcStore, str]]
    manifests: list[tuple[DvcStore, str]]
    shards: list[tuple[DvcStore, str]]


def purge(
    settings: Settings, store: Store, traces: Traces, *, models: Sequence[ModelRef] = (), keep: Collection[Path] = ()
) -> list[Purged]:
    """Remove everything that carries one of the traces and that the present data does not use, and the weights of these models. Gives what
    went, by place; nothing where there was nothing to do.

    keep  files that stay: the list of the request itself, while its flow may still have to go on from it

    Raises UserError where the present data carries a trace, where another DVC is at work, and where something is still there afterwards.
    """
    check_idle(settings)
    gone: dict[str, list[int]] = {}

    def note(place: str, size: int) -> None:
        gone.setdefault(place, []).append(size)

    with looking(settings) as work:
        with _held(settings) as repo:
            stores, listed = _open_stores(repo, work)
            looker = Looker(traces, shapes_of(settings, stores, listed), work)
            _check_present(settings, looker, [place.local for place in stores if place.local])
            plan = _plan(repo, stores, listed, looker)
            if any(plan):
                repo.close()
                shutil.rmtree(repo.site_cache_dir, ignore_errors=True)  # names, md5s, and what it believes to be in the remotes
            for some in plan:
                for place, relative in some:
                    note(place.place, listed[place.place][relative])
                    place.remove(relative)
            listed = _read_again(stores, plan)
            whole = set(_whole(stores, listed)) | _used(repo)
        purge_caches(settings, looker, whole, note)
        with _reachable("MLflow's artifacts"):
            for home in artifact_homes(store):
                purge_artifacts(Artifacts(store, home, work), looker, whole, note)
            purge_weights(store, models, work, note)
        purge_requests(settings, looker, {path.resolve() for path in keep}, note)
    return [Purged(place, len(sizes), sum(sizes)) for place, sizes in sorted(gone.items())]


def irreproducible(settings: Settings) -> list[str]:
    """md5s of the data versions that any revision's `dvc.lock` names and that can no longer be had, neither from the cache nor a remote."""
    from tasks.core.lineage import data_versions

    with looking(settings) as work, opened(settings) as repo:
        stores, listed = _open_stores(repo, work)
        whole = _whole(stores, listed)
        return sorted({md5 for _, md5, here in data_versions(settings) if not here and md5 not in whole})


def check_idle(settings: Settings) -> None:
    """Raise UserError where another DVC is at work on the project."""
    import psutil

    try:
        locks = json.loads((settings.root / ".dvc" / "tmp" / "rwlock").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # half a file is left by one that was killed
        return
    holders = [*locks.get("write", {}).values(), *(one for some in locks.get("read", {}).values() for one in some)]
    for holder in holders:
        if holder and psutil.pid_exists(int(holder["pid"])):
            raise UserError(f"another DVC is at work on this project (process {holder['pid']}: {holder['cmd']}); wait for it, or stop it")


@contextmanager
def _reachable(what: str) -> Iterator[None]:
    """Raise UserError where a store does not answer: rows could stay in it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a cloud's client may raise
        raise UserError(f"{what} cannot be purged ({_stores.reason(error)}); make them reachable, and ask again") from error


@contextmanager
def _held(settings: Settings) -> Iterator[Any]:
    """The project as DVC sees it, and DVC's own lock on it: no other DVC command begins meanwhile."""
    from dvc.lock import LockError

    with opened(settings) as repo:
        try:
            repo.lock.lock()
        except LockError:
            raise UserError("another DVC command is at work on this project; wait for it, or stop it") from None
        try:
            yield repo
        finally:
            repo.lock.unlock()


def _open_stores(repo: Any, work: Path) -> tuple[list[DvcStore], dict[str, dict[str, int]]]:
    """DVC's stores and what they hold. Raises UserError where one of them cannot be opened: rows could stay in it."""
    stores, closed = _stores.dvc_stores(repo, work)
    if closed:
        raise UserError(f"{closed[0].place} cannot be purged ({closed[0].why}); make it reachable, or remove it with 'dvc remote remove'")
    listed = {}
    for place in stores:
        with _reachable(f"the objects of {place.place}"):
            listed[place.place] = place.files()
    return stores, listed


def _check_present(settings: Settings, looker: Looker, without: list[Path]) -> None:
    for item in _stores.project_files(settings, without):
        if item.place == "data":
            with item.get() as path:
                if looker.look(path).carries:
                    folder = "/".join(item.path.split("/")[:2])
                    raise UserError(f"{folder} still carries an erased sample: take it out (what DVC makes: with 'dvc repro'), then purge")


def _plan(repo: Any, stores: list[DvcStore], listed: dict[str, dict[str, int]], looker: Looker) -> _Plan:
    """What carries a trace, in each store. Raises UserError where the present data uses any of it."""
    where: dict[str, list[tuple[DvcStore, str]]] = {}
    others: list[tuple[DvcStore, str]] = []
    runs: list[tuple[DvcStore, str]] = []
    for place in stores:
        for relative in listed[place.place]:
            if oid := oid_of(relative):
                where.setdefault(oid, []).append((place, relative))
            else:
                (runs if relative.startswith("runs/") else others).append((place, relative))
    carriers = {oid for oid, places in where.items() if _any_carries(looker, places)}
    entries = {oid: _entries(*places[0]) or set() for oid, places in where.items() if oid.endswith(".dir")}
    doomed = {oid for oid, named in entries.items() if oid in carriers or named & carriers}
    present = _used(repo)
    present |= {named for oid in present for named in entries.get(oid, ())}
    if present & (carriers | doomed):
        raise UserError("the data that dvc.lock names still carries an erased sample; make it without it ('dvc repro'), then purge")
    marked = carriers | doomed
    some = [(place, relative) for place, relative in runs if _names(place, relative) & marked or _carries(looker, place, relative)]
    shards = [at for oid in sorted(carriers - doomed) for at in where[oid]] + [at for at in others if _carries(looker, *at)]
    return _Plan(some, [at for oid in sorted(doomed) for at in where[oid]], shards)


def _any_carries(looker: Looker, places: list[tuple[DvcStore, str]]) -> bool:
    """Whether an object carries a trace. All its copies are alike; only where the first cannot be opened the next is asked."""
    for place, relative in places:
        try:
            with place.get(relative) as path:
                return bool(looker.look(path).carries)
        except (Unreadable, FileNotFoundError):
            continue  # the search lists it as unread
    return False


def _carries(looker: Looker, place: DvcStore, relative: str) -> bool:
    return looker.name(relative) or _any_carries(looker, [(place, relative)])


def _entries(place: DvcStore, relative: str) -> set[str] | None:
    """md5s of the files that a manifest names; None where it cannot be read."""
    try:
        return {entry["md5"] for entry in _stores.manifest(place, relative)}
    except (ValueError, KeyError, TypeError):
        return None


def _names(place: DvcStore, relative: str) -> set[str]:
    with place.get(relative) as path:
        return set(MD5.findall(path.read_text(encoding="utf-8", errors="replace")))


def _used(repo: Any) -> set[str]:
    """md5s of what the present `dvc.lock` and `.dvc` files name."""
    return {out.hash_info.value for out in repo.index.outs if out.use_cache and out.hash_info and out.hash_info.value}


def _whole(stores: list[DvcStore], listed: dict[str, dict[str, int]]) -> set[str]:
    """md5s of the folders of which manifest and files can all be had from one store or another."""
    where = {oid_of(relative): (place, relative) for place in reversed(stores) for relative in listed[place.place]}
    manifests = {oid: _entries(*at) for oid, at in where.items() if oid.endswith(".dir")}
    return {oid for oid, named in manifests.items() if named is not None and named <= where.keys()}


def _read_again(stores: list[DvcStore], plan: _Plan) -> dict[str, dict[str, int]]:
    """What the stores hold now. Raises UserError that names the store where something was not removed."""
    listed = {place.place: place.files() for place in stores}
    for some in plan:
        for place, relative in some:
            if relative in listed[place.place]:
                raise UserError(f"{place.place} still holds {relative}, which carries an erased sample; may this account delete there?")
    return listed
