"""Unlearning: the penalty's schedule, pruning that holds, retraining that never saw, and what all three refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.unlearn import finetune as plain
from tasks.unlearn import l1_sparse as sparse
from tasks.unlearn import retrain as fresh
from tests import tables

METHODS = [(plain.finetune, plain.SMOKE), (sparse.l1_sparse, sparse.SMOKE), (fresh.retrain, fresh.SMOKE)]
ARCH = {"widths": (4, 6), "hidden": 8}


def model(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, **ARCH, mean=0.3, std=0.4)


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.fixture
def sets(tiny: Dataset) -> tuple[Dataset, Dataset]:
    train = tiny.split("train")
    return train.take(np.arange(10)), train.take(np.arange(10, 120))


@pytest.mark.parametrize(("method", "smoke"), METHODS)
def test_a_new_network_comes_out_and_the_old_one_stays(method, smoke, sets: tuple[Dataset, Dataset]) -> None:
    old = model().requires_grad_(False)
    before = weights(old)
    first, again, other = (method(old, *sets, smoke, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(weights(old), before)
    assert not any(w.requires_grad for w in old.parameters())
    assert old.training
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert {k: v for k, v in first.arch.items() if k not in ("mean", "std")} == {
        k: v for k, v in old.arch.items() if k not in ("mean", "std")
    }


@pytest.mark.parametrize(("method", "smoke"), METHODS)
def test_the_forget_rows_are_not_trained_on_and_neither_are_rows_without_label(method, smoke, tiny: Dataset, sets) -> None:
    forget, retain = sets
    one = weights(method(model(), forget, retain, smoke))
    assert torch.equal(one, weights(method(model(), forget.take(np.arange(1)), retain, smoke)))
    assert torch.equal(one, weights(method(model(), forget, retain + tiny.split("reference").without_labels(), smoke)))


@pytest.mark.parametrize(("method", "smoke"), METHODS)
def test_empty_or_overlapping_sets_and_misfits_are_refused(method, smoke, sets, tmp_path) -> None:
    forget, retain = sets
    none = np.array([], dtype=int)
    with pytest.raises(UserError, match="the forget set has no rows"):
        method(model(), forget.take(none), retain, smoke)
    with pytest.raises(UserError, match=r"row \d+ of the forget set is to retain too \(2 such\)") as told:
        method(model(), forget, retain + forget.take(np.array([3, 5])), smoke)
    assert "d0000" not in str(told.value), "the id of a row to be forgotten is told"
    with pytest.raises(UserError, match="no row of the retain set has a label"):
        method(model(), forget, retain.without_labels(), smoke)
    with pytest.raises(UserError, match="label 9 of the retain set does not fit the model, which has 4 classes"):
        method(model(classes=4), forget, retain, smoke)
    small = tables.dataset(tmp_path / "small", np.zeros((2, 1, 4, 4), np.uint8), [0, 1], classes=("a", "b"))
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\); the retain set has \(1, 4, 4\)"):
        method(model(), forget, small, smoke)


def test_a_class_may_be_gone_from_the_retain_set(sets) -> None:
    forget, retain = sets
    gone = retain.where(retain.labels() != 3)
    for method, smoke in METHODS:
        assert torch.isfinite(weights(method(model(), forget, gone, smoke))).all()


def test_the_penalty_falls_in_a_straight_line_and_then_is_gone() -> None:
    seen = [sparse.gamma_at(step, 0.4, 6, 2) for step in range(6)]
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0])
    assert sparse.gamma_at(0, 0.4, 5, 5) == 0


def test_the_l1_norm_counts_every_parameter_biases_too() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(-0.5)
    norm = sparse.l1_norm(layer)
    norm.backward()
    assert norm.item() == 3.5
    assert layer.weight.grad.tolist() == [[1.0, -1.0]]


def test_without_penalty_and_pruning_it_is_plain_fine_tuning_and_with_it_weights_are_smaller(sets) -> None:
    same = {"steps": 12, "batch": 16}
    by_hand = plain.finetune(model(), *sets, plain.Config(**same), seed=2)
    nothing = sparse.l1_sparse(model(), *sets, sparse.Config(**same, gamma=0, no_l1_steps=2), seed=2)
    penalised = sparse.l1_sparse(model(), *sets, sparse.Config(**same, gamma=0.01, no_l1_steps=2), seed=2)
    assert torch.equal(weights(by_hand), weights(nothing))
    assert sparse.l1_norm(penalised) < 0.9 * sparse.l1_norm(nothing)


def test_masks_take_the_smallest_weights_of_all_layers_together() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.Flatten(), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.1, -5.0, 0.2, 4.0]).reshape(1, 1, 2, 2))
        net[2].weight.copy_(torch.tensor([[-0.3, 3.0, 0.05, 2.0]]))
    every = sparse.magnitude_masks(net, 0.5, "all")
    assert every["0.weight"].flatten().tolist() == [False, True, False, True]
    assert every["2.weight"].flatten().tolist() == [False, True, False, True]
    conv = sparse.magnitude_masks(net, 0.25, "conv")
    assert list(conv) == ["0.weight"]
    assert conv["0.weight"].flatten().tolist() == [False, True, True, True]


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.99), st.sampled_from(["conv", "all"]))
def test_exactly_the_asked_share_is_masked_also_among_equal_weights(share: float, scope: sparse.Scope) -> None:
    net = model()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.5)
    masks = sparse.magnitude_masks(net, share, scope)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == int(share * total)


@pytest.mark.parametrize("scope", ["conv", "all"])
def test_pruned_weights_stay_at_zero_through_momentum_steps(sets, scope: sparse.Scope) -> None:
    old = model()
    made = sparse.l1_sparse(old, *sets, sparse.Config(steps=8, batch=16, no_l1_steps=2, prune=0.6, prune_scope=scope))
    masks = sparse.magnitude_masks(old, 0.6, scope)
    for name, mask in masks.items():
        values = made.get_parameter(name)
        assert (values[~mask] == 0).all()
        assert (values[mask] != 0).float().mean() > 0.9
    assert ("head.weight" in masks) == (scope == "all")


def test_more_steps_without_penalty_than_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no_l1_steps \(9\) must not be above steps \(8\)"):
        sparse.Config(steps=8, no_l1_steps=9)


def test_retraining_starts_from_fresh_weights_and_its_own_pixel_statistics(sets) -> None:
    forget, retain = sets
    one, two = (fresh.retrain(model(seed), forget, retain, fresh.SMOKE, seed=5) for seed in (0, 1))
    assert torch.equal(weights(one), weights(two))  # nothing of the old weights is left
    mean, std = loop.pixel_stats(retain.images())
    assert (one.arch["mean"], one.arch["std"]) == (round(mean, 6), round(std, 6))


def test_fine_tuning_starts_from_the_old_weights(sets) -> None:
    gentle = plain.Config(steps=2, batch=8, lr=1e-5)
    assert (weights(plain.finetune(model(), *sets, gentle)) - weights(model())).abs().max() < 1e-3
