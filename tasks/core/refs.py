"""What flows pass around: references to data and models, never the things themselves."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.core import files
from tasks.core.dataset import SPLITS, Dataset, Info, read_info
from tasks.core.erased import Traces
from tasks.core.errors import UserError
from tasks.core.settings import Settings


class DataRef(BaseModel, frozen=True, extra="forbid"):
    """Rows of one version of a data folder.

    path      folder, relative to the project
    md5       the identity that DVC gives it
    kept      for verdicts: the kept rows or the rejected ones
    splits    only these splits; none: all
    labelled  False hides the labels
    only      id of a request: only the rows that it names
    without   id of a request: neither the rows that it names nor any made from them
    apart_from  for verdicts: no row whose image equals one of these splits of the pool
    """

    path: str
    md5: str
    kept: bool = True
    splits: tuple[str, ...] = ()
    labelled: bool = True
    only: str = ""
    without: str = ""
    apart_from: tuple[str, ...] = ()


class ModelRef(BaseModel, frozen=True, extra="forbid"):
    """A logged model: its MLflow id and the run that made it."""

    model_id: str
    run_id: str
    sha256: str

    @property
    def uri(self) -> str:
        return f"models:/{self.model_id}"


class EvidenceRef(BaseModel, frozen=True, extra="forbid"):
    """Evidence that is stored in a run."""

    run_id: str


Ref = DataRef | ModelRef | EvidenceRef


def data_ref(settings: Settings, spec: str, **view: Any) -> DataRef:
    """Reference to a data folder as it is now, one split of it, or as it was: `data/filtered`, `data/pool:reference`,
    `data/filtered@v1.0` (any git revision).

    Raises UserError where there is no such split, or no such data in that revision.
    """
    place, _, revision = spec.partition("@")
    path, _, split = place.partition(":")
    path = os.path.normpath(path)
    if split and split not in SPLITS:
        raise UserError(f"{spec!r}: there is no split {split!r}; there are: {', '.join(SPLITS)}")
    if split:
        view["splits"] = (split,)
    if not revision:
        folder = settings.root / path
        if not (folder / "dataset.json").exists():
            raise UserError(f"{path} is not there: make it with 'dvc repro', or get it with 'dvc pull'")
        return DataRef(path=path, md5=files.folder_md5(folder), **view)
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    try:
        info = DVCFileSystem(str(settings.root), rev=revision).info(path)
        md5 = info["dvc_info"]["md5"]
    except (DvcException, FileNotFoundError, KeyError) as error:
        raise UserError(f"revision {revision!r} has no data at {path!r}: {error}") from None
    return DataRef(path=path, md5=md5, **view)


def open_data(settings: Settings, *refs: DataRef) -> Dataset:
    """Open the rows that the references name, joined in their order. Raises UserError where a version cannot be had."""
    parts = [_open_one(settings, ref) for ref in refs]
    whole = parts[0]
    for more in parts[1:]:
        whole = whole + more
    return whole


def info_of(settings: Settings, ref: DataRef) -> Info:
    """The facts of a data folder; of one that was made from the pool and names no licence, those of the pool.

    Raises UserError where that version cannot be had.
    """
    folder = folder_of(settings, ref)
    info, pool = read_info(folder), settings.root / "data" / "pool"
    if of := rows_of(folder):
        info = read_info((folder / of).resolve())
    return info if info.licence or not (pool / "dataset.json").exists() else read_info(pool)


def request_file(settings: Settings, request: str) -> Path:
    """Where the samples of a request are listed, in this one file, and never in a tag, a parameter or a log."""
    return settings.home / "requests" / f"{request}.parquet"


def request_ids(settings: Settings, request: str) -> list[str]:
    """The sample ids of a request."""
    return sorted(request_traces(settings, request).ids)


def request_traces(settings: Settings, request: str) -> Traces:
    """The sample ids of a request and, of a deletion request, the contents. Raises UserError where the list is gone."""
    import pyarrow.parquet as pq

    path = request_file(settings, request)
    if not path.exists():
        raise UserError(f"the list of samples of request {request} is not here: it was erased, or another copy of the project has it")
    table = pq.read_table(path)
    second = "content" if "content" in table.column_names else "image"  # of a request from before there were texts
    ids, contents = (frozenset(value for value in table[name].to_pylist() if value) for name in ("sample_id", second))
    return Traces(ids, contents)


def write_request(settings: Settings, ids: Sequence[str], contents: Sequence[bytes] = ()) -> str:
    """Store the samples of a request and give its id, which says nothing about them. The same samples give the same request."""
    import pyarrow as pa

    from tasks.core.dataset import write_parquet

    ids, contents = sorted(ids), sorted(contents)
    secret = _secret(settings)
    asked = json.dumps([ids, [content.hex() for content in contents]]).encode()
    request = "r-" + hashlib.blake2b(asked, key=secret, digest_size=8).hexdigest()
    target = request_file(settings, request)
    if not target.exists():
        n = max(len(ids), len(contents))
        content = io.BytesIO()
        columns = {"sample_id": [*ids, *[None] * (n - len(ids))], "content": [*contents, *[None] * (n - len(contents))]}
        write_parquet(content, pa.table(columns, schema=pa.schema([("sample_id", pa.string()), ("content", pa.binary())])))
        files.write_bytes(target, content.getvalue())
    return request


def _secret(settings: Settings) -> bytes:
    import secrets

    path = settings.home / "requests.key"
    if not path.exists():
        files.write_bytes(path, secrets.token_bytes(32))
        path.chmod(0o600)
    return path.read_bytes()


def _open_one(settings: Settings, ref: DataRef) -> Dataset:
    folder = folder_of(settings, ref)
    rows = Dataset.open(folder, kept=ref.kept)
    if ref.splits:
        rows = rows.split(*ref.splits)
    if ref.only:
        rows = rows.with_ids(request_ids(settings, ref.only))
    if ref.without:
        rows = rows.without_descendants(request_ids(settings, ref.without))
    if ref.apart_from:
        held_out = Dataset.open((folder / (rows_of(folder) or ".")).resolve()).split(*ref.apart_from)
        rows = rows.without_contents_of(held_out)
    return rows if ref.labelled else rows.without_labels()


def rows_of(folder: Path) -> str:
    """For verdicts the relative path of the pool that they judge; otherwise nothing."""
    info = read_info(folder)
    return "" if info.of is None else info.of["path"]


def folder_of(settings: Settings, ref: DataRef) -> Path:
    """A local folder with the version that a reference names. Raises UserError where it can no longer be had."""
    here = settings.root / ref.path
    if here.exists() and files.folder_md5(here) == ref.md5:
        return here
    stored = settings.cache / "versions" / ref.md5 / Path(ref.path).name
    if not stored.exists():
        _fetch(settings, ref.md5, stored)
    info = read_info(stored)
    if info.of is not None:  # verdicts name their pool by a relative path, which must lead to the same version
        pool = (stored / info.of["path"]).resolve()
        if not pool.exists():
            _fetch(settings, info.of["md5"], pool)
    return stored


def _fetch(settings: Settings, md5: str, target: Path) -> None:
    """Get one version of a folder out of DVC's cache or remotes by its md5."""
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    with Repo(str(settings.root)) as repo:
        places = [repo.cache.local]
        remote = repo.config["core"].get("remote")
        if remote:
            places.append(repo.cloud.get_remote_odb(remote))
        for place in places:
            try:
                tree = Tree.load(place, HashInfo("md5", md5))
            except (FileNotFoundError, OSError):
                continue
            with files.replacing_folder(target) as fresh:
                for key, _, digest in tree:
                    path = fresh.joinpath(*key)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    place.fs.get_file(place.oid_to_path(digest.value), str(path))
            return
    raise UserError(f"version {md5} of {target.name} is neither in the DVC cache nor in a remote: 'dvc pull' it, or choose another version")
