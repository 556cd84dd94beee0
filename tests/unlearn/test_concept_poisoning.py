"""Concept poisoning: concepts that are planes, attributions that sum up, patches that land, labels, and what stays frozen."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.unlearn import _concepts
from tasks.unlearn import concept_poisoning as cp
from tasks.unlearn._concepts import Bank, Grid


def model(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(4, 6), hidden=8, mean=0.3, std=0.4)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def sets(tiny: Dataset) -> tuple[Dataset, Dataset]:
    train = tiny.split("train")
    return train.where(train.labels() == 3), train.where(train.labels() != 3)


def body(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in net.state_dict().items() if not name.startswith("head")])


def same(one: Net, other: Net) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


# concepts


def test_windows_are_those_of_the_paper_scaled_to_the_image() -> None:
    assert _concepts.grid_of((5, 3, 224, 224), 2 / 7, 1 / 14) == Grid(64, 16)
    assert _concepts.grid_of((5, 1, 28, 28), 2 / 7, 1 / 14) == Grid(8, 2)
    assert _concepts.grid_of((5, 1, 4, 30), 0.1, 0.1) == Grid(1, 1)


def test_windows_lie_row_by_row_inside_the_image() -> None:
    assert Grid(2, 2).corners((1, 1, 4, 5)).tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert Grid(4, 1).corners((4, 4)).tolist() == [[0, 0]]


def test_a_patch_alone_keeps_its_place_and_all_else_is_black() -> None:
    images = np.arange(1, 17, dtype=np.uint8).reshape(1, 1, 4, 4)
    shown = _concepts.alone(images, np.array([[1, 2]]), 2)
    assert shown[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 7, 8], [0, 0, 11, 12], [0, 0, 0, 0]]
    assert images[0, 0, 0, 0] == 1


def test_each_concept_vector_parts_its_cluster_from_the_others() -> None:
    corners = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    kind = torch.arange(90) % 3
    features = corners[kind] + 0.1 * torch.randn(90, 3, generator=drawn())
    bank = _concepts.learn_bank(features, 3, 1.0, seed=0)
    assert torch.allclose(bank.vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    inside = bank.distances(features) > 0
    of = [set(kind[inside[:, concept]].tolist()) for concept in range(3)]
    assert sorted(map(tuple, of)) == [(0,), (1,), (2,)]
    assert (inside.sum(0) == 30).all()


def test_a_distance_is_measured_from_the_plane() -> None:
    bank = Bank(torch.tensor([[0.6, 0.8]]), torch.tensor([-1.0]))
    assert bank.distances(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).flatten().tolist() == pytest.approx([0.4, -1.0])


def test_there_are_no_more_concepts_than_different_patches_and_none_where_all_are_alike() -> None:
    two = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[torch.arange(20) % 2]
    assert _concepts.learn_bank(two, 16, 1.0, seed=0).vectors.shape == (2, 2)
    with pytest.raises(UserError, match="look the same to the model"):
        _concepts.learn_bank(torch.ones(20, 2), 16, 1.0, seed=0)


def test_a_class_hangs_on_its_own_concept_and_weights_that_do_not_count_are_none() -> None:
    inside = np.arange(200) % 2 == 0
    distances = torch.randn(200, 4, generator=drawn())
    distances[:, 2] += 6 * torch.from_numpy(inside)
    weights = _concepts.class_weights(distances, inside, 1e-2, seed=0)
    assert weights.argmax() == 2
    assert (weights[[0, 1, 3]] == 0).all()
    assert _concepts.class_weights(distances, ~inside, 1e-2, seed=0)[2] < 0


# where a concept sits


def test_attributions_sum_to_the_difference_of_the_logit_from_that_of_a_black_image() -> None:
    net = model().eval().requires_grad_(False)
    images = torch.rand(5, 1, 8, 8, generator=drawn())
    wanted = net(images)[:, 4] - net(torch.zeros_like(images))[:, 4]
    errors = [
        (_concepts.integrated_gradients(lambda batch: net(batch)[:, 4], images, steps).sum((1, 2, 3)) - wanted).abs().max()
        for steps in (2, 256)
    ]
    assert errors[1] < 1e-3
    assert errors[1] < errors[0]


def test_attributions_of_a_linear_and_of_a_squared_score_are_known() -> None:
    images = torch.tensor([[[[2.0, 3.0]]]])
    scale = torch.tensor([5.0, -1.0])
    assert _concepts.integrated_gradients(lambda x: (x * scale).sum((1, 2, 3)), images, 1).flatten().tolist() == [10, -3]
    # the midpoint rule is exact where the gradient is linear along the path
    assert _concepts.integrated_gradients(lambda x: (x**2).sum((1, 2, 3)), images, 3).flatten().tolist() == pytest.approx([4, 9])


def test_the_peak_is_the_window_with_the_largest_sum_over_channels() -> None:
    maps = torch.zeros(2, 2, 6, 6)
    maps[0, 0, 3, 4], maps[0, 1, 2, 5] = 1.0, 1.0
    maps[1, 0, 0, 0], maps[1, 1, 0, 0], maps[1, 0, 5, 5] = 5.0, -5.0, 0.1
    assert _concepts.peaks(maps, Grid(2, 2)).tolist() == [[2, 4], [4, 4]]


def test_a_concept_is_located_where_the_network_sees_it() -> None:
    net = model().eval().requires_grad_(False)
    net.features = lambda batch: torch.stack([batch[:, 0, 4:6, 2:4].sum((1, 2)), batch[:, 0, :2, 6:].sum((1, 2))], dim=1)  # type: ignore[method-assign]
    bank = Bank(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2))
    images = np.full((3, 1, 8, 8), 200, np.uint8)
    assert _concepts.locate(net, bank, 0, images, Grid(2, 2), 2).tolist() == [[4, 2]] * 3
    assert _concepts.locate(net, bank, 1, images, Grid(2, 2), 2).tolist() == [[0, 6]] * 3


# poisoning


def test_the_patch_lands_at_the_peak_and_comes_from_the_donors_own() -> None:
    images, donors = np.zeros((2, 1, 4, 4), np.uint8), np.arange(32, dtype=np.uint8).reshape(2, 1, 4, 4) + 1
    made = cp.paste(images, np.array([[0, 0], [2, 1]]), donors, np.array([[1, 1], [0, 2]]), 2)
    assert made[0, 0].tolist() == [[6, 7, 0, 0], [10, 11, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert made[1, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 19, 20, 0], [0, 23, 24, 0]]
    assert not images.any()


def test_the_donor_is_the_retained_class_that_a_class_is_taken_for_most() -> None:
    logits = torch.tensor([[9.0, 2.0, 5.0, 1.0], [9.0, 4.0, 5.0, 1.0], [3.0, 8.0, 0.0, 4.0]])
    labels = np.array([0, 0, 1])
    assert cp.donor_classes(logits, labels, np.array([1, 2, 3])) == {0: 2, 1: 3}
    assert cp.donor_classes(logits, labels, np.array([1, 3])) == {0: 1, 1: 3}
    assert cp.donor_classes(logits, labels, np.array([0, 1])) == {0: 1, 1: 0}
    with pytest.raises(UserError, match="no class but 0 is retained"):
        cp.donor_classes(logits[:2], labels[:2], np.array([0]))


def test_new_labels_are_the_donors_or_others_at_random_or_their_own() -> None:
    labels, others = np.array([0, 1] * 200), np.array([1, 2, 5])
    assert cp.new_labels(labels, {0: 5, 1: 2}, others, "donor", drawn())[:4].tolist() == [5, 2, 5, 2]
    assert cp.new_labels(labels, {}, others, "keep", drawn()).tolist() == labels.tolist()
    random = cp.new_labels(labels, {}, others, "random", drawn())
    assert set(random[labels == 0]) == {1, 2, 5}
    assert set(random[labels == 1]) == {2, 5}
    assert np.bincount(random[labels == 0])[[1, 2, 5]].min() > 45


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.floats(0, 1))
def test_rows_weigh_one_on_average_and_real_ones_their_share(made: list[bool], real: float) -> None:
    synthetic = np.array(made)
    shares = cp.row_shares(synthetic, real).numpy()
    assert shares.mean() == pytest.approx(1, abs=1e-5)
    if synthetic.any() and not synthetic.all():
        assert shares[~synthetic].sum() / len(made) == pytest.approx(real, abs=1e-5)


def test_the_last_layer_alone_is_trained_as_it_would_be_in_the_whole_network(sets) -> None:
    _, retain = sets
    recipe = {"steps": 12, "batch": 16, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    frozen, quick = model(), model()
    for name, weights in frozen.named_parameters():
        weights.requires_grad_(name.startswith("head"))
    images, labels = retain.images(), retain.labels()
    loop.fit_supervised(frozen, images, labels, retain.synthetic(), real_weight=0.8, generator=drawn(), **recipe)
    features = _concepts.features_of(quick, images)
    cp.fit_head(quick, features, labels, torch.ones(len(labels)), generator=drawn(), **recipe)
    assert torch.allclose(frozen.head.weight, quick.head.weight, atol=1e-5)
    assert torch.equal(body(quick), body(model()))


def test_only_the_last_layer_moves_unless_all_shall(sets) -> None:
    old = model()
    last = cp.concept_poisoning(old, *sets, cp.SMOKE)
    every = cp.concept_poisoning(old, *sets, cp.SMOKE.model_copy(update={"layers": "all"}))
    assert torch.equal(body(last), body(old))
    assert not torch.equal(last.head.weight, old.head.weight)
    assert not torch.equal(body(every), body(old))
    assert all(weights.requires_grad for weights in last.parameters())


@pytest.mark.parametrize("layers", ["last", "all"])
def test_each_switch_changes_what_is_learnt_and_the_seed_decides_it(sets, layers: str) -> None:
    old, made = model(), []
    before = copy.deepcopy(old)
    for patch, label in (("concept", "donor"), ("random", "donor"), ("none", "donor"), ("none", "random"), ("none", "keep")):
        cfg = cp.SMOKE.model_copy(update={"patch": patch, "label": label, "layers": layers})
        made.append(cp.concept_poisoning(old, *sets, cfg, seed=1))
        assert same(made[-1], cp.concept_poisoning(old, *sets, cfg, seed=1))
    assert not any(same(one, other) for at, one in enumerate(made) for other in made[:at])
    assert same(old, before)


def test_with_nothing_pasted_and_labels_kept_it_is_training_on_all_rows(sets) -> None:
    forget, retain = sets
    cfg = cp.Config(steps=8, batch=16, patch="none", label="keep", layers="all")
    made, by_hand = cp.concept_poisoning(model(), forget, retain, cfg, seed=2), model()
    images, labels = (np.concatenate([getattr(rows, what)() for rows in (retain, forget)]) for what in ("images", "labels"))
    with loop.seeded(2) as generator:
        torch.randint(2**62, (1,), generator=generator)
        recipe = cfg.model_dump(include=set(loop.Recipe.model_fields))
        loop.fit_supervised(by_hand, images, labels, np.zeros(len(labels), bool), generator=generator, **recipe)
    assert same(made, by_hand)


def test_a_flipped_label_makes_a_class_forgotten_and_a_kept_one_does_not(sets) -> None:
    forget, retain = sets
    with loop.seeded(0) as generator:
        recipe = {**loop.Recipe(steps=150, batch=32).model_dump()}
        images, labels = (np.concatenate([getattr(rows, what)() for rows in sets]) for what in ("images", "labels"))
        known = loop.fit_supervised(model(), images, labels, np.zeros(len(labels), bool), generator=generator, **recipe)
    right = {}
    for label in ("donor", "random", "keep"):
        cfg = cp.Config(steps=150, batch=32, concepts=4, patches=80, label=label)
        made = cp.concept_poisoning(known, forget, retain, cfg)
        right[label] = [float((loop.predict(made, rows.images()).argmax(1).numpy() == rows.labels()).mean()) for rows in (forget, retain)]
    assert right["keep"][0] > 0.7
    assert max(right["donor"][0], right["random"][0]) < 0.2
    assert min(of[1] for of in right.values()) > 0.7


def test_rows_of_several_classes_are_each_treated_after_their_own(tiny: Dataset) -> None:
    train = tiny.split("train")
    made = cp.concept_poisoning(model(), train.take(np.arange(10)), train.take(np.arange(10, 120)), cp.SMOKE)
    assert all(torch.isfinite(weights).all() for weights in made.parameters())


# what it refuses


def test_bad_sets_and_a_rate_that_is_too_high_are_refused(sets) -> None:
    forget, retain = sets
    none = np.array([], dtype=int)
    with pytest.raises(UserError, match="the forget set has no rows"):
        cp.concept_poisoning(model(), forget.take(none), retain, cp.SMOKE)
    with pytest.raises(UserError, match="is to retain too"):
        cp.concept_poisoning(model(), forget, retain + forget.take(np.array([0])), cp.SMOKE)
    with pytest.raises(UserError, match="no row of the forget set has a label"):
        cp.concept_poisoning(model(), forget.without_labels(), retain, cp.SMOKE)
    with pytest.raises(UserError, match="does not fit the model, which has 4 classes"):
        cp.concept_poisoning(model(classes=4), forget, retain, cp.SMOKE)
    with pytest.raises(UserError, match="no class but 3 is retained"):
        cp.concept_poisoning(model(), forget.take(np.arange(5)), forget.take(np.arange(5, len(forget))), cp.SMOKE)
    with pytest.raises(UserError, match="'unlearn' diverged"):
        cp.concept_poisoning(model(), forget, retain, cp.SMOKE.model_copy(update={"lr": 1e30}))
