"""Tables of paths and of texts, and pools of the rows that a list of uids names."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.core import erased, uids
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.pool.read import Config, fingerprint, read_pool

PLAIN = {"test": 0.0, "validation": 0.0, "reference": 0.0}


def picture(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((6, 6), value, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of six images, two in a folder below, with captions, labels and ids."""
    folder = tmp_path / "source"
    (folder / "more").mkdir(parents=True)
    lines = ["sample_id,image,caption,label"]
    for number in range(6):
        name = f"{'more/' if number > 3 else ''}{number}.png"
        (folder / name).write_bytes(picture(40 * number))
        lines.append(f'r{number},{name},"a ""grey"", square",{number % 2}')
    (folder / "rows.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n")
    return folder / "rows.csv"


def test_a_table_of_paths_is_read_beside_its_images(table: Path, tmp_path: Path) -> None:
    figures = read_pool(Config(source=f"paths:{table}", **PLAIN), tmp_path / "pool")
    found = Dataset.open(tmp_path / "pool")
    assert figures["rows"] == 6
    assert found.ids() == [f"r{number}" for number in range(6)]
    assert found.captions() == ['a "grey", square'] * 6
    assert found.labels().tolist() == [0, 1] * 3
    assert found.images()[:, 0, 0, 0].tolist() == [40 * number for number in range(6)]


def test_tabs_other_names_and_splits_will_do(table: Path, tmp_path: Path) -> None:
    tabbed = table.with_suffix(".tsv")
    tabbed.write_text("file\tabout\tsplit\n0.png\tgrey\ttrain\n1.png\tlighter\ttest\n")
    cfg = Config(source=f"paths:{tabbed}", columns={"image": "file", "caption": "about"}, allow_empty_class=True, **PLAIN)
    read_pool(cfg, tmp_path / "pool")
    found = Dataset.open(tmp_path / "pool")
    assert sorted(zip(found.captions(), found.column("split").to_pylist(), strict=True)) == [("grey", "train"), ("lighter", "test")]


def test_a_path_that_leads_nowhere_or_out_of_the_folder_is_set_aside(table: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(1))
    table.write_text(table.read_text() + f"r6,../secret.png,out,0\nr7,{tmp_path}/secret.png,out,0\nr8,none.png,gone,0\nr9,,empty,0\nr10\n")
    read_pool(Config(source=f"paths:{table}", max_bad=0.9, **PLAIN), tmp_path / "pool")
    aside = pq.read_table(tmp_path / "pool" / "quarantine.parquet").to_pylist()
    reasons = [(row["row"], row["reason"]) for row in aside]
    out, gone, missing = "path leads out of the table's folder", "file cannot be read", "image is missing"
    assert reasons == [(6, out), (7, out), (8, gone), (9, missing), (10, "neither a label nor a caption")]


@pytest.mark.parametrize(
    ("header", "message"),
    [("path,caption", "has no column 'image'"), ("image,words", "neither a label nor a caption column"), ("", "has no column 'image'")],
)
def test_a_table_without_the_columns_is_named(table: Path, tmp_path: Path, header: str, message: str) -> None:
    table.write_text(f"{header}\n0.png,grey\n")
    with pytest.raises(UserError, match=message):
        read_pool(Config(source=f"paths:{table}"), tmp_path / "pool")


def test_a_folder_without_tables_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file ending in \.csv, \.csv\.gz, \.tsv"):
        read_pool(Config(source=f"paths:{tmp_path / 'empty'}"), tmp_path / "pool")


def test_only_the_rows_that_a_list_of_uids_names_come_in(table: Path, tmp_path: Path) -> None:
    listed = tmp_path / "subset.npy"
    listed.write_bytes(uids.to_bytes(uids.uids(["r1", "r4", "r5", "another pool's"])))
    cfg = Config(source=f"paths:{table}", only=str(listed), **PLAIN)
    before = fingerprint(cfg)
    figures = read_pool(cfg, tmp_path / "pool")
    assert Dataset.open(tmp_path / "pool").ids() == ["r1", "r4", "r5"]
    assert (figures["rows"], figures["unlisted"]) == (3, 3)
    listed.write_bytes(uids.to_bytes(uids.uids(["r2"])))
    assert fingerprint(cfg) != before  # another list: the stage runs again
    listed.write_bytes(uids.to_bytes(uids.uids(["another pool's"])))
    with pytest.raises(UserError, match=r"none of the 6 rows of .* is in the list of uids"):
        read_pool(cfg, tmp_path / "pool")
    listed.unlink()
    with pytest.raises(UserError, match="does not exist"):
        read_pool(cfg, tmp_path / "pool")
    assert Dataset.open(tmp_path / "pool").ids() == ["r1", "r4", "r5"]


# texts

