"""A small real project with a past, for tests of purging and of the search: three versions of its data under DVC and git, two remotes, and
MLflow's files. One sample, `ERASED`, was in the middle version; the present one was made without it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tasks.core import files
from tasks.core.dataset import SCHEMAS, Info, encode, image_column, write_parquet
from tasks.core.erased import Traces, image_digest
from tasks.core.refs import ModelRef
from tasks.core.settings import Settings
from tasks.core.store import Store

IDS = tuple(f"digits-{i:04d}" for i in range(12))
ERASED = IDS[5]  # in the second of three shards
PIXELS = np.random.default_rng(7).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
TRACES = Traces(frozenset({ERASED}), frozenset({image_digest(PIXELS[5])}))
CONFIG = """
[core]
    remote = local
    analytics = false
['remote "local"']
    url = ../.retort/remote
['remote "spare"']
    url = ../../spare
"""
PIPELINE = """
stages:
  pool:
    cmd: "true"
    outs: [data/pool: {persist: true}]
  generate:
    cmd: "true"
    deps: [data/pool]
    outs: [data/generated: {persist: true}]
  shard:
    cmd: cp data/pool/part-00001.parquet data/shard.parquet
    deps: [data/pool]
    outs: [data/shard.parquet]
"""


class Planted(NamedTuple):
    """The project: its settings, its store, the md5 of each version of its pool (`first`, `held`, `now`), and two models."""

    settings: Settings
    store: Store
    pools: dict[str, str]
    generated: dict[str, str]
    tainted: ModelRef
    other: ModelRef


def rows(ids: tuple[str, ...], images: np.ndarray, parents: list[list[str]] | None = None) -> pa.Table:
    """Rows of schema `image`."""
    n = len(ids)
    return pa.table(
        {
            "sample_id": list(ids),
            "image": image_column(encode(images)),
            "label": pa.array([0] * n, pa.int64()),
            "caption": [""] * n,
            "split": ["train"] * n,
            "parents": pa.array(parents or [[]] * n, pa.list_(pa.string())),
            "_clean": pa.nulls(n, pa.bool_()),
        },
        schema=SCHEMAS["image"],
    )


def write(folder: Path, shards: list[pa.Table]) -> None:
    """Write a data set of these shards."""
    with files.replacing_folder(folder) as fresh:
        for at, shard in enumerate(shards):
            write_parquet(fresh / f"part-{at:05d}.parquet", shard)
        info = Info("image", rows=sum(len(shard) for shard in shards), classes=("zero",), shape=(1, 8, 8), name="digits")
        (fresh / "dataset.json").write_text(info.to_json())


def pool(at: tuple[int, ...], count: int = 3) -> list[pa.Table]:
    """The pool's rows at these positions, four to a shard as they were in the largest version."""
    held = [[i for i in at if i // 4 == shard] for shard in range(count)]
    return [rows(tuple(IDS[i] for i in some), PIXELS[some]) for some in held]


def generated(parents: list[str]) -> list[pa.Table]:
    """Two shards of two made rows each; the second has the given parents."""
    made = np.random.default_rng(8).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    return [rows(("made-0", "made-1"), made[:2], [[IDS[0]], [IDS[1]]]), rows(("made-2", "made-3"), made[2:], [[IDS[2]], parents])]


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words], cwd=folder, check=True, capture_output=True)


