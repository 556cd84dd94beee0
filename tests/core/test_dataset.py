from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import dataset as ds
from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer
from tasks.core.errors import UserError
from tasks.core.files import folder_md5


def pool_copy(tiny: Dataset, folder: Path, table: pa.Table | None = None) -> Dataset:
    """The tiny pool, written again (with other rows where they are given)."""
    whole = table if table is not None else whole_table(tiny)
    with Writer(folder, tiny.info) as out:
        out.write(whole)
    return Dataset.open(folder)


def whole_table(data: Dataset) -> pa.Table:
    return pa.Table.from_batches(list(data._batches(SCHEMAS["image"].names, 1000)), SCHEMAS["image"])


def judge(pool: Dataset, folder: Path, kept: np.ndarray) -> None:
    info = Info("verdicts", of={"path": "../pool", "md5": folder_md5(pool.parts[0].folder)})
    rows = pa.table(
        {"sample_id": pool.ids(), "score": kept.astype(np.float32), "kept": kept, "reason": [""] * len(pool)}, SCHEMAS["verdicts"]
    )
    with Writer(folder, info) as out:
        out.write(rows)


def test_equal_values_give_equal_bytes(tiny: Dataset, tmp_path: Path) -> None:
    pool_copy(tiny, tmp_path / "a")
    pool_copy(tiny, tmp_path / "b")
    assert folder_md5(tmp_path / "a") == folder_md5(tmp_path / "b") == folder_md5(tiny.parts[0].folder)


def test_the_size_of_the_writes_does_not_show(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds, "ROWS_PER_SHARD", 64)
    table = whole_table(tiny)
    with Writer(tmp_path / "many", tiny.info) as out:
        for at in range(0, 400, 7):
            out.write(table.slice(at, 7))
    with Writer(tmp_path / "one", tiny.info) as out:
        out.write(table)
    assert folder_md5(tmp_path / "many") == folder_md5(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("part-*"))) == 7
    assert Dataset.open(tmp_path / "one").ids() == tiny.ids()


def test_a_removed_value_is_gone_from_the_bytes(tiny: Dataset, tmp_path: Path) -> None:
    table = whole_table(tiny)
    secret = pa.array(["a very secret caption", *["plain"] * 399]).dictionary_encode()
    table = table.set_column(table.schema.names.index("caption"), "caption", secret)
    pool_copy(tiny, tmp_path / "a", table)
    pool_copy(tiny, tmp_path / "b", table.slice(1))
    raw = b"".join(pa.parquet.ParquetFile(p).read().to_string(preview_cols=9).encode() for p in (tmp_path / "b").glob("part-*"))
    assert b"secret" not in raw
    assert all(b"secret" not in p.read_bytes() for p in (tmp_path / "b").iterdir())


def test_a_failed_write_leaves_the_last_good_version(tiny: Dataset, tmp_path: Path) -> None:
    before = pool_copy(tiny, tmp_path / "a").md5
    with pytest.raises(RuntimeError), Writer(tmp_path / "a", tiny.info) as out:
        out.write(whole_table(tiny).slice(0, 10))
        raise RuntimeError
    assert Dataset.open(tmp_path / "a").md5 == before


def test_other_readers_see_images(tiny: Dataset) -> None:
    import json

    schema = pa.parquet.read_schema(next(tiny.parts[0].folder.glob("part-*")))
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
    assert b"pandas" not in schema.metadata


def test_no_method_reads_the_truth(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="no method may read"):
        tiny.column("_clean")
    assert tiny.audit("_clean").to_pylist() == [True] * 400


def test_a_column_that_is_not_there_lists_those_that_are(tiny: Dataset) -> None:
    with pytest.raises(UserError, match=r"no column 'lable'; it has sample_id, image, label"):
        tiny.column("lable")


def test_verdicts_open_as_a_view_of_the_pool(tiny: Dataset, tmp_path: Path) -> None:
    pool = pool_copy(tiny, tmp_path / "pool")
    kept = np.arange(400) % 3 == 0
    judge(pool, tmp_path / "filtered", kept)
    assert Dataset.open(tmp_path / "filtered").ids() == [i for i, k in zip(pool.ids(), kept, strict=True) if k]
    assert Dataset.open(tmp_path / "filtered", kept=False).ids() == [i for i, k in zip(pool.ids(), kept, strict=True) if not k]
    pool_copy(tiny, tmp_path / "pool", whole_table(tiny).slice(1))
    with pytest.raises(UserError, match="judges another version"):
        Dataset.open(tmp_path / "filtered")


