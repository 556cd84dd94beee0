"""Scoring a pool: pieces that are kept, networks of `transformers`, and a filter that is fine-tuned."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.utils import logging

from tasks.core import catalog, loop
from tasks.core.dataset import Dataset, Info, Writer, decode, encode
from tasks.core.errors import UserError
from tasks.core.text_to_image import make_tokenizer, quiet
from tasks.filter import _resume
from tasks.filter._clip import Pretrained, resizing
from tasks.filter._resume import digest, place, score_pieces, scored
from tasks.filter._shared import pixels
from tasks.filter.dfn import SMOKE, Config, Towers, averaged, bags, cosines, dfn
from tests.conftest import image_rows


@pytest.fixture
def pool(tmp_path: Path) -> Dataset:
    """Thirty rows in a project."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    images = np.arange(30, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), dtype=np.uint8)
    folder = tmp_path / "data" / "pool"
    with Writer(folder, Info("image", classes=("a", "b"), shape=(1, 4, 4))) as out:
        out.write(image_rows(images, np.arange(30) % 2, ["train"] * 30))
    return Dataset.open(folder)


def test_a_run_that_was_cut_off_scores_only_what_is_left(pool: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resume, "PIECE", 8)
    read: list[str] = []

    def score(batch: pa.RecordBatch, last: int = 99) -> np.ndarray:
        names = batch.column(0).to_pylist()
        if len(read) + len(names) > last:
            raise KeyboardInterrupt
        read.extend(names)
        return np.array([int(name[1:]) for name in names], dtype=np.float32)

    ids = pool.ids()
    expected = [int(name[1:]) for name in ids]
    with pytest.raises(KeyboardInterrupt):
        scored(pool, ["sample_id"], lambda batch: batch, lambda batch: score(batch, 18), key="k", size=5)
    assert read[:16] == ids[:16]
    done = len(list((tmp_path / ".retort").rglob("scores/*/*.npy")))
    assert done == 2
    read.clear()
    assert scored(pool, ["sample_id"], lambda batch: batch, score, key="k", size=5).tolist() == expected
    assert read == ids[16:]
    read.clear()
    assert scored(pool, ["sample_id"], lambda batch: batch, score, key="other", size=5).tolist() == expected
    assert read == ids
    assert not list((tmp_path / ".retort").rglob("*.npy"))


def test_a_damaged_piece_is_scored_again(pool: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resume, "PIECE", 8)

    def score(batch: pa.RecordBatch) -> np.ndarray:
        if batch.column(0)[0].as_py() == pool.ids()[24] and not list(tmp_path.rglob("damaged")):
            raise KeyboardInterrupt
        return np.full(batch.num_rows, 7, dtype=np.float32)

    with pytest.raises(KeyboardInterrupt):
        scored(pool, ["sample_id"], lambda batch: batch, score, key="k", size=8)
    first = min((tmp_path / ".retort").rglob("scores/*/*.npy"))
    first.write_bytes(first.read_bytes()[:-3])
    (tmp_path / "damaged").touch()
    assert scored(pool, ["sample_id"], lambda batch: batch, score, key="k", size=8).tolist() == [7] * 30


@pytest.mark.parametrize("pieces", [[(0, 30)], [(0, 8), (8, 16), (16, 24), (24, 30)], [(0, 8), (16, 24)], [(3, 9), (27, 30)]])
def test_a_piece_has_the_batches_that_it_would_have_alone(pool: Dataset, pieces: list[tuple[int, int]]) -> None:
    ids, seen = pool.ids(), []

    def score(batch: pa.RecordBatch) -> np.ndarray:
        names = batch.column("sample_id").to_pylist()
        np.testing.assert_array_equal(decode(batch.column("image").field("bytes").to_pylist(), (1, 4, 4))[:, 0, 0, 0], at(names))
        seen.append(names)
        return np.array(at(names), dtype=np.float32)

    def at(names: list[str]) -> list[int]:
        return [ids.index(name) for name in names]

    columns = ["sample_id", "image"]
    together = list(score_pieces(pool, pieces, columns, lambda batch: batch, score, size=5))
    assert [start for start, _ in together] == [start for start, _ in pieces]
    assert [found.tolist() for _, found in together] == [list(range(*piece)) for piece in pieces]
    batches, seen = seen, []
    for piece in pieces:
        list(score_pieces(pool, [piece], columns, lambda batch: batch, score, size=5))
    assert seen == batches


