from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer, encode, image_column
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.filter.dfn import SMOKE, Config, Towers, augment, bags, dfn, fit, info_nce, score, tokenise, vocabulary, words

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUICK = Config(keep=0.5, steps=60, batch=32, width=8)


def make(folder: Path, images: np.ndarray, captions: list[str | None], ids: list[str] | None = None) -> Dataset:
    n = len(images)
    rows = pa.table(
        {
            "sample_id": ids or [f"r{i:05d}" for i in range(n)],
            "image": image_column(encode(images)),
            "label": pa.nulls(n, pa.int64()),
            "caption": pa.array(captions, pa.string()),
            "split": ["train"] * n,
            "parents": pa.array([[]] * n, pa.list_(pa.string())),
            "_clean": pa.nulls(n, pa.bool_()),
        },
        schema=SCHEMAS["image"],
    )
    with Writer(folder, Info("image", classes=NAMES, shape=images.shape[1:], name="made")) as out:  # type: ignore[arg-type]
        out.write(rows)
    return Dataset.open(folder)


def spoiled(tiny: Dataset, folder: Path) -> tuple[Dataset, np.ndarray]:
    """The train rows of `tiny`, of which the first 60 get a wrong name and the next 20 no name at all; and which are right."""
    data = tiny.split("train")
    labels = data.labels()
    captions: list[str | None] = [f"a photo of the digit {NAMES[label]}" for label in labels]
    for at in range(60):
        captions[at] = f"a photo of the digit {NAMES[(labels[at] + 1 + at % 9) % 10]}"
    for at in range(60, 80):
        captions[at] = ("Markets rally as oil falls again", "a storm closes the harbour", None, "")[at % 4]
    return make(folder, data.images(), captions), np.arange(200) >= 80


def towers_of(shape: tuple[int, int, int], tokens: int = 5) -> Towers:
    with loop.seeded(0):
        return Towers(shape, tokens, width=2, embedding=4, dim=8, temperature=0.07, mean=0.5, std=0.5)


@pytest.fixture(scope="module")
def judged(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, np.ndarray, Made]:
    pool, right = spoiled(tiny, tmp_path_factory.mktemp("spoiled") / "pool")
    return pool, right, dfn(pool, tiny.split("reference"), QUICK, seed=1)


def test_captions_become_words_and_tokens() -> None:
    assert words("A photo, of the Digit-7!") == ["a", "photo", "of", "the", "digit", "7"]
    known = vocabulary(["one dog", "Two dogs, one"])
    assert known == {"dog": 1, "dogs": 2, "one": 3, "two": 4}
    assert [some.tolist() for some in tokenise(["two cats", "", "?!"], known)] == [[4, 0], [0], [0]]
    tokens, starts = bags(tokenise(["two dogs", "", "one"], known))
    assert tokens.tolist() == [4, 2, 0, 3]
    assert starts.tolist() == [0, 2, 3]


def test_info_nce_agrees_with_the_sum_worked_by_hand() -> None:
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits at scale 2: [[2, 1.2], [0, 1.6]]
    rows = math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))
    columns = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.4))
    assert info_nce(images, texts, 2.0).item() == pytest.approx((rows + columns) / 4, abs=1e-6)


def test_info_nce_of_towers_that_say_nothing_is_the_log_of_the_batch() -> None:
    vectors = F.normalize(torch.ones(8, 4), dim=-1)
    assert info_nce(vectors, vectors, 5.0).item() == pytest.approx(math.log(8), abs=1e-6)


def test_pairs_of_the_same_caption_are_no_negatives_when_masked() -> None:
    images = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert info_nce(images, texts, 3.0, torch.tensor([5, 5, 5])).item() == 0.0
    torch.testing.assert_close(info_nce(images, texts, 3.0, torch.tensor([0, 1, 2])), info_nce(images, texts, 3.0))
    logits = 3.0 * images @ texts.T
    seen = [[0, 2], [1, 2], [0, 1, 2]]  # captions 0 and 1 are the same
    by_hand = sum(-logits[i, i] + logits[i, at].logsumexp(0) - logits[i, i] + logits[at, i].logsumexp(0) for i, at in enumerate(seen)) / 6
    torch.testing.assert_close(info_nce(images, texts, 3.0, torch.tensor([7, 7, 1])), by_hand)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (3, 32, 32), (1, 28, 28), (3, 64, 64), (1, 3, 3)])
def test_towers_give_unit_vectors_for_any_image_shape(shape: tuple[int, int, int]) -> None:
    towers = towers_of(shape).eval()
    seen = towers.see(torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)))
    read = towers.read(*bags(tokenise(["a b", "", "b"], {"a": 1, "b": 2})))
    assert seen.shape == read.shape == (3, 8)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(read.norm(dim=1), torch.ones(3))


