"""A teacher that goes on from a network pre-trained on condensed rows: by one setting, known to lineage, and erased as any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flows._session import Session
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tests import workspace
from tests.conftest import copied
from tests.flows.asking import certificates, listed, retort, several, words
from tests.flows.remaining import pool_pictures, remains

pytestmark = pytest.mark.timeout(900)
PRETRAIN = {"method": "from_condensed", "epochs": 3}


@pytest.fixture(scope="module")
def pretrained(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(finished, tmp_path_factory.mktemp("pretrained") / "project")
    workspace.change(folder, "train", pretrain=PRETRAIN)
    ran = retort(folder, "train")
    assert ran.status == 0, ran.out + ran.err
    assert "a start from 10 condensed rows" in words(ran.out)
    return folder


def test_the_teacher_is_made_from_the_condensed_rows_and_a_second_run_has_nothing_to_do(pretrained: Path) -> None:
    again = retort(pretrained, "train")
    assert again.status == 0
    assert "cached" in again.out
    (shown,) = several(pretrained, ["lineage", "digits-teacher/3", "--json"])
    text = json.dumps(json.loads(shown.out))
    assert "train.from_condensed" in text
    assert "data/condensed" in text


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("from_condensed", "'train.pretrain' must name its 'method:'"),
        ({"method": "supervised"}, "train.supervised does not, from_condensed does"),
        ({"method": "from_condensd"}, "did you mean train.from_condensed"),
        ({**PRETRAIN, "epoch": 3}, "train.from_condensed has no setting 'epoch'"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path: Path, setting: Any, sentence: str) -> None:
    folder = workspace.make(tmp_path / "project", workspace.smoke_params())
    workspace.change(folder, "train", pretrain=setting)
    with pytest.raises(UserError, match=re.escape(sentence)):
        Session(Settings(folder)).check_settings()


@pytest.mark.long
def test_a_sample_is_erased_from_it_too(pretrained: Path, tmp_path: Path) -> None:
    folder = copied(pretrained, tmp_path / "project")
    parents = Dataset.open(folder / "data" / "condensed").column("parents").to_pylist()
    pool = pool_pictures(folder)
    pictures = {name: pool[name] for name in dict.fromkeys(parents[0][:1] + parents[1][:1])}
    ran = retort(folder, "forget", "--samples", listed(tmp_path / "ids.txt", pictures))
    assert ran.status == 0, ran.out + ran.err
    (certificate,) = certificates(folder)
    assert "digits-teacher/3" in {f"{one['name']}/{one['version']}" for one in certificate["models"]}
    assert not remains(folder, pictures)
