"""A sweep over students: hopeless ones are stopped, the best within the budget is registered, and the budget stays with its version."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import _students
from flows._session import Session
from flows._students import LATENCY, SIZE
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.metrics import Figure, share
from tasks.core.settings import Settings
from tests import workspace
from tests.conftest import copied
from tests.flows.asking import retort, several, words

pytestmark = pytest.mark.timeout(400)
SMALL, LARGE, SLOW = {"widths": [4], "hidden": 8}, {"widths": [8, 8], "hidden": 16}, {"widths": [4, 4], "hidden": 300, "lr": 1e-6}


def figures(accuracy: float, latency: float, size: float, parameters: float = 0.0) -> dict[str, Figure]:
    exact = {LATENCY: latency, SIZE: size, "parameters": parameters}
    return {"accuracy": Figure(accuracy, accuracy - 0.01, accuracy + 0.01), **{name: Figure.exact(value) for name, value in exact.items()}}


def evidence(**students: tuple[float, float, float]) -> Evidence:
    """200 rows, of which each student answers the first ones right."""
    by, tables = {}, []
    for name, (accuracy, latency, size) in students.items():
        hits = np.arange(200) < round(accuracy * 200)
        by[name] = {**figures(accuracy, latency, size), "accuracy": share(hits)}
        rows = {
            "model": [name] * 200,
            "sample_id": [f"r{at:03d}" for at in range(200)],
            "label": [0] * 200,
            "predicted": np.where(hits, 0, 1),
        }
        tables.append(pa.table(rows))
    return Evidence(by, {}, per_sample=pa.concat_tables(tables))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("latency_ms <= 2", {LATENCY: {"max": 2.0}}),
        ("size_bytes<1e5, accuracy >= .9", {SIZE: {"max": 1e5}, "accuracy": {"min": 0.9}}),
        ("latency_ms_b64 < 3 and latency_ms_b64 > 1", {"latency_ms_b64": {"max": 3.0, "min": 1.0}}),
    ],
)
def test_a_budget_is_read_as_bounds(text: str, found: dict[str, Any]) -> None:
    assert _students.bounds(text) == found


@pytest.mark.parametrize(
    "text", ["fast", "latency <= 2", "latency_ms <= two", "latency_ms = 2", "latency_ms <= 2 size_bytes < 3", "ece <= nan"]
)
def test_a_budget_that_cannot_be_read_gets_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match="cannot be read: write for example 'latency_ms <= 2'; figures: latency_ms, "):
        _students.bounds(text)


def test_students_are_called_by_what_they_are_set_to() -> None:
    assert _students.called({"method": "kd", "widths": [8, 16], "lr": 0.05}) == "kd widths 8-16 lr 0.05"
    assert _students.called({"kind": "a, b/c"}) == "kind a-b-c"


def test_a_student_is_hopeless_beside_a_cheaper_and_surely_better_one_only() -> None:
    found = evidence(
        good=(0.9, 1.0, 100), worse=(0.5, 1.0, 200), little_worse=(0.89, 1.0, 200), cheaper=(0.5, 0.5, 50), slow=(0.99, 9.0, 100)
    )
    stopped = _students.hopeless(found, {LATENCY: {"max": 5.0}, "accuracy": {"min": 0.95}})
    assert stopped == {
        "worse": "good is no slower, no larger, and 40.0 points more accurate",
        "slow": "latency_ms_b1 9 is above 5",  # what training changes is not asked of the first steps
    }


def test_of_two_that_beat_each_other_nowhere_none_is_stopped_and_a_stopped_one_stops_none() -> None:
    assert _students.hopeless(evidence(a=(0.9, 1.0, 100), b=(0.9, 1.0, 100)), {}) == {}
    beyond = evidence(a=(0.9, 6.0, 100), b=(0.5, 6.0, 100), c=(0.4, 1.0, 10))
    assert set(_students.hopeless(beyond, {LATENCY: {"max": 5.0}})) == {"a", "b"}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_the_front_holds_all_that_nothing_beats_and_only_these(students: list[tuple[int, int, int]]) -> None:
    by = {f"s{at}": figures(a / 3, float(b), float(c)) for at, (a, b, c) in enumerate(students)}
    front = _students.front(by)
    for name, (accuracy, latency, size) in zip(by, students, strict=True):
        beaten = any(a >= accuracy and b <= latency and c <= size and (a, b, c) != (accuracy, latency, size) for a, b, c in students)
        assert (name in front) == (not beaten)
    assert [by[name][LATENCY].value for name in front] == sorted(by[name][LATENCY].value for name in front)


def test_the_most_accurate_within_the_budget_is_chosen_and_none_where_there_is_none() -> None:
    by = {"small": figures(0.8, 1.0, 10), "large": figures(0.9, 3.0, 10), "quick": figures(0.8, 0.5, 10)}
    assert _students.choose(by, {}) == "large"
    assert _students.choose(by, {LATENCY: {"max": 2.0}}) == "quick"
    with pytest.raises(
        UserError, match=r"no student keeps to the budget \(small: latency_ms_b1 1 is above 0.1; large: .*list smaller students"
    ):
        _students.choose(by, {LATENCY: {"max": 0.1}})


def test_a_picture_comes_back_as_it_was_kept() -> None:
    first, last = {"c": figures(0.1, 1.0, 5)}, {"a": figures(0.8, 1.0, 10), "b": figures(0.7, 2.0, 20)}
    points = _students.picture(first, {"c": "a is better"}, last, "a", {"accuracy": {"min": 0.75}})
    told = {one.name: (one.state, one.reason) for one in points}
    assert told == {"a": ("chosen", ""), "b": ("behind", "accuracy 0.7 is below 0.75"), "c": ("stopped", "a is better")}
    kept = json.loads(json.dumps(_students.to_json(points, "accuracy >= .75")))
    assert _students.from_json(kept) == (points, "accuracy >= .75")


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"students": [SMALL, SMALL]}, "'distill.students' lists the same student twice: widths 4 hidden 8"),
        ({"students": [SMALL, {"width": 3}]}, "distill.ssld has no setting 'width'; did you mean 'widths'?"),
        ({"students": [SMALL, {"method": "sssld"}]}, "did you mean distill.ssld"),
        ({"early": 2}, "distill: setting 'early' is 2"),
        ({"budget": "soon"}, "the budget 'soon' cannot be read"),
    ],
)
def test_a_mistake_in_a_sweep_gets_one_sentence(tmp_path: Path, own: dict[str, Any], sentence: str) -> None:
    folder = workspace.make(tmp_path / "project", workspace.smoke_params())
    workspace.change(folder, "distill", **own)
    with pytest.raises(UserError, match=re.escape(sentence)):
        Session(Settings(folder)).check_settings()


@pytest.fixture(scope="module")
def swept(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project after a sweep of three students, of which one hardly learns; and what the command said."""
    folder = copied(finished, tmp_path_factory.mktemp("swept") / "project")
    workspace.change(folder, "distill", loss="kl", steps=400, lr=0.3, early=0.5, students=[SMALL, LARGE, SLOW])
    ran = retort(folder, "distill", "--teacher", "digits-teacher/1", "--budget", "latency_ms <= 1000")
    assert ran.status == 0, ran.out + ran.err
    return folder, words(ran.out)


