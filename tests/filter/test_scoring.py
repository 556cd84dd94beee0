"""Scoring a pool: pieces that are kept, networks of `transformers`, and a filter that is fine-tuned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.utils import logging

from tasks.core import loop
from tasks.core.dataset import Dataset, Info, Writer
from tasks.core.errors import UserError
from tasks.core.text_to_image import make_tokenizer, quiet
from tasks.filter import _resume
from tasks.filter._clip import Pretrained
from tasks.filter._resume import digest, scored
from tasks.filter.dfn import SMOKE, Config, averaged, dfn
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
