"""Traces of forgotten rows: relearning, new heads, several references, distances, and the attack on single rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import configured
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.evaluate import _references as beside
from tasks.evaluate import _shadows as shadowed
from tasks.evaluate import _traces as traces
from tasks.evaluate._shared import Rows
from tasks.evaluate.forgetting import SMOKE, Config, forgetting
from tests import tables

CLASSES = ("a", "b")


@pytest.fixture(autouse=True)
def told_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.KINDS, "told", tables.Told)


def rows(images: np.ndarray, labels: list[int], prefix: str = "r") -> Rows:
    n = len(labels)
    return Rows([f"{prefix}{i:03d}" for i in range(n)], images, np.array(labels, dtype=np.int64), np.zeros(n, dtype=bool))


def tiny_net(seed: int, hidden: int = 6) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 4, 4), 3, widths=(4,), hidden=hidden, mean=0.5, std=0.3)


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 4, 4)).astype(np.uint8)


# relearning


def test_relearning_counts_the_steps_of_plain_descent() -> None:
    # one row of class a with margin -1: a step of 0.5 adds 2 * 0.5 * (1 - sigmoid(margin)): -1, -0.269, 0.298
    net, row = tables.told([[-1.0, 0.0]]), rows(tables.pixels(0), [0])
    found = traces.relearn(net, row, target=1, steps=10, lr=0.5)
    assert (found.steps, found.curve) == (2, [0, 0, 1])
    assert traces.relearn(net, row, target=1, steps=10, lr=1).steps == 1
    assert traces.relearn(net, row, target=1, steps=1, lr=0.5) == (1, [0, 0])  # never: all that were allowed
    assert traces.relearn(net, row, target=0, steps=10, lr=0.5) == (0, [0])


def test_relearning_leaves_the_network_alone_and_learns_where_it_is_frozen() -> None:
    net = tables.told([[-1.0, 0.0]]).requires_grad_(False)
    before = net.head.weight.clone()
    assert traces.relearn(net, rows(tables.pixels(0), [0]), target=1, steps=10, lr=0.5).steps == 2
    assert torch.equal(net.head.weight, before)
    assert not net.head.weight.requires_grad


def test_a_network_that_diverged_never_learns_again() -> None:
    found = traces.relearn(tables.told([[math.nan, 0.0]]), rows(tables.pixels(0), [1]), target=1, steps=7, lr=0.5)
    assert found.steps == 7


def test_all_are_asked_to_come_as_close_as_the_margin_to_the_original() -> None:
    part = rows(tables.pixels(0, 1), [0, 0])
    original, lost = tables.told([[1.0, 0], [-1.0, 0]]), tables.told([[-1.0, 0], [-50.0, 0]])  # right on one of two; on none
    found, details = traces.recovery({"original": original, "lost": lost}, part, rows=64, steps=9, lr=1, margin=0.1)
    assert details["target"] == pytest.approx(0.45)
    # two rows share the step: the first gains 0.731 and then 0.567
    assert [found[name]["relearn"].value for name in ("original", "lost")] == [0, 2]
    assert details["accuracy"] == {"original": [0.5], "lost": [0, 0, 0.5]}
    _, alone = traces.recovery({"lost": lost}, part, rows=1, steps=9, lr=1, margin=0.1)
    assert (alone["target"], alone["rows"]) == (0.9, 1)


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_spread_rows_are_as_many_as_asked_and_reach_over_all(n: int, most: int) -> None:
    kept = traces.spread(rows(np.zeros((n, 1, 1, 1), np.uint8), list(range(n))), most)
    assert len(kept) == min(n, most)
    steps = np.diff(kept.labels)
    assert kept.labels[0] == 0
    assert not len(steps) or 0 < steps.min() <= steps.max() <= steps.min() + 1


# new heads


def test_the_answer_without_a_row_is_that_of_a_head_fitted_without_it() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    inputs -= inputs.mean(0)
    targets = torch.nn.functional.one_hot(torch.arange(12) % 2, 2).double()
    weights, offset, without = traces.fit_head(inputs, targets, 4, 0.1)
    padded, penalty = torch.cat([torch.ones(12, 1), inputs], 1).double(), 0.1 * 12 * torch.diag(torch.tensor([0.0, 1, 1, 1])).double()

    def by_hand(kept: list[int]) -> torch.Tensor:
        x, y = padded[kept], targets[kept]
        return torch.linalg.solve(x.T @ x + penalty, x.T @ y)

    assert torch.allclose(by_hand(list(range(12))), torch.cat([offset[None], weights]))
    for at in range(8, 12):
        assert torch.allclose(without[at - 8], padded[at] @ by_hand([i for i in range(12) if i != at]))


def test_a_new_head_finds_what_an_edit_of_the_last_layer_left() -> None:
    images = np.zeros((30, 1, 4, 4), np.uint8)
    labels = [i % 3 for i in range(30)]
    images[:, 0, 0, 0] = [(0, 120, 250)[label] for label in labels]
    net = tiny_net(0)
    with loop.seeded(0) as generator:
        recipe = loop.Recipe(steps=80, batch=16).model_dump()
        loop.fit_supervised(net, images, np.array(labels), np.zeros(30, bool), generator=generator, **recipe)
    with torch.no_grad():
        net.head.weight[0], net.head.bias[0] = 0, -9
    is_first = np.array(labels) == 0
    known, gone = rows(images[~is_first], [x for x in labels if x]), rows(images[is_first], [0] * 10)
    assert (loop.predict(net, gone.inputs).argmax(1) != 0).all()
    found = traces.new_heads({"edited": net}, known, gone, gone.where(np.zeros(10, bool)), rows=30)["edited"]
    assert (found["head"].value, set(found)) == (100, {"head"})
    assert traces.new_heads({"edited": net}, known, gone, gone, rows=30)["edited"]["head_test"].value == 100


# beside the references


def test_one_of_several_references_is_measured_against_the_rest() -> None:
    assert beside.references(["original", "retrain", "retrain-2", "retrain-x", "retrained"]) == ["retrain", "retrain-2"]
    assert beside.others("retrain", ["retrain", "retrain-1"]) == ["retrain-1"]
    assert beside.others("retrain", ["retrain"]) == ["retrain"]
    assert beside.others("original", ["retrain", "retrain-1"]) == ["retrain", "retrain-1"]


def figures(ua: float, ra: float, ta: float, mia: float) -> dict[str, Figure]:
    return {"ua": Figure.exact(ua), "ra": Figure.exact(ra), "ta": Figure.exact(ta), "mia": Figure.exact(mia)}


def test_the_gap_is_to_the_mean_of_the_references_and_its_spread_is_between_them() -> None:
    ours, one, other = figures(0, 100, 90, 0), figures(10, 98, 94, 20), figures(14, 100, 92, 24)
    assert beside.average_gap(ours, one, other) == (12 + 1 + 3 + 22) / 4
    assert beside.gap_spread([one, other]) == (4 + 2 + 2 + 4) / 4
    third = figures(10, 98, 94, 20)
    assert beside.gap_spread([one, other, third]) == pytest.approx((3 + 3 + 0) / 3)
    assert beside.over_seeds([one, other])["ua"] == {"mean": 12, "sd": pytest.approx(math.sqrt(8))}
    assert beside.over_seeds([one])["ua"] == {"mean": 10}


def test_activation_distance_is_the_mean_length_of_the_difference() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    assert beside.distance(p, q).value == pytest.approx(math.sqrt(2) / 2)
    assert beside.distance(p, q, p).value == pytest.approx(math.sqrt(2) / 4)
    assert beside.distance(p, q, rows=1).value == pytest.approx(math.sqrt(2))  # the first of two
    assert beside.distance(p, torch.tensor([[0.0, 0, 1], [0.5, 0.5, 0]])).value == pytest.approx(math.sqrt(2) / 2)  # one class more


def test_ks_by_hand() -> None:
    low, high = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.6, 0.7, 0.8])
    assert beside.ks(low, high) == (1, pytest.approx(2 / math.comb(8, 4)))  # two of 70 orders are as extreme
    assert beside.ks(low, low) == (0, 1)
    assert beside.ks(low, low, high)[0] == 0.5


def test_with_several_references_their_spread_may_make_it_void() -> None:
    original, wrong = np.zeros(400, bool), np.zeros((2, 400), bool)
    wrong[0, :5], wrong[1, :90] = True, True  # 1.25% and 22.5%: sd 21.25 / sqrt(2) points
    void, sentence = beside.decide_void(original, wrong, 3)
    assert void
    assert sentence.startswith("retraining moves UA by 11.9 points on 400 rows (standard deviation of 2 networks: 15.0), 45.1 are needed")
    wrong[1] = wrong[0]  # networks that agree by chance do not make five rows in 400 more than they are
    assert beside.decide_void(original, wrong, 3)[0]
    assert not beside.decide_void(original, np.ones((2, 400), bool), 3)[0]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Dataset]:
    """Pixel 0 is retained (class a), 1 retained (class b), 2 and 3 forgotten (a, b), 4 and 5 test rows (a, b)."""

    def of(name: str, values: list[int], labels: list[int | None]) -> Dataset:
        return tables.dataset(tmp_path / name, tables.pixels(*values), labels, classes=CLASSES, prefix=name[0])

    return {
        "forget": of("forget", [2, 2, 3, 3], [0, 0, 1, 1]),
        "retain": of("retain", [0, 0, 1, 1], [0, 0, 1, 1]),
        "test": of("test", [4, 4, 5, 5], [0, 0, 1, 1]),
    }


def net(forgotten: tuple[float, float]) -> tables.Told:
    """Sure of retained rows, in doubt on test rows, with these margins on the two forgotten pixels."""
    return tables.told([[6, 0], [0, 6], [forgotten[0], 0], [0, forgotten[1]], [0.5, 0], [0, 0.5]])


def test_figures_beside_two_references_by_hand(data: dict[str, Dataset]) -> None:
    models = {"original": net((6, 6)), "retrain": net((-0.5, 0.5)), "retrain-1": net((-0.5, -0.5))}
    found = forgetting(models, data, Config(shadows=0, relearn_lr=1.0))
    original, one, other = (found.figures[name] for name in models)
    assert [by["ua"].value for by in (original, one, other)] == [0, 50, 100]
    # of the four, only UA tells the references apart, and MIA is 100 for both
    assert [by["avg_gap"].value for by in (original, one, other)] == [(75 + 100) / 4, 50 / 4, 50 / 4]
    assert {by["avg_gap_spread"].value for by in (original, one, other)} == {50 / 4}
    # margin -0.5, mean over four rows: each step adds 2 * (1 - sigmoid(margin)) / 2 to its pixel: -0.5, 0.122
    assert [by["relearn"].value for by in (original, one, other)] == [0, 1, 1]
    assert [by["relearn_ratio"].value for by in (original, one, other)] == [0, 1, 1]
    p = 1 / (1 + math.exp(0.5))
    apart = math.sqrt(2) * (1 - 2 * p) / 2  # between the references, on half of the rows
    assert one["activation_distance"].value == pytest.approx(apart)
    assert original["activation_distance_retained"].value == 0
    assert original["ks"].value == 1
    assert one["ks"].value == 0.5
    assert found.details["references"]["figures"]["ua"] == {"mean": 75, "sd": pytest.approx(100 * math.sqrt(0.125))}
    assert "of 2 networks: 35.4" in found.details["void"]
    assert original["void"].value == 1


def test_no_ratio_is_told_where_the_reference_needs_no_step(data: dict[str, Dataset]) -> None:
    found = forgetting({"original": net((6, 6)), "retrain": net((6, 6))}, data, Config())
    assert found.figures["retrain"]["relearn"].value == 0
    assert "relearn_ratio" not in found.figures["original"]
    assert "avg_gap_spread" not in found.figures["original"]


def test_probe_and_shadows_can_be_left_out_and_relearning_cannot(data: dict[str, Dataset]) -> None:
    assert set(forgetting({"retrain-1": net((6, 6))}, data, Config(probe_rows=0)).figures["retrain-1"]) >= {"relearn", "avg_gap"}
    assert "head" not in forgetting({"u": net((6, 6))}, data, Config(probe_rows=0)).figures["u"]
    with pytest.raises(UserError, match="setting 'relearn_steps' is 0"):
        configured(Config, "evaluate.forgetting", {"relearn_steps": 0})
    with pytest.raises(UserError, match="setting 'shadows' is 3"):
        configured(Config, "evaluate.forgetting", {"shadows": 3})


# the attack on single rows


def test_confidence_is_the_log_odds_of_the_label() -> None:
    found = shadowed.confidence(tables.told([[2.0, 1.0, 0.0], [900.0, 0, 0]]), rows(tables.pixels(0, 1), [1, 0]))
    p = math.exp(1) / (math.exp(2) + math.exp(1) + 1)
    assert found.tolist() == pytest.approx([math.log(p / (1 - p)), 900 - math.log(2)])
    assert shadowed.confidence(tables.told([[math.nan, 0.0]]), rows(tables.pixels(0), [1])).tolist() == [0]


def test_what_is_expected_of_a_row_comes_from_networks_that_did_not_see_it() -> None:
    nets = [tables.told([[1.0, 0.0]]), tables.told([[3.0, 0.0]]), tables.told([[8.0, 0.0]])]
    unseen = np.array([[True, False], [True, False], [False, True]])
    assert shadowed.expected(nets, rows(tables.pixels(0, 0), [0, 0]), unseen).tolist() == pytest.approx([2, 8])


@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_each_row_is_in_half_of_the_sets(n: int, pairs: int, seed: int) -> None:
    found = shadowed.halves(n, 2 * pairs, np.random.default_rng(seed))
    assert (found.sum(0) == pairs).all()
    assert set(found.sum(1)) <= {n // 2, n - n // 2}


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    assert shadowed.area(np.array([3.0, 1.0]), np.array([2.0, 0.0])).value == 0.75
    assert shadowed.area(np.array([1.0]), np.array([1.0])) == Figure.exact(0.5)
    apart = shadowed.area(np.arange(5.0) + 9, np.arange(5.0))
    assert (apart.value, apart.low, apart.high) == (1, 1, 1)


def test_its_interval_holds_chance_for_draws_from_one_distribution() -> None:
    generator = np.random.default_rng(0)
    found = [shadowed.area(generator.normal(size=60), generator.normal(size=90)) for _ in range(200)]
    assert 0.90 <= np.mean([figure.low <= 0.5 <= figure.high for figure in found]) <= 0.99


def test_memorised_noise_is_told_from_noise_that_was_not_seen() -> None:
    images, labels = noise(90), np.random.default_rng(1).integers(0, 3, 90)
    forget, retain, strangers = (rows(images[part], labels[part].tolist(), "fkt"[at]) for at, part in enumerate(np.split(np.arange(90), 3)))
    recipe = loop.Recipe(steps=150, batch=16).model_dump()

    def trained(on: np.ndarray, seed: int) -> Net:
        with loop.seeded(seed) as generator:
            return loop.fit_supervised(tiny_net(seed, 32), images[on], labels[on], np.zeros(len(on), bool), generator=generator, **recipe)

    models = {"original": trained(np.arange(60), 0), "retrain": trained(np.arange(30, 60), 1)}
    before = len(shadowed._MADE)
    found, said = shadowed.single_rows(models, retain, forget, strangers, count=4, steps=60, seed=0)
    assert found["original"]["lira_auc"].value > 0.8
    assert found["retrain"]["lira_auc"].low < 0.5 < found["retrain"]["lira_auc"].high
    assert found["original"]["lira_members"].value > found["retrain"]["lira_members"].value
    assert said.startswith("4 shadow networks, 30 strangers")
    assert len(shadowed._MADE) <= min(before + 1, shadowed.KEEP)
    pool, at = shadowed.joined(retain, forget)
    assert [pool.ids[i] for i in at] == forget.ids
    assert shadowed.shadows(models["original"], pool, count=4, steps=60, seed=0) is shadowed.shadows(
        models["retrain"], shadowed.joined(forget, retain)[0], count=4, steps=60, seed=0
    )
    assert shadowed.single_rows(models, retain, forget, strangers.where(np.zeros(30, bool)), count=4, steps=60, seed=0)[0] == {}


def test_the_attack_runs_within_the_whole_and_is_the_same_again(tiny: Dataset) -> None:
    train, test = tiny.split("train"), tiny.split("test")
    with loop.seeded(0):
        small = networks.convnet(tiny.info.shape, len(tiny.info.classes), widths=(4, 6), hidden=8, mean=0.3, std=0.3)
    roles = {"forget": train.take(np.arange(20)), "retain": train.take(np.arange(20, 150)), "test": test}
    first = forgetting({"original": small, "retrain": small}, roles, SMOKE, seed=1)
    shadowed._MADE.clear()
    assert forgetting({"original": small, "retrain": small}, roles, SMOKE, seed=1).to_json() == first.to_json()
    assert first.details["lira"].startswith("2 shadow networks")
    label = int(train.labels()[0])
    whole = {"forget": train.where(train.labels() == label), "retain": train.where(train.labels() != label), "test": test}
    of_class = forgetting({"u": small}, whole, SMOKE.model_copy(update={"scenario": "class"}))
    assert {"lira_auc", "head_test"} <= set(of_class.figures["u"])
    without = {**whole, "test": test.where(test.labels() != label)}
    bare = forgetting({"u": small}, without, SMOKE.model_copy(update={"scenario": "class"}))
    assert "lira_auc" not in bare.figures["u"]
    assert "head_test" not in bare.figures["u"]
    assert bare.details["lira"].startswith("no attack on single rows")