def test_the_hopeless_student_is_stopped_and_the_best_is_offered_under_its_budget(swept: tuple[Path, str]) -> None:
    folder, said = swept
    stopped = r"widths 4-4 hidden 300 lr 1e-06: \S+%, \S+ ms, \d+ KiB, stopped early \(widths \S+ hidden \d+ is no slower"
    assert re.search(stopped, said), said
    assert said.count(", chosen") == 1
    assert re.search(r"digits-student version 2 (is champion|refused: )", said), said
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        tags = dict(database.execute("SELECT key, value FROM model_version_tags WHERE name = 'digits-student' AND version = 2"))
        made = [row[0] for row in database.execute("SELECT value FROM params WHERE key = 'steps' AND value IN ('200', '400')")]
    assert json.loads(tags["retort.budget"]) == {LATENCY: {"max": 1000.0}}
    assert {"latency_ms_b1 at most 1000"} <= {rule["rule"] for rule in json.loads(tags["retort.verdict"])["rules"]}
    assert sorted(made) == ["200", "200", "200", "400", "400"]  # the hopeless one never saw its other half


def test_a_second_sweep_has_nothing_to_do_and_the_report_shows_the_front(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    again = retort(folder, "distill", "--teacher", "digits-teacher/1", "--budget", "latency_ms <= 1000")
    assert again.status == 0
    assert " run " not in words(again.out)
    ran = retort(folder, "run")
    assert ran.status == 0, ran.out + ran.err
    pages = [page.read_text() for page in (folder / ".retort" / "reports").glob("digits-*.html")]
    assert any("Which student is worth its cost" in page and "widths 4-4 hidden 300 lr 1e-06" in page for page in pages)


def test_another_budget_is_kept_though_the_student_is_the_same(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    ran = retort(folder, "distill", "--teacher", "digits-teacher/1", "--budget", "latency_ms <= 900")
    assert ran.status == 0, ran.out + ran.err
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        kept = [json.loads(row[0]) for row in database.execute("SELECT value FROM model_version_tags WHERE key = 'retort.budget'")]
    assert {LATENCY: {"max": 900.0}} in kept


def test_where_no_student_keeps_to_the_budget_nothing_is_registered(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    ran = retort(folder, "distill", "--teacher", "digits-teacher/1", "--budget", "size_bytes < 10")
    assert ran.status == 2
    assert "no student keeps to the budget 'size_bytes < 10'" in words(ran.out + ran.err)
    (shown,) = several(folder, ["lineage", "digits-student/3"])
    assert shown.status == 2