def test_what_goes_wrong_while_a_batch_is_prepared_is_told(pool: Dataset) -> None:
    def prepare(batch: pa.RecordBatch) -> pa.RecordBatch:
        raise UserError("no such word")

    with pytest.raises(UserError, match="no such word"):
        scored(pool, ["sample_id"], prepare, lambda batch: np.zeros(batch.num_rows, dtype=np.float32), key="k", size=5)


def as_file(image: np.ndarray, kind: str, mode: str | None = None, **how: object) -> bytes:
    picture, out = Image.fromarray(image.transpose(1, 2, 0).squeeze(-1) if image.shape[0] == 1 else image.transpose(1, 2, 0)), io.BytesIO()
    (picture.convert(mode) if mode else picture).save(out, format=kind, **how)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_decode_whatever_the_file_is(channels: int) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (60, channels, 9, 13), dtype=np.uint8)
    smooth = np.sort(np.sort(drawn, axis=2), axis=3)  # the rows of these are filtered in other ways
    blobs = [*encode(drawn), *encode(smooth)]
    others = [as_file(smooth[0], "PNG", "P"), as_file(smooth[1], "JPEG"), as_file(smooth[2], "PNG", "RGB" if channels == 1 else "L")]
    others += [as_file(smooth[3], "PNG", "LA" if channels == 1 else "RGBA"), as_file(smooth[4], "PNG", dpi=(9, 9))]
    blobs[7:7] = others
    found = pixels(blobs, (channels, 9, 13))
    np.testing.assert_array_equal(found, decode(blobs, (channels, 9, 13)))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(pixels(encode(drawn), (channels, 9, 13)), drawn)
    assert pixels([], (channels, 9, 13)).shape == (0, channels, 9, 13)


@pytest.mark.parametrize("cut", [60, 90])
def test_a_damaged_image_is_refused_as_decode_refuses_it(cut: int) -> None:
    blob = encode(np.random.default_rng(0).integers(0, 256, (1, 1, 9, 13), dtype=np.uint8))[0]
    damaged = blob[:cut] + bytes(len(blob) - cut - 16) + blob[-16:]
    for read in (decode, pixels):
        with pytest.raises(OSError, match=r"broken data stream|image file is truncated|unrecognized data stream"):
            read([blob, damaged], (1, 9, 13))


def test_images_that_are_seen_in_parts_have_the_cosines_of_all_at_once() -> None:
    with loop.seeded(0):
        towers = Towers((1, 8, 8), 4, width=4, embedding=4, dim=8, temperature=0.07, mean=0.5, std=0.5).eval()
        images = torch.rand(300, 1, 8, 8)
    told = bags([np.array([at % 4]) for at in range(300)])
    whole = (towers.see(images) * towers.read(*told)).sum(1)
    torch.testing.assert_close(cosines(towers, images, *told), whole, atol=1e-6, rtol=0)


needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")


@needs_compiler
@pytest.mark.timeout(300)
def test_compiled_towers_give_the_same_verdicts(tiny: Dataset) -> None:
    rows, reference = tiny.split("train"), tiny.split("reference")
    cfg = SMOKE.model_copy(update={"tune_steps": 0})
    plain, fast = (dfn(rows, reference, cfg.model_copy(update={"compile": on}), seed=1) for on in (False, True))
    np.testing.assert_allclose(np.asarray(fast.rows["score"]), np.asarray(plain.rows["score"]), atol=1e-5)
    assert (np.asarray(fast.rows["kept"]) == np.asarray(plain.rows["kept"])).mean() > 0.98
    assert fast.figures["unknown_words"] == plain.figures["unknown_words"]


