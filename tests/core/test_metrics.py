"""Figures and their intervals, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import metrics
from tasks.core.evidence import Evidence
from tasks.core.metrics import Figure


def test_a_share_has_wilsons_interval() -> None:
    # 8 of 10 (Wilson 1927): 0.4902 to 0.9433
    figure = metrics.share(np.arange(10) < 8)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_a_share_of_none_and_of_all_still_has_an_interval_of_some_width() -> None:
    none, every = metrics.share(np.zeros(10, dtype=bool)), metrics.share(np.ones(10, dtype=bool))
    assert (none.low, none.high) == pytest.approx((0, 0.2775), abs=1e-4)
    assert (every.low, every.high) == pytest.approx((0.7225, 1), abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 5))
def test_every_interval_holds_its_value(hits: list[bool], seed: int) -> None:
    array = np.array(hits)
    confidence = np.random.default_rng(seed).uniform(0.1, 1, len(hits))
    for figure in (
        metrics.share(array),
        metrics.difference(array, ~array, seed=seed, draws=50),
        metrics.mean(confidence, seed=seed, draws=50),
        metrics.calibration_error(confidence, array, seed=seed, draws=50),
    ):
        assert figure.low - 1e-12 <= figure.value <= figure.high + 1e-12


def test_a_paired_difference_is_the_mean_of_the_gaps() -> None:
    ours, theirs = np.array([1, 1, 1, 0, 1], dtype=bool), np.array([1, 0, 0, 1, 1], dtype=bool)
    assert metrics.difference(ours, theirs).value == pytest.approx(0.2)
    same = metrics.difference(ours, ours)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="got 5 and 4"):
        metrics.difference(ours, theirs[:4])


def test_accuracy_within_classes_and_confusion_are_counted() -> None:
    labels, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    first, second, third = metrics.per_class_accuracy(labels, predicted, 3)
    assert (first, second) == pytest.approx((1 / 2, 2 / 3))
    assert math.isnan(third)
    assert metrics.confusion(labels, predicted, 3).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    # bin (0.8, 0.9]: 2 rows, confidence .85, accuracy .5; bin (0.5, 0.6]: 2 rows, confidence .6, accuracy 1
    confidence, hits = np.array([0.82, 0.88, 0.6, 0.6]), np.array([True, False, True, True])
    assert metrics.ece(confidence, hits, bins=10) == pytest.approx(0.5 * 0.35 + 0.5 * 0.4)
    rows = metrics.reliability(confidence, hits, bins=10)
    assert [(row["low"], row["count"], row["accuracy"]) for row in rows] == [(0.5, 2, 1.0), (0.8, 2, 0.5)]
    assert metrics.calibration_error(confidence, hits, bins=10).value == pytest.approx(0.375)


def test_an_edge_belongs_to_the_bin_below_it_in_single_precision_too() -> None:
    rows = metrics.reliability(np.array([0.6, 1.0, 0.0], dtype=np.float32), np.ones(3, dtype=bool), bins=10)
    assert [row["low"] for row in rows] == [0.0, 0.5, 0.9]


def test_the_interval_of_the_calibration_error_covers_that_of_an_overconfident_model() -> None:
    covered = 0
    for seed in range(60):
        hits = np.random.default_rng(seed).uniform(size=200) < 0.6
        figure = metrics.calibration_error(np.full(200, 0.9), hits, seed=seed, draws=200)
        covered += figure.low <= 0.3 <= figure.high
    assert 51 <= covered <= 60


def test_a_mean_has_an_interval_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    figure = metrics.mean(values, seed=1)
    assert figure.value == pytest.approx(values.mean())
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_nothing_has_no_figure() -> None:
    none = np.zeros(0)
    for call in (metrics.share, metrics.mean, lambda x: metrics.ece(x, x.astype(bool)), lambda x: metrics.difference(x, x)):
        with pytest.raises(ValueError, match=r"nothing|same samples"):
            call(none)


def test_evidence_comes_back_from_json() -> None:
    found = Evidence({"a": {"accuracy": Figure(0.5, 0.4, 0.6)}}, {"test": "x"}, {"classes": ["one"]})
    assert Evidence.from_json(json.loads(json.dumps(found.to_json()))) == found
