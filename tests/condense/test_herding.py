"""Herding: the greedy choice by hand, the classes, and the whole run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.condense import _classes
from tasks.condense.herding import SMOKE, gap, herd, herd_by_class, herding
from tasks.condense.kmeans import kmeans
from tasks.core.dataset import Dataset, decode
from tasks.core.errors import UserError
from tests import tables


def test_each_choice_brings_the_mean_of_all_so_far_nearest_to_the_mean() -> None:
    # the mean is 3: 2 is the nearest row; then (2 + 5) / 2 = 3.5 is off by .5, (2 + 0) / 2 by 2, (2 + 1) / 2 by 1.5, (2 + 7) / 2 by 1.5;
    # then (2 + 5 + 1) / 3 is off by 1/3, with 0 it is by 2/3, with 7 by 5/3; then 0 makes 2, 7 makes 3.75
    rows = np.array([[0.0], [1.0], [2.0], [5.0], [7.0]])
    assert herd(rows, 5).tolist() == [2, 3, 1, 4, 0]


def test_a_shorter_choice_is_the_beginning_of_a_longer_one() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 4))
    assert herd(rows, 20)[:7].tolist() == herd(rows, 7).tolist()


@given(st.integers(0, 1000))
def test_all_rows_are_taken_once_and_then_there_is_no_gap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, labels = rng.normal(size=(12, 3)), rng.integers(-1, 2, 12)
    assert sorted(herd(rows, 12)) == list(range(12))
    known = np.flatnonzero(labels >= 0) if (labels >= 0).any() else np.arange(12)
    assert sorted(herd_by_class(rows, labels, len(known))) == known.tolist()
    assert gap(rows, labels, known) == pytest.approx(0, abs=1e-12)


def test_its_mean_is_nearer_than_that_of_random_rows() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(400, 16)), np.repeat([0, 1], 200)
    herded = gap(rows, labels, herd_by_class(rows, labels, 20))
    assert herded < 0.5 * min(gap(rows, labels, rng.permutation(400)[:20]) for _ in range(20))


def test_the_gap_is_that_between_means_class_by_class() -> None:
    rows = np.array([[0.0], [2.0], [10.0], [16.0]])
    assert gap(rows, np.array([0, 0, 1, 1]), np.array([1, 2])) == pytest.approx((1 + 3) / 2)
    assert gap(rows, np.array([0, 0, 1, 1]), np.array([1])) == pytest.approx(1)  # of the classes that have any
    assert gap(rows, np.full(4, -1), np.array([1, 2])) == pytest.approx(1)


def test_classes_get_equal_shares_and_the_rest_goes_to_the_largest() -> None:
    def shared(sizes: list[int], n: int) -> list[int]:
        return list(_classes.shares(_classes.by_class(np.repeat(np.arange(len(sizes)), sizes)), n).values())

    assert shared([5, 9, 7], 6) == [2, 2, 2]
    assert shared([5, 9, 7], 8) == [2, 3, 3]
    assert shared([1, 9, 2], 9) == [1, 6, 2]  # no more than there are
    assert shared([4], 3) == [3]


def test_a_number_that_cannot_stand_for_the_classes_is_an_error() -> None:
    groups = _classes.by_class(np.array([0, 0, 1, 1, 1, -1]))
    for n in (1, 6):
        with pytest.raises(UserError, match=f"n = {n} samples cannot stand for 2 classes of 5 source rows; valid: 2 to 5"):
            _classes.shares(groups, n)


def test_labels_stand_beside_the_ids_that_were_asked_for(tiny: Dataset) -> None:
    ids = tiny.ids()[30:20:-1]
    assert _classes.labels_of(tiny, ids).tolist() == tiny.labels()[30:20:-1].tolist()
    assert set(_classes.labels_of(tiny.without_labels(), ids)) == {-1}


def test_it_gives_real_images_of_every_class_with_their_labels_and_all_rows_as_parents(tiny: Dataset) -> None:
    data = tiny.split("train")
    made = herding(data, tiny.split("validation"), 20, SMOKE.model_copy(update={"source_rows": 200}), seed=2)
    real = dict(zip(data.ids(), zip(data.images(), data.labels().tolist(), strict=True), strict=True))
    shown = decode([one["bytes"] for one in made.rows["image"].to_pylist()], (1, 8, 8))
    own = [parents[0] for parents in made.rows["parents"].to_pylist()]
    assert len(set(own)) == 20
    for name, image, label in zip(own, shown, made.rows["label"].to_pylist(), strict=True):
        assert np.array_equal(image, real[name][0])
        assert label == real[name][1]
    assert np.bincount(made.rows["label"].to_pylist()).tolist() == [2] * 10
    assert all(set(parents) == set(data.ids()) for parents in made.rows["parents"].to_pylist())


def test_without_labels_all_rows_are_one_class(tiny: Dataset) -> None:
    made = herding(tiny.split("train").without_labels(), tiny.split("validation"), 5, SMOKE, seed=2)
    assert made.rows["label"].null_count == len(made.rows) == 5
    assert made.figures["mean_gap"] < made.figures["mean_gap_random"]


def test_encoder_and_measure_are_those_of_the_other_baselines(tiny: Dataset) -> None:
    ours, theirs = (call(tiny.split("train"), tiny.split("validation"), 10, SMOKE, seed=2) for call in (herding, kmeans))
    for name in ("heldout_loss_random", "encoder_loss"):
        assert ours.figures[name] == theirs.figures[name]


def test_where_some_rows_have_labels_only_they_are_chosen(tiny: Dataset, tmp_path: Path) -> None:
    images = tiny.split("train").images()[:30]
    some = tables.dataset(tmp_path / "some", images, [at % 2 if at < 10 else None for at in range(30)], classes=("a", "b"))
    made = herding(some, tiny.split("validation"), 6, SMOKE)
    assert sorted(made.rows["label"].to_pylist()) == [0] * 3 + [1] * 3
    with pytest.raises(UserError, match="n = 11 samples cannot stand for 2 classes of 10 source rows; valid: 2 to 10"):
        herding(some, tiny.split("validation"), 11, SMOKE)