def test_a_caption_is_a_bag_of_its_words() -> None:
    towers = towers_of((1, 8, 8)).eval()
    one, other = towers.read(*bags(tokenise(["a b c", "c A, b"], {"a": 1, "b": 2, "c": 3})))
    torch.testing.assert_close(one, other)


def test_augmentation_only_moves_and_repeats_the_border() -> None:
    images = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(60, 1, 1, 1)
    moved = augment(images, 1, 0.0, torch.Generator().manual_seed(0))
    padded = F.pad(images[:1], (1, 1, 1, 1), mode="replicate")[0, 0]
    windows = {(dy, dx): padded[dy : dy + 4, dx : dx + 4] for dy in range(3) for dx in range(3)}
    found = [next(key for key, window in windows.items() if torch.equal(window, image[0])) for image in moved]
    assert set(found) == set(windows)
    assert torch.equal(augment(images, 0, 0.0, torch.Generator()), images)


def test_augmentation_adds_noise_of_the_given_size() -> None:
    noisy = augment(torch.zeros(50, 1, 20, 20), 0, 0.3, torch.Generator().manual_seed(0))
    assert noisy.std().item() == pytest.approx(0.3, rel=0.03)


def fitted(tiny: Dataset, **changes: float) -> tuple[Towers, list[dict[str, float]]]:
    data = tiny.split("reference")
    known = vocabulary(data.captions())
    settings = {"steps": 5, "batch": 16, "lr": 1e-3, "weight_decay": 0.1, "shift": 1, "noise": 0.2, "mask_same": False} | changes
    with loop.seeded(0) as generator:
        towers = Towers((1, 8, 8), len(known) + 1, width=2, embedding=4, dim=8, temperature=0.07, mean=0.3, std=0.4)
        curve = fit(towers, data.images(), tokenise(data.captions(), known), generator=generator, **settings)  # type: ignore[arg-type]
    return towers, curve


def test_the_temperature_is_learned_and_never_below_a_hundredth(tiny: Dataset) -> None:
    towers, curve = fitted(tiny, lr=20.0, steps=60, noise=0.0)
    scales = [1 / row["temperature"] for row in curve]
    assert max(scales) <= 100 * (1 + 1e-5)
    assert len({round(scale, 3) for scale in scales}) > 1
    assert not towers.training


def test_the_curve_has_about_fifty_rows_and_ends_with_the_last_step(tiny: Dataset) -> None:
    _, curve = fitted(tiny, steps=103)
    assert [row["step"] for row in curve][-2:] == [102, 103]
    assert len(curve) == 52


def test_a_loss_that_is_no_number_is_an_error(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="no longer a number at step 1: set lr lower"):
        fitted(tiny, noise=math.inf)


def test_a_pair_scores_the_same_whatever_is_scored_beside_it(tiny: Dataset) -> None:
    data, (towers, _) = tiny.split("test"), fitted(tiny)
    tokens = tokenise(data.captions(), vocabulary(data.captions()))
    whole = score(towers, data.images(), tokens)
    alone = np.concatenate([score(towers, data.images()[at : at + 1], tokens[at : at + 1]) for at in range(20)])
    np.testing.assert_allclose(alone, whole[:20], atol=1e-6)


def test_verdicts_are_in_pool_order_and_exactly_the_share_is_kept(judged: tuple[Dataset, np.ndarray, Made]) -> None:
    pool, _, made = judged
    assert made.rows.schema == SCHEMAS["verdicts"]
    assert made.rows["sample_id"].to_pylist() == pool.ids()
    scores, kept = np.asarray(made.rows["score"]), np.asarray(made.rows["kept"])
    assert kept.sum() == 100 == made.figures["kept"]
    assert made.figures["rows"] == 200
    assert (np.abs(scores) <= 1 + 1e-6).all()
    assert (scores[kept] >= made.figures["threshold"]).all()
    assert (scores[~kept] <= made.figures["threshold"]).all()
    assert set(made.rows.filter(made.rows["kept"])["reason"].to_pylist()) == {""}
    assert set(made.rows.filter(pc.invert(made.rows["kept"]))["reason"].to_pylist()) == {"score below the top 50%"}


def test_right_captions_score_above_wrong_ones(judged: tuple[Dataset, np.ndarray, Made]) -> None:
    from sklearn.metrics import roc_auc_score

    _, right, made = judged
    assert roc_auc_score(right, np.asarray(made.rows["score"])) > 0.85
    assert right[np.asarray(made.rows["kept"])].mean() > right.mean() + 0.2  # 0.6 of the pool are right
    assert made.curve[-1]["loss"] < made.curve[0]["loss"]


