"""A pool of texts: judged by the filters that read captions, and erased from as images are, by id and by what the text says."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import workspace
from tests.flows.asking import certificates

pytestmark = pytest.mark.timeout(400)
SECRET = "Erika Mustermann of 12 Heidestrasse in Cologne has not paid for the {} bicycle that she ordered in spring."
ADJECTIVES = (
    "red",
    "blue",
    "green",
    "small",
    "large",
    "quick",
    "slow",
    "old",
    "new",
    "broken",
    "shining",
    "heavy",
    "light",
    "cheap",
    "dear",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 texts of some sentences each, one of them twice under two ids; the pool and its verdicts are made."""
    base = tmp_path_factory.mktemp("texts")
    texts = [
        f"The {a} {b} house number {at} stands beside a {c} river. Its door was painted {b} by hand. It has been empty for {at + 2} years."
        for at, (a, b, c) in enumerate(zip(ADJECTIVES * 8, ADJECTIVES[2:] * 10, ADJECTIVES[4:] * 11, strict=False))
    ]
    rows = [{"id": f"text-{at:04}", "text": text} for at, text in enumerate(texts)]
    rows += [{"id": "text-secret-1", "text": SECRET.format("red")}, {"id": "text-secret-2", "text": SECRET.format("red").upper()}]
    (base / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = workspace.smoke_params()
    params["pool"] = {"source": f"texts:{base / 'texts.jsonl'}", "columns": {"sample_id": "id"}, "test": 0.0, "validation": 0.0}
    params["filter"] = {"method": "cascade"}
    folder = workspace.make(base / "project", params)
    ran = workspace.retort(folder, "curate", "filter")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "condense" not in ran.stdout, "nobody asked for it"
    return folder


def test_a_text_is_erased_with_its_copy_and_nothing_of_it_is_left(project: Path, tmp_path: Path) -> None:
    said = "erika mustermann of 12 heidestrasse"
    assert said in everything(project)
    (tmp_path / "ids.txt").write_text("text-secret-1\n")
    ran = workspace.retort(project, "forget", "--samples", str(tmp_path / "ids.txt"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert said not in everything(project)
    (signed,) = certificates(project)
    assert signed["samples"]["count"] == 2, "the same words in capitals are the same text"
    assert signed["search"]["found"] == 0
    left = pq.read_table(project / "data" / "pool" / "part-00000.parquet").num_rows
    assert left == json.loads((project / "data" / "pool" / "dataset.json").read_text())["rows"] == 120


def everything(folder: Path) -> str:
    """All text of a project in small letters: of Parquet files what they hold, of others their bytes."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and "tests" not in path.relative_to(folder).parts:
            blob = path.read_bytes()
            found.append(str(pq.read_table(path).to_pydict()) if blob[:4] == b"PAR1" else blob.decode("utf-8", "replace"))
    return "\n".join(found).lower()
