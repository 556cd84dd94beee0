"""Supervised training: what it learns from, what it starts from, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net, parameters
from tasks.train.supervised import Config, supervised
from tests import tables

QUICK = Config(steps=8, batch=8, lr=0.05, widths=(4,), hidden=8)


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.fixture
def made(tiny: Dataset, tmp_path: Path) -> Dataset:
    """Ten synthetic rows, of another brightness."""
    images = 255 - tiny.split("reference").images()[:10]
    return tables.dataset(tmp_path / "made", images, list(range(10)), classes=tiny.info.classes, synthetic=True)


def test_digits_are_learnt_from_two_hundred_rows(tiny: Dataset) -> None:
    net = supervised(tiny.split("train"), Config(steps=150, widths=(16, 32), hidden=64), seed=0)
    test = tiny.split("test")
    assert (loop.predict(net, test.images()).argmax(1).numpy() == test.labels()).mean() > 0.75
    assert not net.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny: Dataset) -> None:
    first, again, other = (weights(supervised(tiny.split("train"), QUICK, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_without_a_label_change_nothing(tiny: Dataset) -> None:
    train = tiny.split("train")
    alone, beside = supervised(train, QUICK), supervised(train + tiny.split("reference").without_labels(), QUICK)
    assert alone.arch == beside.arch
    assert torch.equal(weights(alone), weights(beside))


def test_synthetic_rows_stand_in_a_term_of_their_own(tiny: Dataset, made: Dataset) -> None:
    real = tiny.split("train")
    both = real + made
    net = supervised(both, QUICK.model_copy(update={"real_weight": 0.3}), seed=4)
    with loop.seeded(4) as generator:
        mean, std = loop.pixel_stats(both.images())
        by_hand = networks.convnet((1, 8, 8), 10, widths=(4,), hidden=8, mean=mean, std=std)
        synthetic = np.arange(len(both)) >= len(real)
        loop.fit_supervised(
            by_hand, both.images(), both.labels(), synthetic, steps=8, batch=8, lr=0.05, momentum=0.9, weight_decay=5e-4,
            real_weight=0.3, generator=generator,
        )  # fmt: skip
    assert torch.equal(weights(net), weights(by_hand))
    assert not torch.equal(weights(net), weights(supervised(both, QUICK.model_copy(update={"real_weight": 0.9}), seed=4)))


def test_synthetic_rows_alone_can_be_trained_on(made: Dataset) -> None:
    assert torch.isfinite(weights(supervised(made, QUICK))).all()


def test_a_start_is_trained_on_as_a_copy_and_keeps_its_size(tiny: Dataset) -> None:
    start = supervised(tiny.split("train"), QUICK)
    before = weights(start)
    net = supervised(tiny.split("reference"), QUICK.model_copy(update={"widths": (16,), "lr": 1e-4}), start=start)
    assert torch.equal(weights(start), before)
    assert net.arch == start.arch
    assert 0 < (weights(net) - before).abs().max() < 0.05


def test_widths_and_hidden_set_the_size_of_a_fresh_network(tiny: Dataset) -> None:
    assert parameters(supervised(tiny.split("train"), QUICK)) == (4 * 9 + 4) + (4 * 16 * 8 + 8) + (8 * 10 + 10)


def test_data_that_cannot_be_learnt_from_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    train = tiny.split("train")
    with pytest.raises(UserError, match="no row of the data has a label"):
        supervised(train.without_labels(), QUICK)
    with pytest.raises(UserError, match=r"class 'three' has no labelled row \(1 such\)"):
        supervised(train.where(train.labels() != 3), QUICK)
    wide = tables.dataset(tmp_path / "wide", np.zeros((3, 1, 8, 8), np.uint8), [0, 1, 2], classes=("a", "b"))
    with pytest.raises(UserError, match="label 2 has no class name"):
        supervised(wide, QUICK)


def test_a_start_of_another_shape_or_other_classes_is_refused(tiny: Dataset) -> None:
    start = tables.told([[0.0, 1.0]])
    with pytest.raises(UserError, match=r"takes images \(1, 1, 1\) of 2 classes; the data has \(1, 8, 8\) and 10"):
        supervised(tiny.split("train"), QUICK, start=start)
