"""Mutual learning: what each network takes from the others, by hand, and a cohort of which the teachers' weights are no part."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill._shared import peers
from tasks.distill.dml import Config, dml, mimicry
from tasks.train.supervised import Config as Training
from tasks.train.supervised import supervised

QUICK = Config(widths=(4,), hidden=8, steps=6, batch=8)


def teacher(seed: int = 0, classes: int = 10, hidden: int = 16) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(8,), hidden=hidden, mean=0.3, std=0.4)


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def test_each_takes_the_divergence_of_the_others_from_itself_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    ours, theirs = mimicry([p.log(), q.log()])
    assert ours.item() == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))  # KL(q || p)
    assert theirs.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))  # KL(p || q)


def test_of_several_others_it_is_the_mean_and_alone_there_is_nothing() -> None:
    logs = [torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.9, 0.1]]).log()]
    pairs = [mimicry([logs[0], other])[0].item() for other in logs[1:]]
    assert mimicry(logs)[0].item() == pytest.approx(sum(pairs) / 2)
    assert mimicry(logs[:1])[0].item() == 0


def test_the_others_are_held_fixed() -> None:
    ours, theirs = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    own, _ = mimicry([ours.log_softmax(1), theirs.log_softmax(1)])
    own.backward()
    assert ours.grad is not None
    assert theirs.grad is None


def test_peers_have_the_teachers_description_and_weights_of_their_own() -> None:
    given = [teacher(1), teacher(2, hidden=5)]
    with loop.seeded(3):
        found = peers(given)
    assert [net.arch for net in found] == [net.arch for net in given]
    assert not any(torch.equal(weights(a), weights(b)) for a, b in zip(found, given, strict=True))


def test_the_teachers_weights_do_not_matter_but_their_description_and_number_do(tiny: Dataset) -> None:
    data = tiny.split("validation")
    first = weights(dml([teacher(1)], data, QUICK))
    assert torch.equal(first, weights(dml([teacher(2)], data, QUICK)))
    assert not torch.equal(first, weights(dml([teacher(1, hidden=17)], data, QUICK)))
    assert not torch.equal(first, weights(dml([teacher(1), teacher(1)], data, QUICK)))


def test_without_the_others_it_is_a_student_of_the_labels(tiny: Dataset) -> None:
    data = tiny.split("validation")
    alone = dml([teacher()], data, QUICK.model_copy(update={"weight": 0.0}))
    same = Training(**QUICK.model_dump(include={"widths", "hidden", "steps", "batch", "lr", "momentum", "weight_decay"}))
    assert torch.allclose(weights(alone), weights(supervised(data, same)), atol=1e-5)


def test_networks_that_learn_together_agree_more(tiny: Dataset) -> None:
    train, test = tiny.split("train"), tiny.split("test").images()
    cfg = Config(widths=(8, 16), hidden=32, steps=120)
    with_peer, alone = (dml([teacher()], train, cfg.model_copy(update={"weight": weight})) for weight in (4.0, 0.0))
    spread = [loop.predict(net, test).softmax(1).max(1).values.mean().item() for net in (with_peer, alone)]
    assert spread[0] < spread[1]  # what another network doubts is doubted here too
    labels = torch.from_numpy(tiny.split("test").labels())
    assert (loop.predict(with_peer, test).argmax(1) == labels).float().mean() > 0.7


def test_rows_without_a_label_are_learnt_from_too(tiny: Dataset) -> None:
    data, pool = tiny.split("validation"), tiny.split("reference").without_labels()
    assert not torch.equal(weights(dml([teacher()], data, QUICK)), weights(dml([teacher()], data + pool, QUICK)))


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"shift": 1}, {"lr": 0.02}, {"steps": 7}])
def test_every_setting_changes_the_student(tiny: Dataset, change: dict[str, object]) -> None:
    data = tiny.split("validation")
    base, other = (dml([teacher()], data, QUICK.model_copy(update=update)) for update in ({}, change))
    assert not torch.equal(weights(base), weights(other))


def test_a_student_goes_on_from_the_one_that_is_given(tiny: Dataset) -> None:
    old = teacher(5)
    before = weights(old)
    still = dml([teacher()], tiny.split("validation"), QUICK.model_copy(update={"lr": 1e-9}), start=old)
    assert torch.allclose(weights(still), before, atol=1e-5)
    assert torch.equal(weights(old), before)


def test_what_it_cannot_learn_from_is_refused(tiny: Dataset) -> None:
    data = tiny.split("validation")
    with pytest.raises(UserError, match="at least one teacher"):
        dml([], data, QUICK)
    with pytest.raises(UserError, match="the data has no rows"):
        dml([teacher()], data.take(np.arange(0)), QUICK)
    with pytest.raises(UserError, match="no row of the data has a label: networks that learn from each other alone"):
        dml([teacher()], data.without_labels(), QUICK)
