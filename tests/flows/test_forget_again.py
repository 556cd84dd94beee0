"""A second deletion request, after the first has purged the data versions that the models were made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import workspace
from tests.conftest import copied
from tests.flows.asking import certificates, column, dvc, listed, retort, words
from tests.flows.remaining import pool_pictures, remains

pytestmark = pytest.mark.timeout(900)


def kept(folder: Path) -> set[str]:
    rows = pq.read_table(folder / "data" / "filtered" / "part-00000.parquet").to_pylist()
    return {row["sample_id"] for row in rows if row["kept"]}


@pytest.fixture(scope="module")
def twice(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A project after a request for a row with a label, and then one for a row without; and what had been kept before either."""
    home = tmp_path_factory.mktemp("twice")
    folder = copied(finished, home / "project")
    before = sorted(kept(folder))
    labels = dict(zip(column(folder, "pool", "sample_id"), column(folder, "pool", "label"), strict=True))
    pool = pool_pictures(folder)
    first = next(name for name in before if labels[name] is not None)
    ran = retort(folder, "forget", "--samples", listed(home / "first.txt", [first]))
    assert ran.status == 0, ran.out + ran.err
    second = next(name for name in sorted(kept(folder)) if labels[name] is None)
    ran = retort(folder, "forget", "--samples", listed(home / "second.txt", [second]))
    assert ran.status == 0, ran.out + ran.err
    assert not remains(folder, {name: pool[name] for name in (first, second)})
    return folder, before


def test_a_row_without_a_label_is_forgotten_and_nothing_is_claimed_to_have_been_measured_on_it(twice: tuple[Path, list[str]]) -> None:
    folder, _ = twice
    by_kind = [[one for one in certificate["models"] if one["action"] == "unlearned"] for certificate in certificates(folder)]
    assert sorted(bool(models[0]["figures"]) for models in by_kind) == [False, True]
    assert all(models[0]["gate"] == "passed" for models in by_kind)


@pytest.mark.long
def test_a_model_whose_rows_are_gone_is_trained_again(twice: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = copied(twice[0], tmp_path / "project")
    workspace.change(folder, "filter", keep=0.3)
    dvc(folder, "repro", "-q", "filter")
    for place in (folder / ".dvc" / "cache", folder / ".retort" / "remote", folder / ".retort" / "cache"):
        shutil.rmtree(place, ignore_errors=True)  # as if all the versions that had the row had been purged
    pool = pool_pictures(folder)
    dropped = [name for name in twice[1] if name in pool and name not in kept(folder)][:1]
    assert dropped
    ran = retort(folder, "forget", "--samples", listed(tmp_path / "third.txt", dropped))
    assert ran.status == 0, ran.out + ran.err
    assert "retrained: version" in words(ran.out)
    assert not remains(folder, {name: pool[name] for name in dropped})