TEXTS = ["A short text.", "Another, longer by a word or two.", "Zeilen\nmit Umbruch und Ümläuten"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_texts_are_read_from_any_kind_of_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"texts.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "sample_id": ["t0", "t1", "t2"], "image": [1, 2, 3]}), path)
    elif kind.startswith("json"):
        lines = "".join(json.dumps({"text": text, "sample_id": f"t{at}", "meta": {"more": at}}) + "\n" for at, text in enumerate(TEXTS))
        path.write_bytes(gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode())
    else:
        tab = "\t" if kind == "tsv" else ","
        path.write_text(tab.join(["sample_id", "text"]) + "\n" + "".join(f't{at}{tab}"{text}"\n' for at, text in enumerate(TEXTS)))
    figures = read_pool(Config(source=f"texts:{path}", **PLAIN), tmp_path / "pool")
    found = Dataset.open(tmp_path / "pool")
    assert found.info.schema == "text"
    assert found.info.shape == (0, 0, 0)
    assert dict(zip(found.ids(), found.captions(), strict=True)) == {f"t{at}": text for at, text in enumerate(TEXTS)}
    assert figures["rows"] == 3
    assert figures["quarantined"] == 0
    with pytest.raises(UserError, match="these rows are texts, and this method takes images"):
        found.images()


def test_a_text_that_is_missing_or_no_line_of_json_is_set_aside(tmp_path: Path) -> None:
    lines = ["no json", *(json.dumps({"text": f"text {at}"}) for at in range(5)), json.dumps({"text": " "}), "[1]"]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    cfg = Config(source=f"texts:{tmp_path / 'texts.jsonl'}", max_bad=0.5, **PLAIN)
    assert read_pool(cfg, tmp_path / "pool")["quarantined"] == 3
    reasons = pq.read_table(tmp_path / "pool" / "quarantine.parquet")["reason"].to_pylist()
    assert sorted(reasons) == ["line is no object of JSON"] * 2 + ["text is missing"]
    ids = Dataset.open(tmp_path / "pool").ids()
    read_pool(cfg, tmp_path / "again")
    assert Dataset.open(tmp_path / "again").ids() == ids, "a text without an id is named by its words"
    (tmp_path / "texts.jsonl").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(UserError, match="no column 'text'"):
        read_pool(cfg, tmp_path / "pool")
    (tmp_path / "texts.jsonl.gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_pool(Config(source=f"texts:{tmp_path / 'texts.jsonl.gz'}", **PLAIN), tmp_path / "pool")


def test_a_text_that_was_erased_does_not_come_back_in_other_clothes(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text, "sample_id": f"t{at}"}) + "\n" for at, text in enumerate(TEXTS)))
    cfg = Config(source=f"texts:{source}", **PLAIN)
    read_pool(cfg, tmp_path / "pool")
    erased.add(tmp_path / "erased", erased.traces_of(Dataset.open(tmp_path / "pool").with_ids(["t0"])), "r-1")
    source.write_text(source.read_text() + json.dumps({"text": "a SHORT text", "sample_id": "new"}) + "\n")
    figures = read_pool(cfg, tmp_path / "pool", erased=erased.Erased.read(tmp_path / "erased"))
    assert figures["erased"] == 2
    assert sorted(Dataset.open(tmp_path / "pool").ids()) == ["t1", "t2"]


def test_images_and_texts_do_not_mix(table: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="must both be texts, or both images"):
        read_pool(Config(source=f"paths:{table}", reference_source=f"texts:{tmp_path / 'texts.jsonl'}"), tmp_path / "pool")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_by_name_are_the_classes(tmp_path: Path, kind: str) -> None:
    given = ["dear", "cheap", "dear", "", "cheap"]
    path = tmp_path / f"texts.{kind}"
    if kind == "csv":
        path.write_text("sample_id,text,label\n" + "".join(f"t{at},text {at},{label}\n" for at, label in enumerate(given)))
    else:
        ids, said = [f"t{at}" for at in range(5)], [f"text {at}" for at in range(5)]
        pq.write_table(pa.table({"sample_id": ids, "text": said, "label": [label or None for label in given]}), path)
    read_pool(Config(source=f"texts:{path}", **PLAIN), tmp_path / "pool")
    found = Dataset.open(tmp_path / "pool")
    assert found.info.classes == ("cheap", "dear")
    assert dict(zip(found.ids(), found.labels().tolist(), strict=True)) == {"t0": 1, "t1": 0, "t2": 1, "t3": -1, "t4": 0}


def test_a_reference_with_fewer_names_shares_the_classes_of_both(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("text,label\none,dear\ntwo,cheap\nthree,odd\n")
    (tmp_path / "few.csv").write_text("text,label\nfour,odd\nfive,cheap\n")
    cfg = Config(source=f"texts:{tmp_path / 'all.csv'}", reference_source=f"texts:{tmp_path / 'few.csv'}", **{**PLAIN, "reference": 0.0})
    read_pool(cfg, tmp_path / "pool")
    found = Dataset.open(tmp_path / "pool")
    assert found.info.classes == ("cheap", "dear", "odd")
    assert dict(zip(found.captions(), found.labels().tolist(), strict=True)) == {"one": 1, "two": 0, "three": 2, "four": 2, "five": 0}


def test_labels_of_both_kinds_are_numbers_with_bad_rows_among_them(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,label\none,0\ntwo,dear\nthree,1\nfour,0\n")
    read_pool(Config(source=f"texts:{tmp_path / 'texts.csv'}", max_bad=0.5, **PLAIN), tmp_path / "pool")
    assert Dataset.open(tmp_path / "pool").captions() == ["one", "three", "four"]
    assert pq.read_table(tmp_path / "pool" / "quarantine.parquet")["reason"].to_pylist() == ["label is not an integer"]


def test_more_names_than_classes_may_have_are_no_names(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"text {at},said {at}\n" for at in range(1001)))
    with pytest.raises(UserError, match="label is not an integer"):
        read_pool(Config(source=f"texts:{tmp_path / 'texts.csv'}", **PLAIN), tmp_path / "pool")
