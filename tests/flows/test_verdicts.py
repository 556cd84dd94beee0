"""`retort verdicts`: what a filter, and several at once, said of the pool; and the kept rows for other tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tasks.core import uids
from tasks.core.dataset import Dataset
from tests import workspace
from tests.conftest import copied
from tests.flows.asking import dvc, several, words

pytestmark = pytest.mark.timeout(300)


def test_what_was_kept_is_counted_and_written_as_uids(finished: Path, tmp_path: Path) -> None:
    kept = Dataset.open(finished / "data" / "filtered").ids()
    shown, listed, text, wrong = several(
        finished,
        ["verdicts"],
        ["verdicts", "--out", str(tmp_path / "kept.npy")],
        ["verdicts", "--out", str(tmp_path / "kept.txt"), "--json"],
        ["verdicts", "--out", str(tmp_path / "kept.csv")],
    )
    assert [one.status for one in (shown, listed, text, wrong)] == [0, 0, 0, 2]
    assert f"{len(kept)} of " in shown.out
    assert "score below the top" in words(shown.out)
    assert "must end in .npy or .txt" in wrong.err
    for name in ("kept.npy", "kept.txt"):
        found = uids.read((tmp_path / name).read_bytes(), name)
        np.testing.assert_array_equal(found, np.sort(uids.uids(kept)))
    assert json.loads(text.out)["kept"] == len(kept)


def test_filters_that_params_yaml_combines_are_compared(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "project")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    own = {"method": "dfn", "steps": 6, "batch": 16, "width": 4, "keep": 0.7}
    params["filter"] = {"method": "combined", "how": "all", "filters": [own, {"method": "random", "keep": 0.8}]}
    workspace.write_params(folder, params)
    dvc(folder, "repro", "-q", "filter")
    shown, plain = several(folder, ["verdicts"], ["verdicts", "--json"])
    found = json.loads(plain.out)
    assert found["filters"].keys() == {"dfn", "random"}
    dropped = {name: found["rows"] - one["kept"] for name, one in found["filters"].items()}
    both = found["rows"] - found["kept"] - sum(one["alone"] for one in found["filters"].values())  # rows that both drop
    assert all(one["alone"] + both == dropped[name] for name, one in found["filters"].items())
    assert found["pairs"]["dfn+random"]["overlap"] == pytest.approx(found["kept"] / (found["rows"] - both), abs=1e-5)
    assert sum(found["reasons"].values()) == found["rows"] - found["kept"]
    assert all(name in words(shown.out) for name in ("dfn and random", "dropped by it alone", "rank correlation"))


def test_without_verdicts_it_says_what_to_run(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path / "project", workspace.smoke_params())
    (told,) = several(folder, ["verdicts"])
    assert told.status == 2
    assert "data/filtered" in told.err
