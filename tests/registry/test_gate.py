"""The gate: each kind of rule by hand, ties, missing figures, NaN, and what it refuses to compare."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.method import configured
from tasks.core.metrics import Figure
from tasks.registry import Decision, Offer
from tasks.registry.gate import Answers, Bounds, Config, gain, gate

LABELS = [0, 1] * 100


def evidence(
    accuracy: dict[str, float], ids: dict[str, list[str]] | None = None, confidence: float = 0.9, **figures: dict[str, float]
) -> Evidence:
    """Evidence in which each model gets the first part of 200 samples right; further figures by metric and model."""
    rows = []
    for model, share in accuracy.items():
        names = (ids or {}).get(model, [f"s{i:03d}" for i in range(200)])
        right = round(share * 200) if not math.isnan(share) else 0
        for at, (name, label) in enumerate(zip(names, LABELS, strict=True)):
            predicted = label if at < right else 1 - label
            rows.append({"model": model, "sample_id": name, "label": label, "predicted": predicted, "confidence": confidence})
    found = {model: {"accuracy": Figure.exact(share)} for model, share in accuracy.items()}
    for metric, of in figures.items():
        for model, value in of.items():
            found[model][metric] = Figure.exact(value)
    return Evidence(found, {}, {}, pa.Table.from_pylist(rows))


def ask(found: Evidence, **rules: dict[str, Any]) -> Decision:
    return gate(Offer(evidence=found), Config(rules={metric: Bounds(**bounds) for metric, bounds in rules.items()}))


def test_without_a_champion_the_candidate_needs_only_to_be_good_enough() -> None:
    assert ask(evidence({"candidate": 0.9}), accuracy={"min": 0.5, "min_delta": 0.1, "max_ratio": 1.0}).promote
    refused = ask(evidence({"candidate": 0.4}), accuracy={"min": 0.5})
    assert not refused.promote
    assert refused.reason == "accuracy 0.4 misses at least 0.5"


def test_a_better_candidate_passes_and_a_worse_one_does_not() -> None:
    assert ask(evidence({"candidate": 0.95, "champion": 0.9}), accuracy={"min_delta": -0.02}).promote
    worse = ask(evidence({"candidate": 0.8, "champion": 0.9}), accuracy={"min_delta": -0.02})
    assert not worse.promote
    assert "accuracy may be worse than the champion's by 0.02: gain -0.1000" in worse.reason


def test_a_tie_is_not_worse_at_any_margin_and_never_better() -> None:
    tie = evidence({"candidate": 0.9, "champion": 0.9})
    assert ask(tie, accuracy={"min_delta": 0}).promote
    assert not ask(tie, accuracy={"min_delta": 0.001}).promote


def test_not_worse_and_better_are_read_off_the_interval_and_not_off_the_value() -> None:
    close = evidence({"candidate": 0.89, "champion": 0.9})
    assert not ask(close, accuracy={"min_delta": -0.011}).promote, "the value is within the margin, the interval is not"
    assert ask(close, accuracy={"min_delta": -0.05}).promote
    above = evidence({"candidate": 0.91, "champion": 0.9})
    refused = ask(above, accuracy={"min_delta": 0.005})
    assert not refused.promote, "two samples more of 200 are no proof"
    assert "not shown to be better than the champion's by 0.005" in refused.reason


def test_for_costs_and_errors_lower_is_better() -> None:
    found = evidence({"candidate": 0.9, "champion": 0.9}, latency_ms_b1={"candidate": 3.0, "champion": 2.0})
    assert ask(found, latency_ms_b1={"max_ratio": 1.5}).promote
    assert not ask(found, latency_ms_b1={"max_ratio": 1.4}).promote
    assert not ask(found, latency_ms_b1={"max": 2.9}).promote


def test_calibration_and_the_worst_class_are_paired_too() -> None:
    worse = evidence({"candidate": 0.6, "champion": 0.9}, ece={"candidate": 0.3, "champion": 0.0})
    lost = gain("ece", Answers(worse, "candidate"), Answers(worse, "champion"))
    assert lost.value == pytest.approx(-0.3)  # confidence .9, accuracy .6 and .9
    assert lost.low < -0.3 < lost.high < 0
    assert not ask(worse, ece={"min_delta": -0.1}).promote
    mine, theirs = Answers(worse, "candidate"), Answers(worse, "champion")
    theirs.hits = np.arange(200) % 2 == 0  # the champion never gets class 1
    mine.hits = np.arange(200) % 4 != 1  # the candidate gets half of it
    assert gain("worst_class_accuracy", mine, theirs).value == pytest.approx(0.5)


def test_a_figure_that_is_missing_or_no_number_meets_no_rule() -> None:
    missing = ask(evidence({"candidate": 0.9}), avg_gap={"max": 5})
    assert not missing.promote
    assert missing.reason == "avg_gap was not measured; measured: accuracy"
    assert ask(evidence({"candidate": 0.9}), accuracy={"min": 0.5}, avg_gap={"max": 5, "optional": True}).promote
    assert not ask(evidence({"candidate": math.nan}), accuracy={"min": 0.0}).promote
    assert not ask(evidence({"candidate": 0.9}, ece={"candidate": math.nan}), ece={"max": 1}).promote
    lacking = evidence({"candidate": 0.9, "champion": 0.9}, size_bytes={"candidate": 10})
    assert not ask(lacking, size_bytes={"max_ratio": 2}).promote
    nothing = evidence({"candidate": 0.9, "champion": 0.9}, size_bytes={"candidate": 10, "champion": 0})
    assert not ask(nothing, size_bytes={"max_ratio": 2}).promote


def test_other_samples_cannot_be_compared() -> None:
    other = {"champion": [f"t{i:03d}" for i in range(200)]}
    with pytest.raises(UserError, match="not measured on the same samples"):
        ask(evidence({"candidate": 0.9, "champion": 0.9}, ids=other), accuracy={"min_delta": 0})


def test_accuracy_under_shifts_is_paired_where_it_was_measured() -> None:
    found = evidence({"candidate": 0.9, "champion": 0.9}, shifted_accuracy={"candidate": 0.8, "champion": 0.7})
    unmeasured = ask(found, shifted_accuracy={"min_delta": 0})
    assert not unmeasured.promote
    assert found.per_sample is not None
    shifted = pa.array([0.8] * 200 + [0.7] * 200)
    rows = replace(found, per_sample=found.per_sample.append_column("shifted", shifted))
    assert ask(rows, shifted_accuracy={"min_delta": 0.09}).promote
    assert not ask(rows, shifted_accuracy={"min_delta": 0.11}).promote


@pytest.mark.parametrize(("low", "passed"), [(-0.01, True), (-0.02, True), (-0.03, False), (math.nan, False)])
def test_embeddings_must_serve_the_champions_gallery_by_the_low_end_of_the_interval(low: float, passed: bool) -> None:
    found = evidence({"candidate": 0.9, "champion": 0.9})
    found.figures["candidate"]["compatibility"] = Figure(0.0, low, 0.02)
    rules = {"accuracy": Bounds(min=0.5)}
    assert gate(Offer(evidence=found), Config(rules=rules, compatible_with="champion")).promote == passed
    assert gate(Offer(evidence=found), Config(rules=rules)).promote


def test_compatibility_that_was_not_measured_is_not_met_and_without_a_champion_not_asked_for() -> None:
    cfg = Config(rules={"accuracy": Bounds(min=0.5)}, compatible_with="champion")
    refused = gate(Offer(evidence=evidence({"candidate": 0.9, "champion": 0.9})), cfg)
    assert refused.reason.endswith("embedding compatibility with the champion was not measured")
    assert gate(Offer(evidence=evidence({"candidate": 0.9})), cfg).promote


def test_a_gate_without_evidence_says_what_to_do() -> None:
    with pytest.raises(UserError, match="needs evidence on the candidate; evaluate it first"):
        gate(Offer())


def test_every_rule_is_in_the_verdict_with_both_figures() -> None:
    found = ask(evidence({"candidate": 0.8, "champion": 0.9}), accuracy={"min": 0.5, "min_delta": -0.02, "max_ratio": 2})
    assert [(rule.rule, rule.passed) for rule in found.rules] == [
        ("accuracy at least 0.5", True),
        ("accuracy within 0.02 of champion", False),
        ("accuracy at most 2 times champion's", True),
    ]
    assert (found.rules[1].candidate, found.rules[1].champion) == (0.8, 0.9)
    assert found.rules[1].low < -0.1 < found.rules[1].high


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"accuracy": {}}, "a rule needs min, max, min_delta or max_ratio"),
        (
            {"nll": {"min_delta": 0}},
            "cannot be paired sample by sample: that takes accuracy, worst_class_accuracy, ece, shifted_accuracy; use max_ratio",
        ),
        ({"accuracy": {"minimum": 1}}, "no setting 'rules.accuracy.minimum'"),
        ({}, "at least 1"),
    ],
)
def test_rules_that_ask_for_nothing_or_for_what_cannot_be_told_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configured(Config, "registry.gate", {"rules": rules})
