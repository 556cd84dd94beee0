"""Random labels: what is drawn, what is added to the loss, and what comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.unlearn import _shared
from tasks.unlearn import random_label as wrong


def model(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(4, 6), hidden=8, mean=0.3, std=0.4)


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.fixture
def sets(tiny: Dataset) -> tuple[Dataset, Dataset]:
    train = tiny.split("train")
    return train.take(np.arange(10)), train.take(np.arange(10, 120))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 9))
def test_a_drawn_label_is_a_class_and_never_the_right_one(labels: list[int], seed: int) -> None:
    true = torch.tensor(labels)
    drawn = _shared.other_labels(true, 5, torch.Generator().manual_seed(seed))
    assert ((drawn >= 0) & (drawn < 5)).all()
    assert (drawn != true).all()


def test_the_other_labels_are_drawn_evenly() -> None:
    drawn = _shared.other_labels(torch.full((4000,), 2), 5, torch.Generator().manual_seed(0))
    assert torch.bincount(drawn, minlength=5).tolist() == pytest.approx([1000, 1000, 0, 1000, 1000], abs=100)


def test_a_network_of_one_class_has_no_other_label() -> None:
    with pytest.raises(UserError, match="no other label"):
        _shared.other_labels(torch.tensor([0]), 1, torch.Generator())


def test_with_two_classes_the_added_loss_is_the_weighted_loss_under_the_other_one(sets) -> None:
    net, pixels, labels = model(classes=2), sets[0].images(), sets[0].labels() % 2
    loss = _shared.wrong_label_loss(pixels, labels, classes=2, steps=1, batch=99, weight=0.3, generator=torch.Generator().manual_seed(0))
    flipped = F.cross_entropy(net(loop.to_float(pixels)), torch.from_numpy(1 - labels))
    assert loss(0, net).item() == pytest.approx(0.3 * flipped.item(), rel=1e-5)


def test_a_row_gets_another_wrong_label_each_time_it_is_seen(sets) -> None:
    net, pixels, labels = model(), sets[0].images()[:1], sets[0].labels()[:1]
    loss = _shared.wrong_label_loss(pixels, labels, classes=10, steps=20, batch=1, weight=1, generator=torch.Generator().manual_seed(0))
    seen = {round(loss(step, net).item(), 4) for step in range(20)}
    possible = {round(-value.item(), 4) for value in F.log_softmax(net(loop.to_float(pixels)), 1)[0]}
    assert len(seen) > 3
    assert seen <= possible


def test_the_accuracy_on_forget_rows_falls_and_that_on_retained_rows_stays(tiny: Dataset) -> None:
    train = tiny.split("train")
    forget, retain = train.where(train.labels() == 0), train.where(train.labels() != 0)
    with loop.seeded(0) as generator:
        old = networks.convnet((1, 8, 8), 10, widths=(8, 16), hidden=32, mean=0.3, std=0.4)
        recipe = loop.Recipe(steps=150, batch=32).model_dump()
        loop.fit_supervised(old, train.images(), train.labels(), train.synthetic(), generator=generator, **recipe)
    new = wrong.random_label(old, forget, retain, wrong.Config(steps=60, batch=32, lr=0.05))
    right = {
        (name, role): float((loop.predict(net, rows.images()).argmax(1).numpy() == rows.labels()).mean())
        for name, net in (("old", old), ("new", new))
        for role, rows in (("forget", forget), ("retain", retain))
    }
    assert right["old", "forget"] > 0.95
    assert right["new", "forget"] < 0.1
    assert right["new", "retain"] > 0.9


def test_the_weight_of_the_forget_rows_matters_and_the_seed_decides(sets) -> None:
    one, again, other = (wrong.random_label(model(), *sets, wrong.SMOKE, seed=seed) for seed in (3, 3, 4))
    heavy = wrong.random_label(model(), *sets, wrong.SMOKE.model_copy(update={"forget_weight": 2.0}), seed=3)
    assert torch.equal(weights(one), weights(again))
    assert not torch.equal(weights(one), weights(other))
    assert not torch.equal(weights(one), weights(heavy))


def test_forget_rows_without_labels_are_passed_over_and_refused_where_none_is_left(sets) -> None:
    forget, retain = sets
    half = forget.take(np.arange(5))
    mixed = half + forget.take(np.arange(5, 10)).without_labels()
    assert torch.equal(
        weights(wrong.random_label(model(), half, retain, wrong.SMOKE)), weights(wrong.random_label(model(), mixed, retain, wrong.SMOKE))
    )
    with pytest.raises(UserError, match="no row of the forget set has a label"):
        wrong.random_label(model(), forget.without_labels(), retain, wrong.SMOKE)


def test_a_forget_label_beyond_the_model_is_refused(tiny: Dataset) -> None:
    train = tiny.split("train")
    with pytest.raises(UserError, match="label 9 of the forget set does not fit the model, which has 9 classes"):
        wrong.random_label(model(classes=9), train.where(train.labels() == 9), train.where(train.labels() < 9), wrong.SMOKE)


def test_forget_images_of_another_shape_are_refused(sets, tmp_path) -> None:
    from tests import tables

    small = tables.dataset(tmp_path / "small", np.zeros((2, 1, 4, 4), np.uint8), [0, 1], classes=("a", "b"))
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\); the forget set has \(1, 4, 4\)"):
        wrong.random_label(model(), small, sets[1], wrong.SMOKE)
