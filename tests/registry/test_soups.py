"""Soups: means by hand, what greedy keeps, what the learned weights move, batch normalisation, and what may not be averaged."""

from __future__ import annotations

import copy
from typing import Any

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
from tasks.registry import Offer
from tasks.registry.soups import (
    Config,
    accuracy,
    average,
    batch_norms,
    check_versions,
    cook,
    greedy,
    learned_weights,
    mixed,
    re_estimate,
    scaled,
    soups,
)

CPU = {"batch": 32, "device": "cpu"}


def net(seed: int, norm: str = "", classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(4,), hidden=8, mean=0.3, std=0.3, norm=norm).eval()


def constant(answer: int, sureness: float = 1.0, classes: int = 10) -> Net:
    """A network that gives every image the same class."""
    made = net(0, classes=classes)
    with torch.no_grad():
        made.head.weight.zero_()
        made.head.bias.zero_()
        made.head.bias[answer] = sureness
    return made


def trained(data: Dataset, seed: int, start: Net, lr: float = 0.05) -> Net:
    rows = data.split("train")
    with loop.seeded(seed) as generator:
        return loop.fit_supervised(
            copy.deepcopy(start), rows.images(), rows.labels(), rows.synthetic(), steps=20, batch=32, lr=lr,
            momentum=0.9, weight_decay=0, real_weight=1.0, generator=generator,
        )  # fmt: skip


def same(one: Net, two: Net) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def facts(**starts: str | None) -> dict[str, Any]:
    return {"versions": {name: {"start": start} if start else {} for name, start in starts.items()}}


def offer(data: Dataset, nets: dict[str, Net], known: dict[str, Any] | None = None) -> Offer:
    rows = {"train": data.split("train"), "choose": data.split("validation")}
    return Offer(nets, rows, None, known or {"versions": {name: {"start": "s/1"} for name in nets}})


@pytest.fixture(scope="module")
def family(tiny: Dataset) -> dict[str, Net]:
    """Four networks with batch normalisation, fine-tuned from one start."""
    start = trained(tiny, 0, net(0, "batch"))
    return {f"m/{at}": trained(tiny, at, start, lr=0.02 * at) for at in (1, 2, 3, 4)}


def test_floats_are_averaged_and_counters_copied() -> None:
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(7)}
    two = {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(100)}
    mean = average([one, two])
    assert mean["w"].tolist() == [2.0, 4.0]
    assert mean["n"].item() == 7
    assert mean["n"] is not one["n"]
    assert average([one, two], {"w": torch.tensor([0.75, 0.25])})["w"].tolist() == [1.5, 3.0]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_the_mean_of_equal_states_is_that_state(values: list[float], copies: int) -> None:
    state: dict[str, Tensor] = {"w": torch.tensor(values), "half": torch.tensor(values, dtype=torch.bfloat16)}
    mean = average([state] * copies)
    assert all(torch.equal(mean[name], state[name]) and mean[name].dtype == state[name].dtype for name in state)


def test_standardisation_of_the_soup_is_that_of_its_ingredients(tiny: Dataset) -> None:
    nets = {f"m/{at}": net(at) for at in range(3)}
    soup = soups(offer(tiny, nets), Config(kind="uniform"))
    assert torch.equal(soup.mean, nets["m/0"].mean)
    assert torch.equal(soup.std, nets["m/0"].std)
    assert soup.arch == nets["m/0"].arch


def test_a_uniform_soup_has_the_mean_weights(tiny: Dataset) -> None:
    one, two = net(1), net(2)
    made = cook(offer(tiny, {"a/1": one, "a/2": two}), Config(kind="uniform"))
    assert torch.allclose(made.net.head.weight, (one.head.weight + two.head.weight) / 2)
    assert made.shares == {"a/1": 0.5, "a/2": 0.5}
    assert not made.net.training


IMAGES = np.zeros((10, 1, 8, 8), np.uint8)


def test_greedy_begins_with_the_best_and_leaves_out_what_lowers_the_score() -> None:
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2)
    # the mean of `0` and `1` says 1, which is surer; that lowers .5 to .3
    soup, kept = greedy([constant(1, 9.0), constant(0, 1.0), constant(2, 0.5)], IMAGES, labels, None, strict=True, **CPU)
    assert kept == (1,)
    assert accuracy(soup, IMAGES, labels) == 0.5


def test_an_ingredient_that_changes_nothing_stays_unless_strict() -> None:
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2)
    nets = [constant(1, 9.0), constant(0, 2.0), constant(2, 1.0)]
    assert greedy(nets, IMAGES, labels, None, strict=False, **CPU)[1] == (1, 2)
    assert greedy(nets, IMAGES, labels, None, strict=True, **CPU)[1] == (1,)