def test_labels_are_never_read_and_the_same_seed_gives_the_same_bytes(tiny: Dataset, judged: tuple[Dataset, np.ndarray, Made]) -> None:
    pool, _, made = judged
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    again = dfn(pool.without_labels(), tiny.split("reference").without_labels(), QUICK, seed=1)
    assert again == made
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    other = dfn(pool, tiny.split("reference"), QUICK, seed=2)
    assert other.rows["score"] != made.rows["score"]


def test_a_threshold_keeps_what_scores_above_it(tiny: Dataset, judged: tuple[Dataset, np.ndarray, Made]) -> None:
    pool, _, made = judged
    cut = QUICK.model_copy(update={"threshold": made.figures["threshold"], "keep": 0.01})
    again = dfn(pool, tiny.split("reference"), cut, seed=1)
    assert again.rows["score"] == made.rows["score"]
    assert again.rows["kept"].to_pylist() == (np.asarray(made.rows["score"]) > np.float32(made.figures["threshold"])).tolist()
    assert any(reason.startswith("score not above ") for reason in again.rows["reason"].to_pylist())
    with pytest.raises(UserError, match=r"no pair of the pool scores above threshold=1; the best has 0\.\d+"):
        dfn(pool, tiny.split("reference"), QUICK.model_copy(update={"threshold": 1.0}), seed=1)


def test_a_pool_of_many_batches_and_shards_is_scored_row_by_row(tiny: Dataset, tmp_path: Path) -> None:
    images, captions = tiny.split("train").images(), tiny.split("train").captions()
    pool = make(tmp_path / "pool", np.tile(images, (21, 1, 1, 1)), captions * 21)  # 4,200 rows: two shards
    made = dfn(pool, tiny.split("reference"), SMOKE)
    assert made.rows["sample_id"].to_pylist() == pool.ids()
    scores = np.asarray(made.rows["score"]).reshape(21, 200)
    np.testing.assert_allclose(scores, np.broadcast_to(scores[0], scores.shape), atol=1e-5)
    assert scores[0].std() > 0.01


def test_colour_images_are_judged_too(tmp_path: Path) -> None:
    red, blue = np.zeros((2, 40, 3, 16, 16), dtype=np.uint8)
    red[:, 0], blue[:, 2] = 255, 255
    noise = np.random.default_rng(0).integers(0, 60, (80, 3, 16, 16), dtype=np.uint8)
    images = np.concatenate([red, blue]) // 2 + noise
    right = ["a red square"] * 40 + ["a blue square"] * 40
    wrong = right[::-1]
    reference = make(tmp_path / "reference", images, list(right))
    pool = make(tmp_path / "pool", np.concatenate([images, images]), [*right, *wrong])
    made = dfn(pool, reference, Config(keep=0.5, steps=30, batch=16, width=4))
    assert np.asarray(made.rows["kept"]).tolist() == [True] * 80 + [False] * 80


def test_bad_reference_sets_are_named(tiny: Dataset, tmp_path: Path) -> None:
    pool, images = tiny.split("train"), tiny.split("reference").images()[:4]
    with pytest.raises(UserError, match="reference row 'r00002' has no words"):
        dfn(pool, make(tmp_path / "a", images, ["one", "two", " - ", "four"]), SMOKE)
    with pytest.raises(UserError, match="has 1 different captions"):
        dfn(pool, make(tmp_path / "b", images, ["one", "One", "one.", "one"]), SMOKE)
    with pytest.raises(UserError, match="has 0 different captions"):
        dfn(pool, tiny.split("reference").take(np.array([], dtype=int)), SMOKE)
    with pytest.raises(UserError, match=r"pool images are \(1, 8, 8\) and reference images \(1, 9, 8\)"):
        dfn(pool, make(tmp_path / "c", np.zeros((2, 1, 9, 8), dtype=np.uint8), ["one", "two"]), SMOKE)


def test_a_pool_that_would_be_left_empty_is_an_error(tiny: Dataset) -> None:
    nobody = tiny.split("train").take(np.array([], dtype=int))
    with pytest.raises(UserError, match="the pool has no rows"):
        dfn(nobody, tiny.split("reference"), SMOKE)
    with pytest.raises(UserError, match=r"keep=0.001 leaves none of the pool's 200 rows; valid: 0.005 or more"):
        dfn(tiny.split("train"), tiny.split("reference"), Config(keep=0.001))


@pytest.mark.parametrize("setting", [{"keep": 0}, {"keep": 1.1}, {"threshold": 1.5}, {"batch": 1}, {"temperature": 0.001}, {"epochs": 3}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Config(**setting)  # type: ignore[arg-type]
