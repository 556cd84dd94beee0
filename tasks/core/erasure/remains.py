"""What is left of erased samples? Opens everything that a project can reach, and names every place that still carries a trace.

A trace is the id of a sample, as a value, as a parent, as a word of a text, in the name of a file; or its picture, pixel by pixel, in the
form of the project's images; or its words, where the project has texts without images. Nothing is passed over in silence: what cannot be
opened is listed with the reason.

Beyond the search: other clones and backups, earlier versions of objects in a bucket that keeps them, records of servers that others run,
copies of a picture at another size or after lossy compression, and what a network's weights remember, which is measured elsewhere.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.erased import Traces
from tasks.core.erasure import _artifacts, _stores
from tasks.core.erasure._artifacts import Artifacts
from tasks.core.erasure._look import Looker, Unreadable
from tasks.core.erasure._stores import SMALL, WORK, Closed, DvcStore, Item
from tasks.core.errors import without_secrets
from tasks.core.settings import Settings
from tasks.core.store import Store


class Found(NamedTuple):
    """A place that carries a trace. `what`: `id`, `parent`, `image`, `text`, or `name` where the path itself does."""

    place: str
    path: str
    what: str


@dataclass
class Count:
    """How much was looked at: files, their bytes, rows of tables, and pictures."""

    files: int = 0
    bytes: int = 0
    rows: int = 0
    images: int = 0


@dataclass
class Report:
    """What a search has found. `unread`: what could not be opened; paths may hold an id, and are for nobody's log."""

    found: list[Found] = field(default_factory=list)
    unread: list[Closed] = field(default_factory=list)
    counts: dict[str, Count] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing was found. What could not be opened is for the caller to judge."""
        return not self.found

    def to_json(self) -> dict[str, Any]:
        """Places and numbers for the certificate; nothing that names a sample."""
        total = {name: sum(getattr(count, name) for count in self.counts.values()) for name in ("files", "bytes", "rows", "images")}
        unread = sorted({f"{one.place}: {one.why}" for one in self.unread})
        return {"places": sorted(self.counts), **total, "found": len(self.found), "unread": unread}


def search(settings: Settings, store: Store, traces: Traces, *, without: Collection[Path] = ()) -> Report:
    """Open everything that can be reached and give every place that carries one of the traces; `without` are paths left out, such as the
    list of the very request, which goes last.
    """
    report = Report()
    left_out = {path.resolve() for path in without}
    with looking(settings) as work, opened(settings) as repo:
        stores, closed = _stores.dvc_stores(repo, work)
        report.unread.extend(closed)
        listed = {place.place: _listed(place, report) for place in stores}
        looker = Looker(traces, shapes_of(settings, stores, listed), work)
        if looker.words.short:
            why = f"{looker.words.short} ids cannot be told from other words in text; they were compared with the values of columns alone"
            report.unread.append(Closed("texts", "", why))
        for item in _items(settings, store, repo, stores, listed, work, report):
            if not item.place.startswith("DVC ") and (settings.root / item.path).resolve() in left_out:
                continue
            count = report.counts.setdefault(item.place, Count())
            if looker.name(item.path):
                report.found.append(Found(item.place, item.path, "name"))
            try:
                with item.get() as path:
                    look = looker.look(path)
                    carries = set(look.carries)
                    if item.place == "Prefect results":
                        carries |= set(looker.result(path))
            except FileNotFoundError as error:
                if not (settings.root / item.path).is_symlink():
                    continue  # it went away meanwhile, as a database's side files do
                report.unread.append(Closed(item.place, item.path, _stores.reason(error)))
            except Unreadable as error:
                report.unread.append(Closed(item.place, item.path, str(error)))
            except Exception as error:  # whatever the client of a remote store may raise
                report.unread.append(Closed(item.place, item.path, _stores.reason(error)))
            else:
                count.files, count.bytes = count.files + 1, count.bytes + item.size
                count.rows, count.images = count.rows + look.rows, count.images + look.images
                # a manifest is a list of names
                report.found += [Found(item.place, item.path, "name" if item.path.endswith(".dir") else what) for what in sorted(carries)]
        _records(settings, store, looker, report)
    return report


@contextmanager
def looking(settings: Settings) -> Iterator[Path]:
    """A folder in the project for what is fetched to be looked at. What dead searches left in theirs is removed."""
    settings.home.mkdir(parents=True, exist_ok=True)
    for left in settings.home.glob(f"{WORK}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=settings.home, prefix=WORK) as folder:
        yield Path(folder)


@contextmanager
def opened(settings: Settings) -> Iterator[Any]:
    """The project as DVC sees it, its hash caches inside the project as in every run."""
    import os

    os.environ["DVC_SITE_CACHE_DIR"] = str(settings.root / ".dvc" / "site")
    from dvc.repo import Repo

    with Repo(str(settings.root)) as repo:
        yield repo


def shapes_of(settings: Settings, stores: list[DvcStore], listed: dict[str, dict[str, int]]) -> set[tuple[int, int, int]]:
    """Shapes (C, H, W) that images have or had in any version of the project's data that can be reached; zeros of texts alone."""
    found: set[tuple[int, int, int]] = set()

    def take(path: Path) -> None:
        try:
            described = json.loads(path.read_bytes())
            shape = tuple(described["shape"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if len(shape) == 3 and (all(shape) or described.get("schema") == "text"):
            found.add(shape)

    for path in (*settings.root.glob("data/*/dataset.json"), *settings.cache.glob("versions/*/*/dataset.json")):
        take(path)
    read: set[str] = set()
    for store in stores:
        for relative, size in listed.get(store.place, {}).items():
            oid = _stores.oid_of(relative)
            if oid and not oid.endswith(".dir") and size < SMALL and oid not in read:
                read.add(oid)
                try:
                    with store.get(relative) as path:
                        take(path)
                except Exception:  # noqa: S112 (the search itself says that it cannot be read)
                    continue
    return found


def _listed(place: DvcStore, report: Report) -> dict[str, int]:
    try:
        found = place.files()
    except Exception as error:  # whatever a cloud's client may raise
        report.unread.append(Closed(place.place, "", _stores.reason(error)))
        return {}
    report.counts.setdefault(place.place, Count())
    return found


def _items(
    settings: Settings, store: Store, repo: Any, stores: list[DvcStore], listed: dict[str, dict[str, int]], work: Path, report: Report
) -> Iterator[Item]:
    own = {place.local for place in stores if place.local} | {work.resolve()}
    yield from _stores.project_files(settings, own)
    for place in stores:
        for relative, size in listed[place.place].items():
            yield Item(place.place, relative, size, lambda place=place, relative=relative: place.get(relative))  # type: ignore[misc]
    site = Path(repo.site_cache_dir)
    if site.is_dir() and settings.root not in site.parents:
        for path in sorted(site.rglob("*")):
            if path.is_file():
                yield _stores.local("DVC's own files", str(path), path)
    yield from _stores.git_objects(settings.root, work)
    for home in _artifacts.artifact_homes(store):
        folder = _artifacts.local_folder(home)
        if folder is not None and settings.home.resolve() in (folder.resolve(), *folder.resolve().parents):
            continue  # seen with the project's folder
        try:
            tree = Artifacts(store, home, work)
            for name, size in tree.files():
                yield Item("MLflow artifacts", f"{without_secrets(home)}/{name}", size, lambda tree=tree, name=name: tree.get(name))  # type: ignore[misc]
        except Exception as error:  # whatever a cloud's client may raise
            report.unread.append(Closed("MLflow artifacts", without_secrets(home), _stores.reason(error)))


def _records(settings: Settings, store: Store, looker: Looker, report: Report) -> None:
    """What MLflow's runs and versions say, asked of the server where its database is no file of the project; and what nobody can ask."""
    import os

    if settings.tracking_uri != f"sqlite:///{settings.mlflow_db}":
        count = report.counts.setdefault("MLflow records", Count())
        for found in store.client.search_experiments():
            ours = "" if store.embedded else f"tags.`retort.project` = '{store.project}'"
            for run in _artifacts.runs_of(store, found.experiment_id, ours):
                count.rows += 1
                said = [run.info.run_name or "", *run.data.tags.values(), *run.data.params.values()]
                said += [one.dataset.source + one.dataset.name for one in run.inputs.dataset_inputs] if run.inputs else []
                if any(True for _ in looker.text("\n".join(said).encode())):
                    report.found.append(Found("MLflow records", f"run {run.info.run_id}", "id"))
        if not store.embedded:
            report.unread.append(Closed("MLflow records", "", "of a registry that others share, only this project's own runs were read"))
    for variable in ("PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        address = os.environ.get(variable, "")
        if address and "127.0.0.1" not in address and "localhost" not in address and "sqlite" not in address:
            why = f"the records of the server at {without_secrets(address)} are not a file of this project"
            report.unread.append(Closed("Prefect records", "", why))