def test_descendants_go_with_their_ancestors(tiny: Dataset, tmp_path: Path) -> None:
    table = whole_table(tiny).slice(0, 4)
    parents = pa.array([[], ["d00000"], ["d00001", "d00003"], []], pa.list_(pa.string()))
    data = pool_copy(tiny, tmp_path / "a", table.set_column(table.schema.names.index("parents"), "parents", parents))
    assert data.synthetic().tolist() == [False, True, True, False]
    assert data.without_descendants(["d00000"]).ids() == ["d00002", "d00003"]
    assert data.without_descendants(["d00003"]).ids() == ["d00000", "d00001"]
    assert data.without_descendants([]).ids() == data.ids()


def test_a_class_that_loses_its_last_row_is_absent_and_the_file_says_so_only_then(tiny: Dataset, tmp_path: Path) -> None:
    threes = [name for name, label in zip(tiny.ids(), tiny.labels(), strict=True) if label == 3]
    assert tiny.without_descendants(threes[1:]).info.absent == ()
    left = tiny.without_descendants(threes)
    assert left.info.absent == ("three",)
    assert len(left) == len(tiny) - len(threes)
    assert '"absent"' not in tiny.info.to_json()
    assert Info.from_json(tiny.info.to_json()) == tiny.info
    assert Info.from_json(left.info.to_json()).absent == ("three",)


def test_hidden_labels_are_hidden_in_a_joined_set_too(tiny: Dataset) -> None:
    both = tiny.split("train") + tiny.split("test").without_labels()
    assert (both.labels()[:200] >= 0).all()
    assert (both.labels()[200:] == -1).all()
    assert both.split("test").labels().tolist() == [-1] * 100


def test_images_that_are_held_out_can_be_left_out(tiny: Dataset) -> None:
    test = tiny.split("test")
    left = tiny.without_contents_of(test)
    assert not {x.tobytes() for x in left.images()} & {x.tobytes() for x in test.images()}
    assert len(left) <= 300


def test_a_mask_of_another_length_is_refused(tiny: Dataset) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        tiny.where(np.ones(3, dtype=bool))


@settings(max_examples=30, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=400, max_size=400), size=st.integers(1, 300))
def test_a_view_is_the_rows_of_its_mask_however_it_is_read(tiny: Dataset, mask: list[bool], size: int) -> None:
    chosen = np.array(mask)
    view = tiny.where(chosen)
    expected = [i for i, keep in zip(tiny.ids(), mask, strict=True) if keep]
    assert len(view) == len(expected)
    assert view.ids() == expected
    streamed = [row for ids, images in view.image_batches(size) for row in zip(ids, images, strict=True)]
    assert [i for i, _ in streamed] == expected
    assert all(np.array_equal(a, b) for (_, a), b in zip(streamed, tiny.images()[chosen], strict=True))
    again = view.where(np.arange(len(view)) % 2 == 0)
    assert again.ids() == expected[::2]


def test_a_cached_array_equals_the_decoded_rows(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    data = pool_copy(tiny, tmp_path / "data" / "pool")
    whole, test = tiny.images(), tiny.split("test").images()
    monkeypatch.setattr(ds, "CACHE_FROM_ROWS", 100)
    first, again = data.images(), data.images()
    assert isinstance(again, np.memmap)
    assert np.array_equal(first, whole)
    assert np.array_equal(data.split("test").images(), test)
    assert len(list((tmp_path / ".retort" / "cache" / "decoded").iterdir())) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip_is_exact(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 9, 7), dtype=np.uint8)
    assert np.array_equal(ds.decode(ds.encode(images), (channels, 9, 7)), images)


def test_a_folder_that_is_no_dataset_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json; make it with 'dvc repro'"):
        Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Dataset.open(tmp_path)


def test_sets_of_other_shapes_do_not_join(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="different image shapes"):
        tiny + replace(tiny, info=replace(tiny.info, shape=(3, 8, 8)))
