from __future__ import annotations

import math

import pyarrow as pa
import pytest

from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.metrics import Figure
from tasks.registry.gate import Config, gate

LABELS = [0, 1] * 100


def evidence(accuracy: dict[str, float], ece: float = 0.01, ids: dict[str, list[str]] | None = None) -> Evidence:
    """Evidence in which each model gets the first part of 200 samples right."""
    rows = []
    for model, share in accuracy.items():
        names = (ids or {}).get(model, [f"s{i}" for i in range(200)])
        right = round(share * 200) if not math.isnan(share) else 0
        for at, (name, label) in enumerate(zip(names, LABELS, strict=True)):
            rows.append({"model": model, "sample_id": name, "label": label, "predicted": label if at < right else 1 - label})
    figures = {model: {"accuracy": Figure.exact(share), "ece": Figure.exact(ece)} for model, share in accuracy.items()}
    return Evidence(figures, {}, {}, pa.Table.from_pylist(rows))


def test_without_a_champion_the_candidate_needs_only_to_be_good_enough() -> None:
    assert gate(evidence({"candidate": 0.9})).promote
    refused = gate(evidence({"candidate": 0.4}))
    assert not refused.promote
    assert "accuracy 0.4000 misses at least 0.5" in refused.reason


def test_a_better_candidate_passes_and_a_worse_one_does_not() -> None:
    assert gate(evidence({"candidate": 0.95, "champion": 0.9})).promote
    worse = gate(evidence({"candidate": 0.8, "champion": 0.9}))
    assert not worse.promote
    assert "may be worse than the champion by 0.02: difference -0.1000" in worse.reason


def test_a_tie_passes_at_any_margin() -> None:
    assert gate(evidence({"candidate": 0.9, "champion": 0.9}), Config(margin=0)).promote


def test_not_worse_is_read_off_the_interval_and_not_off_the_value() -> None:
    close = evidence({"candidate": 0.89, "champion": 0.9})
    assert not gate(close, Config(margin=0.011)).promote, "the value is within the margin, the interval is not"
    assert gate(close, Config(margin=0.05)).promote


def test_for_the_calibration_error_lower_is_better() -> None:
    assert not gate(evidence({"candidate": 0.9}, ece=0.3)).promote
    assert gate(evidence({"candidate": 0.9}, ece=0.2)).promote


def test_a_figure_that_is_no_number_never_passes() -> None:
    assert not gate(evidence({"candidate": math.nan})).promote
    assert not gate(evidence({"candidate": 0.9}, ece=math.nan)).promote


def test_other_samples_cannot_be_compared() -> None:
    other = {"champion": [f"t{i}" for i in range(200)]}
    with pytest.raises(UserError, match="not measured on the same samples"):
        gate(evidence({"candidate": 0.9, "champion": 0.9}, ids=other))
