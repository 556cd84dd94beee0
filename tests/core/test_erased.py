"""The suppression list: what is on it stays out, by id and by content, and it tells nobody what it holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core import erased
from tasks.core.dataset import Dataset
from tasks.core.erased import Erased, Traces, image_digest
from tasks.core.errors import UserError
from tasks.pool import read

PIXELS = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
TRACES = Traces(frozenset({"alice-1"}), frozenset({image_digest(PIXELS)}))


def test_a_list_knows_what_was_put_on_it_and_nothing_else(tmp_path: Path) -> None:
    assert erased.add(tmp_path, TRACES, "r-1")
    found = Erased.read(tmp_path)
    assert found.has_id("alice-1")
    assert found.has_content(image_digest(PIXELS.copy()))
    assert not found.has_id("alice-2")
    assert not found.has_content(image_digest(PIXELS.reshape(1, 4, 16)))  # the same bytes in another form are another image


def test_there_is_no_list_where_nothing_was_erased(tmp_path: Path) -> None:
    found = Erased.read(tmp_path / "none")
    assert not found.has_id("alice-1")
    assert not found.has_content(image_digest(PIXELS))


def test_putting_the_same_on_the_list_twice_changes_no_byte(tmp_path: Path) -> None:
    erased.add(tmp_path, TRACES, "r-1")
    before = (tmp_path / erased.LIST).read_bytes()
    assert not erased.add(tmp_path, TRACES, "r-1")
    assert (tmp_path / erased.LIST).read_bytes() == before


def test_a_second_request_keeps_the_first_one_and_its_salt(tmp_path: Path) -> None:
    erased.add(tmp_path, TRACES, "r-1")
    salt = Erased.read(tmp_path).salt
    erased.add(tmp_path, Traces(frozenset({"bob-7"}), frozenset()), "r-2")
    found = Erased.read(tmp_path)
    assert found.salt == salt
    assert found.has_id("alice-1")
    assert found.has_id("bob-7")
    assert erased.requests(tmp_path) == ["r-1", "r-2"]


def test_no_id_stands_in_the_file_and_two_projects_have_other_hashes(tmp_path: Path) -> None:
    erased.add(tmp_path / "a", TRACES, "r-1")
    erased.add(tmp_path / "b", TRACES, "r-1")
    table = pq.read_table(tmp_path / "a" / erased.LIST)
    assert "alice" not in str(table.to_pydict())
    assert b"alice" not in (tmp_path / "a" / erased.LIST).read_bytes()
    assert Erased.read(tmp_path / "a").ids.isdisjoint(Erased.read(tmp_path / "b").ids)


def test_a_damaged_list_stops_the_stage_instead_of_letting_rows_back_in(tmp_path: Path) -> None:
    (tmp_path / erased.LIST).write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match="erased samples could come back"):
        Erased.read(tmp_path)


def test_erased_rows_are_left_out_of_the_pool_and_move_no_other_row(tmp_path: Path) -> None:
    cfg = read.configure({"source": "digits", "limit": 600})
    read.read_pool(cfg, tmp_path / "before")
    before = Dataset.open(tmp_path / "before")
    ids, images = before.ids(), before.images()
    by_id, by_image = ids[3], image_digest(images[20])  # one is known by its id alone, the other by its pixels alone
    erased.add(tmp_path / "erased", Traces(frozenset({by_id}), frozenset({by_image})), "r-1")
    figures = read.read_pool(cfg, tmp_path / "after", erased=Erased.read(tmp_path / "erased"))
    after = Dataset.open(tmp_path / "after")
    assert set(ids) - set(after.ids()) == {by_id, ids[20]}
    assert figures["erased"] == 2
    assert figures["rows"] == len(ids) - 2
    where = dict(zip(ids, before.column("split").to_pylist(), strict=True))
    assert [where[name] for name in after.ids()] == after.column("split").to_pylist()


def test_an_erased_row_that_comes_back_damaged_does_not_enter_quarantine(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = [("alice-1", b"no image"), *((f"x{i}", image) for i, image in enumerate(_pngs(8)))]
    table = pa.table({"sample_id": [r[0] for r in rows], "image": [r[1] for r in rows], "label": [0, 1] * 4 + [0]})
    pq.write_table(table, tmp_path / "crawl.parquet")
    erased.add(tmp_path / "erased", TRACES, "r-1")
    none = {"test": 0.0, "validation": 0.0, "reference": 0.0}
    cfg = read.configure({"source": f"parquet:{tmp_path / 'crawl.parquet'}", **none})
    figures = read.read_pool(cfg, tmp_path / "pool", erased=Erased.read(tmp_path / "erased"))
    assert (figures["rows"], figures["quarantined"], figures["erased"]) == (8, 0, 1)
    assert b"alice" not in (tmp_path / "pool" / "quarantine.parquet").read_bytes()


def test_an_erased_class_stays_out_and_its_label_stays_free(tmp_path: Path) -> None:
    cfg = read.configure({"source": "digits", "limit": 600})
    erased.add(tmp_path / "erased", Traces(frozenset(), frozenset()), "r-1", class_name="three")
    figures = read.read_pool(cfg, tmp_path / "pool", erased=Erased.read(tmp_path / "erased"))
    pool = Dataset.open(tmp_path / "pool")
    assert figures["erased"] > 30
    assert 3 not in pool.labels()
    assert pool.info.classes[3:5] == ("three", "four")


def test_an_erased_concept_keeps_out_captions_that_speak_of_it_in_these_words(tmp_path: Path) -> None:
    erased.add(tmp_path, Traces(frozenset(), frozenset()), "r-1", concept="Red bicycle")
    found = Erased.read(tmp_path)
    assert found.has_concept("a red, bicycle leaning on a wall")
    assert not found.has_concept("a bicycle, red as a wall")
    assert not found.has_concept("a red bicycles")


def _pngs(n: int) -> list[bytes]:
    from tasks.core.dataset import encode

    return encode(np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8))


def test_a_list_from_before_there_were_texts_is_obeyed(tmp_path: Path) -> None:
    erased.add(tmp_path, TRACES, "r-1")
    path = tmp_path / erased.LIST
    table = pq.read_table(path)
    kinds = ["image" if kind == "content" else kind for kind in table["kind"].to_pylist()]
    pq.write_table(table.set_column(1, "kind", pa.array(kinds)), path)
    assert Erased.read(tmp_path).has_content(image_digest(PIXELS))


def test_texts_without_words_are_told_apart() -> None:
    assert erased.text_digest("One, two!") == erased.text_digest("one TWO")
    assert len({erased.text_digest(text) for text in ("", "!!!", "???", "one two")}) == 4
