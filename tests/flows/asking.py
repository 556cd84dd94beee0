"""Deletion requests as a user makes them, and the state of a project as files and tables tell it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tests import workspace

PATIENCE = 900  # seconds for one command
SEVERAL = """
import contextlib, io, json, sys
from flows import cli
told = []
for words in json.load(sys.stdin):
    out, err, sys.argv, status = io.StringIO(), io.StringIO(), ["retort", *words], 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    told.append([status, out.getvalue(), err.getvalue()])
json.dump(told, sys.stdout)
"""


class Told(NamedTuple):
    """What a command said, and the status that it ended with."""

    status: int
    out: str
    err: str


def chosen(folder: Path, pool: dict[str, np.ndarray]) -> list[str]:
    """Ten train rows, from all over: parents of condensed and of generated rows, rows of the demonstration, rows that the report shows."""
    splits = column(folder, "pool", "split")
    train = {name for name, split in zip(column(folder, "pool", "sample_id"), splits, strict=True) if split == "train"}
    (demonstration,) = (folder / ".retort" / "requests").glob("*.parquet")
    (report,) = (folder / ".retort" / "reports").glob("digits-*.html")
    by_picture = {image.tobytes(): name for name, image in pool.items()}
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in re.findall(r"base64,([^\"']+)", report.read_text())]
    sources: tuple[tuple[int, list[Any]], ...] = (
        (3, list(chain(*column(folder, "condensed", "parents")))),
        (2, list(chain(*column(folder, "generated", "parents")))),
        (2, pq.read_table(demonstration, columns=["sample_id"])["sample_id"].to_pylist()),
        (3, [by_picture[image.tobytes()] for image in shown if image.tobytes() in by_picture]),
    )
    found: list[str] = []
    for count, names in sources:
        new = [name for name in dict.fromkeys(names) if name in train and name not in found]
        assert len(new) >= count
        found += new[:count]
    return found


def column(folder: Path, name: str, wanted: str) -> list[Any]:
    return list(pq.read_table(folder / "data" / name / "part-00000.parquet", columns=[wanted])[wanted].to_pylist())


def listed(path: Path, names: Collection[str]) -> str:
    path.write_text("\n".join(names) + "\n")
    return str(path)


def retort(folder: Path, *words: str) -> Told:
    ran = workspace.retort(folder, *words, timeout=PATIENCE)
    return Told(ran.returncode, ran.stdout, ran.stderr)


def several(folder: Path, *commands: list[str]) -> list[Told]:
    """Commands one after the other in one process: for those that start nothing."""
    command = [sys.executable, "-c", SEVERAL]
    ran = subprocess.run(
        command, cwd=folder, env=workspace.environment(), input=json.dumps(commands), capture_output=True, text=True, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [Told(*told) for told in json.loads(ran.stdout)]


def dvc(folder: Path, *words: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=folder, env=workspace.environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def receive_only(folder: Path, ids: str) -> None:
    """Ask, and be killed as soon as the request is written down."""
    command = [sys.executable, "-m", "flows.cli", "forget", "--samples", ids]
    child = subprocess.Popen(command, cwd=folder, env=workspace.environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout is not None
    line = child.stdout.readline()
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert re.fullmatch(r"request r-[0-9a-f]{16}: \d+ samples, received\n", line)


def words(shown: str) -> str:
    """What is on the screen, tables and line breaks taken out."""
    return " ".join(re.sub(r"[│┃]", " ", shown).split())


def registry(folder: Path) -> dict[str, Any]:
    """The tables of the registry: versions, their tags, aliases; and the requests."""
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        tables = ("model_versions", "model_version_tags", "registered_model_aliases")
        rows = {name: sorted(map(repr, database.execute(f"SELECT * FROM {name}"))) for name in tables}
        found = database.execute("SELECT run_uuid FROM tags WHERE key = 'retort.state'").fetchall()
    return {**rows, "requests": sorted(found)}


def state(folder: Path) -> dict[str, Any]:
    """All that a request changes: data with the list of what is erased, DVC's lock file, the registry, the journal and certificates."""
    kept = [folder / "dvc.lock", folder / ".retort" / "journal.jsonl", *(folder / ".retort" / "certificates").glob("*")]
    files = [path for path in (*(folder / "data").rglob("*"), *kept) if path.is_file()]
    return {"files": {path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}, "registry": registry(folder)}


def weights_of(folder: Path) -> dict[str, str]:
    """Hash of the file of weights of every registered version."""
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        stored = database.execute("SELECT name, version, storage_location FROM model_versions").fetchall()
    paths = {f"{name}/{version}": Path(at.removeprefix("file://")) / "artifacts" / "weights.safetensors" for name, version, at in stored}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.exists()}


def aliases(folder: Path) -> dict[str, int]:
    """The version that is champion, by the model's name."""
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        return {
            name: int(number)
            for name, number in database.execute("SELECT name, version FROM registered_model_aliases WHERE alias = 'champion'")
        }


def certificates(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / ".retort" / "certificates").glob("*.json"))]


def named_by(certificate: dict[str, Any], names: Collection[str]) -> set[str]:
    """Those of the ids whose salted hash a certificate has."""
    salt, held = bytes.fromhex(certificate["samples"]["salt"]), set(certificate["samples"]["ids"])
    return {name for name in names if hashlib.blake2b(name.encode(), key=salt, digest_size=16).hexdigest() in held}


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image[0]).save(out, "PNG")
    return out.getvalue()
