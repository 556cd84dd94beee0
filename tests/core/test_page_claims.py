"""The page of claims: figures as words, and positions that tell the truth."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from tasks.core import page_claims as page


def condition(**changes: Any) -> dict[str, Any]:
    return {
        **{"arm": "ours", "against": "theirs", "metric": "accuracy", "by": 0.0, "better": "higher", "relative": False},
        **{"effect": 0.05, "ci_low": 0.03, "ci_high": 0.07, "status": "holds", "failed": 0},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "+0.050 [0.030, 0.070]"),
        ({"relative": True}, "+5.0% [3.0, 7.0]"),
        ({"effect": -12.34, "ci_low": -40.1, "ci_high": 15.4}, "\u221212 [\u221240, 15]"),
        ({"ci_low": 0.05, "ci_high": 0.05}, "+0.050 [0.050, 0.050]"),
        ({"effect": 999.98647, "ci_low": 999.982, "ci_high": 999.991}, "+999.99 [999.98, 999.99]"),
        ({"ci_low": None, "ci_high": None}, "+0.05 [no interval]"),
        ({"effect": None}, "\u2013"),
    ],
)
def test_an_effect_has_as_many_digits_as_its_interval_allows(changes: dict[str, Any], text: str) -> None:
    assert page.effect_text({}, condition(**changes)) == text


def test_what_is_asked_reads_as_a_sentence() -> None:
    assert page.asked(condition()) == "accuracy of ours above that of theirs, by any amount"
    assert page.asked(condition(by=0.2, relative=True, better="lower")) == "accuracy of ours below that of theirs, by 20% or more"
    assert page.asked(condition(by=-0.01)) == "accuracy of ours above that of theirs, or short of it by 0.01 at most"


def test_differences_are_positive_where_the_claim_is_right_and_nan_where_a_seed_failed() -> None:
    found = {"values": {"accuracy": {"ours": [0.5, None, 0.2], "theirs": [0.4, 0.3, 0.4]}}}
    assert page.differences(found, condition()) == pytest.approx([0.1, math.nan, -0.2], nan_ok=True)
    assert page.differences(found, condition(better="lower", relative=True)) == pytest.approx([-0.25, math.nan, 0.5], nan_ok=True)


def test_both_sides_of_zero_have_one_scale() -> None:
    drawn = page.forest([("name", "about", condition(effect=0.0, ci_low=-0.2, ci_high=0.4, by=0.1), [-0.1, 0.1])], "label")
    zero = float(re.search(r'<line x1="([\d.]+)"', drawn)[1])  # type: ignore[index]
    circles = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    cut = float(re.search(r'<line x1="([\d.]+)"[^>]*class="cut"', drawn)[1])  # type: ignore[index]
    assert circles[0] - zero == pytest.approx(zero - circles[1], abs=0.11) or circles[1] - zero == pytest.approx(
        zero - circles[0], abs=0.11
    )
    assert cut == pytest.approx(max(circles), abs=0.11)


def test_a_condition_without_any_figure_is_drawn_as_words() -> None:
    drawn = page.forest(
        [("n", "a", condition(effect=None, ci_low=None, ci_high=None, failed=2, status="does not hold here"), [math.nan])], "l"
    )
    assert "does not hold here, 2 failed" in drawn
    assert "<circle" not in drawn


def test_text_from_a_claim_is_escaped() -> None:
    assert "<b>" not in page.forest([("<b>", "<b>", condition(), [0.1])], "<b>")