def test_without_a_compiler_the_way_out_is_told(tiny: Dataset, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    rows, reference = tiny.split("train"), tiny.split("reference")
    for pretrained in (None, str(clip)):
        with pytest.raises(UserError, match="finds no no-such-compiler: install it, name another one in CXX, or set compile to false"):
            dfn(rows, reference, SMOKE.model_copy(update={"compile": True, "pretrained": pretrained}))


def test_the_device_is_the_environments(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() == "cpu"
    monkeypatch.setenv("RETORT_DEVICE", "meta")
    assert place() == "meta"
    for wrong in ("gpu", "cuda:99"):
        monkeypatch.setenv("RETORT_DEVICE", wrong)
        with pytest.raises(UserError, match=f"RETORT_DEVICE is '{wrong}', but torch has no such device here"):
            dfn(tiny.split("train"), tiny.split("reference"), SMOKE)
    assert place(here=False) == "cuda:99"


NETWORKS: dict[str, dict[str, object]] = {
    "dfn": {},
    "perplexity": {},
    "real": {},
    "combined": {"filters": ({"method": "random", "keep": 0.9}, {"method": "perplexity", "steps": 2, "width": 16, "channels": 4})},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_filter_with_a_network_says_where_there_is_no_such_device(name: str, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    method = catalog.get(f"filter.{name}")
    monkeypatch.setenv("RETORT_DEVICE", "gpu")
    with pytest.raises(UserError, match="RETORT_DEVICE is 'gpu', but torch has no such device here: unset it to score on the CPU"):
        method.entry(tiny.split("train"), tiny.split("reference"), method.smoke.model_copy(update=NETWORKS[name]))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_of_every_filter_is_trained_there(name: str, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = catalog.get(f"filter.{name}"), set()
    rows, reference, cfg = tiny.split("train"), tiny.split("reference"), method.smoke.model_copy(update=NETWORKS[name])
    to_float = loop.to_float

    def watched(images: npt.NDArray[np.uint8], device: str = "cpu") -> torch.Tensor:
        seen.add(device)
        return to_float(images, device)

    monkeypatch.setattr(loop, "to_float", watched)
    there = method.entry(rows, reference, cfg, seed=3)
    assert seen == {"cpu"}
    monkeypatch.setenv("RETORT_DEVICE", "cpu:0")  # the only other name of a device that is on every machine
    placed = method.entry(rows, reference, cfg, seed=3)
    assert "cpu:0" in seen
    np.testing.assert_allclose(np.asarray(placed.rows["score"]), np.asarray(there.rows["score"]), atol=1e-5)
    assert placed.rows["kept"].equals(there.rows["kept"])


def test_a_digest_is_of_weights_and_words() -> None:
    with loop.seeded(0):
        one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert digest(one, "a") == digest(one, "a") != digest(one, "b")
    assert digest(one, "a") != digest(other, "a")
    assert digest(one.bfloat16())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of the real classes with random weights, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = make_tokenizer(["a handwritten zero one two three four five six seven eight nine photo picture of digit the number"])
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    tokenizer.model_max_length = 16
    with quiet(), loop.seeded(0):
        logging.set_verbosity_error()
        model = CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 4}, projection_dim=8))
        model.save_pretrained(folder)
        CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer).save_pretrained(folder)
    return folder


def test_a_clip_in_a_folder_scores_the_pool(clip: Path, tiny: Dataset) -> None:
    rows, reference = tiny.split("train"), tiny.split("reference")
    made = dfn(rows, reference, Config(pretrained=str(clip), keep=0.25))
    assert made.figures["kept"] == 50
    network = Pretrained(str(clip))
    cosines = network.score(network.inputs(rows.images()[:5], rows.captions()[:5]))
    np.testing.assert_allclose(np.asarray(made.rows["score"])[:5], cosines, atol=1e-5)
    alone = [float(network.score(network.inputs(rows.images()[at : at + 1], rows.captions()[at : at + 1]))[0]) for at in range(5)]
    np.testing.assert_allclose(alone, cosines, atol=1e-5)  # padding by longer captions changes nothing
    assert len(set(cosines.tolist())) > 1
    assert dfn(rows, reference, Config(pretrained=str(clip), keep=0.25), seed=5).rows.equals(made.rows)


@pytest.mark.parametrize(
    "look",
    [
        {"size": {"shortest_edge": 16}, "crop_size": 16},
        {"size": {"shortest_edge": 20}, "crop_size": 16},
        {"size": {"height": 16, "width": 16}, "do_center_crop": False, "resample": 2},
    ],
)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 13), (3, 9, 40)])
def test_images_resized_where_they_lie_are_the_processors_but_for_rounding(clip: Path, look: dict, shape: tuple[int, int, int]) -> None:
    network = Pretrained(str(clip))
    network.processor.image_processor = CLIPImageProcessor(**look)
    images = np.sort(np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8))
    captions = ["a photo", "", "two", "a photo", "number three"]
    seen, told = network.inputs(images, captions)
    raw, _ = network.inputs(images, captions, raw=True)
    assert raw.dtype == torch.uint8
    level = 1 / 255 / min(network.processor.image_processor.image_std)
    apart = (network.resized(raw) - seen).abs() / level
    assert apart.max() < 2.01, "two roundings"
    assert (apart > 1.01).float().mean() < 0.01
    np.testing.assert_allclose(network.score((raw, told)), network.score((seen, told)), atol=0.02)


