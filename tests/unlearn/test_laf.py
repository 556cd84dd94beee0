"""LAF: both losses by hand, which way they push, what is frozen, and that no label is read but by the repair."""

from __future__ import annotations

import math

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
from tasks.unlearn import laf as method
from tests import tables

QUICK = method.Config(steps=4, batch=8, vae_steps=10)


def model(seed: int = 0) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), 10, widths=(4, 6), hidden=8, mean=0.3, std=0.4)


def weights(net: Net) -> Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def sets(tiny: Dataset) -> tuple[Dataset, Dataset]:
    train = tiny.split("train")
    return train.take(np.arange(20)), train.take(np.arange(20, 150))


def test_the_vae_loss_by_hand() -> None:
    e, rebuilt = rows([1, 2], [0, 0]), rows([0, 0], [0, 3])  # squared errors 5 and 9
    mean, log_variance = rows([1.0], [0.0]), rows([0.0], [math.log(4)])
    divergence = [0.5, 0.5 * (4 - 1 - math.log(4))]  # of N(1, 1) and N(0, 4) from N(0, 1)
    loss = method.vae_loss(e, rebuilt, mean, log_variance, kl=0.1)
    assert loss.item() == pytest.approx((5 + 0.1 * divergence[0] + 9 + 0.1 * divergence[1]) / 2)


def test_a_code_that_is_standard_normal_costs_nothing() -> None:
    e, still = rows([1, 2]), rows([0.0])
    assert method.vae_loss(e, e, still, still, kl=1.0).item() == 0


def test_the_misfit_takes_the_sum_over_dimensions_and_not_their_mean() -> None:
    rebuilt, e = rows([1, 1, 1], [0, 0, 0]), rows([0, 0, 0], [0, 0, 0])  # m = 3 and 0
    assert method.misfit(rebuilt, e).item() == pytest.approx((math.exp(3 / 4) + 1) / 2)


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_the_misfit_lies_between_1_and_e(values: list[float]) -> None:
    assert 1 <= method.misfit(rows(values), rows([0, 0, 0])).item() <= math.e


def test_extractor_unlearning_by_hand_and_its_signs() -> None:
    retain, forget = rows([1, 0]).requires_grad_(), rows([0, 2]).requires_grad_()
    rebuilt = rows([0, 0])
    loss = method.unlearning_loss(retain, rebuilt, forget, rebuilt)
    assert loss.item() == pytest.approx(math.exp(1 / 2) - math.exp(4 / 5))
    loss.backward()
    # a step against the gradient: the retained row comes nearer to what its VAE gives, the forgotten one goes farther from its own
    assert retain.grad[0, 0] > 0
    assert forget.grad[0, 1] < 0


def test_alignment_by_hand_and_its_signs() -> None:
    retain, forget = rows([1, 1], [1, 0]).requires_grad_(), rows([1, 1], [2, 0]).requires_grad_()
    before = rows([1, 0], [3, 0])
    turned = 1 - math.sqrt(0.5)  # 45 degrees away; the second row has not turned, and its length does not count
    loss = method.alignment_loss(retain, before, forget, before, tau=0.5)
    by_hand = turned / 2 - math.log(math.exp(turned / 0.5) + 1)
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    # the loss falls as the retained row turns back, and as the forgotten one turns farther away
    assert retain.grad[0, 1] > 0
    assert forget.grad[0, 1] < 0


def test_a_smaller_tau_turns_the_forgotten_rows_harder() -> None:
    pulls = []
    for tau in (1.0, 5.0):
        forget = rows([1, 1]).requires_grad_()
        method.alignment_loss(rows([1, 0]), rows([1, 0]), forget, rows([1, 0]), tau).backward()
        pulls.append(forget.grad.norm().item())
    assert pulls[0] == pytest.approx(5 * pulls[1])


