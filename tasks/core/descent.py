"""What was made from this sample? Read from DVC's lock files and MLflow's runs; what is kept beside them only saves time.

A data version carries a sample where one of its rows is that sample or was made from it. A model carries it where it saw such a row, or
where a model that it was made from carries it; but not what it was made to forget, nor, if it was trained afresh, what its model carried.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tasks.core import files, seen
from tasks.core.errors import UserError
from tasks.core.lineage import data_versions, references
from tasks.core.refs import DataRef, ModelRef, folder_of
from tasks.core.seen import Keys
from tasks.core.settings import Settings
from tasks.core.store import Store


class DataCarrier(NamedTuple):
    """A data version that holds rows of so many of the samples, or rows made from them. `here`: it is the one in the project's folder."""

    path: str
    md5: str
    here: bool
    samples: int


class ModelCarrier(NamedTuple):
    """A model that saw some of the samples, itself or by way of what it was made from.

    versions  its names in the registry, with those that are revoked
    how       `saw it`, or `made from` and the role of the model that did
    """

    ref: ModelRef
    role: str
    method: str
    versions: tuple[tuple[str, int], ...]
    revoked: bool
    how: str


class Carriers(NamedTuple):
    """Everything that carries the samples; `unknown`: data versions that can no longer be read, so that nobody can tell."""

    data: tuple[DataCarrier, ...]
    models: tuple[ModelCarrier, ...]
    unknown: tuple[tuple[str, str], ...]


def carriers(settings: Settings, store: Store, ids: Collection[str]) -> Carriers:
    """Everything that was made from samples with these ids, the samples' own data versions included."""
    wanted = seen.keys_of(ids)
    data, unknown = [], []
    for path, md5, here in data_versions(settings):
        keys = version_keys(settings, path, md5)
        if keys is None:
            unknown.append((path, md5))
        elif held := int(seen.holds(keys, wanted).sum()):
            data.append(DataCarrier(path, md5, here, held))
    return Carriers(tuple(data), tuple(_models(settings, store, wanted)), tuple(unknown))


def version_keys(settings: Settings, path: str, md5: str) -> Keys | None:
    """Keys of the ids and parents in a version of a data folder; None where it can no longer be had."""
    cached = settings.cache / "keys" / f"{md5}.npy"
    if cached.exists():
        return np.load(cached, mmap_mode="r")  # type: ignore[no-any-return]
    try:
        folder = folder_of(settings, DataRef(path=path, md5=md5))
    except UserError:
        return None
    return _keep(cached, seen.keys_of(_names(folder)))


def run_keys(settings: Settings, store: Store, run_id: str, file: str, digest: str) -> Keys:
    """Keys that a run has stored under this name and digest."""
    cached = settings.cache / "keys" / f"{digest}.npy"
    if cached.exists():
        return np.load(cached, mmap_mode="r")  # type: ignore[no-any-return]
    return _keep(cached, seen.read(store.artifact(run_id, file)))


def _names(folder: Path) -> Iterator[str]:
    for shard in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(shard) as parquet:
            wanted = [name for name in ("sample_id", "parents") if name in parquet.schema_arrow.names]
            table = parquet.read(columns=wanted)
        yield from seen.rows_and_parents(*(table[name] for name in wanted))


def _keep(path: Path, keys: Keys) -> Keys:
    out = io.BytesIO()
    np.save(out, keys, allow_pickle=False)
    files.write_bytes(path, out.getvalue())
    return keys


def _models(settings: Settings, store: Store, wanted: Keys) -> Iterator[ModelCarrier]:
    names = store.versions_by_model()
    known: dict[str, tuple[npt.NDArray[np.bool_], str]] = {}  # by run: which of the wanted keys its model carries, and its role
    held: dict[str, npt.NDArray[np.bool_]] = {}  # by list: many models saw the same

    def among(run_id: str, file: str, digest: str) -> npt.NDArray[np.bool_]:
        if digest not in held:
            held[digest] = seen.holds(run_keys(settings, store, run_id, file, digest), wanted)
        return held[digest]

    for run_id, tags in store.model_runs():  # the oldest first, so that parents come before what was made from them
        found = among(run_id, seen.FILE, tags["retort.seen"])
        how = "saw it" if found.any() else ""
        for parent in _parents(tags):
            theirs, role = known.get(parent, (found, ""))
            if theirs.any() and not how:
                how = f"made from the {role} that did"
            found = found | theirs
        if digest := tags.get("retort.forgot"):
            found = found & ~among(run_id, seen.FORGOT, digest)
        known[run_id] = found, tags.get("retort.role", "model")
        if found.any():
            ref = ModelRef(**json.loads(tags["retort.result"])["model"])
            listed = names.get(ref.model_id, [])
            versions = tuple((name, version) for name, version, _ in listed)
            revoked = bool(listed) and all(gone for _, _, gone in listed)
            yield ModelCarrier(ref, tags.get("retort.role", ""), tags.get("retort.method", ""), versions, revoked, how)


def _parents(tags: dict[str, str]) -> Iterator[str]:
    """The runs of the models that a model was made from; a retrained network took nothing but the shape from its own."""
    for role, value in json.loads(tags.get("retort.inputs", "{}")).items():
        if role == "model" and tags.get("retort.method") == "unlearn.retrain":
            continue
        for found in references(value):
            if found["kind"] == "ModelRef":
                yield found["run_id"]