def test_a_processor_that_does_more_than_resizing_is_left_to_itself(clip: Path) -> None:
    network = Pretrained(str(clip))
    assert resizing(network.processor, (1, 8, 8)) == ((16, 16), (16, 16), "bicubic")
    for look in ({"do_normalize": False}, {"resample": 0}, {"do_pad": True}, {"crop_size": 99}, {"size": {"longest_edge": 16}}):
        network.processor.image_processor = CLIPImageProcessor(**{"size": {"shortest_edge": 16}, "crop_size": 16, **look})
        assert resizing(network.processor, (1, 8, 8)) is None


def test_what_is_no_such_network_is_named(tmp_path: Path, tiny: Dataset) -> None:
    rows, reference = tiny.split("train"), tiny.split("reference")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load .*empty"):
        dfn(rows, reference, Config(pretrained=str(tmp_path / "empty")))
    bert = tmp_path / "bert"
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=40)).save_pretrained(
        bert
    )
    make_tokenizer(["a word"]).save_pretrained(bert)
    with pytest.raises(UserError, match=r"cannot load|BertModel, which does not put images and texts"):
        dfn(rows, reference, Config(pretrained=str(bert)))


def test_fine_tuned_weights_are_averaged_with_those_before(tiny: Dataset) -> None:
    before, after = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}, {"w": torch.tensor([2.0, 0.0]), "n": torch.tensor(5)}
    found = averaged(before, after, 0.25)
    assert found["w"].tolist() == [0.5, 3.0]
    assert found["n"] == 5
    rows, reference = tiny.split("train"), tiny.split("reference")
    scores = {
        share: np.asarray(dfn(rows, reference, SMOKE.model_copy(update={"tune_steps": 20, "ensemble": share})).rows["score"])
        for share in (0.0, 0.5, 1.0)
    }
    assert np.abs(scores[0.0] - scores[1.0]).max() > 0.01
    assert np.abs(scores[0.5] - scores[1.0]).max() > 0.01
    one_class = reference.where(reference.labels() == 1) + reference.where(reference.labels() != 1).without_labels()
    with pytest.raises(UserError, match="two classes or more: set tune_steps to 0"):
        dfn(rows, one_class, SMOKE)