def make_data(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The data and its past, in an empty folder; gives the md5s of pool and generated rows by version."""
    os.environ["DVC_SITE_CACHE_DIR"] = str(folder / ".dvc" / "site")
    from dvc.repo import Repo

    (folder / "data").mkdir(parents=True)
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text("seed: 0\n")
    (folder / ".gitignore").write_text(".retort/\n/data/\n")
    git(folder, "init", "-q")
    pools: dict[str, str] = {}
    made: dict[str, str] = {}
    with Repo.init(str(folder)):
        (folder / ".dvc" / "config").write_text(CONFIG)
    versions = {
        "first": (pool((0, 1, 2, 3, 8), 3), generated([IDS[3]])),
        "held": (pool(tuple(range(12))), generated([IDS[4], ERASED])),
        "now": (pool((0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11)), generated([IDS[4], IDS[6]])),
    }
    with Repo(str(folder)) as repo:
        for name, (some, others) in versions.items():
            write(folder / "data" / "pool", some)
            write(folder / "data" / "generated", others)
            with contextlib.chdir(folder):  # where DVC looks for its pipeline
                repo.reproduce()
            for remote in ("local", "spare"):
                repo.push(remote=remote, run_cache=True)
            git(folder, "add", "-A")
            git(folder, "commit", "-qm", name)
            git(folder, "tag", name)
            pools[name] = files.folder_md5(folder / "data" / "pool")
            made[name] = files.folder_md5(folder / "data" / "generated")
    return pools, made


def page(images: np.ndarray, md5: str) -> str:
    """A page that shows images of a data version."""
    shown = "".join(f'<img src="data:image/png;base64,{base64.b64encode(blob).decode()}">' for blob in encode(images))
    return f"<html><p>{md5}</p>{shown}</html>"


def model(store: Store, folder: Path, key: str, seed: int) -> ModelRef:
    """A registered model, and beside it, in its run, figures of each sample."""
    import torch

    from tasks.core import networks

    torch.manual_seed(seed)
    net = networks.convnet((1, 8, 8), 3, widths=(4,), hidden=8, mean=0.0, std=1.0)
    run = store.start(key, key, params={}, tags={"retort.role": key, "retort.inputs": "{}"}, inputs=[])
    write_parquet(folder / "per_sample.parquet", pa.table({"model": [key] * 24, "sample_id": list(IDS) * 2, "confidence": [0.5] * 24}))
    store.log_file(run, folder / "per_sample.parquet")
    store.log_json(run, "evidence.json", {"accuracy": 1.0})
    ref = store.log_net(run, net, name=key, classes=["a", "b", "c"], tags={})
    store.finish(run, key, {"model": ref.model_dump()}, {"accuracy": 1.0})
    store.register(key, ref, {})
    return ref


def make(folder: Path) -> Planted:
    """The whole project."""
    pools, made = make_data(folder)
    settings = Settings(folder)
    (folder / ".retort").mkdir(exist_ok=True)
    store = Store(settings)
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    tainted, other = model(store, scratch, "tainted", 0), model(store, scratch, "other", 1)
    store.log_text(tainted.run_id, "page.html", page(PIXELS[4:6], pools["held"]))
    store.log_text(other.run_id, "page.html", page(PIXELS[6:8], pools["now"]))
    store.log_json(tainted.run_id, "chosen.json", {"chosen": [ERASED]})
    store.log_json(other.run_id, "chosen.json", {"chosen": [IDS[6]]})
    plant_home(settings, pools)
    return Planted(settings, store, pools, made, tainted, other)


def plant_home(settings: Settings, pools: dict[str, str]) -> None:
    """Traces in `.retort`, each beside a neighbour that carries none."""
    home = settings.home
    for name, images in (("held", PIXELS), ("now", np.delete(PIXELS, 5, axis=0))):
        (settings.cache / "decoded").mkdir(parents=True, exist_ok=True)
        np.save(settings.cache / "decoded" / f"{pools[name]}.npy", images)
        write(settings.cache / "versions" / pools[name] / "pool", pool(tuple(range(12)) if name == "held" else (0, 1)))
    for folder in ("requests", "reports", "logs", "prefect/storage", "children"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    write_parquet(home / "requests" / "r-held.parquet", pa.table({"sample_id": [ERASED]}))
    write_parquet(home / "requests" / "r-other.parquet", pa.table({"sample_id": [IDS[6]]}))
    (home / "reports" / "held.html").write_text(page(PIXELS[4:6], pools["held"]))
    (home / "reports" / "now.html").write_text(page(PIXELS[6:8], pools["now"]))
    (home / "logs" / "a.log").write_text(f"row {ERASED} is odd\nrow {IDS[6]} too\n")
    (home / "progress.jsonl").write_text(json.dumps({"error": f"{ERASED}: no"}) + "\n" + json.dumps({"what": "train"}) + "\n")
    (home / "prefect" / "storage" / "key").write_text(json.dumps({"result": base64.b64encode(f"({ERASED})".encode()).decode()}))
    half = settings.root / "data" / ".pool.new-1234"
    half.mkdir()
    write_parquet(half / "part-00000.parquet", pool(tuple(range(12)))[1])


def copied(made: Planted, folder: Path) -> Planted:
    """A copy, free to be changed. Paths that MLflow knows are moved along."""
    old, new = made.settings.root, folder / made.settings.root.name
    shutil.copytree(old.parent, folder, symlinks=True, dirs_exist_ok=True)
    with sqlite3.connect(new / ".retort" / "mlflow.db") as database:
        columns = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
        for table, column in {**columns, "model_versions": "storage_location"}.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(old), str(new)))
    settings = Settings(new)
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # that of the store which was opened before
    return made._replace(settings=settings, store=Store(settings))


def contents(folder: Path, *parts: str) -> dict[str, Any]:
    """Every file below some parts of a folder, and what it holds."""
    found = [path for part in parts for path in (folder / part).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
