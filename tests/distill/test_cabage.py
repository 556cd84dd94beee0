"""Extraction: a victim that counts and refuses, losses and the choice of queries by hand, heads that grow, and no row that is learnt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill import _extraction as parts
from tasks.distill._extraction import Clones, Generator, Generators, Store, Victim, answer_loss, disagreement, generator_loss, in_order
from tasks.distill.cabage import SMOKE, cabage


def net(seed: int = 0, classes: int = 10, shape: tuple[int, int, int] = (1, 8, 8)) -> Net:
    with loop.seeded(seed):
        return networks.convnet(shape, classes, widths=(4,), hidden=8, mean=0.5, std=0.25).eval()


def weights(one: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in one.state_dict().values()])


def noise(n: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def clones(classes: int, **settings: float) -> Clones:
    how = {"steps": 30, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, **settings}
    return Clones([net(1, classes), net(2, classes)], range(classes), **how)  # type: ignore[arg-type]


def test_a_victim_counts_each_image_and_refuses_what_goes_beyond_the_budget() -> None:
    victim = Victim(net(), budget=10)
    images = noise(7)
    assert torch.equal(victim(images), loop.predict(net(), images).argmax(1))
    assert victim.queries == 7
    with pytest.raises(UserError, match="7 of 10 queries are spent: 4 more"):
        victim(noise(4))
    assert victim.queries == 7
    victim(noise(3))
    assert victim.queries == 10


def test_a_victim_says_labels_or_probabilities_and_gives_no_gradient() -> None:
    labels, shares = Victim(net(), 5)(noise(5)), Victim(net(), 5, "probabilities")(noise(5))
    assert (labels.shape, shares.shape) == ((5,), (5, 10))
    assert torch.allclose(shares.sum(1), torch.ones(5))
    assert torch.equal(shares.argmax(1), labels)
    assert not shares.requires_grad


def test_entropy_disagreement_and_the_generators_loss_by_hand() -> None:
    # one clone is sure of the first class, the other of the second: each class's deviation is sqrt(2) / 2; they agree on the other image
    assert [parts.entropy(np.array(counts)) for counts in ([5, 5, 0], [9, 0])] == pytest.approx([math.log(2), 0])
    logits = torch.tensor([[[50.0, 0.0], [50.0, 0.0]], [[0.0, 50.0], [50.0, 0.0]]])
    found = disagreement(logits.softmax(2))
    assert found.tolist() == pytest.approx([math.sqrt(0.5), 0.0], abs=1e-6)
    # of the four answers three are the first class
    balance = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert generator_loss(logits, 0.2).item() == pytest.approx(0.2 * balance - math.sqrt(0.5) / 2, abs=1e-5)


def test_the_generators_loss_has_finite_gradients_where_clones_agree_or_know_one_class_only() -> None:
    for shape in ((2, 4, 1), (2, 4, 3)):
        logits = torch.zeros(shape, requires_grad=True)
        generator_loss(logits, 0.2).backward()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def test_answers_are_learnt_by_cross_entropy_or_by_centred_logarithms() -> None:
    logits = torch.tensor([[0.0, math.log(3)]])
    assert answer_loss(logits, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))
    # log(1/4), log(3/4) less their mean are -ln(3)/2 and ln(3)/2: both logits are off by ln(3)/2
    assert answer_loss(logits, torch.tensor([[0.25, 0.75]])).item() == pytest.approx(math.log(3) / 2)
    assert answer_loss(logits, torch.tensor([[0.0, 1.0]])).isfinite()


def test_candidates_are_paid_for_by_the_fewest_class_and_there_by_score() -> None:
    scores, guesses = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2, 0.9]), torch.tensor([0, 0, 0, 1, 1, 0])
    # class 2 has no candidate; class 1 has two answers less, then they take turns
    assert parts.worth(scores, guesses, np.array([2, 0, 0]), 4).tolist() == [3, 4, 1, 5]
    assert parts.worth(scores, guesses, np.array([0, 0, 0]), 3).tolist() == [1, 3, 5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 40), st.integers(1, 5))
def test_as_many_candidates_as_wanted_are_chosen_each_once(seed: int, n: int, m: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    guesses = rng.integers(0, classes, m)
    have = rng.integers(0, 9, classes)
    found = parts.worth(torch.tensor(rng.random(m)), torch.tensor(guesses), have, n)
    assert len(set(found.tolist())) == min(n, m)
    after = have + np.bincount(guesses[found], minlength=classes)
    left = np.bincount(np.delete(guesses, found), minlength=classes)
    grown = after > have
    # nothing was added to a class while a smaller one had candidates left
    assert all(after[k] <= after[j] + 1 for k in np.flatnonzero(grown) for j in np.flatnonzero(left))


def test_a_store_keeps_the_last_answers_and_draws_by_hardness() -> None:
    store, generator = Store(5, (1, 8, 8)), torch.Generator().manual_seed(0)
    assert store.labels().tolist() == []
    assert store.add(noise(3), torch.tensor([1, 2, 3])).tolist() == [0, 1, 2]
    assert len(store) == 3
    assert store.add(noise(4, seed=1), torch.tensor([4, 5, 6, 7])).tolist() == [3, 4, 0, 1]
    assert store.labels().tolist() == [6, 7, 3, 4, 5]
    assert np.array_equal(store.images[0], noise(4, seed=1)[2])
    assert store.add(noise(7), torch.arange(7)).numel() == 5
    assert sorted(store.labels().tolist()) == [2, 3, 4, 5, 6]
    store.hardness[:] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    drawn = [store.draw(1, 1.0, generator).item() for _ in range(50)]
    assert drawn == [2] * 50
    assert len({store.draw(1, 0.0, generator).item() for _ in range(100)}) == 5
    assert sorted(store.draw(9, 0.5, generator).tolist()) == [0, 1, 2, 3, 4]


def test_hardness_is_what_is_missing_of_the_answers_probability() -> None:
    both, store = clones(3, lr=1e-9), Store(4, (1, 8, 8))
    at = store.add(noise(4), torch.tensor([0, 2, 1, 0]))
    assert store.hardness.tolist() == [1, 1, 1, 1]
    said = torch.stack([loop.predict(one, store.images).softmax(1) for one in both.nets]).mean(0)
    both.learn(store, at)
    assert torch.allclose(store.hardness, 1 - said[torch.arange(4), torch.tensor([0, 2, 1, 0])], atol=1e-5)


def test_a_head_grows_by_new_outputs_and_keeps_the_old_ones_and_their_momentum() -> None:
    both, store = clones(2), Store(8, (1, 8, 8))
    both.learn(store, store.add(noise(4), torch.tensor([0, 1, 1, 0])))
    first = both.nets[0]
    old, momentum = first.head.weight.detach().clone(), both.optimiser.state[first.head.weight]["momentum_buffer"].clone()
    assert both.outputs(torch.tensor([7, 1, 4, 7])).tolist() == [2, 1, 3, 2]
    assert both.labels == [0, 1, 7, 4]
    assert first.head.weight.shape[0] == first.arch["classes"] == 4
    assert torch.equal(first.head.weight[:2], old)
    buffer = both.optimiser.state[first.head.weight]["momentum_buffer"]
    assert torch.equal(buffer[:2], momentum)
    assert not buffer[2:].any()
    learning = [id(one) for group in both.optimiser.param_groups for one in group["params"]]
    assert sorted(learning) == sorted(id(one) for clone in both.nets for one in clone.parameters())
    before = first.head.weight.detach().clone()
    both.learn(store, store.add(noise(4), torch.tensor([3, 3, 2, 2])))
    assert not torch.equal(first.head.weight[2:], before[2:])


def test_a_head_grows_without_an_optimiser() -> None:
    one, before = net(classes=2), loop.predict(net(classes=2), noise(3))
    parts.grow(one, 4)
    assert torch.allclose(loop.predict(one, noise(3))[:, :2], before)


def test_outputs_are_put_in_the_datas_order_and_unheard_classes_never_win() -> None:
    one, images = net(classes=3), noise(20)
    made = in_order(one, [4, 0, 2], 5)
    logits, placed = loop.predict(one, images), loop.predict(made, images)
    assert torch.allclose(placed[:, [4, 0, 2]], logits)
    assert set(placed.argmax(1).tolist()) <= {0, 2, 4}
    assert torch.isfinite(placed.log_softmax(1)).all()
    assert one.arch["classes"] == 3


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28)])
def test_networks_side_by_side_say_the_mean_of_their_logits(shape: tuple[int, int, int]) -> None:
    with loop.seeded(0):
        some = [networks.convnet(shape, 5, widths=(3, 4), hidden=6, mean=0.5, std=0.25) for _ in range(3)]
        made = parts.joined(some)
    images = noise(6, shape)
    assert made.arch["widths"] == [9, 12]
    assert torch.allclose(loop.predict(made, images), torch.stack([loop.predict(one, images) for one in some]).mean(0), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 32, 32)])
def test_generators_make_bytes_of_any_size_and_each_its_share(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    with loop.seeded(0):
        several = Generators([Generator(shape, 8, 4, 4.0) for _ in range(3)], shape, 8, 1e-3)
    for n in (1, 2, 7):
        found = several.images(n, generator)
        assert found.shape == (n, *shape)
        assert found.dtype == np.uint8
    with loop.seeded(0), torch.no_grad():
        drawn = [Generator(shape, 8, 4, contrast)(torch.randn(32, 8)) for contrast in (1.0, 4.0)]
    assert drawn[0].std() < drawn[1].std()


def test_a_generator_learns_to_make_what_clones_disagree_on_and_leaves_these_as_they_are() -> None:
    both, generator = clones(3), torch.Generator().manual_seed(0)
    with loop.seeded(0):
        one = Generators([Generator((1, 8, 8), 8, 4, 4.0)], (1, 8, 8), 8, 3e-3)
    before = [weights(clone) for clone in both.nets]

    def score() -> float:
        images = loop.to_float(one.images(200, generator))
        with torch.no_grad():
            return disagreement(both.logits(images).softmax(2)).mean().item()

    first = score()
    for _ in range(60):
        one.learn(both, 32, 0.0, generator)
    assert score() > 1.2 * first
    assert all(torch.equal(weights(clone), was) for clone, was in zip(both.nets, before, strict=True))


def test_the_budget_is_spent_to_the_last_query_and_what_was_filtered_out_is_told(tiny: Dataset) -> None:
    rows = tiny.split("validation")
    taught = cabage([net()], rows, SMOKE.model_copy(update={"queries": 50}))
    assert taught.figures["queries"] == 50
    assert taught.figures["queries_filtered"] == 3 * 50
    assert cabage([net()], rows, SMOKE.model_copy(update={"over": 1})).figures["queries_filtered"] == 0
    # two clones of 8 and 16 side by side
    assert (taught.net.arch["widths"], taught.net.arch["hidden"], taught.net.arch["classes"]) == ([16], 32, 10)


def test_no_row_of_the_data_is_learnt_or_asked_about(tiny: Dataset) -> None:
    one, other = (cabage([net()], rows, SMOKE) for rows in (tiny.split("validation"), tiny.split("test").take(np.arange(9))))
    assert torch.equal(weights(one.net), weights(other.net))
    blind = cabage([net()], tiny.split("validation").without_labels(), SMOKE)
    assert torch.equal(weights(one.net), weights(blind.net))
    assert "agreement" not in blind.figures
    assert one.figures["agreement"] != other.figures["agreement"]


def test_classes_are_found_one_after_another_and_no_others(tiny: Dataset) -> None:
    victim = net(3)
    with torch.no_grad():
        victim.head.bias[[1, 4, 5]] -= 100  # it never says these
    taught = cabage([victim], tiny.split("validation"), SMOKE.model_copy(update={"queries": 200, "steps": 60}))
    never = loop.predict(taught.net, noise(200))[:, [1, 4, 5]]
    assert 2 <= taught.figures["classes_found"] <= 7
    assert float(never.max()) < -900
    known = cabage([victim], tiny.split("validation"), SMOKE.model_copy(update={"classes_known": True}))
    assert float(loop.predict(known.net, noise(200))[:, [1, 4, 5]].max()) > -900


def test_a_victim_that_says_one_thing_only_is_no_obstacle(tiny: Dataset) -> None:
    victim = net()
    with torch.no_grad():
        victim.head.bias[6] += 1000
    taught = cabage([victim], tiny.split("validation"), SMOKE)
    assert taught.figures["classes_found"] == 1
    assert taught.figures["label_entropy"] == 0
    assert taught.figures["agreement"] == 1


def test_a_clone_comes_to_answer_as_the_victim_does(tiny: Dataset) -> None:
    from tasks.train.supervised import Config as Training
    from tasks.train.supervised import supervised

    train, test = tiny.split("train"), tiny.split("test")
    victim = supervised(train, Training(steps=150, widths=(8, 16), hidden=32))
    found = cabage([victim], test, SMOKE.model_copy(update={"queries": 800, "per_round": 80, "steps": 150, "batch": 32}))
    assert found.figures["agreement"] > 0.4  # chance is a tenth
    assert found.figures["classes_found"] == 10


@pytest.mark.parametrize(
    "change",
    [
        {"answers": "probabilities"}, {"classes_known": True}, {"per_round": 24}, {"generators": 0}, {"generators": 1}, {"over": 1},
        {"over": 2}, {"hard": 0.0}, {"balance": 5.0}, {"generator_steps": 3}, {"generator_lr": 0.1}, {"noise": 9}, {"contrast": 2.0},
        {"remember": 20}, {"lr": 0.01}, {"steps": 10},
    ],
)  # fmt: skip
def test_every_setting_changes_the_clone(tiny: Dataset, change: dict[str, object]) -> None:
    rows = tiny.split("validation")
    one, other = (cabage([net()], rows, SMOKE.model_copy(update=update)).net for update in ({}, change))
    assert not torch.equal(weights(one), weights(other))


def test_a_start_goes_on_and_keeps_its_shape(tiny: Dataset) -> None:
    start = net(9)
    before = weights(start)
    made = cabage([net()], tiny.split("validation"), SMOKE.model_copy(update={"lr": 1e-9}), start=start).net
    assert made.arch == start.arch
    assert torch.allclose(weights(made), before, atol=1e-5)
    assert torch.equal(weights(start), before)
    assert not torch.equal(weights(cabage([net()], tiny.split("validation"), SMOKE, start=start).net), before)


def test_no_victim_two_victims_misfits_and_divergence_are_refused(tiny: Dataset) -> None:
    rows = tiny.split("validation")
    with pytest.raises(UserError, match="at least one teacher"):
        cabage([], rows, SMOKE)
    with pytest.raises(UserError, match="an extraction has one victim; got 2 teachers"):
        cabage([net(), net(1)], rows, SMOKE)
    with pytest.raises(UserError, match="teacher 0 takes images"):
        cabage([net(classes=3)], rows, SMOKE)
    with pytest.raises(UserError, match="'extract' diverged"):
        cabage([net()], rows, SMOKE.model_copy(update={"lr": 1e9, "steps": 60}))
    with pytest.raises(ValueError, match="shift"):
        type(SMOKE)(shift=1)
