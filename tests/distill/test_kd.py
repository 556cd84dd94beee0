"""Distillation at a temperature: its loss by hand, what labels and the pool are for, and a student that follows several teachers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill._shared import cross_entropy
from tasks.distill.kd import Config, kd, soft_loss

QUICK = Config(widths=(4,), hidden=8, steps=6, batch=8)


def teacher(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(8,), hidden=16, mean=0.3, std=0.4)


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def test_the_soft_loss_by_hand() -> None:
    # at T = 2 the logits (0, 2 ln 3) are (0, ln 3): probabilities 1/4 and 3/4; the teacher's are 1/2 and 1/2
    logits = torch.tensor([[0.0, 2 * math.log(3)]])
    half = torch.tensor([[0.5, 0.5]]).log()
    by_hand = 4 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert soft_loss(logits, half, 2.0).item() == pytest.approx(by_hand)
    assert soft_loss(logits, F.log_softmax(logits / 2, 1), 2.0).item() == pytest.approx(0, abs=1e-6)


def test_at_a_high_temperature_gradients_keep_their_size_and_are_those_of_matching_centred_logits() -> None:
    ours, theirs = torch.tensor([[1.0, 2.0, -3.0]], requires_grad=True), torch.tensor([[0.0, 3.0, -3.0]])
    sizes = []
    for temperature in (50.0, 100.0):
        [gradient] = torch.autograd.grad(soft_loss(ours, F.log_softmax(theirs / temperature, 1), temperature), ours)
        assert torch.allclose(gradient, (ours - theirs) / 3, atol=0.02)  # paper, equation 4; both are centred
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_cross_entropy_is_the_mean_of_those_rows_that_have_a_label() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [5.0, 0.0]], requires_grad=True)
    found = cross_entropy(logits, torch.tensor([0, 1, -1]))
    assert found.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    found.backward()
    assert logits.grad is not None
    assert logits.grad[2].tolist() == [0, 0]
    assert cross_entropy(logits, torch.tensor([-1, -1, -1])).item() == 0


def test_a_student_without_labels_follows_the_mean_of_its_teachers(tiny: Dataset) -> None:
    from tasks.train.supervised import Config as Training
    from tasks.train.supervised import supervised

    train, test = tiny.split("train"), tiny.split("test")
    experts = [supervised(train, Training(steps=100, widths=(8, 16), hidden=32), seed=seed) for seed in (0, 1)]
    student = kd(experts, train.without_labels(), Config(widths=(8, 16), hidden=32, steps=250, lr=0.02))
    said = sum(loop.predict(net, test.images()).softmax(1) for net in experts).argmax(1)
    assert (loop.predict(student, test.images()).argmax(1) == said).float().mean() > 0.8


def test_labels_count_by_their_weight_alone_and_rows_without_one_by_the_teachers(tiny: Dataset) -> None:
    train, pool = tiny.split("train").take(np.arange(40)), tiny.split("reference").without_labels()
    soft = QUICK.model_copy(update={"alpha": 1.0})
    assert torch.equal(weights(kd([teacher()], train, soft)), weights(kd([teacher()], train.without_labels(), soft)))
    assert not torch.equal(weights(kd([teacher()], train, QUICK)), weights(kd([teacher()], train.without_labels(), QUICK)))
    assert not torch.equal(weights(kd([teacher()], train, QUICK)), weights(kd([teacher()], train + pool, QUICK)))
    hard = QUICK.model_copy(update={"alpha": 0.0})
    assert torch.equal(weights(kd([teacher(1)], train, hard)), weights(kd([teacher(2)], train, hard)))


@pytest.mark.parametrize("change", [{"temperature": 2.0}, {"alpha": 0.5}, {"shift": 1}, {"lr": 0.02}, {"steps": 7}])
def test_every_setting_changes_the_student(tiny: Dataset, change: dict[str, object]) -> None:
    data = tiny.split("validation")
    base, other = (kd([teacher()], data, QUICK.model_copy(update=update)) for update in ({}, change))
    assert not torch.equal(weights(base), weights(other))


def test_a_student_goes_on_from_the_one_that_is_given(tiny: Dataset) -> None:
    old = teacher(5)
    before = weights(old)
    still = kd([teacher()], tiny.split("validation"), QUICK.model_copy(update={"lr": 1e-9}), start=old)
    assert torch.allclose(weights(still), before, atol=1e-5)
    assert torch.equal(weights(old), before)
    assert still is not old


def test_what_it_cannot_learn_from_is_refused(tiny: Dataset) -> None:
    data = tiny.split("validation")
    with pytest.raises(UserError, match="at least one teacher"):
        kd([], data, QUICK)
    with pytest.raises(UserError, match="teacher 0 takes images"):
        kd([teacher(classes=3)], data, QUICK)
    with pytest.raises(UserError, match="no row of the data has a label: with 'alpha' 0 the student learns from labels alone"):
        kd([teacher()], data.without_labels(), QUICK.model_copy(update={"alpha": 0.0}))
