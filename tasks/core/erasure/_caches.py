"""Purging what lies outside DVC's stores: what can be made again, pages with pictures, logs, requests, MLflow's files and weights."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.dataset import write_parquet
from tasks.core.erasure._artifacts import Artifacts, models_of
from tasks.core.erasure._look import Looker, Unreadable
from tasks.core.erasure._stores import TEMPORARY
from tasks.core.errors import UserError
from tasks.core.refs import ModelRef
from tasks.core.settings import Settings
from tasks.core.store import Store

Note = Callable[[str, int], None]
VERSION = re.compile(rb"[0-9a-f]{32}\.dir")
PICTURED = (b"data:image/png;base64", b"data:image/jpeg;base64")
# of a model's files what says what it was; all others go with the weights
SKELETON = ("MLmodel", "arch.json", "model_entry.py", "requirements.txt", "conda.yaml", "python_env.yaml", "registered_model_meta")


def purge_caches(settings: Settings, looker: Looker, whole: Collection[str], note: Note) -> None:
    """Remove decoded images and fetched versions of what is gone, what teachers said of rows, all that was fitted to earlier data, pages
    that show rows of it, and results of Prefect; and black out ids in logs. `whole`: md5s of the data versions that can still be had.
    """
    for path in _entries(settings.cache / "decoded"):
        if path.stem not in whole or _carries(looker, path):
            _remove(path, "caches", note)
    for path in _entries(settings.cache / "answers"):
        _remove(path, "caches", note)
    for path in _entries(settings.cache / "versions"):
        if path.name.startswith(".") or any(_carries(looker, part) for part in path.rglob("*") if part.is_file()):
            _remove(path, "caches", note)
    pool = settings.root / "data" / "pool" / "dataset.json"
    for path in _entries(settings.home / "knowledge"):
        newest = max((part.stat().st_mtime for part in (path, *path.rglob("*"))), default=0.0)
        if not pool.exists() or newest < pool.stat().st_mtime or any(_carries(looker, part) for part in path.rglob("*") if part.is_file()):
            _remove(path, "caches", note)
    for path in _entries(settings.reports):
        if _carries(looker, path) or shows_gone(path, whole):
            _remove(path, "reports", note)
    for path in _entries(settings.prefect_home / "storage"):
        _remove(path, "Prefect results", note)
    for path in (*settings.home.rglob("*"), *(settings.root / "data").rglob("*")):
        relative = path.relative_to(settings.root).as_posix()
        if not TEMPORARY.search(relative) or path.is_dir() or relative.startswith(".retort/.looking-"):
            continue
        if relative.startswith("data/") or _carries(looker, path):  # the data has no writer now: one holds the project's lock
            _remove(path, "temporary folders", note)
    for folder in (settings.root / "data").rglob(".*.*-*"):
        if folder.is_dir() and TEMPORARY.search(folder.relative_to(settings.root).as_posix()):
            shutil.rmtree(folder, ignore_errors=True)
    for path in (
        settings.home / "progress.jsonl",
        settings.home / "notices.jsonl",
        *_entries(settings.logs),
        *_entries(settings.home / "children"),
    ):
        if path.is_file():
            _black_out(path, looker, note)


def shows_gone(path: Path, whole: Collection[str]) -> bool:
    """Whether a page shows pictures of rows of a data version that can no longer be had: previews of large ones cannot be compared."""
    if path.suffix != ".html":
        return False
    page = path.read_bytes()
    return any(sign in page for sign in PICTURED) and any(md5.decode() not in whole for md5 in VERSION.findall(page))


def purge_artifacts(tree: Artifacts, looker: Looker, whole: Collection[str], note: Note) -> None:
    """Take the rows that carry a trace out of tables among MLflow's files, and remove other files that carry one.

    Raises UserError that names a file that still carries one afterwards.
    """
    changed = []
    for name, size in list(tree.files()):
        with tree.get(name) as path:
            if not (_carries(looker, path) or looker.name(name) or shows_gone(path, whole)):
                continue
            changed.append(name)
            fresh = None if looker.name(name) else _without(path, looker)
            if fresh is not None:
                with tempfile.TemporaryDirectory(dir=tree.work) as folder:
                    target = Path(folder, path.name)
                    write_parquet(target, fresh)
                    if not _carries(looker, target):
                        note("MLflow artifacts", size - target.stat().st_size)
                        tree.put(name, target)
                        continue
        note("MLflow artifacts", size)
        tree.remove(name)
    left = {name for name, _ in tree.files()} if changed else set()
    for name in left.intersection(changed):
        with tree.get(name) as path:
            if _carries(looker, path):
                raise UserError(f"MLflow's artifacts still hold {name}, which carries an erased sample; may this account change them?")


def purge_weights(store: Store, models: Sequence[ModelRef], work: Path, note: Note) -> None:
    """Remove the weights of models, and of any that were stored with the same ones. Rows, tags and descriptions stay.

    Raises UserError that names a model whose weights are still there.
    """
    for home in dict.fromkeys(home for ref in models for home in _homes(store, ref)):
        tree = Artifacts(store, home, work)
        doomed = [
            (name, size) for name, size in tree.files() if name.rpartition("/")[2] not in SKELETON and not name.endswith("example.json")
        ]
        for name, size in doomed:
            note("model weights", size)
            tree.remove(name)
        left = {name for name, _ in tree.files()} & {name for name, _ in doomed}
        if left:
            raise UserError(f"the files of a revoked model still hold {sorted(left)[0]}; may this account delete there?")


def _homes(store: Store, ref: ModelRef) -> Iterator[str]:
    from mlflow.exceptions import MlflowException

    try:
        own = store.client.get_logged_model(ref.model_id)
        yield own.artifact_location
    except MlflowException:
        return
    for found in models_of(store, own.experiment_id, f"tags.`retort.sha256` = '{ref.sha256}'"):
        yield found.artifact_location


def purge_requests(settings: Settings, looker: Looker, keep: Collection[Path], note: Note) -> None:
    """Remove the lists of requests that name one of the samples."""
    for path in _entries(settings.home / "requests"):
        if path.resolve() not in keep and _carries(looker, path):
            _remove(path, "requests", note)


def _without(path: Path, looker: Looker) -> Any:
    """A Parquet file's table without the rows that carry a trace; None for any other file."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError):
        return None
    plain = [field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in table.schema]
    table = table.cast(pa.schema(plain)).combine_chunks()
    kept = [piece for batch in table.to_batches() for piece in _clean(batch, looker)]
    return pa.Table.from_batches(kept, table.schema.remove_metadata())


