from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from tasks.core import loop
from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer, encode, image_column
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.filter._captioners import EDGE, Captioner, Loaded, as_bytes, fit, mean_loss
from tasks.filter.perplexity import SMOKE, Config, caption_figures, perplexity, score_pool, within_lengths

QUICK = Config(keep=0.2, steps=150, width=32, channels=8)
CAPTIONS = ["a photo of the digit three", "seven", "the digit nine, drawn by hand"]


def make(folder: Path, captions: list[str | None], images: np.ndarray | None = None) -> Dataset:
    """A dataset of these captions; without images it is a pool of texts."""
    n = len(captions)
    pixels = np.zeros((n, 1, 1, 1), dtype=np.uint8) if images is None else images
    rows = pa.table(
        {
            "sample_id": [f"r{i:05d}" for i in range(n)],
            "image": image_column(encode(pixels)),
            "label": pa.nulls(n, pa.int64()),
            "caption": pa.array(captions, pa.string()),
            "split": ["train"] * n,
            "parents": pa.array([[]] * n, pa.list_(pa.string())),
            "_clean": pa.nulls(n, pa.bool_()),
        },
        schema=SCHEMAS["image"],
    )
    with Writer(folder, Info("image", shape=(0, 0, 0) if images is None else images.shape[1:], name="made")) as out:  # type: ignore[arg-type]
        out.write(rows)
    return Dataset.open(folder)


def quadrants(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Images of a bright corner, and captions that say which."""
    rng = np.random.default_rng(seed)
    where = rng.integers(4, size=n)
    images = rng.integers(0, 60, (n, 1, 8, 8), dtype=np.uint8)
    for image, corner in zip(images, where, strict=True):
        image[0, 4 * (corner // 2) :, 4 * (corner % 2) :][:4, :4] += 150
    return images, [("upper left", "upper right", "lower left", "lower right")[corner] for corner in where]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset, np.ndarray, Made]:
    """A pool of 200 bright corners, 40% of which carry the caption of the corner across; 100 right ones; and the verdicts."""
    folder = tmp_path_factory.mktemp("corners")
    images, captions = quadrants(200, 0)
    other = {"upper left": "lower right", "lower right": "upper left", "upper right": "lower left", "lower left": "upper right"}
    pool = make(folder / "pool", [other[text] if at < 80 else text for at, text in enumerate(captions)], images)
    images, captions = quadrants(100, 1)
    reference = make(folder / "reference", list(captions), images)
    return pool, reference, np.arange(200) >= 80, perplexity(pool, reference, QUICK, seed=1)


def letters(**special: str) -> Any:
    """A tokenizer whose tokens are bytes and these special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*dict.fromkeys(special.values()), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}


def save(folder: Path, *parts: Any) -> None:
    """Save a model and what belongs to it, its weights drawn so wide that every input is heard."""
    with torch.no_grad():
        for weights in parts[0].parameters():
            weights.normal_(0, 0.3)
    for part in parts:
        part.save_pretrained(folder)


def encoder_decoder(folder: Path) -> None:
    import transformers as hub

    tokenizer = letters(bos_token="<e>", eos_token="<e>")
    text = hub.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, add_cross_attention=True, bos_token_id=0
    )
    model = hub.VisionEncoderDecoderModel(encoder=hub.ViTModel(hub.ViTConfig(**VISION)), decoder=hub.GPT2LMHeadModel(text))
    model.config.decoder_start_token_id = 0
    save(folder, model, tokenizer, hub.ViTImageProcessor(size={"height": 16, "width": 16}))


