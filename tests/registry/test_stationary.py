"""Stationary: the simplex, the table of vertices and the loss by hand; versions that replace each other; what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.evaluate.compatibility import compatibility
from tasks.registry import Offer
from tasks.registry.stationary import SMOKE, Config, assigned, hoc, stationary
from tests import tables

NEXT = SMOKE.model_copy(update={"how": "independent"})
TRAINED = Config(vertices=16, steps=250, batch=32, widths=(16, 16), hidden=32)


def rows(folder: Path, names: str, *, size: int = 8, prefix: str = "r") -> Dataset:
    """Three noise images of each class, labels in the order of the names."""
    n = 3 * len(names)
    images = np.random.default_rng(0).integers(0, 256, (n, 1, size, size), dtype=np.uint8)
    return tables.dataset(folder, images, [at // 3 for at in range(n)], classes=tuple(names), prefix=prefix)


def same(one: Net, two: Net) -> bool:
    return one.arch == two.arch and all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


# the simplex


def test_two_vertices_are_opposite_and_three_stand_at_120_degrees() -> None:
    assert torch.allclose(networks.simplex(2), torch.tensor([[1.0], [-1.0]]))
    three = networks.simplex(3)
    # the axes less their mean with the last corner, (1 - sqrt 3) / 2 on both: cosines and sines of 15, 75 and 225 degrees
    angles = [math.degrees(math.atan2(y, x)) % 360 for x, y in three.tolist()]
    assert angles == pytest.approx([345, 105, 225], abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 200))
def test_vertices_have_length_one_and_the_same_angle_to_each_other(count: int) -> None:
    vertices = networks.simplex(count)
    assert vertices.shape == (count, count - 1)
    wanted = torch.eye(count) * (1 + 1 / (count - 1)) - 1 / (count - 1)
    assert torch.allclose(vertices @ vertices.T, wanted, atol=1e-5)
    assert torch.allclose(vertices.sum(0), torch.zeros(count - 1), atol=1e-4)


def test_one_vertex_is_no_simplex() -> None:
    with pytest.raises(ValueError, match="two vertices or more, got 1"):
        networks.simplex(1)


# which class has which vertex


def test_classes_take_vertices_from_the_end_and_keep_them() -> None:
    first = assigned("abc", {}, 8)
    assert first == {"a": 7, "b": 6, "c": 5}
    assert assigned("dbx", first, 8) == {"a": 7, "b": 6, "c": 5, "d": 4, "x": 3}  # a and c are gone, their vertices stay taken
    assert assigned("cab", first, 8) == first


def test_more_classes_than_free_vertices_are_refused() -> None:
    assert assigned("abcd", {"z": 0}, 5) == {"z": 0, "a": 4, "b": 3, "c": 2, "d": 1}
    with pytest.raises(UserError, match="5 new classes, but 4 of 5 vertices are free"):
        assigned("abcde", {"z": 0}, 5)


# the loss


def test_the_loss_by_hand() -> None:
    x, y = [1.0, 0.0], [0.0, 1.0]
    new, old, labels = torch.tensor([x, y, y]), torch.tensor([x, x, y]), torch.tensor([4, 4, 9])
    # row 0: -10 + log e^0; row 1: 0 + log e^0; row 2, against both others: -10 + log(e^0 + e^10)
    by_hand = (-10 + 0 + 0 + 0 - 10 + math.log(1 + math.exp(10))) / 3
    assert hoc(new, old, labels, 10).item() == pytest.approx(by_hand, rel=1e-6)
    assert hoc(3 * new, 0.5 * old, labels, 10).item() == pytest.approx(by_hand, rel=1e-6)  # lengths do not count


def test_a_batch_of_one_class_has_only_the_pull_and_finite_gradients() -> None:
    new = torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    loss = hoc(new, torch.tensor([[1.0, 0.0], [1.0, -1.0]]), torch.tensor([2, 2]), 10)
    assert loss.item() == pytest.approx(-(10 * 1 + 10 * 0) / 2)
    loss.backward()
    assert new.grad is not None
    assert bool(new.grad.isfinite().all())


def test_steps_down_the_loss_bring_embeddings_back_to_the_old_ones_at_their_vertices() -> None:
    old, labels = networks.simplex(8), torch.arange(8)
    new = torch.randn(8, 7, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    assert F.cosine_similarity(new, old).mean().item() < 0.3
    for _ in range(60):
        (slope,) = torch.autograd.grad(hoc(new, old, labels, 10), new)
        new = (new - 0.5 * slope).detach().requires_grad_(True)
    assert F.cosine_similarity(new, old).min().item() > 0.9


# versions


def test_a_first_version_has_the_vertices_of_its_table_which_nothing_trains(tmp_path: Path) -> None:
    net = stationary(Offer(data={"train": rows(tmp_path / "d", "abc")}), SMOKE)
    assert net.arch["names"] == ["a", "b", "c"]
    assert net.arch["table"] == {"a": 15, "b": 14, "c": 13}
    assert torch.equal(net.head.weight, networks.simplex(16)[[15, 14, 13]])
    assert not net.head.weight.requires_grad
    assert net.features(torch.rand(2, 1, 8, 8)).shape == (2, 15)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert not net.training


def test_another_recipe_trains_everything_but_the_last_layer(tmp_path: Path) -> None:
    data = rows(tmp_path / "d", "abc")
    net = stationary(Offer(data={"train": data}), SMOKE)
    more = copy.deepcopy(net)
    recipe = loop.Recipe(steps=5, batch=4).model_dump()
    loop.fit_supervised(more, data.images(), data.labels(), data.synthetic(), generator=torch.Generator().manual_seed(0), **recipe)
    assert torch.equal(more.head.weight, net.head.weight)
    assert not torch.equal(more.embed.weight, net.embed.weight)  # type: ignore[union-attr]


def test_a_version_is_rebuilt_from_json_and_weights(tmp_path: Path) -> None:
    net = stationary(Offer(data={"train": rows(tmp_path / "d", "abc")}), SMOKE)
    again = networks.build(json.loads(json.dumps(net.arch)))
    again.load_state_dict(net.state_dict())
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(net(images), again(images))
    assert not again.head.weight.requires_grad


@pytest.mark.parametrize("how", ["independent", "fine-tuned", "hoc"])
def test_old_classes_keep_their_vertices_whatever_their_order_and_new_ones_get_others(how: str, tmp_path: Path) -> None:
    old = stationary(Offer(data={"train": rows(tmp_path / "old", "abc")}), SMOKE)
    kept = copy.deepcopy(old)
    cfg = SMOKE.model_copy(update={"how": how})
    new = stationary(Offer({"line/1": old}, {"train": rows(tmp_path / "new", "xcya")}), cfg, seed=1)
    assert new.arch["table"] == {"a": 15, "b": 14, "c": 13, "x": 12, "y": 11}
    assert new.arch["names"] == ["x", "c", "y", "a"]
    assert torch.equal(new.head.weight, networks.simplex(16)[[12, 13, 11, 15]])
    assert same(old, kept)
    third = stationary(Offer({"line/2": new}, {"train": rows(tmp_path / "third", "bz")}), cfg)
    assert third.arch["table"] == {**new.arch["table"], "z": 10}


@pytest.mark.parametrize("how", ["fine-tuned", "hoc"])
def test_without_learning_a_fine_tuned_version_is_the_old_one(how: str, tmp_path: Path) -> None:
    old = stationary(Offer(data={"train": rows(tmp_path / "old", "abc")}), SMOKE)
    cfg = SMOKE.model_copy(update={"how": how, "lr": 1e-12, "weight_decay": 0.0, "widths": (4, 4), "hidden": 3})
    new = stationary(Offer({"line/1": old}, {"train": rows(tmp_path / "new", "abcd")}), cfg, seed=9)
    images = torch.rand(5, 1, 8, 8)
    assert torch.allclose(new.features(images), old.features(images), atol=1e-5)  # of the old one's size, not of the setting's


def test_an_independent_version_may_have_another_size_and_starts_anew(tmp_path: Path) -> None:
    data = rows(tmp_path / "d", "abc")
    old = stationary(Offer(data={"train": data}), SMOKE)
    alone = stationary(Offer(data={"train": data}), NEXT.model_copy(update={"hidden": 24}), seed=4)
    beside = stationary(Offer({"line/1": old}, {"train": data}), NEXT.model_copy(update={"hidden": 24}), seed=4)
    assert same(alone, beside)
    assert beside.arch["hidden"] == 24


def test_all_weight_on_cross_entropy_makes_hoc_plain_fine_tuning(tmp_path: Path) -> None:
    data = rows(tmp_path / "d", "abc")
    offer = Offer({"line/1": stationary(Offer(data={"train": data}), SMOKE)}, {"train": data})
    tuned, with_loss, without = (
        stationary(offer, SMOKE.model_copy(update=update), seed=2)
        for update in ({"how": "fine-tuned"}, {"how": "hoc"}, {"how": "hoc", "lam": 1.0})
    )
    assert same(tuned, without)
    assert not same(tuned, with_loss)


def test_a_first_version_looks_at_no_network_and_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    data = rows(tmp_path / "d", "abc")
    one, two = (stationary(Offer(nets, {"train": data}), SMOKE, seed=5) for nets in ({}, {"other/1": tables.told([[0.0]])}))
    assert same(one, two)
    assert not same(one, stationary(Offer(data={"train": data}), SMOKE, seed=6))


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    data = rows(tmp_path / "d", "abc")
    extra = rows(tmp_path / "e", "abc", prefix="e").without_labels()
    assert same(*(stationary(Offer(data={"train": some}), SMOKE) for some in (data, data + extra)))


def test_digits_find_their_class_in_the_gallery_of_an_older_version(tiny: Dataset) -> None:
    train, search = tiny.split("train"), {"test": tiny.split("test"), "gallery": tiny.split("reference", "validation")}
    old = stationary(Offer(data={"train": train.take(np.arange(100))}), TRAINED, seed=0)
    versions = {"champion": old}
    for how in ("independent", "hoc"):
        versions[how] = stationary(Offer({"line/1": old}, {"train": train}), TRAINED.model_copy(update={"how": how}), seed=7)
    figures = compatibility(versions, search).figures
    assert figures["champion"]["self_retrieval"].value > 0.7
    assert figures["independent"]["cross_retrieval"].value > 0.4  # by chance: .1
    assert figures["hoc"]["cross_retrieval"].value > 0.7


# what is refused


def test_data_that_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="role 'train'; it got query"):
        stationary(Offer(data={"query": rows(tmp_path / "q", "ab")}), SMOKE)
    with pytest.raises(UserError, match=r"'a' has no labelled row in 'train' \(3 such\)"):
        stationary(Offer(data={"train": rows(tmp_path / "u", "abc").without_labels()}), SMOKE)
    with pytest.raises(UserError, match=r"two or more, all different; it has a$"):
        stationary(Offer(data={"train": rows(tmp_path / "one", "a")}), SMOKE)
    with pytest.raises(UserError, match="all different; it has a, b, a"):
        stationary(Offer(data={"train": rows(tmp_path / "twice", "aba")}), SMOKE)
    stray = tables.dataset(tmp_path / "stray", np.zeros((3, 1, 8, 8), np.uint8), [0, 1, 2], classes=("a", "b"))
    with pytest.raises(UserError, match="label 2 has no class name"):
        stationary(Offer(data={"train": stray}), SMOKE)
    with pytest.raises(UserError, match="20 new classes, but 16 of 16 vertices"):
        stationary(Offer(data={"train": rows(tmp_path / "many", "abcdefghijklmnopqrst")}), SMOKE)


def test_an_old_version_that_shares_no_vertices_is_refused(tmp_path: Path) -> None:
    data = rows(tmp_path / "d", "abc")
    old = stationary(Offer(data={"train": data}), SMOKE)
    with pytest.raises(UserError, match="2 are offered: line/1, line/2"):
        stationary(Offer({"line/1": old, "line/2": old}, {"train": data}), NEXT)
    with pytest.raises(UserError, match="line/1 has no fixed classifier"):
        stationary(Offer({"line/1": tables.told([[0.0]])}, {"train": data}), NEXT)
    with pytest.raises(UserError, match="line/1 has 16 vertices and the new version 17"):
        stationary(Offer({"line/1": old}, {"train": data}), NEXT.model_copy(update={"vertices": 17}))
    moved = copy.deepcopy(old)
    moved.arch["table"] = {"a": 14, "b": 15, "c": 13}
    with pytest.raises(UserError, match="not the vertices of its table"):
        stationary(Offer({"line/1": moved}, {"train": data}), NEXT)
    learned = copy.deepcopy(old)
    with torch.no_grad():
        learned.head.weight[0] += 0.1
    with pytest.raises(UserError, match="not the vertices of its table"):
        stationary(Offer({"line/1": learned}, {"train": data}), NEXT)
    double = copy.deepcopy(old)
    double.arch["table"] = {**old.arch["table"], "gone": 15}
    with pytest.raises(UserError, match="not the vertices of its table"):
        stationary(Offer({"line/1": double}, {"train": data}), NEXT)


def test_fine_tuning_needs_an_old_version_for_such_images(tmp_path: Path) -> None:
    data = rows(tmp_path / "d", "abc")
    for how in ("fine-tuned", "hoc"):
        with pytest.raises(UserError, match=f"how is '{how}', but there is no old version"):
            stationary(Offer(data={"train": data}), SMOKE.model_copy(update={"how": how}))
    old = stationary(Offer(data={"train": data}), SMOKE)
    large = {"train": rows(tmp_path / "large", "abc", size=10)}
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\), the data has \(1, 10, 10\)"):
        stationary(Offer({"line/1": old}, large), SMOKE.model_copy(update={"how": "hoc"}))
    assert stationary(Offer({"line/1": old}, large), NEXT).arch["shape"] == [1, 10, 10]


def test_a_learning_rate_that_diverges_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'stationary' diverged"):
        stationary(Offer(data={"train": rows(tmp_path / "d", "abc")}), SMOKE.model_copy(update={"lr": 1e9}))