def test_greedy_averages_all_that_it_kept_with_equal_shares() -> None:
    labels = np.array([0] * 10)
    nets = [constant(0, 3.0), constant(0, 6.0), constant(0, 9.0)]
    soup, kept = greedy(nets, IMAGES, labels, None, strict=False, **CPU)
    assert kept == (0, 1, 2)  # ties go to the earlier one
    assert soup.head.bias[0].item() == pytest.approx(6.0)


def test_greedy_is_never_below_the_best_on_the_held_out_rows(tiny: Dataset, family: dict[str, Net]) -> None:
    rows = tiny.split("validation")
    scores = [accuracy(each, rows.images(), rows.labels()) for each in family.values()]
    made = cook(offer(tiny, family))
    assert accuracy(made.net, rows.images(), rows.labels()) >= max(scores)
    assert set(made.shares) == set(family)
    assert sum(made.shares.values()) == pytest.approx(1)
    assert all(made.shares[name] == pytest.approx(1 / len(made.kept)) for name in made.kept)


def test_a_soup_of_one_is_that_network_with_its_own_statistics(tiny: Dataset, family: dict[str, Net]) -> None:
    one = family["m/1"]
    assert same(mixed([one], tiny.split("train").images(), **CPU), one)


def test_batch_normalisation_is_re_estimated_on_the_rows(tiny: Dataset, family: dict[str, Net]) -> None:
    soup = copy.deepcopy(family["m/1"])
    rows = tiny.split("train").images()[:64]
    re_estimate(soup, rows, batch=64)
    seen = soup.body[0]((loop.to_float(rows) - soup.mean) / soup.std).detach()
    layer = batch_norms(soup)[0]
    assert torch.allclose(layer.running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(layer.running_var, seen.var((0, 2, 3)), rtol=1e-4)
    assert layer.momentum == 0.1
    assert not any(part.training for part in soup.modules())
    batches = copy.deepcopy(soup)
    re_estimate(batches, rows, batch=20)  # three of 20; the four that are left would count as much as twenty
    assert batch_norms(batches)[0].num_batches_tracked == 3
    assert torch.allclose(batch_norms(batches)[0].running_mean, seen[:60].mean((0, 2, 3)), atol=1e-5)


def test_statistics_are_averaged_where_no_rows_are_asked_for(tiny: Dataset, family: dict[str, Net]) -> None:
    without = Offer(family, {}, None, {"versions": {name: {"start": "s/1"} for name in family}})
    soup = soups(without, Config(kind="uniform", bn_rows=0))
    wanted = torch.stack([batch_norms(each)[0].running_var for each in family.values()]).mean(0)
    assert torch.allclose(batch_norms(soup)[0].running_var, wanted)
    other = soups(offer(tiny, family), Config(kind="uniform", bn_rows=100))
    assert torch.equal(soup.head.weight, other.head.weight)
    assert not torch.allclose(batch_norms(other)[0].running_var, wanted)


def learn(nets: list[Net], labels: Any, **changes: Any) -> tuple[dict[str, Tensor], float]:
    asked = {"lr": 0.05, "epochs": 40, "batch": 10, "live": False, **changes}
    with loop.seeded(0) as generator:
        return learned_weights(nets, IMAGES, labels, generator=generator, **asked)


def test_learned_shares_go_to_the_network_that_is_right() -> None:
    weights, beta = learn([constant(0), constant(1)], np.zeros(10, np.int64))
    assert weights["head.bias"][0] > 0.8
    assert beta > 1.5  # the more sure the better, as all answers are right
    assert all(float(share.sum()) == pytest.approx(1) for share in weights.values())
    assert torch.equal(weights["body.0.weight"], torch.tensor([0.5, 0.5]))  # these tensors are alike: nothing pulls


def test_wrong_answers_make_the_scale_smaller() -> None:
    assert learn([constant(0, 3.0), constant(0, 3.0)], np.arange(10))[1] < 0.5


def test_learning_that_has_not_moved_gives_the_uniform_soup() -> None:
    weights, beta = learn([net(1), net(2)], np.arange(10), lr=1e-12, epochs=1)
    assert all(torch.allclose(share, torch.tensor([0.5, 0.5])) for share in weights.values())
    assert beta == pytest.approx(1)


def test_the_scale_is_put_into_the_last_layer() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    before = loop.predict(net(1), images)
    assert torch.allclose(loop.predict(scaled(net(1), 2.5), images), 2.5 * before, atol=1e-5)


def test_a_learned_soup_lowers_the_held_out_loss(tiny: Dataset, family: dict[str, Net]) -> None:
    rows = tiny.split("validation")
    losses = {}
    for kind in ("uniform", "learned"):
        made = soups(offer(tiny, family), Config(kind=kind, epochs=20, batch=20))
        logits = loop.predict(made, rows.images())
        losses[kind] = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(rows.labels())))
    assert losses["learned"] < losses["uniform"]


