"""Classification: figures worked out by hand from a network with chosen answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.evaluate.classification import SMOKE, classification, latency, size_bytes, worst_class
from tests import tables

CLASSES = ("a", "b", "c")
LN3 = math.log(3)
# pixel 0 -> class 0 with probability 3/5, pixel 1 -> class 1 with 3/5, pixel 2 -> undecided, and 0 wins ties
GOOD = [[LN3, 0, 0], [0, LN3, 0], [0, 0, 0]]
ALWAYS_B = [[0, 1, 0]] * 3


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Four labelled rows: 0, 1, 1 shown as 0, and one undecided of class 0; and one row without a label."""
    return tables.dataset(tmp_path / "rows", tables.pixels(0, 1, 0, 2, 1), [0, 1, 1, 0, None], classes=CLASSES)


def test_figures_by_hand(data: Dataset) -> None:
    found = classification({"good": tables.told(GOOD), "b": tables.told(ALWAYS_B)}, {"test": data}, SMOKE)
    good, b = found.figures["good"], found.figures["b"]
    assert good["accuracy"].value == 0.75
    assert good["worst_class_accuracy"].value == 0.5
    assert b["accuracy"].value == 0.5
    assert b["worst_class_accuracy"].value == 0
    # -ln of 3/5, 3/5, 1/5 and 1/3
    assert good["nll"].value == pytest.approx(-(2 * math.log(0.6) + math.log(0.2) + math.log(1 / 3)) / 4)
    # bin of 3/5: accuracy 2/3 over three rows; bin of 1/3: accuracy 1 over one
    assert good["ece"].value == pytest.approx((3 * abs(2 / 3 - 3 / 5) + abs(1 - 1 / 3)) / 4)
    assert good["parameters"].value == 9
    assert good["size_bytes"].value == 4 * (9 + 2)  # mean and std travel along
    assert found.data == {"test": data.md5}


def test_details_hold_counts_and_no_nan(data: Dataset) -> None:
    details = classification({"good": tables.told(GOOD)}, {"test": data}, SMOKE).details
    assert details["classes"] == list(CLASSES)
    assert details["rows"] == 4
    assert details["per_class"]["good"] == [1.0, 0.5, None]
    assert details["confusion"]["good"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert sum(row["count"] for row in details["reliability"]["good"]) == 4


def test_every_answer_is_listed_without_rows_that_have_no_label(data: Dataset) -> None:
    table = classification({"good": tables.told(GOOD), "b": tables.told(ALWAYS_B)}, {"test": data}, SMOKE).per_sample
    assert table is not None
    rows = table.to_pylist()
    assert [row["model"] for row in rows] == ["good"] * 4 + ["b"] * 4
    assert [row["sample_id"] for row in rows[:4]] == ["r000", "r001", "r002", "r003"]
    assert [(row["label"], row["predicted"]) for row in rows[:4]] == [(0, 0), (1, 1), (1, 0), (0, 0)]
    assert [row["confidence"] for row in rows[:4]] == pytest.approx([0.6, 0.6, 0.6, 1 / 3])


def test_all_but_latency_is_the_same_twice_and_models_are_left_alone(data: Dataset) -> None:
    net = tables.told(GOOD).train()
    first, again = (classification({"m": net}, {"test": data}, SMOKE, seed=2) for _ in range(2))
    for key in first.figures["m"]:
        assert key.startswith("latency") or first.figures["m"][key] == again.figures["m"][key]
    assert net.training
    assert torch.equal(net.head.weight, torch.tensor(GOOD).T)


def test_latency_is_positive_and_repeats_rows_where_there_are_too_few() -> None:
    figure = latency(tables.told(GOOD), tables.pixels(0, 1), 64, repeats=3)
    assert figure.value > 0
    assert figure.low == figure.value == figure.high


def test_the_worst_class_has_the_interval_of_its_own_rows() -> None:
    figure = worst_class(np.array([0] * 10 + [2] * 2), np.array([0] * 8 + [1] * 2 + [2] * 2))
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_size_counts_each_value_in_its_own_type() -> None:
    net = tables.told(GOOD)
    assert size_bytes(net) == 44
    assert size_bytes(net.double()) == 88
    net.register_buffer("flags", torch.zeros(3, dtype=torch.int8))
    assert size_bytes(net) == 91


def test_missing_models_roles_labels_and_misfits_are_refused(data: Dataset, tmp_path: Path) -> None:
    net = tables.told(GOOD)
    with pytest.raises(UserError, match="no model was given"):
        classification({}, {"test": data}, SMOKE)
    with pytest.raises(UserError, match="role 'test'; it got train"):
        classification({"m": net}, {"train": data}, SMOKE)
    with pytest.raises(UserError, match="no row in the role 'test' has a label"):
        classification({"m": net}, {"test": data.without_labels()}, SMOKE)
    with pytest.raises(UserError, match="model 'm' takes images"):
        classification({"m": tables.told([[0.0]])}, {"test": data}, SMOKE)
    large = tables.dataset(tmp_path / "large", np.zeros((1, 1, 2, 2), np.uint8), [0], classes=CLASSES)
    with pytest.raises(UserError, match=r"takes images \(1, 1, 1\)"):
        classification({"m": net}, {"test": large}, SMOKE)
