"""The stage `condense` goes on from a version that DVC has, and from scratch where that descends from what was erased."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from dvc.repo import Repo

from flows import _dvc
from tasks.condense import krr_st, stage
from tasks.core import catalog, erased
from tasks.core.dataset import Dataset, Writer, read_info
from tasks.core.erased import Traces
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tests import workspace


def run(folder: Path, *words: str) -> str:
    ran = subprocess.run(words, cwd=folder, env=workspace.environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def commit(folder: Path, tag: str) -> None:
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    for words in (("add", "-A"), ("commit", "-qm", tag), ("tag", tag)):
        run(folder, *git, *words)


def keep(folder: Path, first: int, last: int) -> None:
    """Some of the pool's rows as those that are kept."""
    pool = folder / "data" / "pool"
    with Writer(folder / "data" / "filtered", read_info(pool)) as out:
        out.write(pq.read_table(pool / "part-00000.parquet").slice(first, last - first))


def figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "data" / "metrics" / "condense.json").read_text())


def parents(folder: Path) -> set[str]:
    return {name for own in Dataset.open(folder / "data" / "condensed").column("parents").to_pylist() for name in own}


@pytest.fixture(scope="module")
def project(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of the one stage: condensed from the train rows as version v1, then again from v1 after 20 rows were exchanged."""
    folder = tmp_path_factory.mktemp("start") / "project"
    settings = krr_st.SMOKE.model_dump(mode="json") | {"source_rows": 500}
    workspace.make(folder, {"seed": 0, "condense": {**settings, "method": "krr_st", "n": 10}})
    stages = yaml.safe_load((catalog.ROOT / "dvc.yaml").read_text())["stages"]
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"condense": stages["condense"]}}, sort_keys=False))
    shutil.copytree(tiny.parts[0].folder, folder / "data" / "pool")
    keep(folder, 0, 180)
    stage(Settings(folder), "krr_st")
    with Repo(str(folder)) as repo:
        repo.commit(force=True)
    commit(folder, "v1")
    keep(folder, 20, 200)
    workspace.change(folder, "condense", start="data/condensed@v1", start_steps=2)
    run(folder, sys.executable, "-m", "dvc", "repro")
    return folder


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Settings:
    return Settings(Path(shutil.copytree(project, tmp_path / "project", symlinks=True)))


def test_it_goes_on_from_the_version_that_is_named(project: Path, tiny: Dataset) -> None:
    found = figures(project)
    assert found["started_from_scratch"] == 0
    assert {"heldout_loss", "heldout_loss_start", "heldout_loss_random"} <= found.keys()
    assert (project / "data" / "metrics" / "condense.csv").read_text().splitlines()[-1].startswith("2.0,")
    assert parents(project) == set(tiny.split("train").ids())  # the 20 that are no longer there among them
    made_by = json.loads((project / "data" / "condensed" / "dataset.json").read_text())["made_by"]
    lock = yaml.safe_load(run(project, "git", "show", "v1:dvc.lock"))
    assert made_by["start"] == {"data": "data/condensed@v1", "md5": lock["stages"]["condense"]["outs"][0]["md5"]}
    assert _dvc.clean(Settings(project))


def test_a_start_that_descends_from_what_was_erased_is_passed_over(
    copy: Settings, tiny: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tiny.split("train").ids()[3]  # no longer among the rows, but a parent of the start
    erased.add(copy.root / erased.FOLDER, Traces(frozenset([gone]), frozenset()), "r-1")
    stage(copy, "krr_st")
    found = figures(copy.root)
    assert found["started_from_scratch"] == 1
    assert "heldout_loss_start" not in found
    assert parents(copy.root) == set(tiny.split("train").ids()[20:])
    assert (copy.metrics / "condense.csv").read_text().splitlines()[-1].startswith("6.0,")  # all of the outer steps
    assert "data/condensed@v1 is not started from, since it descends from rows that were erased" in capsys.readouterr().err
    made_by = json.loads((copy.root / "data" / "condensed" / "dataset.json").read_text())["made_by"]
    assert made_by["start"]["not_used"] == "it descends from rows that were erased"


def test_a_start_that_is_gone_is_passed_over_only_where_rows_were_erased_since(copy: Settings) -> None:
    for place in (copy.root / ".dvc" / "cache", copy.cache):
        shutil.rmtree(place, ignore_errors=True)
    (copy.root / ".dvc" / "cache").mkdir()
    before = figures(copy.root)
    with pytest.raises(UserError, match=r"'condense\.start': version [0-9a-f]{32}\.dir of condensed is neither .*: 'dvc pull' it"):
        stage(copy, "krr_st")
    assert figures(copy.root) == before
    erased.add(copy.root / erased.FOLDER, Traces(frozenset(["somebody"]), frozenset()), "r-1")
    stage(copy, "krr_st")
    assert figures(copy.root)["started_from_scratch"] == 1


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("data/condensed", "must name an earlier version"),
        ("data/pool@v1", r"revision 'v1' has no data at 'data/pool'"),
        ("data/condensed@v3", "git knows no revision 'v3'"),
        ("data/condensed@HEAD", "write the commit, data/condensed@"),
    ],
)
def test_what_is_no_version_is_refused(start: str, said: str, copy: Settings) -> None:
    workspace.change(copy.root, "condense", start=start)
    with pytest.raises(UserError, match=said):
        stage(copy, "krr_st")