@pytest.mark.parametrize("kind", ["uniform", "greedy", "learned"])
def test_ingredients_are_left_alone_and_a_seed_gives_one_result(kind: str, tiny: Dataset, family: dict[str, Net]) -> None:
    before = copy.deepcopy(family)
    grads = [weights.grad for each in family.values() for weights in each.parameters()]
    given = offer(tiny, family)
    cfg = Config(kind=kind, epochs=2, batch=16, bn_rows=50)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    first, again = cook(given, cfg, seed=5), cook(given, cfg, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first.net, again.net)
    assert first.shares == again.shares
    assert all(same(family[name], before[name]) and not family[name].training for name in family)
    weights = [weights for each in family.values() for weights in each.parameters()]
    assert all(each.requires_grad and each.grad is grad for each, grad in zip(weights, grads, strict=True))
    assert first.net not in family.values()
    assert all(each.requires_grad and each.grad is None for each in first.net.parameters())


ARCH = {"kind": "convnet", "hidden": 8}


def check(known: dict[str, Any], trust: bool = False) -> None:
    check_versions(dict.fromkeys(known["versions"], ARCH), known["versions"], trust)


def test_versions_of_one_start_pass_and_the_start_may_be_among_them() -> None:
    check(facts(a="s/1", b="s/1"))
    check(facts(a="s/1", b="s/1", **{"s/1": None}))
    check(facts(a="s/1", b="a"))  # fine-tuned twice
    check({"versions": {"a": {"start": "a"}, "b": {"start": "a"}}})


def test_starts_that_differ_are_refused_even_when_trusted() -> None:
    with pytest.raises(UserError, match=r"a and c cannot be averaged: .* different starts \(s/1 and t/1\)"):
        check(facts(a="s/1", b="s/1", c="t/1"), trust=True)


def test_a_start_that_is_not_known_is_refused_unless_trusted() -> None:
    with pytest.raises(UserError, match=r"a and b are not known to be fine-tuned from one start.*trust_start"):
        check(facts(a=None, b=None))
    with pytest.raises(UserError, match="a and b are not known"):
        check(facts(a="s/1", b=None, c="s/1"))
    check(facts(a=None, b=None), trust=True)
    check(facts(a="s/1", b=None), trust=True)


def test_networks_of_another_arch_are_refused(tiny: Dataset) -> None:
    with pytest.raises(UserError, match=r"a/1 and a/3 cannot be averaged: their networks differ in 'classes' \(10 and 4\)"):
        soups(offer(tiny, {"a/1": net(1), "a/2": net(2), "a/3": net(3, classes=4)}))
    with pytest.raises(UserError, match=r"differ in 'norm' \(None and batch\)"):
        soups(offer(tiny, {"a/1": net(1), "a/2": net(2, "batch")}))


def test_one_version_is_no_soup(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="two or more versions, got 1"):
        soups(offer(tiny, {"a/1": net(1)}))


def test_rows_that_are_missing_or_do_not_fit_are_named(tiny: Dataset) -> None:
    nets, known = {"a/1": net(1), "a/2": net(2)}, {"versions": {"a/1": {"start": "s"}, "a/2": {"start": "s"}}}
    with pytest.raises(UserError, match="needs rows 'choose' here: a greedy soup"):
        soups(Offer(nets, {}, None, known))
    with pytest.raises(UserError, match="needs rows 'choose' here: a learned soup"):
        soups(Offer(nets, {}, None, known), Config(kind="learned"))
    with pytest.raises(UserError, match="split 'test'"):
        soups(Offer(nets, {"choose": tiny.split("test", "validation")}, None, known))
    with pytest.raises(UserError, match="no row of 'choose' has a label"):
        soups(Offer(nets, {"choose": tiny.split("validation").without_labels()}, None, known))
    normed = {"a/1": net(1, "batch"), "a/2": net(2, "batch")}
    with pytest.raises(UserError, match="needs rows 'train' here: they re-estimate batch normalisation"):
        soups(Offer(normed, {"choose": tiny.split("validation")}, None, known))
    few = {"a/1": net(1, classes=4), "a/2": net(2, classes=4)}
    with pytest.raises(UserError, match=r"rows 'choose' are images .* of 10 classes; the versions take .* and 4"):
        soups(Offer(few, {"choose": tiny.split("validation")}, None, known))


def test_learning_that_diverged_is_said_so() -> None:
    broken = net(1)
    with torch.no_grad():
        broken.head.bias[0] = torch.inf
    with pytest.raises(UserError, match="'learned soup' diverged"):
        learn([broken, net(2)], np.arange(10))
