"""Balanced divergences: weights by entropy row by row, both divergences by hand, peers that learn and teachers that do not."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill.bd_kd import Config, balanced, bd_kd, entropy

QUICK = Config(widths=(4,), hidden=8, steps=6, batch=8)
SHARP, FLAT = [0.9, 0.1], [0.5, 0.5]
FORWARD = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # KL(sharp || flat)
BACKWARD = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # KL(flat || sharp)


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def teacher(seed: int = 0, classes: int = 10, hidden: int = 16) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(8,), hidden=hidden, mean=0.3, std=0.4)


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def test_entropy_of_even_and_of_certain_rows() -> None:
    assert entropy(logs([0.25] * 4, [1.0, 0.0, 0.0, 0.0])).tolist() == pytest.approx([math.log(4), 0])


def test_a_sharper_student_favours_forward_and_a_flatter_one_reverse() -> None:
    # student sharp, teacher flat: forward is KL(flat || sharp)
    assert balanced(logs(SHARP), logs(FLAT), w_hi=2, w_lo=1).item() == pytest.approx(2 * BACKWARD + FORWARD)
    # student flat, teacher sharp: reverse is KL(flat || sharp)
    assert balanced(logs(FLAT), logs(SHARP), w_hi=2, w_lo=1).item() == pytest.approx(FORWARD + 2 * BACKWARD)


def test_each_row_has_weights_of_its_own_and_only_then_comes_the_mean() -> None:
    student, teacher = logs(SHARP, FLAT), logs(FLAT, SHARP)
    both = balanced(student, teacher, w_hi=2, w_lo=1).item()
    assert both == pytest.approx((2 * BACKWARD + FORWARD + FORWARD + 2 * BACKWARD) / 2)
    flipped = balanced(student, teacher, w_hi=2, w_lo=1, orientation="flipped").item()
    assert flipped == pytest.approx((BACKWARD + 2 * FORWARD + 2 * FORWARD + BACKWARD) / 2)


def test_one_direction_for_all_rows_is_that_divergence_alone() -> None:
    student, teacher = logs(SHARP, SHARP), logs(FLAT, FLAT)
    assert balanced(student, teacher, w_hi=3, w_lo=0, orientation="forward").item() == pytest.approx(3 * BACKWARD)
    assert balanced(student, teacher, w_hi=3, w_lo=0, orientation="reverse").item() == pytest.approx(3 * FORWARD)


def test_the_teacher_is_held_fixed_and_a_certain_one_gives_finite_gradients() -> None:
    student, teacher = torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    balanced(student.log_softmax(1), teacher.log_softmax(1), w_hi=2, w_lo=1).backward()
    assert teacher.grad is None
    balanced(student.log_softmax(1), torch.tensor([[0.0, -torch.inf, -torch.inf]] * 2), w_hi=2, w_lo=1).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_peers_learn_from_the_teachers_description_and_a_frozen_teacher_from_nothing(tiny: Dataset) -> None:
    data = tiny.split("validation")
    online = weights(bd_kd([teacher(1)], data, QUICK))
    assert torch.equal(online, weights(bd_kd([teacher(2)], data, QUICK)))
    assert not torch.equal(online, weights(bd_kd([teacher(1, hidden=17)], data, QUICK)))
    offline = QUICK.model_copy(update={"online": False})
    assert not torch.equal(weights(bd_kd([teacher(1)], data, offline)), weights(bd_kd([teacher(2)], data, offline)))


def test_a_peer_that_is_held_to_the_student_comes_closer_to_it(tiny: Dataset) -> None:
    # beta reaches the student only through the peer, so that any change of it shows that the peer took part
    train = tiny.split("train")
    cfg = Config(widths=(8, 16), hidden=32, steps=120)
    free, held = (bd_kd([teacher()], train, cfg.model_copy(update={"beta": beta})) for beta in (0.0, 3.0))
    sure = [loop.predict(net, tiny.split("test").images()).softmax(1).max(1).values.mean().item() for net in (free, held)]
    assert sure[1] < sure[0]  # both soften each other
    labels = torch.from_numpy(tiny.split("test").labels())
    assert (loop.predict(held, tiny.split("test").images()).argmax(1) == labels).float().mean() > 0.7


def test_of_a_frozen_teacher_a_student_learns_without_any_label(tiny: Dataset) -> None:
    from tasks.train.supervised import Config as Training
    from tasks.train.supervised import supervised

    train, test = tiny.split("train"), tiny.split("test").images()
    expert = supervised(train, Training(steps=100, widths=(8, 16), hidden=32))
    student = bd_kd([expert], train.without_labels(), Config(widths=(8, 16), hidden=32, steps=200, lr=0.01, online=False))
    assert (loop.predict(student, test).argmax(1) == loop.predict(expert, test).argmax(1)).float().mean() > 0.7


CHANGES = [
    {"temperature": 2.0},
    {"w_hi": 3.0},
    {"w_lo": 0.5},
    {"orientation": "flipped"},
    {"orientation": "reverse"},
    {"beta": 0.0},
    {"shift": 1},
]


@pytest.mark.parametrize("change", [*CHANGES, {"online": False}])
def test_every_setting_changes_the_student(tiny: Dataset, change: dict[str, object]) -> None:
    data = tiny.split("validation")
    base, other = (bd_kd([teacher()], data, QUICK.model_copy(update=update)) for update in ({}, change))
    assert not torch.equal(weights(base), weights(other))


def test_rows_without_a_label_are_learnt_from_and_a_start_is_gone_on_from(tiny: Dataset) -> None:
    data, pool = tiny.split("validation"), tiny.split("reference").without_labels()
    assert not torch.equal(weights(bd_kd([teacher()], data, QUICK)), weights(bd_kd([teacher()], data + pool, QUICK)))
    old = teacher(5)
    still = bd_kd([teacher()], data, QUICK.model_copy(update={"lr": 1e-9}), start=old)
    assert torch.allclose(weights(still), weights(old), atol=1e-5)


def test_what_it_cannot_learn_from_is_refused(tiny: Dataset) -> None:
    data = tiny.split("validation")
    with pytest.raises(UserError, match="at least one teacher"):
        bd_kd([], data, QUICK)
    with pytest.raises(UserError, match="teacher 0 takes images"):
        bd_kd([teacher(classes=3)], data, QUICK)
    with pytest.raises(UserError, match="no row of the data has a label: student and peer know nothing else; set 'online' off"):
        bd_kd([teacher()], data.without_labels(), QUICK)
