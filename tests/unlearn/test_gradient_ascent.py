"""Gradient ascent: one step by hand, the bound on the gradient, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.unlearn import gradient_ascent as up


def model(seed: int = 0) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), 10, widths=(4, 6), hidden=8, mean=0.3, std=0.4)


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def parameters(net: Net) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in net.parameters()])


@pytest.fixture
def sets(tiny: Dataset) -> tuple[Dataset, Dataset]:
    train = tiny.split("train")
    return train.take(np.arange(10)), train.take(np.arange(10, 120))


def gradient(net: Net, rows: Dataset) -> torch.Tensor:
    loss = F.cross_entropy(net(loop.to_float(rows.images())), torch.from_numpy(rows.labels()))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def test_one_step_goes_up_the_loss_of_the_forget_rows(sets) -> None:
    old = model()
    new = up.gradient_ascent(old, *sets, up.Config(steps=1, lr=0.5, weight_decay=0))
    torch.testing.assert_close(parameters(new), parameters(old) + 0.5 * gradient(old, sets[0]))


def test_a_bound_keeps_the_direction_and_shortens_the_step(sets) -> None:
    old = model()
    new = up.gradient_ascent(old, *sets, up.Config(steps=1, lr=1, weight_decay=0, clip=0.01))
    step = parameters(new) - parameters(old)
    assert step.norm().item() == pytest.approx(0.01, rel=1e-2)
    assert F.cosine_similarity(step, gradient(old, sets[0]), dim=0) > 0.999


def test_the_loss_of_the_forget_rows_rises(sets) -> None:
    old = model()
    new = up.gradient_ascent(old, *sets, up.Config(steps=10, lr=0.2))
    of = [F.cross_entropy(loop.predict(net, sets[0].images()), torch.from_numpy(sets[0].labels())) for net in (old, new)]
    assert of[1] > of[0] + 0.1


def test_only_the_forget_rows_count_and_the_seed_decides_their_order(sets) -> None:
    old = model().requires_grad_(False)
    before = weights(old)
    one, again, other = (up.gradient_ascent(old, *sets, up.SMOKE, seed=seed) for seed in (3, 3, 4))
    fewer = up.gradient_ascent(old, sets[0], sets[1].take(np.arange(5)), up.SMOKE, seed=3)
    assert torch.equal(weights(old), before)
    assert old.training
    assert not one.training
    assert torch.equal(weights(one), weights(again))
    assert torch.equal(weights(one), weights(fewer))
    assert not torch.equal(weights(one), weights(other))


def test_empty_overlapping_and_unlabelled_sets_are_refused(sets) -> None:
    forget, retain = sets
    with pytest.raises(UserError, match="the forget set has no rows"):
        up.gradient_ascent(model(), forget.take(np.array([], dtype=int)), retain, up.SMOKE)
    with pytest.raises(UserError, match="row 0 of the forget set is to retain too"):
        up.gradient_ascent(model(), forget, retain + forget, up.SMOKE)
    with pytest.raises(UserError, match="no row of the forget set has a label"):
        up.gradient_ascent(model(), forget.without_labels(), retain, up.SMOKE)


def test_weights_that_are_no_longer_numbers_are_told(sets) -> None:
    with pytest.raises(UserError, match="'unlearn' diverged"):
        up.gradient_ascent(model(), *sets, up.Config(steps=60, lr=1e20))
