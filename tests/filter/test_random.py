from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.dataset import SCHEMAS, Dataset
from tasks.core.errors import UserError
from tasks.filter._shared import keep_top, survivors, verdicts
from tasks.filter.random import Config, draws, random


def ids(names: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(names, pa.string())])


def test_keeps_the_share_in_pool_order(tiny: Dataset) -> None:
    pool = tiny.split("train")
    made = random(pool, tiny.split("reference"), Config(keep=0.29))
    assert made.rows.schema == SCHEMAS["verdicts"]
    assert made.rows["sample_id"].to_pylist() == pool.ids()
    assert sum(made.rows["kept"].to_pylist()) == 58 == made.figures["kept"]
    assert {(kept, reason) for kept, reason in zip(*(made.rows[c].to_pylist() for c in ("kept", "reason")), strict=True)} == {
        (True, ""),
        (False, "draw below the top 29%"),
    }


def test_a_row_draws_the_same_whatever_else_is_in_the_pool(tiny: Dataset) -> None:
    pool = tiny.split("train")
    whole = draws(pool.column("sample_id"), 3)
    np.testing.assert_array_equal(draws(pool.take(np.arange(50, 200)).column("sample_id"), 3), whole[50:])
    assert not np.array_equal(draws(pool.column("sample_id"), 4), whole)


def test_draws_are_uniform() -> None:
    some = draws(ids([f"r{i}" for i in range(20_000)]), 0)
    assert 0 <= some.min() < some.max() < 1
    counts, _ = np.histogram(some, bins=10, range=(0, 1))
    assert np.abs(counts - 2000).max() < 200  # 4.7 standard deviations


def test_the_count_is_the_share_rounded_down_but_not_by_float_error() -> None:
    assert [survivors(100, 0.29), survivors(10, 0.19), survivors(7, 1.0), survivors(1000, 0.15)] == [29, 1, 7, 150]
    with pytest.raises(UserError, match=r"keep=0.01 leaves none of the pool's 10 rows; valid: 0.1 or more"):
        survivors(10, 0.01)
    with pytest.raises(UserError, match="no rows"):
        survivors(0, 0.5)


def test_the_threshold_is_the_score_at_the_index_of_the_count() -> None:
    kept, threshold = keep_top(np.array([0.1, 0.9, 0.5, 0.7], dtype=np.float32), ids(list("abcd")), 2)
    assert kept.tolist() == [False, True, False, True]
    assert threshold == 0.5


def test_ties_are_kept_by_id_up_to_the_count() -> None:
    scores = np.array([0.5, 0.5, 0.9, 0.5, 0.1], dtype=np.float32)
    kept, threshold = keep_top(scores, ids(["z", "b", "c", "a", "d"]), 3)
    assert kept.tolist() == [False, True, True, True, False]
    assert threshold == 0.5


def test_all_rows_can_be_kept() -> None:
    kept, threshold = keep_top(np.array([0.5, 0.2], dtype=np.float32), ids(["a", "b"]), 2)
    assert kept.all()
    assert 0.19 < threshold < np.float32(0.2)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_exactly_the_count_survives_and_the_order_of_rows_does_not_matter(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    order = data.draw(st.permutations(range(len(values))))
    scores, names = np.array(values, dtype=np.float32), [f"{i:02d}" for i in range(len(values))]
    kept, threshold = keep_top(scores, ids(names), count)
    assert kept.sum() == count
    assert kept[scores > threshold].all()
    assert not kept[scores < threshold].any()
    moved, _ = keep_top(scores[list(order)], ids([names[i] for i in order]), count)
    assert moved.tolist() == kept[list(order)].tolist()


def test_a_million_verdicts_are_plain_columns() -> None:
    n = 1_000_000
    names = pa.chunked_array([pa.array(np.arange(n)).cast(pa.string())])
    scores = draws_like(n)
    kept, _ = keep_top(scores, names, 300_000)
    table = verdicts(names, scores, kept, "no")
    assert table.num_rows == n
    assert pa.compute.sum(table["kept"]).as_py() == 300_000
    assert pa.compute.sum(pa.compute.equal(table["reason"], "no")).as_py() == 700_000


def draws_like(n: int) -> np.ndarray:
    return np.random.default_rng(0).random(n, dtype=np.float32).round(3)  # many ties
