"""The pool's reader: every kind of source, every mistake, and nothing lost when it fails."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.core.dataset import IMAGE, QUARANTINE, Dataset
from tasks.core.errors import UserError
from tasks.core.files import folder_md5
from tasks.pool import _digits, _draw, _images
from tasks.pool._base import resolve
from tasks.pool._check import _tracked, whole
from tasks.pool._intake import short
from tasks.pool.read import Config, configure, parse_source, plain_settings, read_pool

ALL_TRAIN = {"test": 0.0, "validation": 0.0, "reference": 0.0}


def png(value: int = 0, size: tuple[int, int] = (6, 6), mode: str = "L", kind: str = "PNG", **how: Any) -> bytes:
    """An image file whose pixels all depend on `value`."""
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **how)
    return out.getvalue()


def rows(n: int, start: int = 0, **columns: list[Any]) -> dict[str, list[Any]]:
    """Columns of a source: n rows of two classes in turn."""
    numbers = range(start, start + n)
    made = {
        "sample_id": [f"s{i}" for i in numbers],
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in numbers],
        "label": [i % 2 for i in numbers],
    }
    return {name: values for name, values in {**made, **columns}.items() if values is not None}


def write(path: Path, columns: dict[str, list[Any]], names: list[str] | None = None, **types: pa.DataType) -> str:
    """A Parquet source; gives its address."""
    known = {"image": IMAGE, "label": pa.int64(), **types}
    table = pa.table({name: pa.array(values, known.get(name, pa.string())) for name, values in columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(names or ["cat", "dog"]), "licence": "MIT"}), path)
    return f"parquet:{path}"


def read(source: str, out: Path, **settings: Any) -> tuple[Dataset, dict[str, float], list[dict[str, Any]]]:
    figures = read_pool(Config(source=source, **{**ALL_TRAIN, **settings}), out)
    table = pq.read_table(out / "quarantine.parquet")
    assert table.schema.equals(QUARANTINE)
    return Dataset.open(out), figures, table.to_pylist()


def tar(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return f"pairs:{path}"


def tree(path: Path, classes: dict[str, list[bytes]]) -> str:
    for name, images in classes.items():
        (path / name).mkdir(parents=True)
        for at, blob in enumerate(images):
            (path / name / f"{at}.png").write_bytes(blob)
    return f"folder:{path}"


# ---- digits ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, dict[str, float]]:
    out = tmp_path_factory.mktemp("digits") / "pool"
    figures = read_pool(Config(), out)
    return Dataset.open(out), figures


def test_digits_are_all_there_and_split(digits: tuple[Dataset, dict[str, float]]) -> None:
    data, figures = digits
    assert len(data) == figures["rows"] == 1797
    assert data.info.shape == (1, 8, 8)
    assert figures["quarantined"] == 0
    counts = Counter(data.column("split").to_pylist())
    assert {f"rows_{split}": float(n) for split, n in counts.items()} == {k: v for k, v in figures.items() if k.startswith("rows_")}
    assert counts["test"] / 1797 == pytest.approx(0.2, abs=0.03)
    assert counts["validation"] / (1797 - counts["test"]) == pytest.approx(0.1, abs=0.03)
    from sklearn.datasets import load_digits

    first = data.with_ids(["digits-0000"]).images()[0, 0]
    assert np.array_equal(first, np.round(load_digits().images[0] * 255 / 16).astype(np.uint8))


def test_three_in_ten_train_captions_are_spoiled_and_no_others(digits: tuple[Dataset, dict[str, float]]) -> None:
    data, figures = digits
    train = data.split("train")
    clean = np.asarray(train.audit("_clean"))
    assert (~clean).sum() == round(0.3 * len(train))
    assert figures["share_clean"] == pytest.approx(clean.mean())
    assert np.asarray(data.split("test", "validation", "reference").audit("_clean")).all()


def test_spoiled_captions_are_unrelated_look_alike_or_any_other_digit(digits: tuple[Dataset, dict[str, float]]) -> None:
    from sklearn.datasets import load_digits

    train = digits[0].split("train")
    truth = load_digits().target[[int(i.removeprefix("digits-")) for i in train.ids()]]
    labels, captions, clean = train.labels(), train.captions(), np.asarray(train.audit("_clean"))
    unrelated = labels < 0
    assert unrelated.sum() == round(0.3 * (~clean).sum())
    assert {captions[at] for at in np.flatnonzero(unrelated)} <= set(_digits.UNRELATED)
    named = ~unrelated
    assert np.array_equal(clean[named], labels[named] == truth[named])
    assert all(_digits.NAMES[labels[at]] in captions[at] for at in np.flatnonzero(named))
    wrong = named & ~clean
    alike = labels[wrong] == np.array(_digits.LOOK_ALIKE)[truth[wrong]]
    assert alike.mean() == pytest.approx(0.5 + 0.5 / 9, abs=0.06)
    assert len(set(captions)) > 50


def test_noise_is_exact_at_its_limits(tmp_path: Path) -> None:
    _, none, _ = read("digits", tmp_path / "a", digits_noise=0.0)
    _, every, _ = read("digits", tmp_path / "b", digits_noise=1.0, digits_unrelated=0.0)
    assert (none["share_clean"], every["share_clean"]) == (1.0, 0.0)


def test_look_alikes_are_other_digits() -> None:
    assert all(digit != other for digit, other in enumerate(_digits.LOOK_ALIKE))


def test_the_truth_about_captions_is_hidden_from_methods(digits: tuple[Dataset, dict[str, float]]) -> None:
    with pytest.raises(UserError, match="_clean"):
        digits[0].column("_clean")


def test_another_seed_moves_the_noise_but_no_split(tmp_path: Path) -> None:
    read_pool(Config(), tmp_path / "a", seed=0)
    read_pool(Config(), tmp_path / "b", seed=1)
    a, b = Dataset.open(tmp_path / "a"), Dataset.open(tmp_path / "b")
    assert a.column("split").equals(b.column("split"))
    assert not a.audit("_clean").equals(b.audit("_clean"))


def test_the_cap_on_reference_rows_holds_for_digits(tmp_path: Path) -> None:
    _, figures, _ = read("digits", tmp_path / "pool", reference=0.5, reference_rows=20)
    assert figures["rows_reference"] == 20
    assert figures["rows"] == 1797


# ---- Parquet ---------------------------------------------------------------------------------------------------------------------------


def test_parquet_rows_arrive_as_they_are(tmp_path: Path) -> None:
    source = rows(10)
    data, figures, bad = read(write(tmp_path / "in.parquet", source), tmp_path / "pool")
    assert data.ids() == source["sample_id"]
    assert data.labels().tolist() == source["label"]
    assert [image["bytes"] for image in data.column("image").to_pylist()] == [image["bytes"] for image in source["image"]]
    assert data.info.classes == ("cat", "dog")
    assert (data.info.licence, data.info.shape, data.info.name) == ("MIT", (1, 6, 6), "in")
    assert all(("cat", "dog")[label] in text for label, text in zip(data.labels(), data.captions(), strict=True))
    assert data.audit("_clean").null_count == 10
    assert not data.synthetic().any()
    assert figures == {"rows": 10, "rows_train": 10, "rows_reference": 0, "rows_validation": 0, "rows_test": 0, "quarantined": 0}
    assert bad == []


def test_a_plain_path_a_folder_a_glob_and_a_url_give_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", rows(6))
    write(tmp_path / "in" / "deep" / "b.parquet", rows(4, start=6))
    write(tmp_path / "in" / ".hidden.parquet", rows(4))
    memory = fsspec.filesystem("memory")
    memory.pipe("/pool-in/a.parquet", (tmp_path / "in" / "a.parquet").read_bytes())
    wanted = [f"s{i}" for i in range(6)]
    assert read(str(tmp_path / "in" / "a.parquet"), tmp_path / "1")[0].ids() == wanted
    assert read(f"parquet:{tmp_path}/in/*.parquet", tmp_path / "2")[0].ids() == wanted
    assert read("parquet:memory://pool-in/a.parquet", tmp_path / "3")[0].ids() == wanted
    assert read("parquet:memory://pool-in", tmp_path / "4")[0].ids() == wanted
    assert read(f"parquet:{tmp_path}/in", tmp_path / "5")[0].ids() == [f"s{i}" for i in range(10)]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    made = rows(4)
    odd = {"key": made["sample_id"], "picture": made["image"], "y": made["label"], "words": list("abcd"), "part": ["train"] * 3 + ["test"]}
    names = {"sample_id": "key", "image": "picture", "label": "y", "caption": "words", "split": "part"}
    data, figures, _ = read(write(tmp_path / "in.parquet", odd, picture=IMAGE, y=pa.int64()), tmp_path / "pool", columns=names)
    assert data.captions() == list("abcd")
    assert figures["rows_test"] == 1


def test_a_row_without_an_id_is_named_by_its_pixels_and_caption(tmp_path: Path) -> None:
    import hashlib

    made = rows(2, sample_id=None, text=["a cat", "a dog"])
    data, _, _ = read(write(tmp_path / "in.parquet", made), tmp_path / "pool")
    pixels = np.asarray(Image.open(io.BytesIO(png(0)))).tobytes()
    assert data.ids()[0] == hashlib.md5(pixels + b"a cat").hexdigest()
    assert len(set(data.ids())) == 2


def test_labels_may_be_class_names_or_their_numbers_as_text(tmp_path: Path) -> None:
    data, _, _ = read(write(tmp_path / "in.parquet", rows(4, label=["dog", "0", "cat", "1"]), label=pa.string()), tmp_path / "pool")
    assert data.labels().tolist() == [1, 0, 0, 1]


def test_class_names_of_the_datasets_library_are_understood(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["ox", "emu"]}}}}
    table = pa.table({"image": pa.array(rows(4)["image"], IMAGE), "label": [0, 1, 0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "in.parquet")
    assert read(str(tmp_path / "in.parquet"), tmp_path / "pool")[0].info.classes == ("ox", "emu")


def test_without_class_names_classes_are_numbered(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array(rows(4)["image"], IMAGE), "label": [0, 1, 0, 1]}), tmp_path / "in.parquet")
    data, _, _ = read(str(tmp_path / "in.parquet"), tmp_path / "pool")
    assert data.info.classes == ("class 0", "class 1")
    assert all(f"class {label}" in text for label, text in zip(data.labels(), data.captions(), strict=True))


def test_a_dataset_of_ours_is_a_source(tmp_path: Path) -> None:
    bad = rows(200)
    bad["image"][3] = None
    first, _, quarantined = read(write(tmp_path / "in.parquet", bad), tmp_path / "one")
    second, _, _ = read(f"parquet:{tmp_path / 'one'}", tmp_path / "two")
    assert len(quarantined) == 1
    assert second.ids() == first.ids()
    assert second.captions() == first.captions()
    assert second.info.classes == first.info.classes


def test_text_that_is_not_utf8_is_patched(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(struct.pack("<iii", 0, 2, 5)), pa.py_buffer(b"\xff\xfeabc")])
    table = pa.table({"image": pa.array(rows(2)["image"], IMAGE), "label": [0, 1], "text": broken})
    pq.write_table(table, tmp_path / "in.parquet")
    assert read(str(tmp_path / "in.parquet"), tmp_path / "pool")[0].captions() == ["\ufffd\ufffd", "abc"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_any_kind_of_text_column_will_do(tmp_path: Path, kind: pa.DataType) -> None:
    source = write(tmp_path / "in.parquet", rows(4, text=list("abcd"), split=["train"] * 4), sample_id=kind, text=kind, split=kind)
    assert read(source, tmp_path / "pool")[0].captions() == list("abcd")


def test_fashion_mnist_is_read_whole(tmp_path: Path, shared: Path) -> None:
    data, figures, _ = read(f"parquet:{shared / 'fashion_mnist' / 'train.parquet'}", tmp_path / "pool", limit=3000, test=0.2, reference=0.1)
    assert (figures["rows"], figures["quarantined"]) == (3000, 0)
    assert data.info.shape == (1, 28, 28)
    assert data.info.classes[9] == "Ankle boot"
    assert data.info.licence == "MIT"
    assert figures["rows_test"] / 3000 == pytest.approx(0.2, abs=0.03)
    assert np.bincount(data.labels(), minlength=10).min() > 200


def test_emoji_keep_their_own_captions_splits_and_colours(tmp_path: Path, shared: Path) -> None:
    data, figures, _ = read(f"parquet:{shared / 'emoji'}", tmp_path / "pool", limit=2000, test=0.2)
    table = pq.read_table(sorted((shared / "emoji").glob("*.parquet")), columns=["sample_id", "text", "split"])
    own = {row["sample_id"]: row for row in table.to_pylist()}
    assert data.info.shape == (3, 32, 32)
    assert data.captions() == [own[i]["text"] for i in data.ids()]
    assert data.column("split").to_pylist() == [own[i]["split"] for i in data.ids()]
    assert figures["rows_test"] > 0
    assert len(np.unique(data.images()[:50].reshape(50, 3, -1)[:, 0] - data.images()[:50].reshape(50, 3, -1)[:, 2])) > 1


# ---- folders and pairs -----------------------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders_is_read(tmp_path: Path) -> None:
    where = tree(tmp_path / "in", {"dog": [png(1), png(2)], "cat": [png(3), png(4, kind="PNG")]})
    (tmp_path / "in" / "cat" / "x.jpg").write_bytes(png(5, kind="JPEG"))
    (tmp_path / "in" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".trash").mkdir()
    data, figures, _ = read(where, tmp_path / "pool")
    assert data.info.classes == ("cat", "dog")
    assert data.labels().tolist() == [0, 0, 0, 1, 1]
    assert figures["rows"] == 5
    assert all(image["bytes"].startswith(b"\x89PNG") for image in data.column("image").to_pylist())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_every_format_becomes_png(tmp_path: Path, kind: str) -> None:
    where = tree(tmp_path / "in", {"one": [png(1, mode="RGB", kind=kind)]})
    (tmp_path / "in" / "one" / "0.png").rename(tmp_path / "in" / "one" / f"0.{kind.lower()}")
    data, _, _ = read(where, tmp_path / "pool")
    expected = np.asarray(Image.open(io.BytesIO(png(1, mode="RGB", kind=kind))).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(data.images()[0], expected)


def test_split_folders_above_class_folders_are_splits(tmp_path: Path) -> None:
    tree(tmp_path / "in" / "train", {"cat": [png(1)], "dog": [png(2)]})
    tree(tmp_path / "in" / "test", {"cat": [png(3)], "dog": [png(4)]})
    data, figures, _ = read(f"folder:{tmp_path / 'in'}", tmp_path / "pool")
    assert data.info.classes == ("cat", "dog")
    assert (figures["rows_train"], figures["rows_test"]) == (2, 2)


def test_unreadable_files_and_images_outside_classes_are_set_aside(tmp_path: Path) -> None:
    where = tree(tmp_path / "in", {"cat": [png(1), b"no image", png(2)[:-20]]})
    (tmp_path / "in" / "stray.png").write_bytes(png(3))
    _, figures, bad = read(where, tmp_path / "pool", max_bad=1.0)
    assert figures["rows"] == 1
    assert {row["file"]: row["reason"] for row in bad} == {
        "cat/1.png": "not a PNG, JPEG, WebP or BMP image",
        "cat/2.png": "image is damaged or cut short",
        "stray.png": "image is not in a class folder",
    }


def test_the_same_image_twice_in_a_class_is_a_duplicate(tmp_path: Path) -> None:
    _, figures, bad = read(tree(tmp_path / "in", {"cat": [png(1), png(1)], "dog": [png(1)]}), tmp_path / "pool", max_bad=1.0)
    assert figures["rows"] == 2
    assert [row["reason"] for row in bad] == ["sample_id was there before"]


def test_pairs_as_parquet_need_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "in.parquet", rows(3, label=None, text=["a", "b", "c"]))
    data, _, _ = read(f"pairs:{tmp_path / 'in.parquet'}", tmp_path / "pool", allow_empty_class=True)
    assert data.captions() == ["a", "b", "c"]
    assert data.labels().tolist() == [-1, -1, -1]


def test_webdataset_shards_are_read(tmp_path: Path) -> None:
    members = {
        "a/0.png": png(0),
        "a/0.txt": b"first ",
        "a/0.cls": b"1",
        "b/0.jpg": png(1, kind="JPEG"),
        "b/0.json": json.dumps({"caption": "second", "label": 0, "split": "train"}).encode(),
        "2.png": png(2),
        "2.json": json.dumps({"sample_id": "own", "text": "third \ud800", "split": "test"}).encode(),
    }
    members["a/0.json"] = b'{"split": "train"}'
    ordered = {name: members[name] for name in sorted(members, key=lambda name: (name.startswith("2"), name))}
    data, figures, _ = read(tar(tmp_path / "in" / "000.tar", ordered), tmp_path / "pool")
    assert data.ids() == ["a/0", "b/0", "own"]
    assert data.captions() == ["first", "second", "third ?"]
    assert data.labels().tolist() == [1, 0, -1]
    assert figures["rows_test"] == 1
    assert data.info.classes == ("class 0", "class 1")


def test_names_that_climb_out_of_an_archive_write_nothing(tmp_path: Path) -> None:
    where = tar(
        tmp_path / "in" / "x.tar", {"../../evil.png": png(0), "../../evil.txt": b"hello", "/abs/two.png": png(1), "/abs/two.cls": b"0"}
    )
    before = set(tmp_path.rglob("*"))
    data, _, _ = read(where, tmp_path / "pool")
    assert data.ids() == ["evil", "abs/two"]
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "pool")} == before


def test_bad_samples_of_a_shard_are_set_aside(tmp_path: Path) -> None:
    members = {"0.png": png(0), "0.txt": b"fine", "1.txt": b"no image", "2.png": png(2), "2.json": b"{", "3.png": png(3), "3.cls": b"dog"}
    _, figures, bad = read(tar(tmp_path / "x.tar", members), tmp_path / "pool", max_bad=1.0)
    assert figures["rows"] == 1
    assert [(row["row"], row["column"], row["value"], row["reason"]) for row in bad] == [
        (1, "image", None, "image is missing"),
        (2, "json", "2.json", "not a JSON object"),
        (3, "label", "dog", "label is not an integer"),
    ]


def test_prefixed_ids_tell_shards_apart(tmp_path: Path) -> None:
    for shard, value in (("a", 1), ("b", 2)):
        tar(tmp_path / "in" / f"{shard}.tar", {"0.png": png(value), "0.cls": b"0"})
    data, _, _ = read(f"pairs:{tmp_path / 'in'}", tmp_path / "pool", prefix_ids=True)
    assert data.ids() == ["a-0", "b-0"]


# ---- images ----------------------------------------------------------------------------------------------------------------------------


def test_images_are_resized_to_a_square(tmp_path: Path) -> None:
    made = rows(2, image=[{"bytes": png(0, size=(9, 5)), "path": None}, {"bytes": png(1), "path": None}])
    data, _, _ = read(write(tmp_path / "in.parquet", made), tmp_path / "pool", size=4)
    assert data.images().shape == (2, 1, 4, 4)


def test_without_a_size_another_size_is_set_aside_with_the_way_out(tmp_path: Path) -> None:
    made = rows(4)
    made["image"][2] = {"bytes": png(0, size=(9, 5)), "path": "big.png"}
    _, _, bad = read(write(tmp_path / "in.parquet", made), tmp_path / "pool", max_bad=0.5)
    assert [(row["value"], row["reason"]) for row in bad] == [
        ("big.png", "image is 9x5 pixels, the pool's first is 6x6: set `size` to resize them")
    ]


def test_colour_is_never_lost_unasked(tmp_path: Path) -> None:
    made = rows(4)
    made["image"][2] = {"bytes": png(2, mode="RGB"), "path": None}
    source = write(tmp_path / "in.parquet", made)
    _, _, bad = read(source, tmp_path / "a", max_bad=0.5)
    assert "set `mode`" in bad[0]["reason"]
    assert read(source, tmp_path / "b", mode="grey")[0].info.shape == (1, 6, 6)
    colour = read(source, tmp_path / "c", mode="rgb")[0]
    assert np.array_equal(colour.images()[2].transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(png(2, mode="RGB")))))


def test_transparent_parts_become_white() -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(clear, "PNG")
    blob, _ = _images.standard(clear.getvalue(), _images.Want("RGB", 2, 2, False, False), pixels=False)
    assert np.asarray(Image.open(io.BytesIO(blob))).min() == 255


def test_sixteen_bits_are_cut_to_eight() -> None:
    deep = io.BytesIO()
    Image.fromarray(np.array([[0, 256 * 7 + 5], [65535, 255]], dtype=np.uint16)).save(deep, "PNG")
    blob, _ = _images.standard(deep.getvalue(), _images.Want("L", 2, 2, False, False), pixels=False)
    assert np.asarray(Image.open(io.BytesIO(blob))).tolist() == [[0, 7], [255, 0]]


def test_the_turn_that_a_camera_stores_is_applied() -> None:
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 4)).save(turned, "JPEG", exif=exif)
    assert _images.wanted(turned.getvalue(), None, "auto")[1:3] == (4, 8)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I4s", 13, b"IHDR") + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(_images.ImageError):
        _images.wanted(b"\x89PNG\r\n\x1a\n" + chunk, None, "auto")


@given(
    mode=st.sampled_from(["L", "RGB", "P", "1", "RGBA", "LA"]), width=st.integers(1, 9), height=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_the_short_check_of_a_png_agrees_with_the_decoder(mode: str, width: int, height: int, seed: int) -> None:
    blob = png(seed, (width, height), mode)
    plain = _images._plain_png(blob)
    assert plain == ((mode, width, height) if mode in ("L", "RGB") else None)


@settings(max_examples=200)
@given(at=st.integers(8, 10_000), to=st.integers(1, 255), cut=st.booleans())
def test_damage_anywhere_in_a_png_is_found(at: int, to: int, cut: bool) -> None:
    blob = bytearray(png(7, (12, 12)))
    at %= len(blob)
    if cut:
        del blob[at:]
    else:
        blob[at] ^= to
    with pytest.raises(_images.ImageError):
        _images.standard(bytes(blob), _images.Want("L", 12, 12, False, False), pixels=False)


# ---- splits ----------------------------------------------------------------------------------------------------------------------------


@given(ids=st.lists(st.text(min_size=1), min_size=1, max_size=60, unique=True), more=st.lists(st.text(min_size=1), max_size=60))
def test_no_row_changes_sides_when_others_come(ids: list[str], more: list[str]) -> None:
    shares = {"test": 0.3, "validation": 0.3, "reference": 0.3}
    alone = _draw.splits(_draw.numbers(ids), ["train"] * len(ids), **shares)
    both = [*more, *ids]
    together = _draw.splits(_draw.numbers(both), ["train"] * len(both), **shares)
    assert alone.tolist() == together[len(more) :].tolist()


def test_no_row_changes_sides_when_a_file_is_added(tmp_path: Path) -> None:
    shares = {"test": 0.3, "validation": 0.2, "reference": 0.2}
    write(tmp_path / "in" / "b.parquet", rows(60))
    first, _, _ = read(f"parquet:{tmp_path / 'in'}", tmp_path / "one", **shares)
    write(tmp_path / "in" / "a.parquet", rows(60, start=60))
    second, _, _ = read(f"parquet:{tmp_path / 'in'}", tmp_path / "two", **shares)
    before = dict(zip(first.ids(), first.column("split").to_pylist(), strict=True))
    after = dict(zip(second.ids(), second.column("split").to_pylist(), strict=True))
    assert before == {i: after[i] for i in before}
    assert len(after) == 120


def test_the_draw_never_changes() -> None:
    """Frozen: another draw would move test rows of existing pools into training."""
    ids = [f"s{i}" for i in range(12)]
    drawn = _draw.splits(_draw.numbers(ids), ["train"] * 12, test=0.2, validation=0.2, reference=0.2)
    assert "".join(split[0:2] for split in drawn) == "trtrtetevatrtrtrtrtrvatr"


def test_own_splits_stay_and_the_missing_ones_are_drawn_from_train_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", rows(300, split=["train"] * 200 + ["test"] * 100))
    data, figures, _ = read(source, tmp_path / "pool", test=0.5, validation=0.2, reference=0.2)
    assert sorted(data.split("test").ids()) == sorted(f"s{i}" for i in range(200, 300))
    assert figures["rows_validation"] == pytest.approx(40, abs=20)
    assert figures["rows_reference"] == pytest.approx(32, abs=18)
    assert figures["rows"] == 300


def test_the_cap_on_reference_rows_keeps_the_same_ones_in_any_order(tmp_path: Path) -> None:
    made = rows(100)
    turned = {name: values[::-1] for name, values in made.items()}
    a, figures, _ = read(write(tmp_path / "a.parquet", made), tmp_path / "1", reference=0.5, reference_rows=7)
    b, _, _ = read(write(tmp_path / "b.parquet", turned), tmp_path / "2", reference=0.5, reference_rows=7)
    assert figures["rows_reference"] == 7
    assert set(a.split("reference").ids()) == set(b.split("reference").ids())
    assert set(a.ids()) == set(made["sample_id"])


def test_another_source_may_be_the_trusted_set(tmp_path: Path) -> None:
    pool = write(tmp_path / "pool.parquet", rows(100))
    trusted = write(tmp_path / "trusted.parquet", rows(5, start=99, split=["query"] * 5))
    data, figures, bad = read(pool, tmp_path / "out", reference=0.5, reference_source=trusted)
    assert sorted(data.split("reference").ids()) == sorted(f"s{i}" for i in range(99, 104))
    assert figures["rows_train"] == 99
    assert [row["value"] for row in bad] == ["s99"], "a row of both sets must not be trained on"


def test_digits_as_trusted_set_are_clean(tmp_path: Path) -> None:
    made = rows(4, image=[{"bytes": png(i, (8, 8)), "path": None} for i in range(4)])
    table = pa.table({"sample_id": made["sample_id"], "image": pa.array(made["image"], IMAGE), "label": [0, 1, 2, 3]})
    pq.write_table(table, tmp_path / "in.parquet")
    settings = {"reference_source": "digits", "digits_noise": 0.5, "allow_empty_class": True}
    data, figures, _ = read(str(tmp_path / "in.parquet"), tmp_path / "pool", **settings)
    assert figures["rows_reference"] == 1797
    assert np.asarray(data.split("reference").audit("_clean")).all()


@given(batches=st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=12))
def test_repeats_are_found_in_any_order_of_batches(batches: list[list[int]]) -> None:
    seen, known = _draw.Seen(), set()
    for batch in batches:
        expected = []
        for number in batch:
            expected.append(number in known)
            known.add(number)
        assert seen.add(np.array(batch, dtype=np.uint64)).tolist() == expected


def test_what_was_seen_stays_in_few_runs() -> None:
    seen = _draw.Seen()
    for at in range(300):
        assert not seen.add(_draw.numbers([f"{at}-{i}" for i in range(50)])[:, 0]).any()
    assert len(seen._runs) <= 14
    assert seen.add(_draw.numbers(["7-7"])[:, 0]).all()


def test_a_limit_takes_an_even_sample_that_is_always_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", rows(200, label=[0] * 100 + [1] * 100))
    one, figures, _ = read(source, tmp_path / "a", limit=50)
    two, _, _ = read(source, tmp_path / "b", limit=50)
    assert figures["rows"] == 50
    assert one.ids() == two.ids()
    assert 10 < (one.labels() == 0).sum() < 40


# ---- bad rows --------------------------------------------------------------------------------------------------------------------------


def test_each_bad_row_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    made = rows(12, split=["train"] * 12)
    made["sample_id"][1] = None
    made["sample_id"][2] = "s0"
    made["label"][3] = 5
    made["label"][4] = None
    made["image"][5] = None
    made["image"][6] = {"bytes": None, "path": "gone.png"}
    made["image"][7] = {"bytes": b"x" * 500, "path": None}
    made["split"][8] = "holdout " * 20
    made["split"][9] = None
    data, figures, bad = read(write(tmp_path / "in.parquet", made), tmp_path / "pool", max_bad=0.9)
    assert data.ids() == ["s0", "s10", "s11"]
    assert figures["quarantined"] == 9
    found = {row["row"]: (row["file"], row["column"], row["value"], row["reason"]) for row in bad}
    assert found == {
        1: ("in.parquet", "sample_id", None, "sample_id is missing"),
        2: ("in.parquet", "sample_id", "s0", "sample_id was there before"),
        3: ("in.parquet", "label", "5", "label is out of range: 0 to 1"),
        4: ("in.parquet", "label", None, "neither a label nor a caption"),
        5: ("in.parquet", "image", None, "image is missing"),
        6: ("in.parquet", "image", "gone.png", "image is missing"),
        7: ("in.parquet", "image", "<500 bytes>", "not a PNG, JPEG, WebP or BMP image"),
        8: ("in.parquet", "split", ("holdout " * 20)[:79] + "…", "split is not one of train, reference, validation, test"),
        9: ("in.parquet", "split", None, "split is not one of train, reference, validation, test"),
    }


def test_ids_repeated_across_files_are_set_aside_or_prefixed(tmp_path: Path) -> None:
    for name in ("noto", "openmoji"):
        write(tmp_path / "in" / f"{name}.parquet", rows(3))
    data, _, bad = read(f"parquet:{tmp_path / 'in'}", tmp_path / "a", max_bad=0.5)
    assert data.ids() == ["s0", "s1", "s2"]
    assert {row["file"] for row in bad} == {"openmoji.parquet"}
    both, _, _ = read(f"parquet:{tmp_path / 'in'}", tmp_path / "b", prefix_ids=True)
    assert both.ids()[::3] == ["noto-s0", "openmoji-s0"]


def test_an_id_whose_first_row_was_bad_may_come_again(tmp_path: Path) -> None:
    made = rows(4)
    made["sample_id"][1] = "s0"
    made["image"][0] = None
    data, _, _ = read(write(tmp_path / "in.parquet", made), tmp_path / "pool", max_bad=0.5)
    assert data.ids() == ["s0", "s2", "s3"]


@pytest.mark.parametrize(
    ("value", "classes", "expected"),
    [
        (3, None, 3),
        (3.0, None, 3),
        ("3", None, 3),
        ("dog", ("cat", "dog"), 1),
        (1.5, None, "label is not an integer"),
        (float("nan"), None, "label is not an integer"),
        (True, None, "label is not an integer"),
        ("1_0", None, "label is not an integer"),
        ([1], None, "label is not an integer"),
        ("mouse", ("cat",), "label is not an integer or a class name"),
        (-1, None, "label is out of range: 0 to 65535"),
        ("7", ("cat", "dog"), "label is out of range: 0 to 1"),
    ],
)
def test_what_a_label_may_be(value: Any, classes: tuple[str, ...] | None, expected: Any) -> None:
    assert whole(value, classes) == expected


@given(st.one_of(st.none(), st.text(), st.binary(), st.integers()))
def test_a_shown_value_is_short_and_never_raw_bytes(value: Any) -> None:
    text = short(value)
    assert text is None or (len(text) <= 80 and text.isprintable())
    if isinstance(value, bytes):
        assert text == f"<{len(value)} bytes>"


# ---- mistakes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("parqet:x", "did you mean 'parquet'"),
        ("parqet:x.parquet", "did you mean 'parquet'"),
        ("digits:x", "valid: digits, parquet:PATH"),
        ("parquet:", "valid: digits"),
        ("", "of no known kind"),
        ("parquet:/nowhere/x.parquet", "does not exist"),
        ("/nowhere/x.parquet", "does not exist"),
        ("folder:/nowhere", "does not exist"),
        ("pairs:/nowhere", "does not exist"),
        ("parquet:/nowhere/*.parquet", "matches no file"),
        ("parquet:nosuch://bucket/x.parquet", "cannot be opened"),
    ],
)
def test_a_source_that_is_not_there_is_named(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(source, tmp_path / "pool")
    assert list(tmp_path.iterdir()) == []


def test_passwords_in_addresses_are_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse_source("s3://key:secret@bucket/x")
    assert "secret" not in str(caught.value)
    cfg = Config(source="parquet:https://host/a.parquet?sig=secret", reference_source="parquet:s3://key:secret@bucket/x.parquet")
    assert "secret" not in json.dumps(plain_settings(cfg))


def test_a_source_that_shrinks_while_it_is_read_is_named() -> None:
    with pytest.raises(UserError, match="x lost rows while it was read: 5 at first, then 0"):
        list(_tracked(iter([]), 5, "x"))


def test_a_folder_without_such_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for kind, message in (("parquet", r"no file ending in \.parquet"), ("pairs", r"\.parquet, \.tar"), ("folder", "no class folders")):
        with pytest.raises(UserError, match=message):
            read(f"{kind}:{tmp_path / 'in'}", tmp_path / "pool")
    (tmp_path / "both").mkdir()
    write(tmp_path / "both" / "a.parquet", rows(2))
    tar(tmp_path / "both" / "b.tar", {"0.png": png(0)})
    with pytest.raises(UserError, match="both Parquet files and tar shards"):
        read(f"pairs:{tmp_path / 'both'}", tmp_path / "pool")
    (tmp_path / "in" / "cat").mkdir()
    with pytest.raises(UserError, match=r"no file ending in \.png"):
        read(f"folder:{tmp_path / 'in'}", tmp_path / "pool")
    (tmp_path / "file.png").write_bytes(png())
    with pytest.raises(UserError, match="is not a folder"):
        read(f"folder:{tmp_path / 'file.png'}", tmp_path / "pool")


def test_a_misspelt_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    made = rows(4)
    source = write(
        tmp_path / "in.parquet", {"sample_id": made["sample_id"], "image": made["image"], "lable": made["label"]}, lable=pa.int64()
    )
    with pytest.raises(UserError, match=r"no column 'label'; did you mean 'lable'\? it has sample_id, image, lable"):
        read(source, tmp_path / "pool")
    with pytest.raises(UserError, match=r"no column 'labels'.*set columns.label"):
        read(source, tmp_path / "pool", columns={"label": "labels"})


def test_a_misspelt_split_does_not_mix_test_rows_into_training() -> None:
    with pytest.raises(UserError, match=r"no column 'split'; did you mean 'Splits'.*or to null"):
        resolve(["image", "label", "Splits"], {}, {"image", "label"}, "x")
    assert resolve(["image", "label", "Splits"], {"split": None}, {"image", "label"}, "x") == {"image": "image", "label": "label"}


def test_labels_can_be_declared_missing_but_images_cannot() -> None:
    assert resolve(["image", "text"], {"label": None}, {"image", "label"}, "x") == {"image": "image", "caption": "text"}
    with pytest.raises(UserError, match=r"columns\.image must name a column"):
        resolve(["image", "text"], {"image": None}, {"image"}, "x")


@pytest.mark.parametrize(
    ("column", "kind", "values", "message"),
    [
        (
            "image",
            pa.string(),
            ["a.png"] * 4,
            "column 'image' is string, but the image must be struct<bytes: binary, path: string> or binary",
        ),
        ("label", pa.bool_(), [True] * 4, "column 'label' is bool, but the label must be an integer"),
        ("sample_id", pa.float64(), [1.5] * 4, "column 'sample_id' is double, but the id must be a string or an integer"),
        ("text", pa.int64(), [1] * 4, "column 'text' is int64, but the caption must be a string"),
        ("split", pa.int64(), [1] * 4, "column 'split' is int64, but the split must be a string"),
    ],
)
def test_a_column_of_the_wrong_type_is_named(tmp_path: Path, column: str, kind: pa.DataType, values: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "in.parquet", rows(4, **{column: values}), **{column: kind}), tmp_path / "pool")


@pytest.mark.parametrize("keep", [0, 3, 100, -200, -5])
def test_a_cut_parquet_file_is_named(tmp_path: Path, keep: int) -> None:
    source = write(tmp_path / "in" / "good.parquet", rows(40))
    whole_file = Path(source.partition(":")[2]).read_bytes()
    (tmp_path / "in" / "later.parquet").write_bytes(whole_file[:keep])
    with pytest.raises(UserError, match=r"later\.parquet cannot be read as Parquet"):
        read(f"parquet:{tmp_path / 'in'}", tmp_path / "pool")


def test_parquet_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "in.parquet", rows(40)).partition(":")[2])
    blob = bytearray(path.read_bytes())
    blob[4:2000] = bytes(1996)
    path.write_bytes(blob)
    with pytest.raises(UserError, match=r"in\.parquet cannot be read as Parquet"):
        read(str(path), tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:700], lambda b: b[:1024] + b"\x55" * 512 + b[1536:], lambda b: b"x" * 900])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Any) -> None:
    members = {f"{i}.{end}": png(i) if end == "png" else b"0" for i in range(4) for end in ("png", "cls")}
    path = Path(tar(tmp_path / "x.tar", members).partition(":")[2])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"x\.tar (is damaged|cannot be read)"):
        read(f"pairs:{path}", tmp_path / "pool")


def test_files_that_do_not_agree_are_named(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", rows(4))
    write(tmp_path / "in" / "b.parquet", rows(4, split=["train"] * 4))
    with pytest.raises(UserError, match=r"b\.parquet has other columns than .*a\.parquet"):
        read(f"parquet:{tmp_path / 'in'}", tmp_path / "pool")
    write(tmp_path / "in" / "b.parquet", rows(4), names=["cat", "cow"])
    with pytest.raises(UserError, match="other class names"):
        read(f"parquet:{tmp_path / 'in'}", tmp_path / "pool")
    with pytest.raises(UserError, match="other class names"):
        read(f"parquet:{tmp_path}/in/a.parquet", tmp_path / "pool", reference_source=f"parquet:{tmp_path}/in/b.parquet")


def test_class_names_that_are_no_list_are_named(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array(rows(2)["image"], IMAGE), "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"class_names": '{"a": 1}'}), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="must be a JSON list of strings"):
        read(str(tmp_path / "in.parquet"), tmp_path / "pool")


def test_an_empty_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        read(write(tmp_path / "in.parquet", rows(0)), tmp_path / "pool")


def test_a_source_without_any_readable_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image that can be read \(in\.parquet, row 1: not a PNG"):
        read(write(tmp_path / "in.parquet", rows(2, image=[{"bytes": b"?", "path": None}] * 2)), tmp_path / "pool", max_bad=1.0)


def test_a_source_of_bad_rows_only_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable row"):
        read(write(tmp_path / "in.parquet", rows(3, label=[9, 9, 9])), tmp_path / "pool", max_bad=1.0)


def test_a_source_without_train_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train row, only test; add some, or set columns\.split to null"):
        read(write(tmp_path / "in.parquet", rows(4, split=["test"] * 4)), tmp_path / "pool")


def test_a_class_without_train_rows_is_named_unless_allowed(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", rows(4), names=["cat", "dog", "emu", "fox"])
    with pytest.raises(UserError, match=r"class 'emu' .label 2, and 1 more. has no train row"):
        read(source, tmp_path / "pool")
    assert read(source, tmp_path / "pool", allow_empty_class=True)[0].info.classes == ("cat", "dog", "emu", "fox")


def test_the_pool_may_not_lie_in_its_source(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.parquet", rows(4))
    with pytest.raises(UserError, match="must lie apart"):
        read(f"parquet:{tmp_path / 'in'}", tmp_path / "in" / "pool")
    with pytest.raises(UserError, match="must lie apart"):
        read(source, tmp_path / "in")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sorce": "digits"}, "did you mean 'source'"),
        ({"test": 1.0}, "'test' is 1.0"),
        ({"columns": {"lable": "y"}}, "'columns.lable'"),
        ({"mode": "blue"}, "'mode' is 'blue'"),
    ],
)
def test_a_wrong_setting_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(setting)
    assert configure({"limit": 5}).limit == 5


# ---- the last good version -------------------------------------------------------------------------------------------------------------


def test_too_many_bad_rows_leave_the_last_good_version(tmp_path: Path) -> None:
    out = tmp_path / "out" / "pool"
    source = write(tmp_path / "in.parquet", rows(100))
    read(source, out)
    before = folder_md5(out)
    made = rows(100)
    made["image"][10] = made["image"][20] = None
    write(tmp_path / "in.parquet", made)
    with pytest.raises(UserError, match=r"2 of 100 rows are bad so far, more than max_bad=0\.01.*2 times 'image is missing'; .* row 10"):
        read(source, out)
    assert folder_md5(out) == before
    assert list(out.parent.iterdir()) == [out]
    assert read(source, out, max_bad=0.02)[1]["rows"] == 98


NO_SPACE = """
import sys
from tasks.pool.read import Config, read_pool
from pathlib import Path
from tasks.core.errors import UserError
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    read_pool(Config(source=sys.argv[1], test=0, validation=0, reference=0), Path(sys.argv[2]))
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("size", [100, 10_000])
def test_a_full_disk_leaves_the_last_good_version(tmp_path: Path, size: int) -> None:
    out = tmp_path / "out" / "pool"
    source = write(tmp_path / "in.parquet", rows(5000, image=[{"bytes": png(i), "path": None} for i in range(50)] * 100))
    read(source, out, limit=20)
    before = folder_md5(out)
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", NO_SPACE, source, str(out), str(size)], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stderr) == (2, "")
    assert f"no space left for {out}" in ran.stdout
    assert folder_md5(out) == before
    assert list(out.parent.iterdir()) == [out]