def _clean(batch: pa.RecordBatch, looker: Looker) -> Iterator[pa.RecordBatch]:
    """The pieces of a batch that carry nothing, found by halving."""
    if batch.num_rows == 0:
        return
    if not looker.rows(batch):
        yield batch
    elif batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _clean(batch.slice(0, half), looker)
        yield from _clean(batch.slice(half), looker)


def _black_out(path: Path, looker: Looker, note: Note) -> None:
    """Write x over ids in a text, in place: whoever appends to it meanwhile goes on at its end."""
    with path.open("r+b") as text:
        spans = list(looker.words.spans(text.read()))
        for start, end in spans:
            text.seek(start)
            text.write(b"x" * (end - start))
    if spans:
        note("logs", sum(end - start for start, end in spans))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _carries(looker: Looker, path: Path) -> bool:
    if looker.name(path.name):
        return True
    try:
        return bool(looker.look(path).carries) if path.is_file() else False
    except (Unreadable, FileNotFoundError):
        return False  # the search lists it as unread


def _remove(path: Path, place: str, note: Note) -> None:
    """Remove a file, or a folder in one step as far as any reader can see."""
    parts = [part for part in (path, *path.rglob("*")) if part.is_file()]
    note(place, sum(part.stat().st_size for part in parts))
    if path.is_dir():
        aside = path if path.name.startswith(".") else path.with_name(f".{path.name}.old-purged")
        shutil.rmtree(aside, ignore_errors=True) if aside != path else None
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink()
