"""SSLD: the divergence, the mining, the soft labels, and a student that follows its teacher without any label."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill.ssld import Config, divergence, mined, soft_labels, ssld
from tasks.train.supervised import Config as Training
from tests import tables

LN2 = math.log(2)
QUICK = Config(widths=(4,), hidden=8, mine=3, steps=6, batch=8, tune_steps=3)


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def teacher(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(8,), hidden=16, mean=0.3, std=0.4)


def test_js_is_nothing_for_equal_and_ln_2_for_disjoint_distributions() -> None:
    same = logs([0.2, 0.3, 0.5])
    assert divergence(same, same).item() == pytest.approx(0, abs=1e-12)
    assert divergence(logs([1.0, 0.0]), logs([0.0, 1.0])).item() == pytest.approx(LN2)


def test_js_and_kl_by_hand() -> None:
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): JS = [ln(4/3) + ln(2/3)/2 + ln(2)/2] / 2
    p, q = logs([1.0, 0.0]), logs([0.5, 0.5])
    by_hand = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * LN2) / 2
    assert divergence(p, q).item() == pytest.approx(by_hand)
    assert divergence(q, p, "kl").item() == pytest.approx(LN2)  # KL(teacher || student)
    assert divergence(torch.cat([p, q]), torch.cat([q, q])).item() == pytest.approx(by_hand / 2)  # mean over rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-200, 200), min_size=3, max_size=3), st.lists(st.floats(-200, 200), min_size=3, max_size=3))
def test_js_is_symmetric_bounded_and_has_finite_gradients(a: list[float], b: list[float]) -> None:
    student, teacher = torch.tensor([a], requires_grad=True), torch.tensor([b])
    one, two = torch.log_softmax(student, 1), torch.log_softmax(teacher, 1)
    loss = divergence(one, two)
    loss.backward()
    assert loss.item() == pytest.approx(divergence(two, one).item(), abs=1e-6)
    assert -1e-6 <= loss.item() <= LN2 + 1e-6
    assert torch.isfinite(student.grad).all()


def test_a_certain_teacher_gives_finite_gradients() -> None:
    student = torch.zeros(1, 2, requires_grad=True)
    divergence(torch.log_softmax(student, 1), torch.tensor([[0.0, -torch.inf]])).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad[0, 0] < 0 < student.grad[0, 1]


def test_mining_takes_each_classs_highest_rows_and_each_row_once() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6], [0.5, 0.5]])
    assert mined(probabilities, 1).tolist() == [0, 1]
    assert mined(probabilities, 2).tolist() == [0, 1, 2, 3]
    assert mined(probabilities, 3).tolist() == [0, 1, 2, 3, 4]  # row 4 is third for both
    assert mined(probabilities, 99).tolist() == [0, 1, 2, 3, 4]
    assert mined(np.full((4, 2), 0.5), 1).tolist() == [0]  # a tie goes to the earlier row


def test_soft_labels_of_several_teachers_are_the_mean_of_their_probabilities(tiny: Dataset) -> None:
    few = tiny.take(np.arange(5))
    one, two = (loop.predict(teacher(seed), few.images()).softmax(1) for seed in (1, 2))
    assert torch.allclose(soft_labels([teacher(1), teacher(2)], few, few.images()).exp(), (one + two) / 2, atol=1e-6)


def test_a_student_of_soft_labels_alone_follows_its_teacher(tiny: Dataset) -> None:
    from tasks.train.supervised import supervised

    train, test = tiny.split("train"), tiny.split("test")
    expert = supervised(train, Training(steps=150, widths=(16, 32), hidden=64))
    student = ssld([expert], train.without_labels(), Config(widths=(8, 16), hidden=32, mine=200, steps=250, lr=0.1))
    answers = [loop.predict(net, test.images()).argmax(1).numpy() for net in (expert, student)]
    assert (answers[0] == answers[1]).mean() > 0.8
    assert networks.parameters(student) < networks.parameters(expert) / 3


@pytest.mark.parametrize("size", [8, 12, 15, 16, 20, 28, 31, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_default_student_has_at_most_a_quarter_of_the_default_teachers_parameters(size: int, channels: int) -> None:
    def count(widths: tuple[int, ...], hidden: int) -> int:
        return networks.parameters(networks.convnet((channels, size, size), 10, widths=widths, hidden=hidden, mean=0.5, std=0.5))

    ours, theirs = Config(), Training()
    assert count(ours.widths, ours.hidden) <= count(theirs.widths, theirs.hidden) / 4


def test_labels_do_not_matter_for_what_is_learnt_but_for_what_is_mined(tiny: Dataset, tmp_path: Path) -> None:
    train = tiny.split("train").take(np.arange(40))
    wrong = tables.dataset(tmp_path / "wrong", train.images(), [0] * 40, classes=tiny.info.classes)
    assert torch.equal(weights(ssld([teacher()], train, QUICK)), weights(ssld([teacher()], wrong, QUICK)))
    pool = tiny.split("reference").without_labels()
    assert not torch.equal(weights(ssld([teacher()], train, QUICK)), weights(ssld([teacher()], train + pool, QUICK)))
    none = QUICK.model_copy(update={"mine": 0})
    assert torch.equal(weights(ssld([teacher()], train, none)), weights(ssld([teacher()], train + pool, none)))


@pytest.mark.parametrize("change", [{"loss": "kl"}, {"shift": 1}, {"tune_steps": 0}, {"hidden": 9}, {"steps": 7}])
def test_every_setting_changes_the_student(tiny: Dataset, change: dict[str, object]) -> None:
    data = tiny.split("train").take(np.arange(30)) + tiny.split("reference").without_labels()
    base, other = (ssld([teacher()], data, QUICK.model_copy(update=update), seed=1) for update in ({}, change))
    assert weights(base).shape != weights(other).shape or not torch.equal(weights(base), weights(other))


def test_teachers_are_left_as_they_were_in_mode_too(tiny: Dataset) -> None:
    net = teacher().train()
    before = weights(net)
    ssld([net], tiny.split("validation"), QUICK)
    assert torch.equal(weights(net), before)
    assert net.training
    assert all(w.grad is None for w in net.parameters())


def test_missing_teachers_missing_rows_and_misfits_are_refused(tiny: Dataset) -> None:
    data = tiny.split("validation")
    with pytest.raises(UserError, match="at least one teacher"):
        ssld([], data, QUICK)
    with pytest.raises(UserError, match="the data has no rows"):
        ssld([teacher()], data.take(np.array([], dtype=int)), QUICK)
    with pytest.raises(UserError, match=r"teacher 1 takes images \(1, 8, 8\) of 4 classes; the data has \(1, 8, 8\) and 10"):
        ssld([teacher(), teacher(classes=4)], data, QUICK)
    with pytest.raises(UserError, match="'mine' above 0"):
        ssld([teacher()], data.without_labels(), QUICK.model_copy(update={"mine": 0}))
