"""SalUn: the gradients, the mask over all layers, and weights off the mask that stay to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.networks import Net
from tasks.unlearn import random_label
from tasks.unlearn import salun as sal


def model(seed: int = 0) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), 10, widths=(4, 6), hidden=8, mean=0.3, std=0.4)


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.fixture
def sets(tiny: Dataset) -> tuple[Dataset, Dataset]:
    train = tiny.split("train")
    return train.take(np.arange(10)), train.take(np.arange(10, 120))


def test_the_gradients_are_those_of_the_mean_loss_whatever_the_batches(sets) -> None:
    net, pixels, labels = model(), sets[0].images(), sets[0].labels()
    torch.nn.functional.cross_entropy(net(loop.to_float(pixels)), torch.from_numpy(labels)).backward()
    whole, pieces = sal.forget_gradients(net, pixels, labels), sal.forget_gradients(net, pixels, labels, size=3)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad)
        torch.testing.assert_close(pieces[name], parameter.grad)


def test_the_largest_gradients_by_absolute_value_of_all_layers_together_are_salient() -> None:
    gradients = {"a": torch.tensor([[0.1, -5.0], [0.2, 4.0]]), "b": torch.tensor([-0.3, 3.0, 0.05, 0.0])}
    masks = sal.saliency(gradients, 0.5)
    assert masks["a"].tolist() == [[False, True], [False, True]]
    assert masks["b"].tolist() == [True, True, False, False]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 1), st.booleans())
def test_exactly_the_asked_share_is_salient_also_among_equal_gradients(share: float, equal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = (
        {"a": torch.zeros(7, 5), "b": torch.zeros(6)} if equal else {"a": torch.randn(7, 5, generator=generator), "b": torch.ones(6)}
    )
    assert sum(int(mask.sum()) for mask in sal.saliency(gradients, share).values()) == round(share * 41)


def test_weights_off_the_mask_stay_to_the_bit_and_those_on_it_move(sets) -> None:
    old = model()
    new = sal.salun(old, *sets, sal.Config(steps=10, batch=16, forget_batch=4, lr=0.1, weight_decay=0.1, salient=0.3))
    masks = sal.saliency(sal.forget_gradients(old, sets[0].images(), sets[0].labels()), 0.3)
    for name, mask in masks.items():
        before, after = old.get_parameter(name), new.get_parameter(name)
        assert torch.equal(before[~mask], after[~mask])
    moved = torch.cat([(old.get_parameter(name) != new.get_parameter(name))[mask] for name, mask in masks.items()])
    assert moved.float().mean() > 0.9


def test_with_every_weight_salient_it_is_random_label(sets) -> None:
    same = {"steps": 8, "batch": 16, "forget_batch": 4, "lr": 0.05}
    all_salient = sal.salun(model(), *sets, sal.Config(**same, salient=1), seed=2)
    assert torch.equal(weights(all_salient), weights(random_label.random_label(model(), *sets, random_label.Config(**same), seed=2)))


def test_the_model_keeps_its_weights_its_mode_and_its_lack_of_gradients(sets) -> None:
    old = model().requires_grad_(False)
    before = weights(old)
    first, again, other = (sal.salun(old, *sets, sal.SMOKE, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(weights(old), before)
    assert old.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in old.parameters())
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="salient"):
        sal.Config(salient=share)
