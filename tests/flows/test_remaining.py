"""The search that erasures are held against finds a sample in whatever form it is put, and nobody else."""

from __future__ import annotations

import base64
import gzip
import io
import json
import sqlite3
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.flows.remaining import remains

NAME = "digits-0007"
PIXELS = np.random.default_rng(1).integers(0, 256, (1, 8, 8), dtype=np.uint8)
OTHER = np.random.default_rng(2).integers(0, 256, (1, 8, 8), dtype=np.uint8)


def png(image: np.ndarray, scale: int = 1) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image[0].repeat(scale, 0).repeat(scale, 1)).save(out, "PNG")
    return out.getvalue()


def npz(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, x=np.stack([OTHER, image]))
    return out.getvalue()


def parquet(name: str, image: np.ndarray) -> bytes:
    out = io.BytesIO()
    rows = {"a": ["x", name], "b": [[], [name]], "c": [{"bytes": png(OTHER)}, {"bytes": png(image)}]}
    pq.write_table(pa.table(rows), out, compression="zstd")
    return out.getvalue()


def sheet(image: np.ndarray) -> bytes:
    whole = np.zeros((1, 40, 60), np.uint8)
    whole[:, 5:29, 14:38] = image.repeat(3, 1).repeat(3, 2)
    return png(whole)


def zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/file", content)
    return out.getvalue()


Make = Callable[[str, np.ndarray], bytes]
FORMS: dict[str, Make] = {
    "a log line": lambda name, image: f"row {name} is odd\n".encode(),
    "JSON that is packed twice": lambda name, image: zipped(gzip.compress(json.dumps({"ids": [name]}).encode())),
    "ids without a space": lambda name, image: f"{name}digits-0008".encode(),
    "a zlib stream": lambda name, image: zlib.compress(name.encode() * 3),
    "Parquet": parquet,
    "an array in memory": lambda name, image: b"head" + np.stack([OTHER, image]).tobytes(),
    "floats in memory": lambda name, image: np.stack([OTHER, image]).astype(np.float32).tobytes(),
    "floats from 0 to 1": lambda name, image: (image.astype(np.float32) / np.float32(255)).tobytes(),
    "a packed array": lambda name, image: npz(image),
    "JSON numbers": lambda name, image: json.dumps({"inputs": np.stack([OTHER, image]).tolist()}, indent=1).encode(),
    "JSON numbers from 0 to 1": lambda name, image: json.dumps((image / 255).tolist()).encode(),
    "a line of CSV": lambda name, image: ",".join(map(str, [7, *image.reshape(-1)])).encode(),
    "a page": lambda name, image: f'<img src="data:image/png;base64,{base64.b64encode(png(image)).decode()}">'.encode(),
    "an enlarged picture": lambda name, image: png(image, 5),
    "an inverted picture": lambda name, image: png(255 - image),
    "a sheet of pictures": lambda name, image: sheet(image),
    "a picture behind other bytes": lambda name, image: b"\x80\x04pickle" + png(image),
    "hex": lambda name, image: image.tobytes().hex().encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_is_found_in(form: str, tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    path = tmp_path / ".hidden" / "file"
    path.write_bytes(FORMS[form]("digits-00071", OTHER))
    assert not remains(tmp_path, {NAME: PIXELS})
    path.write_bytes(FORMS[form](NAME, PIXELS))
    assert {one.path for one in remains(tmp_path, {NAME: PIXELS})} == {".hidden/file"}


def test_a_sample_is_found_in_names_in_databases_in_their_logs_and_in_git(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.txt").write_text("nothing")
    with sqlite3.connect(tmp_path / "deleted.db") as database:
        database.execute("PRAGMA secure_delete = OFF")
        database.execute("CREATE TABLE t (a)")
        database.execute("INSERT INTO t VALUES (?)", (f"about {NAME}.",))
        database.execute("DELETE FROM t")
    log = sqlite3.connect(tmp_path / "log.db")
    log.execute("PRAGMA journal_mode = WAL")
    log.execute("CREATE TABLE t (a)")
    log.execute("INSERT INTO t VALUES (?)", (gzip.compress(NAME.encode()),))
    log.commit()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["commit", "-qm", f"takes {NAME} out", "--allow-empty"], ["gc", "-q"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    found = {one.path for one in remains(tmp_path, {NAME: PIXELS})}
    log.close()
    assert {f"{NAME}.txt", "deleted.db", "log.db", ".git"} <= found