def blip(folder: Path) -> None:
    import transformers as hub
    from tokenizers.processors import TemplateProcessing

    tokenizer = letters(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    around = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.backend_tokenizer.post_processor = around
    text = {**SMALL, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    model = hub.BlipForConditionalGeneration(hub.BlipConfig(text_config=text, vision_config=VISION))
    save(folder, model, hub.BlipProcessor(hub.BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer))


def llava(folder: Path) -> None:
    import transformers as hub

    tokenizer = letters(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = hub.LlavaConfig(
        vision_config=hub.CLIPVisionConfig(**VISION | {"num_hidden_layers": 2}),
        text_config=hub.LlamaConfig(vocab_size=len(tokenizer), **SMALL),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    look = hub.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    template = (
        "{{ bos_token }}USER: {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT: "
    )
    how = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "chat_template": template}
    save(folder, hub.LlavaForConditionalGeneration(config), hub.LlavaProcessor(look, tokenizer, **how))


def gpt2(folder: Path) -> None:
    import transformers as hub

    tokenizer = letters(bos_token="<e>", eos_token="<e>")
    save(folder, hub.GPT2LMHeadModel(hub.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)), tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with tiny models of the real classes, their weights random."""
    folder = tmp_path_factory.mktemp("saved")
    with loop.seeded(0):
        for build in (encoder_decoder, blip, llava, gpt2):
            build(folder / build.__name__)
    return folder


def test_the_mean_loss_agrees_with_the_one_worked_by_hand() -> None:
    likely = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], [[0.25, 0.5, 0.25], [0.3, 0.3, 0.4], [1.0, 0.0, 0.0]]])
    tokens = torch.tensor([[0, 1, 2], [0, 2, 1]])
    counted = torch.tensor([[True, True, True], [True, True, False]])  # what stands there is impossible, and padding
    losses = mean_loss(likely.log(), tokens, counted)
    assert losses.exp().tolist() == pytest.approx([(1 / (0.5 * 0.8 * 0.6)) ** (1 / 3), (1 / (0.25 * 0.4)) ** 0.5])


def test_the_perplexity_of_a_model_that_knows_nothing_is_the_number_of_tokens() -> None:
    losses = mean_loss(torch.zeros(2, 5, 7), torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool))
    assert losses.exp().tolist() == pytest.approx([7, 7])


def test_a_caption_of_which_no_token_counts_has_no_loss() -> None:
    assert mean_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool)).isnan().all()


def test_captions_become_bytes_between_edges() -> None:
    tokens, counted = as_bytes(["ab", "é", "x"])
    assert tokens.tolist() == [[EDGE, 97, 98, EDGE], [EDGE, 0xC3, 0xA9, EDGE], [EDGE, 120, EDGE, 0]]
    assert counted.tolist() == [[True, True, True], [True, True, True], [True, True, False]]


@pytest.mark.parametrize("shape", [None, (1, 8, 8), (3, 8, 12), (3, 32, 32), (1, 28, 28), (3, 64, 64), (1, 2, 3)])
def test_a_captioner_sees_images_of_any_shape_and_only_tokens_before(shape: tuple[int, int, int] | None) -> None:
    with loop.seeded(0):
        net = Captioner(shape, channels=2, prefix=2, width=16, layers=1).eval()
        images = None if shape is None else torch.rand(2, *shape)
    tokens, _ = as_bytes(["abcd", "abxy"])
    with torch.no_grad():
        expected = net(images if images is None else images[:1].expand(2, -1, -1, -1), tokens)
    assert expected.shape == (2, 5, 257)
    torch.testing.assert_close(expected[0, :3], expected[1, :3])
    assert not torch.allclose(expected[0, 3], expected[1, 3])
    if images is not None:
        with torch.no_grad():
            assert not torch.allclose(net(images, tokens)[0, 0], net(images, tokens)[1, 0])


def test_images_too_small_are_refused() -> None:
    with pytest.raises(UserError, match="images of 1x4 pixels are too small"):
        Captioner((1, 1, 4), channels=2, prefix=1, width=8, layers=1)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    images, captions = quadrants(20, 0)
    how = {"steps": 3, "batch": 8, "lr": 1e-3, "weight_decay": 0.1, "shift": 1, "noise": math.inf}
    with loop.seeded(0) as generator, pytest.raises(UserError, match="no longer a number at step 1: set lr lower"):
        net = Captioner((1, 8, 8), channels=2, prefix=1, width=8, layers=1)
        fit(net, images, captions, generator=generator, **how)  # type: ignore[arg-type]


def test_lowest_perplexities_are_kept_and_their_captions_are_right(judged: tuple[Dataset, Dataset, np.ndarray, Made]) -> None:
    from sklearn.metrics import roc_auc_score

    pool, _, right, made = judged
    assert made.rows.schema == SCHEMAS["verdicts"]
    assert made.rows["sample_id"].to_pylist() == pool.ids()
    scores, kept = np.asarray(made.rows["score"]), np.asarray(made.rows["kept"])
    assert kept.sum() == 40 == made.figures["kept"]
    assert scores[kept].min() >= -math.log(made.figures["threshold"]) - 1e-6 >= scores[~kept].max() - 2e-6
    assert made.figures["perplexity"] == pytest.approx(math.exp(-scores.mean()), rel=1e-5)
    assert made.figures["kept_perplexity"] < made.figures["perplexity"]
    assert set(made.rows.filter(pa.array(~kept))["reason"].to_pylist()) == {"perplexity above the lowest 20%"}
    assert roc_auc_score(right, scores) > 0.9
    assert right[kept].mean() > 0.9  # 0.6 of the pool are


def test_a_perplexity_that_sees_no_image_cannot_tell(judged: tuple[Dataset, Dataset, np.ndarray, Made]) -> None:
    pool, reference, _, _ = judged
    made = perplexity(pool, reference, QUICK.model_copy(update={"condition": "none", "steps": 40}), seed=1)
    scores = dict(zip(pool.captions(), made.rows["score"].to_pylist(), strict=True))
    for text, score in zip(pool.captions(), made.rows["score"].to_pylist(), strict=True):
        assert score == pytest.approx(scores[text], abs=1e-5)


def test_labels_are_never_read_and_the_same_seed_gives_the_same_bytes(judged: tuple[Dataset, Dataset, np.ndarray, Made]) -> None:
    pool, reference, _, made = judged
    before = torch.random.get_rng_state()
    assert perplexity(pool.without_labels(), reference.without_labels(), QUICK, seed=1) == made
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_score_does_not_depend_on_what_is_scored_beside_it(judged: tuple[Dataset, Dataset, np.ndarray, Made]) -> None:
    pool, reference, _, made = judged
    mixed = make(pool.parts[0].folder.parent / "mixed", [*CAPTIONS, *pool.captions()[:9]], pool.images()[:12])
    with loop.seeded(1):
        net = Captioner((1, 8, 8), channels=8, prefix=4, width=32, layers=2).eval()
    scores = {size: score_pool(net.read, mixed, True, 256, size, "key")[0] for size in (1, 5, 12)}
    np.testing.assert_allclose(scores[1], scores[12], atol=1e-5)
    np.testing.assert_allclose(scores[5], scores[12], atol=1e-5)
    some = perplexity(pool.take(np.arange(30)), reference, QUICK.model_copy(update={"at_once": 7}), seed=1)
    np.testing.assert_allclose(np.asarray(some.rows["score"]), np.asarray(made.rows["score"])[:30], atol=1e-4)


def test_a_threshold_keeps_what_is_below_it(judged: tuple[Dataset, Dataset, np.ndarray, Made]) -> None:
    pool, reference, _, made = judged
    cut = QUICK.model_copy(update={"threshold": made.figures["threshold"], "keep": 0.01})
    again = perplexity(pool, reference, cut, seed=1)
    scores = np.asarray(made.rows["score"])
    assert again.rows["kept"].to_pylist() == (scores > np.float32(-math.log(made.figures["threshold"]))).tolist()
    assert any(reason.startswith("perplexity not below ") for reason in again.rows["reason"].to_pylist())
    with pytest.raises(UserError, match=r"no caption of the pool has a perplexity below threshold=1; the lowest is 1\.\d+"):
        perplexity(pool, reference, QUICK.model_copy(update={"threshold": 1.0000001}), seed=1)


def test_ranks_within_lengths_favour_no_length() -> None:
    lengths = np.repeat([5, 30], 50)
    scores = np.concatenate([np.linspace(-3, -2, 50), np.linspace(-1, 0, 50)]).astype(np.float32)  # long captions all look better
    ranks = within_lengths(scores, lengths)
    np.testing.assert_allclose(ranks, np.tile(np.arange(1, 51) / 50, 2), rtol=1e-6)
    np.testing.assert_allclose(within_lengths(scores, np.full(100, 7)), np.arange(1, 101) / 100, rtol=1e-6)


def test_the_same_share_of_each_length_is_kept_where_that_is_asked(judged: tuple[Dataset, Dataset, np.ndarray, Made]) -> None:
    pool, reference, _, _ = judged
    made = perplexity(pool, reference, Config(keep=0.2, by_length=True, steps=5, width=16, channels=4))
    kept, lengths = np.asarray(made.rows["kept"]), np.array([len(text) for text in pool.captions()])
    assert kept.sum() == 40
    for length in set(lengths.tolist()):
        assert kept[lengths == length].mean() == pytest.approx(0.2, abs=0.05)
    assert "of its length" in next(reason for reason in made.rows["reason"].to_pylist() if reason)


def test_length_and_vocabulary_of_the_kept_captions_stand_beside_the_pools(tmp_path: Path) -> None:
    pool = make(tmp_path / "pool", ["a cat", "A cat sat on a mat.", None, "dogs"])
    found = caption_figures(pool, np.array([True, False, False, True]))
    assert found == {"words": 9 / 4, "kept_words": 3 / 2, "vocabulary": 6, "kept_vocabulary": 3}


def test_rows_without_a_caption_come_last(judged: tuple[Dataset, Dataset, np.ndarray, Made], tmp_path: Path) -> None:
    pool, reference, _, _ = judged
    holes = make(tmp_path / "holes", [None, "upper left", "  ", "zzzz", "", "lower left"], pool.images()[:6])
    scores = np.asarray(perplexity(holes, reference, SMOKE).rows["score"])
    assert np.isfinite(scores).all()
    assert scores[[0, 2, 4]].max() < scores[[1, 3, 5]].min()
    with pytest.raises(UserError, match="no row of the pool has a caption"):
        perplexity(holes.take(np.array([0, 2, 4])), reference, SMOKE)


def test_texts_are_judged_without_images(tmp_path: Path) -> None:
    clean = [f"the {noun} is {colour}" for noun in ("cat", "dog", "house", "tree") for colour in ("red", "blue", "green", "grey")]
    pool = make(tmp_path / "pool", [*clean, *(text[::-1].replace("e", "q") for text in clean)])
    made = perplexity(pool, make(tmp_path / "reference", clean * 2), Config(keep=0.5, condition="none", steps=60, width=32))  # type: ignore[arg-type]
    assert made.rows["kept"].to_pylist() == [True] * 16 + [False] * 16
    with pytest.raises(UserError, match="the pool has no images: set 'condition: none'"):
        perplexity(pool, pool, Config(keep=0.5))


@pytest.mark.parametrize("name", ["encoder_decoder", "blip", "llava"])
def test_models_by_path_see_the_image_and_no_padding(name: str, saved: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 1, 8, 8), dtype=np.uint8)
    reader = Loaded(str(saved / name), (1, 8, 8))
    losses, counts = reader(images, CAPTIONS)
    assert counts.tolist() == [len(text) for text in CAPTIONS]
    for at in range(3):
        alone, _ = reader(images[at : at + 1], CAPTIONS[at : at + 1])
        assert alone.item() == pytest.approx(losses[at].item(), abs=1e-4)
    other, _ = reader(images[::-1].copy(), CAPTIONS)
    assert abs(other[0] - losses[0]) > 1e-3
    assert other[1].item() == pytest.approx(losses[1].item(), abs=1e-4)


def test_a_loaded_models_loss_is_that_of_the_model_itself(saved: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved / "gpt2").eval(), AutoTokenizer.from_pretrained(saved / "gpt2")
    losses, _ = Loaded(str(saved / "gpt2"), None)(None, CAPTIONS)
    for text, loss in zip(CAPTIONS, losses.tolist(), strict=True):
        ids = tokenizer("<e>" + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert model(ids, labels=ids).loss.item() == pytest.approx(loss, abs=1e-5)


def test_a_prompt_stands_before_the_caption_and_does_not_count(saved: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (1, 1, 8, 8), dtype=np.uint8)
    for name in ("blip", "llava"):
        plain, asked = Loaded(str(saved / name), (1, 8, 8)), Loaded(str(saved / name), (1, 8, 8), "What is it? ")
        assert asked.start == plain.start + len("What is it? ")
        (loss, count), (other, again) = plain(image, ["seven"]), asked(image, ["seven"])
        assert count == again == 5
        assert abs(loss - other) > 1e-4
    assert "USER: <image>What is it? " in asked.before


def test_a_pool_is_judged_by_a_model_by_path_and_no_reference(saved: Path, judged: tuple[Dataset, Dataset, np.ndarray, Made]) -> None:
    pool, reference, _, _ = judged
    nobody = reference.take(np.array([], dtype=int))
    made = perplexity(pool.take(np.arange(20)), replace(nobody, info=Info("image")), Config(model=str(saved / "encoder_decoder")))
    assert made.rows["kept"].to_pylist().count(True) == 4
    assert made.curve == ()
    texts = perplexity(pool.take(np.arange(20)), nobody, Config(model=str(saved / "gpt2"), condition="none", at_once=3))
    assert texts.rows["kept"].to_pylist().count(True) == 4


def test_what_is_no_such_model_is_refused(saved: Path, tmp_path: Path) -> None:
    import transformers as hub

    with pytest.raises(UserError, match=r"model: there is no folder /nowhere; give a folder of one \(image-to-text model\)"):
        Loaded("/nowhere", (1, 8, 8))
    with pytest.raises(UserError, match="holds no image-to-text model that can be loaded here"):
        Loaded(str(tmp_path), (1, 8, 8))
    with pytest.raises(UserError, match="holds no image-to-text model that can be loaded here"):
        Loaded(str(saved / "gpt2"), (1, 8, 8))
    with pytest.raises(UserError, match="holds no causal language model that can be loaded here"):
        Loaded(str(saved / "blip"), None)
    tokenizer = letters(bos_token="<s>", eos_token="</s>")
    save(tmp_path / "headless", hub.LlamaModel(hub.LlamaConfig(vocab_size=len(tokenizer), **SMALL)), tokenizer)
    with pytest.raises(UserError, match=r"its weights lack lm_head\.weight"):
        Loaded(str(tmp_path / "headless"), None)
    save(tmp_path / "both ways", hub.BertLMHeadModel(hub.BertConfig(vocab_size=len(tokenizer), **SMALL)), tokenizer)
    with pytest.raises(UserError, match="sees the tokens that it is to predict"):
        Loaded(str(tmp_path / "both ways"), None)
    save(tmp_path / "too few words", hub.GPT2LMHeadModel(hub.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)), tokenizer)
    with pytest.raises(UserError, match="gives no loss of a caption"):
        Loaded(str(tmp_path / "too few words"), None)


def test_bad_reference_sets_are_named(judged: tuple[Dataset, Dataset, np.ndarray, Made], tmp_path: Path) -> None:
    pool, reference, _, _ = judged
    with pytest.raises(UserError, match="reference row 'r00001' has no caption"):
        perplexity(pool, make(tmp_path / "a", ["one", " "], pool.images()[:2]), SMOKE)
    with pytest.raises(UserError, match="the reference set has no rows to train a captioner on"):
        perplexity(pool, reference.take(np.array([], dtype=int)), SMOKE)
    with pytest.raises(UserError, match="the reference set has no images"):
        perplexity(pool, make(tmp_path / "b", ["one", "two"]), SMOKE)
    with pytest.raises(UserError, match=r"pool images are \(1, 8, 8\) and reference images \(1, 9, 8\)"):
        perplexity(pool, make(tmp_path / "c", ["one", "two"], np.zeros((2, 1, 9, 8), dtype=np.uint8)), SMOKE)
    with pytest.raises(UserError, match=r"keep=0.001 leaves none of the pool's 200 rows"):
        perplexity(pool, reference, Config(keep=0.001))


@pytest.mark.parametrize("setting", [{"keep": 0}, {"keep": 1.1}, {"threshold": 1.0}, {"condition": "text"}, {"width": 12}, {"epochs": 3}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(**setting)
