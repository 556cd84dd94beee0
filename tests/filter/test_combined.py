from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tasks.core.dataset import SCHEMAS, Dataset
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.filter._shared import verdicts
from tasks.filter.combined import Config, Judged, agreement, chained, combined, parts, ranks, together
from tasks.filter.random import Config as Random
from tasks.filter.random import random


def judged(name: str, scores: list[float], kept: list[int], at: list[int] | None = None) -> Judged:
    marks = np.array(kept, dtype=bool)
    ids = pa.chunked_array([[f"r{place}" for place in at or range(len(scores))]])
    made = Made(verdicts(ids, np.array(scores, dtype=np.float32), marks, "low"))
    where = np.array(at if at is not None else range(len(scores)))
    return Judged(name, where, np.array(scores, dtype=np.float32), marks, ["" if mark else "low" for mark in kept], made)


A, B = judged("a", [0.1, 0.2, 0.3, 0.4], [0, 1, 1, 1]), judged("b", [30, 40, 10, 20], [1, 1, 0, 0])


def test_all_keeps_what_every_filter_keeps_and_any_what_one_does() -> None:
    scores, kept, reasons = together([A, B], every=True)
    assert kept.tolist() == [False, True, False, False]
    assert reasons == ["a: low", "", "b: low", "b: low"]
    np.testing.assert_allclose(scores, [1 / 3, 2 / 3, 1 / 3, 2 / 3], rtol=1e-6)
    assert together([A, B], every=False)[1].tolist() == [True] * 4


def test_a_chain_judges_what_is_left_and_its_scores_say_how_far_a_row_came() -> None:
    scores, kept, reasons = chained([A, judged("b", [1, 3, 2], [0, 1, 1], at=[1, 2, 3])], 4)
    assert kept.tolist() == [False, False, True, True]
    assert reasons == ["a: low", "b: low", "", ""]
    np.testing.assert_allclose(scores, [0, 0.5, 1, 0.75])


def test_agreement_is_counted_by_hand() -> None:
    found = agreement([A, B])
    assert found == pytest.approx({"a/alone": 1, "b/alone": 2, "a+b/overlap": 1 / 4, "a+b/spearman": -0.6})
    assert np.isnan(agreement([A, judged("c", [1, 1, 1, 1], [1, 1, 1, 1])])["a+c/spearman"])


def test_ranks_are_shares_and_ties_share_a_place() -> None:
    assert ranks(np.array([5, 1, 5, 9], dtype=np.float32)).tolist() == [0.5, 0, 0.5, 1]
    assert ranks(np.array([5], dtype=np.float32)).tolist() == [0]


def test_the_real_filters_are_run_and_a_chain_spares_the_later_ones(tiny: Dataset) -> None:
    pool, reference = tiny.split("train"), tiny.split("reference")
    some = ({"method": "random", "keep": 0.5}, {"method": "random", "keep": 0.8})
    alone = [np.asarray(random(pool, reference, Random(keep=share)).rows["kept"]) for share in (0.5, 0.8)]
    made = combined(pool, reference, Config(filters=some))
    assert made.rows.schema == SCHEMAS["verdicts"]
    np.testing.assert_array_equal(np.asarray(made.rows["kept"]), alone[0] & alone[1])
    assert made.figures["random2/seen"] == len(pool)
    chain = combined(pool, reference, Config(how="chain", filters=some))
    assert chain.figures["random2/seen"] == alone[0].sum() == made.figures["random/kept"]
    assert chain.figures["kept"] == int(0.8 * alone[0].sum())
    assert not any(name.endswith("/overlap") for name in chain.figures)
    nested = combined(pool, reference, Config(how="chain", filters=({"method": "combined", "filters": some}, some[0])))
    assert nested.figures["combined/kept"] == made.figures["kept"]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ((), "needs two or more entries"),
        (({"method": "random"},), "needs two or more entries"),
        (({"keep": 0.5}, {"method": "random"}), r"filters\[0\] must name its 'method:'"),
        (({"method": "random"}, {"method": "randon"}), r"filters\[1\]: .*random"),
        (({"method": "random"}, {"method": "random", "kep": 1}), r"filters\[1\]: filter.random has no setting 'kep'; did you mean 'keep'"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place(filters: tuple[dict[str, object], ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parts(filters)


def test_where_nothing_is_left_it_says_so(tiny: Dataset) -> None:
    pool, reference = tiny.split("train"), tiny.split("reference")
    strict = ({"method": "random", "keep": 0.005}, {"method": "dfn", "keep": 0.005, "steps": 2, "width": 4})
    with pytest.raises(UserError, match="no row is kept by all of random, dfn: let them keep more"):
        combined(pool, reference, Config(filters=strict))
    assert combined(pool, reference, Config(how="any", filters=strict)).figures["kept"] == 2
