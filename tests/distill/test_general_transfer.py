"""General transfer: who is followed on which row, the targets, what is measured of teacher and student, and students that keep or gain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill.general_transfer import Config, chosen, flips, gained, general_transfer, measured, targets
from tasks.train.supervised import Config as Training
from tasks.train.supervised import supervised

QUICK = Config(steps=6, batch=8, lr=0.05)
UNKNOWN = -1


def logits(*models: list[list[float]]) -> Tensor:
    """Logits of models from their probabilities of each row."""
    return torch.tensor(models, dtype=torch.float64).log()


def weights(net: Net) -> Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def net(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(8,), hidden=16, mean=0.3, std=0.4)


# rows: the student is surer and wrong of label 1; the teacher is surer; as sure as each other
STUDENT = [[0.8, 0.2, 0.0], [0.4, 0.4, 0.2], [0.5, 0.25, 0.25]]
TEACHER = [[0.3, 0.6, 0.1], [0.1, 0.0, 0.9], [0.25, 0.5, 0.25]]
THIRD = [[0.0, 0.1, 0.9], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]


def test_a_label_decides_where_there_is_one_and_confidence_elsewhere() -> None:
    said = logits(STUDENT, TEACHER)
    none, all_of_one = torch.tensor([UNKNOWN] * 3), torch.tensor([1] * 3)
    assert chosen(said, none).tolist() == [0, 1, 0]  # the last is a tie: the student
    assert chosen(said, all_of_one).tolist() == [1, 0, 1]
    assert chosen(said, torch.tensor([1, UNKNOWN, UNKNOWN])).tolist() == [1, 1, 0]
    assert chosen(said, all_of_one, "confidence").tolist() == [0, 1, 0]
    assert chosen(said, all_of_one, "none").tolist() == [1, 1, 1]


def test_of_several_teachers_the_surest_is_followed() -> None:
    said, none = logits(STUDENT, TEACHER, THIRD), torch.tensor([UNKNOWN] * 3)
    assert chosen(said, none).tolist() == [2, 1, 0]
    assert chosen(said, torch.tensor([1, 1, 2])).tolist() == [1, 2, 0]
    assert chosen(said, none, "none").tolist() == [2, 1, 1]  # a tie of teachers: the earlier


def test_targets_are_the_probabilities_of_whoever_is_followed_at_the_temperature() -> None:
    said, none = logits(STUDENT, TEACHER), torch.tensor([UNKNOWN] * 3)
    assert targets(said, none, "confidence").exp().tolist() == [pytest.approx(row) for row in (STUDENT[0], TEACHER[1], STUDENT[2])]
    # at temperature 2, odds are square roots: 4 : 1 becomes 2 : 1
    two = targets(logits([[0.8, 0.2]], [[0.5, 0.5]]), torch.tensor([UNKNOWN]), "confidence", 2.0)
    assert two.exp().tolist() == [pytest.approx([2 / 3, 1 / 3])]


def test_temperature_does_not_change_who_is_followed() -> None:
    # at a high temperature the second, of two equals and a nought, stays at a half and beats whatever has three alike
    said, none = logits([[0.6, 0.2, 0.2]], [[0.5, 0.5, 0.0]]), torch.tensor([UNKNOWN])
    assert torch.isfinite(targets(said, none, "confidence", 50.0)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_whoever_is_followed_gives_the_label_at_least_what_the_student_gave(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    said, labels = torch.randn(3, 20, 4, generator=generator), torch.randint(0, 4, (20,), generator=generator)
    rows = torch.arange(20)
    assert (targets(said, labels, "label")[rows, labels] >= said[0].log_softmax(1)[rows, labels]).all()
    assert (targets(said, labels, "confidence").amax(1) >= said[0].log_softmax(1).amax(1)).all()


def test_complementary_knowledge_by_hand() -> None:
    said, labels = logits(STUDENT, TEACHER, THIRD), torch.tensor([1, 2, 0])
    # the student is right of the last alone, the teacher of the first two, the third of the last
    assert flips(said, labels) == [pytest.approx(2 / 3), 0.0]
    assert flips(said, torch.tensor([1, UNKNOWN, UNKNOWN])) == [1.0, 0.0]
    assert np.isnan(flips(said, torch.tensor([UNKNOWN] * 3))).all()
    found = measured(said, labels, "confidence", [4, 7])
    assert found == {
        **{"taken_4": pytest.approx(1 / 3), "differs_4": 1.0, "flips_4": pytest.approx(2 / 3)},
        **{"taken_7": pytest.approx(1 / 3), "differs_7": pytest.approx(1 / 3), "flips_7": 0.0},
    }
    assert "flips_0" not in measured(said[:2], torch.tensor([UNKNOWN] * 3), "label", [0])


def test_what_a_student_won_and_lost_by_hand() -> None:
    before, after = logits([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]])[0], logits([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]])[0]
    assert gained(before, after, torch.tensor([0, 1, 1, 1])) == {"changed": 0.75, "won": 0.5, "lost": 0.25, "transfer": 0.25}
    assert gained(before, after, torch.tensor([UNKNOWN] * 4)) == {"changed": 0.75}


def test_a_student_that_is_its_own_teacher_stays_as_it_is(tiny: Dataset) -> None:
    one, rows = net(1), tiny.split("train").take(np.arange(40))
    still = QUICK.model_copy(update={"weight_decay": 0.0})
    taught = general_transfer([one], rows, still, start=one)
    assert torch.allclose(weights(taught.net), weights(one), atol=1e-5)
    assert taught.figures["taken_0"] == taught.figures["changed"] == 0.0


@pytest.fixture(scope="module")
def halves(tiny: Dataset) -> tuple[Net, Net]:
    """Two networks: one has learnt the digits 0 to 4 and seen one each of the others, one the other way round."""
    train = tiny.split("train")
    labels = train.labels()
    one_each = np.array([np.flatnonzero(labels == label)[0] for label in range(10)])
    how = Training(steps=120, widths=(16,), hidden=32, batch=32)
    low, high = (train.take(np.union1d(one_each, np.flatnonzero(part))) for part in (labels < 5, labels >= 5))
    return supervised(low, how, seed=1), supervised(high, how, seed=2)


def accuracy(one: Net, rows: Dataset) -> float:
    return float((loop.predict(one, rows.images()).argmax(1).numpy() == rows.labels()).mean())


def test_without_labels_a_student_gains_what_its_teacher_knows_and_keeps_its_own(tiny: Dataset, halves: tuple[Net, Net]) -> None:
    student, teacher = halves
    pool, test = tiny.split("train").without_labels(), tiny.split("test")
    cfg = Config(steps=150, batch=32, lr=0.05)
    taught = general_transfer([teacher], pool, cfg, start=student)
    blind = general_transfer([teacher], pool, cfg.model_copy(update={"partition": "none"}), start=student)
    assert accuracy(taught.net, test) > max(accuracy(student, test), accuracy(teacher, test)) + 0.1
    old = test.where(test.labels() < 5)
    assert accuracy(taught.net, old) > accuracy(blind.net, old) + 0.2
    assert 0.2 < taught.figures["taken_0"] < 0.8
    assert taught.figures["changed"] > 0.1
    assert {"flips_0", "transfer", "won"}.isdisjoint(taught.figures)


def test_labels_add_what_was_won_and_lost(tiny: Dataset, halves: tuple[Net, Net]) -> None:
    student, teacher = halves
    rows = tiny.split("train")
    found = general_transfer([teacher], rows, Config(steps=100, batch=32, lr=0.05), start=student)
    truth, before, said = rows.labels(), *(loop.predict(one, rows.images()).argmax(1).numpy() for one in (student, teacher))
    assert found.figures["flips_0"] == pytest.approx(((said == truth) & (before != truth)).mean())
    assert found.figures["transfer"] == pytest.approx(accuracy(found.net, rows) - accuracy(student, rows))
    assert found.figures["transfer"] > 0.1


def test_in_a_row_each_teacher_meets_the_student_that_the_last_one_left(tiny: Dataset, halves: tuple[Net, Net]) -> None:
    low, high = halves
    rows = tiny.split("train")
    cfg = Config(steps=100, batch=32, lr=0.05)
    once, twice = (general_transfer(teachers, rows, cfg, start=low) for teachers in ([high], [high, high]))
    for name in ("flips_0", "taken_0", "differs_0"):
        assert twice.figures[name] == once.figures[name]
    assert twice.figures["flips_1"] < once.figures["flips_0"] / 2  # what it had to give was taken already
    together = general_transfer([high, high], rows, cfg.model_copy(update={"order": "together"}), start=low)
    assert together.figures["flips_1"] == together.figures["flips_0"]
    assert together.figures["taken_1"] == 0.0  # of equals the earlier


def test_rows_without_label_are_learnt_from(tiny: Dataset) -> None:
    rows, pool = tiny.split("train").take(np.arange(30)), tiny.split("reference").without_labels()
    one, more = (general_transfer([net(1)], data, QUICK, start=net(2)) for data in (rows, rows + pool))
    assert not torch.equal(weights(one.net), weights(more.net))


@pytest.mark.parametrize("change", [{"partition": "confidence"}, {"partition": "none"}, {"temperature": 2.0}, {"shift": 1}, {"steps": 7}])
def test_every_setting_changes_the_student(tiny: Dataset, change: dict[str, object]) -> None:
    rows = tiny.split("train").take(np.arange(30))
    base, other = (general_transfer([net(1)], rows, QUICK.model_copy(update=update), start=net(2)).net for update in ({}, change))
    assert not torch.equal(weights(base), weights(other))


def test_what_comes_in_is_left_as_it_was(tiny: Dataset) -> None:
    teacher, start = net(1).train(), net(2)
    before = weights(teacher), weights(start)
    taught = general_transfer([teacher], tiny.split("validation"), QUICK, start=start)
    assert torch.equal(weights(teacher), before[0])
    assert torch.equal(weights(start), before[1])
    assert teacher.training
    assert taught.net.arch == start.arch


def test_no_student_no_teacher_no_rows_and_misfits_are_refused(tiny: Dataset) -> None:
    data = tiny.split("validation")
    with pytest.raises(UserError, match="retort distill --student NAME/version"):
        general_transfer([net()], data, QUICK)
    with pytest.raises(UserError, match="at least one teacher"):
        general_transfer([], data, QUICK, start=net())
    with pytest.raises(UserError, match="the data has no rows"):
        general_transfer([net()], data.take(np.arange(0)), QUICK, start=net())
    with pytest.raises(UserError, match="the student to start from takes images"):
        general_transfer([net()], data, QUICK, start=net(classes=4))
    with pytest.raises(UserError, match="diverged"):
        general_transfer([net(1)], data, QUICK.model_copy(update={"lr": 1e20}), start=net(2))
