"""Forgetting: UA, RA, TA, MIA, their gap, ZRF and the void check (the rest is in `test_traces`), against hand-worked numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.metrics import Figure
from tasks.evaluate._references import average_gap, decide_void
from tasks.evaluate.forgetting import SMOKE, Config, attack, forgetting, zrf
from tests import tables

CLASSES = ("a", "b")
SURE, DOUBT = 6.0, 0.5


@pytest.fixture(autouse=True)
def told_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.KINDS, "told", tables.Told)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Dataset]:
    """Pixel 0 is retained (class a), 1 retained (class b), 2 and 3 forgotten (a, b), 4 and 5 test rows (a, b)."""

    def rows(name: str, values: list[int], labels: list[int | None], **more: object) -> Dataset:
        return tables.dataset(tmp_path / name, tables.pixels(*values), labels, classes=CLASSES, prefix=name[0], **more)

    return {
        "forget": rows("forget", [2, 2, 3, 3], [0, 0, 1, 1]),
        "retain": rows("retain", [0, 0, 1, 1, 1], [0, 0, 1, 1, None]) + rows("made", [5, 5], [0, 0], synthetic=True),
        "test": rows("test", [4, 4, 5, 5], [0, 0, 1, 1]),
    }


def net(retained: float, forgotten: tuple[float, float], tested: float) -> tables.Told:
    """Logit margins for the right class: of retained rows, of the two forgotten pixels, and of test rows."""
    return tables.told([[retained, 0], [0, retained], [forgotten[0], 0], [0, forgotten[1]], [tested, 0], [0, tested]])


ORIGINAL = net(SURE, (SURE, SURE), DOUBT)  # knows the forgotten rows like retained ones
RETRAIN = net(SURE, (-DOUBT, DOUBT), DOUBT)  # wrong on half of them, and in doubt as on test rows


def test_figures_by_hand(data: dict[str, Dataset]) -> None:
    found = forgetting({"original": ORIGINAL, "u": net(-SURE, (-SURE, SURE), DOUBT), "retrain": RETRAIN}, data, SMOKE)
    original, mine, reference = (found.figures[name] for name in ("original", "u", "retrain"))
    assert [original[key].value for key in ("ua", "ra", "ta", "mia")] == [0, 100, 100, 0]
    assert [reference[key].value for key in ("ua", "ra", "ta")] == [50, 100, 100]
    assert [mine[key].value for key in ("ua", "ra", "ta")] == [50, 0, 100]
    assert reference["mia"].value == 100  # all are as doubtful as test rows
    assert original["avg_gap"].value == pytest.approx((50 + 0 + 0 + 100) / 4)
    assert reference["avg_gap"].value == 0
    assert found.details["rows"] == {"forget": 4, "retain": 4, "test": 4}  # no synthetic row, none without a label
    assert found.data == {role: data[role].md5 for role in data}


def test_shares_carry_their_interval_in_percent(data: dict[str, Dataset]) -> None:
    ua = forgetting({"retrain": RETRAIN}, data, SMOKE).figures["retrain"]["ua"]
    assert (ua.value, ua.low, ua.high) == pytest.approx((50, 15.0, 85.0), abs=0.05)


def test_the_gap_is_the_mean_distance_in_either_direction() -> None:
    ours = {key: Figure.exact(value) for key, value in {"ua": 0, "ra": 100, "ta": 90, "mia": 40}.items()}
    theirs = {key: Figure.exact(value) for key, value in {"ua": 10, "ra": 98, "ta": 94, "mia": 20}.items()}
    assert average_gap(ours, theirs) == average_gap(theirs, ours) == (10 + 2 + 4 + 20) / 4


def test_the_attack_tells_confident_members_from_doubtful_strangers() -> None:
    generator = np.random.default_rng(0)
    members, strangers = generator.uniform(0.9, 1, 200), generator.uniform(0.2, 0.6, 200)
    assert attack(members, strangers, np.array([0.3, 0.5, 0.95, 0.99])).tolist() == [True, True, False, False]


def test_the_attack_takes_equal_numbers_from_the_front_and_no_more_than_asked() -> None:
    members = np.concatenate([np.full(20, 0.9), np.full(500, 0.1)])  # the later ones would turn the answer
    strangers = np.full(20, 0.1)
    asked = np.array([0.9, 0.1])
    assert attack(members, strangers, asked).tolist() == [False, True]
    assert attack(members[:20], np.concatenate([strangers, np.full(500, 0.9)]), asked, rows=20).tolist() == [False, True]


def test_zrf_is_1_for_equal_and_0_for_disjoint_answers() -> None:
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    # third row: JS of (1, 0) and (1/2, 1/2) in bits
    third = (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) / 2
    assert zrf(p, q).tolist() == pytest.approx([1, 0, 1 - third])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-300, 300), min_size=4, max_size=4), st.lists(st.floats(-300, 300), min_size=4, max_size=4))
def test_zrf_lies_between_0_and_1_and_is_symmetric(a: list[float], b: list[float]) -> None:
    p, q = (torch.softmax(torch.tensor([x], dtype=torch.float64), 1) for x in (a, b))
    assert 0 <= zrf(p, q)[0] <= 1
    assert zrf(p, q)[0] == pytest.approx(zrf(q, p)[0])


def test_zrf_falls_as_confidence_grows_as_in_the_toy_check() -> None:
    # ten classes, a near-uniform stranger, logits of standard deviation 1, 5, 10, 20: in nats .908, .593, .529, .499
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 10, generator=generator, dtype=torch.float64)
    uniform = torch.full((4000, 10), 0.1, dtype=torch.float64)
    nats = [1 - math.log(2) * (1 - zrf(torch.softmax(sd * logits, 1), uniform).mean()) for sd in (1, 5, 10, 20)]
    assert nats == pytest.approx([0.908, 0.593, 0.529, 0.499], abs=0.015)


def test_a_class_is_forgotten_without_its_test_rows(data: dict[str, Dataset], tmp_path: Path) -> None:
    forget = tables.dataset(tmp_path / "whole", tables.pixels(0, 0), [0, 0], classes=CLASSES, prefix="f")
    retain = tables.dataset(tmp_path / "kept", tables.pixels(1, 1), [1, 1], classes=CLASSES, prefix="k")
    blind = tables.told([[0, SURE], [0, SURE], [0, 0], [0, 0], [0, DOUBT], [0, DOUBT]])  # says b to everything
    rows = {"forget": forget, "retain": retain, "test": data["test"]}
    by = forgetting({"retrain": blind}, rows, Config(scenario="class")).figures["retrain"]
    assert [by[key].value for key in ("ua", "ra", "ta")] == [100, 100, 100]
    assert forgetting({"retrain": blind}, rows, Config()).figures["retrain"]["ta"].value == 50
    with pytest.raises(UserError, match=r"row 'r000' of 'retain' has a forgotten class \(4 such\)"):
        forgetting({"retrain": blind}, data, Config(scenario="class"))


def wrong(n: int, of: int) -> np.ndarray:
    return np.arange(of) < n


def test_void_compares_the_change_in_ua_with_its_binomial_error() -> None:
    # 400 rows, 0 against 54 wrong: p = .0675, se = sqrt(2 * .0675 * .9325 / 400) = .01774, three of them 5.3 points
    void, sentence = decide_void(wrong(0, 400), wrong(54, 400), 3)
    assert not void
    assert sentence.startswith("retraining moves UA by 13.5 points on 400 rows, 5.3 are needed")
    # 10 rows, 0 against 1 wrong: se = sqrt(2 * .05 * .95 / 10) = .0975
    void, sentence = decide_void(wrong(0, 10), wrong(1, 10), 3)
    assert void
    assert "10.0 points on 10 rows, 29.2 are needed: the comparison is void" in sentence


def test_void_at_the_limits() -> None:
    assert decide_void(wrong(0, 50), wrong(0, 50), 3)[0]  # no change, no error
    assert decide_void(wrong(0, 1), wrong(1, 1), 3)[0]  # one row decides nothing
    assert not decide_void(wrong(0, 50), wrong(50, 50), 3)[0]


def test_void_and_gap_are_told_only_where_their_references_are_there(data: dict[str, Dataset]) -> None:
    alone = forgetting({"original": ORIGINAL}, data, SMOKE)
    assert set(alone.figures["original"]) == {"ua", "ra", "ta", "mia", "zrf", "relearn", "head", "lira_auc", "lira_members"}
    assert alone.details["void"].startswith("not decided")
    both = forgetting({"original": ORIGINAL, "retrain": RETRAIN}, data, SMOKE)
    assert both.figures["original"]["void"].value == 1
    assert "the comparison is void" in both.details["void"]


def test_a_diverged_network_is_measured_and_not_an_error(data: dict[str, Dataset]) -> None:
    broken = tables.told([[math.nan, math.nan]] * 6)
    by = forgetting({"broken": broken, "retrain": RETRAIN}, data, SMOKE).figures["broken"]
    assert all(math.isfinite(figure.value) for figure in by.values())


def test_the_same_seed_gives_the_same_evidence_and_models_are_left_alone(data: dict[str, Dataset]) -> None:
    before = ORIGINAL.head.weight.detach().clone()
    first, again, other = (forgetting({"original": ORIGINAL, "retrain": RETRAIN}, data, SMOKE, seed=seed) for seed in (1, 1, 2))
    assert first.to_json() == again.to_json()
    assert first.figures["original"]["zrf"] != other.figures["original"]["zrf"]  # another random network
    assert torch.equal(ORIGINAL.head.weight, before)


def test_the_global_random_state_is_left_alone(data: dict[str, Dataset]) -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    forgetting({"retrain": RETRAIN}, data, SMOKE)
    assert np.array_equal(np.random.get_state()[1], before)


def test_shared_rows_and_missing_roles_are_refused(data: dict[str, Dataset]) -> None:
    with pytest.raises(UserError, match=r"row 0 of 'forget' is in 'retain' too \(4 such\)") as told:
        forgetting({"retrain": RETRAIN}, {**data, "retain": data["retain"] + data["forget"]}, SMOKE)
    assert "f000" not in str(told.value), "the id of a row to be forgotten is told"
    with pytest.raises(UserError, match="role 'retain'; it got forget, test"):
        forgetting({"retrain": RETRAIN}, {k: v for k, v in data.items() if k != "retain"}, SMOKE)
    synthetic = data["retain"].where(data["retain"].synthetic())
    with pytest.raises(UserError, match="no real labelled row is left"):
        forgetting({"retrain": RETRAIN}, {**data, "retain": synthetic}, SMOKE)