# ---- identity and cost -----------------------------------------------------------------------------------------------------------------


def test_equal_input_gives_an_equal_folder(tmp_path: Path) -> None:
    made = rows(300)
    made["label"][7] = 99
    source = write(tmp_path / "in.parquet", made)
    for out in ("a", "b"):
        read(source, tmp_path / out, test=0.2, validation=0.1, reference=0.1)
        read("digits", tmp_path / f"digits-{out}")
    assert folder_md5(tmp_path / "a") == folder_md5(tmp_path / "b")
    assert folder_md5(tmp_path / "digits-a") == folder_md5(tmp_path / "digits-b")


def test_what_is_written_does_not_depend_on_where_the_source_lies(tmp_path: Path) -> None:
    made = rows(50)
    made["label"][7] = 99
    for place in ("one", "two"):
        write(tmp_path / place / "in" / "x.parquet", made)
        read(f"parquet:{tmp_path / place / 'in'}", tmp_path / place / "pool", max_bad=0.5)
    for name in ("part-00000.parquet", "quarantine.parquet"):
        assert (tmp_path / "one" / "pool" / name).read_bytes() == (tmp_path / "two" / "pool" / name).read_bytes()


def test_the_module_imports_no_heavy_library() -> None:
    code = "import sys, tasks.pool.read; sys.exit(bool({'torch', 'sklearn', 'pandas', 'fsspec'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], check=False).returncode == 0


PEAK = """
import re, sys
from pathlib import Path
from tasks.pool.read import Config, read_pool
read_pool(Config(source=sys.argv[1]), Path(sys.argv[2]))
# not ru_maxrss, which begins with what the parent held when it forked
print(int(re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's record of a process's peak memory")
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """One row group of 16,000 rows, 190 MB, is never held at once."""
    n, blobs = 16_000, [png(i, (64, 64), "RGB") for i in range(20)]
    schema = pa.schema([("sample_id", pa.string()), ("image", IMAGE), ("label", pa.int64())])
    path = tmp_path / "in.parquet"
    image = pa.array([{"bytes": blobs[i % 20], "path": None} for i in range(n)], IMAGE)
    table = pa.table([[f"s{i}" for i in range(n)], image, [i % 2 for i in range(n)]], schema=schema)
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=n)
    assert path.stat().st_size > 185 << 20
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), str(tmp_path / "pool")], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 450
