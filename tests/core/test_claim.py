"""The statistics of claims: what an interval covers, what ties, single seeds and diverged runs come to, and that no status is free."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.claim import HOLDS, IN_PART, NOT_HERE, Beats, Claim, Row, effect, interval, judge, table

NAN = math.nan
finite = st.floats(-1e3, 1e3)


def values(ours: list[float], theirs: list[float]) -> dict[str, dict[str, list[float]]]:
    return {"accuracy": {"method": ours, "baseline": theirs}}


def beats(**changes: object) -> Beats:
    return Beats("method", "baseline", "accuracy", **changes)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    draws = np.random.default_rng(0).normal(0.3, 2.0, (4000, n))
    ends = [interval(row)[1:] for row in draws.tolist()]
    covered = np.mean([low <= 0.3 <= high for low, high in ends])
    assert abs(covered - 0.95) < 0.012  # three and a half standard errors


def test_the_interval_is_the_one_of_the_tables() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t of 4 degrees of freedom, standard deviation, n
    assert (mean, low, high) == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-5)


def test_one_seed_gives_no_interval_and_decides_nothing() -> None:
    assert interval([0.4]) == (0.4, -math.inf, math.inf)
    assert effect(beats(), values([0.9], [0.5])).status == NOT_HERE
    assert effect(beats(by=-0.1), values([0.9], [0.5])).status == NOT_HERE
    assert all(math.isnan(figure) for figure in interval([]))


def test_ties_are_no_effect() -> None:
    tied = effect(beats(), values([0.7, 0.8, 0.6], [0.7, 0.8, 0.6]))
    assert (tied.mean, tied.low, tied.high, tied.status) == (0, 0, 0, NOT_HERE)
    assert effect(beats(by=-0.01), values([0.7, 0.8], [0.7, 0.8])).status == HOLDS  # no worse than by .01


def test_pairing_by_seed_takes_out_what_seeds_share() -> None:
    hard_and_easy = [0.2, 0.9, 0.5, 0.7]
    assert effect(beats(by=0.01), values([v + 0.02 for v in hard_and_easy], hard_and_easy)).status == HOLDS


@pytest.mark.parametrize(
    ("ours", "by", "status"),
    [
        ([0.60, 0.61, 0.62], 0.05, HOLDS),
        ([0.60, 0.61, 0.62], 0.10, IN_PART),  # above 0, but its low end does not reach .10
        ([0.60, 0.40, 0.55], 0.0, NOT_HERE),
        ([0.40, 0.41, 0.42], 0.0, NOT_HERE),
        ([0.48, 0.49, 0.485], -0.05, HOLDS),
        ([0.40, 0.41, 0.40], -0.05, NOT_HERE),
    ],
)
def test_a_condition_is_judged_by_the_low_end_of_its_interval(ours: list[float], by: float, status: str) -> None:
    assert effect(beats(by=by), values(ours, [0.5, 0.5, 0.5])).status == status


def test_lower_is_better_turns_the_sign_and_relative_divides_by_the_baseline() -> None:
    found = effect(beats(better="lower", relative=True), values([8.0, 15.0], [10.0, 20.0]))
    assert found.differences == pytest.approx((0.2, 0.25))
    assert effect(beats(relative=True), values([1.0, 1.0], [0.0, 1.0])).failed == (0,)  # a share of nothing is no number


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("arm", ["method", "baseline"])
def test_a_diverged_run_counts_as_a_failure_whichever_arm_it_struck(arm: str, bad: float) -> None:
    runs = {"method": [0.9, 0.9, 0.9, 0.91], "baseline": [0.5, 0.5, 0.5, 0.5]}
    assert effect(beats(), {"accuracy": runs}).status == HOLDS
    runs[arm][2] = bad
    found = effect(beats(), {"accuracy": runs})
    assert found.failed == (2,)
    assert found.status == NOT_HERE
    assert found.mean == pytest.approx(0.4, abs=0.01)  # the other seeds are still shown


def test_a_seed_without_rows_is_a_failed_seed() -> None:
    rows = {0: [Row("method", "accuracy", 0.9), Row("baseline", "accuracy", 0.5)], 1: [], 2: [Row("method", "accuracy", 0.9)]}
    found = table(rows)
    assert found["accuracy"]["method"] == pytest.approx([0.9, NAN, 0.9], nan_ok=True)
    assert effect(beats(), found).failed == (1, 2)


def test_an_arm_that_nobody_measured_is_an_error() -> None:
    with pytest.raises(KeyError, match="'accuracy' of arm 'method'"):
        effect(beats(), {"accuracy": {"baseline": [0.5]}})
    with pytest.raises(ValueError, match="seed 3 gives accuracy of a twice"):
        table({3: [Row("a", "accuracy", 1), Row("a", "accuracy", 2)]})


def test_a_claim_holds_whole_in_part_or_not() -> None:
    claim = Claim("", (), beats(by=0.1), (beats(by=0.2),))
    assert judge(claim, values([0.8, 0.81, 0.8], [0.5] * 3))[0] == HOLDS
    assert judge(claim, values([0.65, 0.66, 0.65], [0.5] * 3))[0] == IN_PART  # the second condition is missed
    assert judge(claim, values([0.56, 0.57, 0.56], [0.5] * 3))[0] == IN_PART  # there is an effect, and less than was asked
    assert judge(claim, values([0.5, 0.5, 0.5], [0.5] * 3))[0] == NOT_HERE


def test_what_holds_besides_cannot_save_a_headline_that_fails() -> None:
    measured = {**values([0.5, 0.5, 0.5], [0.5] * 3), "loss": {"method": [1, 1.01, 1], "baseline": [2, 2, 2]}}
    claim = Claim("", (), beats(), (Beats("method", "baseline", "loss", better="lower"),))
    status, effects = judge(claim, measured)
    assert status == NOT_HERE
    assert [found.status for found in effects.values()] == [NOT_HERE, HOLDS]


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=8), finite)
def test_swapping_the_arms_turns_the_effect_and_both_cannot_win(pairs: list[tuple[float, float]], by: float) -> None:
    ours, theirs = [list(column) for column in zip(*pairs, strict=True)]
    one, other = effect(beats(by=abs(by)), values(ours, theirs)), effect(beats(by=abs(by)), values(theirs, ours))
    assert one.mean == pytest.approx(-other.mean)
    assert NOT_HERE in (one.status, other.status)
    assert one.low <= one.mean <= one.high
