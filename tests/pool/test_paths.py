"""Tables of paths, and pools of the rows that a list of uids names."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.core import uids
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
    with pytest.raises(UserError, match=r"no file ending in \.csv, \.tsv"):
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