def test_a_vae_learns_its_rows_and_is_frozen_afterwards() -> None:
    with loop.seeded(0) as generator:
        e = torch.randn(64, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
        given = e.clone()
        fit = {"latent": 4, "batch": 32, "lr": 3e-3, "kl": 0.0, "generator": generator, "what": "fit"}
        short, long = (method.fit_vae(e, steps=steps, **fit) for steps in (1, 300))
        errors = [(vae(e, generator)[0] - e).square().sum(1).mean().item() for vae in (short, long)]
    assert errors[1] < 0.3 * errors[0]
    assert torch.equal(e, given)
    assert not long.training
    assert not any(weights.requires_grad for weights in long.parameters())


def test_gradients_pass_through_a_frozen_vae_and_leave_it_alone() -> None:
    with loop.seeded(0) as generator:
        vae = method.VAE(4, 2).requires_grad_(False)
        e = torch.randn(3, 4, generator=generator).requires_grad_()
        method.misfit(vae(e, generator)[0], e).backward()
    assert e.grad.abs().sum() > 0
    assert all(weights.grad is None for weights in vae.parameters())


def test_representations_are_what_stands_before_the_last_layer_in_batches_of_any_size(sets) -> None:
    net, images = model().eval(), sets[0].images()
    whole, pieces = (method.represent(net, images, "cpu", size) for size in (1024, 7))
    assert whole.shape == (20, 8)
    assert torch.allclose(whole, pieces, atol=1e-6)
    assert torch.allclose(net.head(whole), loop.predict(net, images), atol=1e-5)


def test_no_label_is_read_without_the_repair(sets) -> None:
    forget, retain = sets
    told = method.laf(model(), forget, retain, QUICK)
    assert torch.equal(weights(told), weights(method.laf(model(), forget.without_labels(), retain.without_labels(), QUICK)))


def test_the_repair_reads_the_labels_of_retained_rows_only(sets) -> None:
    forget, retain = sets
    first, second = retain.take(np.arange(60)), retain.take(np.arange(60, 130))
    told = weights(method.laf(model(), forget, retain, method.SMOKE))
    assert torch.equal(told, weights(method.laf(model(), forget.without_labels(), retain, method.SMOKE)))
    half = weights(method.laf(model(), forget, first + second.without_labels(), method.SMOKE))
    assert not torch.equal(told, half)


def test_the_last_layer_stays_but_for_the_repair(sets) -> None:
    old, head = model(), QUICK.model_copy(update={"repair": "head", "repair_steps": 3})
    plain, repaired, whole = (method.laf(old, *sets, cfg) for cfg in (QUICK, head, method.SMOKE))
    assert torch.equal(plain.head.weight, old.head.weight)
    assert not torch.equal(plain.body[0].weight, old.body[0].weight)
    assert not torch.equal(repaired.head.weight, plain.head.weight)
    assert torch.equal(repaired.body[0].weight, plain.body[0].weight)
    assert not torch.equal(whole.body[0].weight, plain.body[0].weight)


@pytest.mark.parametrize("cfg", [QUICK, method.SMOKE, QUICK.model_copy(update={"repair": "head"})])
def test_a_new_network_comes_out_and_the_old_one_stays(cfg: method.Config, sets) -> None:
    old = model().requires_grad_(False)
    before = weights(old)
    first, again, other = (method.laf(old, *sets, cfg, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(weights(old), before)
    assert old.training
    assert not any(w.requires_grad for w in old.parameters())
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert first.arch == old.arch
    assert not first.training
    assert all(w.requires_grad for w in first.parameters())


def test_it_pushes_the_forgotten_rows_and_holds_the_retained_ones(tiny: Dataset) -> None:
    train = tiny.split("train")
    forget, retain = train.where(train.labels() == 0), train.where(train.labels() != 0)
    with loop.seeded(0) as generator:
        old = networks.convnet((1, 8, 8), 10, widths=(8, 16), hidden=32, mean=0.3, std=0.4)
        recipe = loop.Recipe(steps=150).model_dump()
        loop.fit_supervised(old, train.images(), train.labels(), train.synthetic(), generator=generator, **recipe)
    made = method.laf(old, forget.without_labels(), retain.without_labels(), method.Config(steps=60, vae_steps=100))

    def right(net: Net, rows: Dataset) -> float:
        return float((loop.predict(net, rows.images()).argmax(1).numpy() == rows.labels()).mean())

    assert right(old, forget) > 0.95
    assert right(made, forget) < 0.2
    assert right(made, retain) > 0.85


def test_batch_statistics_stay_as_they_were(sets) -> None:
    with loop.seeded(0):
        old = networks.convnet((1, 8, 8), 10, widths=(4, 6), hidden=8, mean=0.3, std=0.4, norm="batch")
    made = method.laf(old, *sets, QUICK)
    for name, value in old.named_buffers():
        assert torch.equal(value, made.get_buffer(name)), name


def test_empty_or_overlapping_sets_and_misfits_are_refused(sets, tmp_path) -> None:
    forget, retain = sets
    none = np.array([], dtype=int)
    with pytest.raises(UserError, match="the forget set has no rows"):
        method.laf(model(), forget.take(none), retain, QUICK)
    with pytest.raises(UserError, match="the retain set has no rows"):
        method.laf(model(), forget, retain.take(none), QUICK)
    with pytest.raises(UserError, match=r"row \d+ of the forget set is to retain too \(2 such\)") as told:
        method.laf(model(), forget, retain + forget.take(np.array([3, 5])), QUICK)
    assert "d0000" not in str(told.value), "the id of a row to be forgotten is told"
    small = tables.dataset(tmp_path / "small", np.zeros((2, 1, 4, 4), np.uint8), [0, 1], classes=("a", "b"))
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\); the forget set has \(1, 4, 4\)"):
        method.laf(model(), small, retain, QUICK)
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\); the retain set has \(1, 4, 4\)"):
        method.laf(model(), forget, small, QUICK)


def test_a_repair_without_any_label_is_refused(sets) -> None:
    forget, retain = sets
    with pytest.raises(UserError, match="no row of the retain set has a label"):
        method.laf(model(), forget, retain.without_labels(), method.SMOKE)


def test_a_network_that_represents_nothing_is_refused(sets) -> None:
    dead = model()
    with torch.no_grad():
        dead.body[-2].weight.zero_()
        dead.body[-2].bias.fill_(-1)
    with pytest.raises(UserError, match="the model represents every row by zeros"):
        method.laf(dead, *sets, QUICK)


def test_steps_that_diverge_are_told(sets) -> None:
    with pytest.raises(UserError, match="'unlearn' diverged"):
        method.laf(model(), *sets, QUICK.model_copy(update={"lr": 1e30}))
