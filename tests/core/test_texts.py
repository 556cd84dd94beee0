"""Encoders of texts: how texts are cut, masked-LM pre-training, weights from a folder, and the network rebuilt."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tasks.core import encoder, loop, networks, texts
from tasks.core.dataset import text_bytes
from tasks.core.encoder import CLS, MASK, PAD, SPECIAL, TextClassifier
from tasks.core.errors import UserError
from tasks.core.text_to_image import quiet

WORDS = ("red", "blue", "old", "new", "house", "boat")
SAID = ["red house", "old boat, new boat", "a house", "blue"]
SIGNS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]


def small(classes: int = 3, **changes: Any) -> TextClassifier:
    own: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "words": 200, "longest": 12, "dropout": 0.0, "pooling": "mean"}
    with loop.seeded(0):
        return texts.fresh(classes, **{**own, **changes})


def weights(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def tokenizer(longest: int | None = None) -> PreTrainedTokenizerFast:
    """Word pieces: the words whole, and single letters."""
    letters = [letter for at in "abcdefghijklmnopqrstuvwxyz" for letter in (at, f"##{at}")]
    vocabulary = {token: at for at, token in enumerate([*SIGNS, *WORDS, ",", *letters])}
    cut = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    cut.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cut.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = dict(zip(("pad_token", "cls_token", "sep_token", "mask_token", "unk_token"), SIGNS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=cut, **names, **({"model_max_length": longest} if longest else {}))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as RoBERTa cuts them, without merges."""
    signs = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: at for at, token in enumerate([*signs, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    cut = Tokenizer(models.BPE(vocabulary, []))
    cut.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=cut, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>",
    )  # fmt: skip


def saved(folder: Path, kind: str) -> Path:
    """A small encoder that has learnt nothing, as `transformers` keeps it."""
    cut = byte_tokenizer() if kind == "roberta" else tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(cut), "pad_token_id": cut.pad_token_id}
    wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with loop.seeded(3), quiet():
        model: Any = {
            "bert": lambda: BertForMaskedLM(BertConfig(**sizes, **wide, max_position_embeddings=20)),
            "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**sizes, **wide, max_position_embeddings=20)),
            "distilbert": lambda: DistilBertForMaskedLM(
                DistilBertConfig(**sizes, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=20)
            ),
        }[kind]()
        model.save_pretrained(folder)
        cut.save_pretrained(folder)
    return folder


# how texts are cut


def test_words_are_hashed_in_lower_case_signs_apart_and_cut_at_the_longest() -> None:
    net = small(longest=6)
    [row, same, long] = net.tokens(text_bytes(["Red house!", "rED  HOUSE !", "a b c d e f g h"]))
    assert row.tolist() == same.tolist()
    assert row[0] == CLS
    assert row[4:].tolist() == [PAD, PAD]
    assert len(set(row[1:4])) == 3
    assert row[1:4].min() >= SPECIAL
    assert (long != PAD).sum() == 6


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_texts_give_tokens_of_the_vocabulary_and_finite_logits(rows: list[str]) -> None:
    net = small().eval()
    found = net.tokens(text_bytes(rows))
    assert found.shape[0] == len(rows)
    assert found.min() >= 0
    assert found.max() < 200 + SPECIAL
    assert net(torch.from_numpy(text_bytes(rows))).isfinite().all()


def test_bytes_cut_inside_a_character_empty_texts_and_padding_do_no_harm() -> None:
    net = small().eval()
    whole, half = "blue é".encode(), "blue é".encode()[:-1]
    rows = np.zeros((4, 12), np.uint8)
    rows[0, : len(whole)], rows[1, : len(half)] = list(whole), list(half)
    rows[3, :4] = list(b"blue")
    found = net.tokens(rows)
    assert found[1].tolist() == found[3].tolist()  # the half of a character is left out
    assert found[2].tolist() == [CLS, PAD, PAD]  # no text at all
    assert net(torch.from_numpy(rows)).isfinite().all()
    assert net.tokens(np.zeros((0, 5), np.uint8)).shape == (0, 1)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_what_stands_beside_a_text_does_not_change_its_answer(pooling: str) -> None:
    net = small(pooling=pooling).eval()
    alone = net(torch.from_numpy(text_bytes(SAID[:1])))
    beside = net(torch.from_numpy(text_bytes(SAID)))[:1]
    assert torch.allclose(alone, beside, atol=1e-6)
    assert torch.equal(net(torch.from_numpy(net.tokens(text_bytes(SAID)))), net(torch.from_numpy(text_bytes(SAID))))


def test_the_mean_is_that_of_the_states_of_the_text_and_the_first_is_the_first() -> None:
    net = small().eval()
    tokens = torch.from_numpy(net.tokens(text_bytes(["red", "old boat"])))
    states = net.encoder(input_ids=tokens, attention_mask=(tokens != PAD).long()).last_hidden_state
    assert torch.allclose(net.features(tokens)[0], states[0, :2].mean(0), atol=1e-6)
    net.arch["pooling"] = "first"
    assert torch.equal(net.features(tokens), states[:, 0])


def test_a_kind_of_tokens_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="not known; known: hashed, file"):
        encoder.cutter({"kind": "sounds"}, 8)


# the network


def test_it_is_rebuilt_from_its_description_and_weights_alone() -> None:
    first = small(classes=4, pooling="first", layers=2).eval()
    second = networks.build(json.loads(json.dumps(first.arch))).eval()
    second.load_state_dict(first.state_dict())
    data = torch.from_numpy(text_bytes(SAID))
    assert torch.equal(first(data), second(data))
    assert first(data).shape == (4, 4)
    assert networks.reads(first.arch)


def test_states_that_the_heads_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match="16 values cannot be shared out among 3 heads"):
        small(heads=3)


def test_first_weights_are_as_wide_as_berts_for_its_size() -> None:
    net = small(words=4000, width=64)
    assert net.encoder.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.02 * math.sqrt(768 / 64), rel=0.02)


def test_its_module_stands_on_that_of_networks_alone() -> None:
    tree = ast.parse(Path(encoder.__file__).read_text())
    top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    assert [name for name in top if name.startswith(("tasks", "flows"))] == ["tasks.core.networks"]


# masked-LM pre-training


def pairs(n: int = 300, seed: int = 0) -> list[str]:
    """Texts in which each word is foretold by those beside it: four phrases of three words."""
    draw = np.random.default_rng(seed)
    phrases = ["red house stands", "blue boat swims", "old man sleeps", "new song sounds"]
    return [" ".join(phrases[at] for at in draw.integers(4, size=2)) for _ in range(n)]


def test_words_that_follow_from_others_are_guessed_far_better_than_by_how_frequent_they_are() -> None:
    rows = pairs()
    net = small(width=32, layers=2)
    before, head = weights(net.encoder), weights(net.head)
    with loop.seeded(1) as generator:
        losses = texts.pretrain(net, net.tokens(text_bytes(rows)), steps=400, batch=32, lr=3e-3, generator=generator)
    words = Counter(word for row in rows for word in row.split())
    entropy = -sum(n / words.total() * math.log(n / words.total()) for n in words.values())
    assert len(losses) == 400
    assert losses[0] == pytest.approx(entropy, abs=0.4)  # the biases know from the start how frequent each word is
    assert np.mean(losses[-50:]) < 0.4 * entropy
    assert not torch.equal(weights(net.encoder), before)
    assert torch.equal(weights(net.head), head)


def test_pre_training_leaves_nothing_behind_on_the_network() -> None:
    net = small()
    keys, tokens = list(net.state_dict()), net.tokens(text_bytes(SAID))
    with loop.seeded(1) as generator:
        texts.pretrain(net, tokens, steps=2, batch=4, lr=1e-3, generator=generator)
        with pytest.raises(UserError, match="'pre-train' diverged"):
            texts.pretrain(small(), tokens, steps=3, batch=4, lr=float("inf"), generator=generator)
    assert list(net.state_dict()) == keys
    assert not any(module._forward_hooks for module in net.modules())
    assert net(torch.from_numpy(tokens)).shape == (4, 3)


def test_words_are_guessed_by_the_embeddings_that_they_come_in_by(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = AutoModelForMaskedLM.from_config
    monkeypatch.setattr(AutoModelForMaskedLM, "from_config", lambda config: made.append(real(config)) or made[-1])
    net = small()
    with loop.seeded(1) as generator:
        texts.pretrain(net, net.tokens(text_bytes(SAID)), steps=1, batch=4, lr=1e-3, generator=generator)
    assert made[0].get_output_embeddings().weight is net.encoder.embeddings.word_embeddings.weight


def test_the_same_seed_gives_the_same_pre_training_and_another_seed_another() -> None:
    made = []
    for seed in (1, 1, 2):
        net = small(dropout=0.1)
        with loop.seeded(seed) as generator:
            texts.pretrain(net, net.tokens(text_bytes(pairs(20))), steps=3, batch=8, lr=1e-3, generator=generator)
        made.append(weights(net))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_texts_without_a_word_ask_for_nothing() -> None:
    net = small()
    before = weights(net)
    with loop.seeded(1) as generator:
        losses = texts.pretrain(net, net.tokens(text_bytes(["", ""])), steps=2, batch=2, lr=1e-9, generator=generator)
    assert losses == [0.0, 0.0]
    assert torch.allclose(weights(net), before, atol=1e-6)


def test_one_token_in_seven_is_asked_for_most_of_them_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SPECIAL, 500, (400, 50), generator=generator)
    tokens[:, 0], tokens[:, 40:] = CLS, PAD
    shown, asked = texts.mask(tokens, torch.tensor([PAD, CLS, MASK]), MASK, 500, generator)
    free = tokens >= SPECIAL
    assert not asked[~free].any()
    assert torch.equal(shown[~asked], tokens[~asked])
    assert asked[free].float().mean().item() == pytest.approx(0.15, abs=0.01)
    hidden, same = (shown == MASK)[asked].float().mean().item(), (shown == tokens)[asked].float().mean().item()
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert same == pytest.approx(0.1, abs=0.02)
    one = torch.tensor([[CLS, 7, PAD]])
    assert all(
        texts.mask(one, torch.tensor([PAD, CLS, MASK]), MASK, 500, generator)[1].tolist() == [[False, True, False]] for _ in range(20)
    )


def test_texts_of_like_length_come_together_and_each_as_often_as_any() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 320)
    batches = list(texts.alike(lengths, 10, 70, torch.Generator().manual_seed(0)))
    assert [len(at) for at in batches] == [10] * 70
    assert sorted(torch.cat(batches[:32]).tolist()) == list(range(320))  # each pass over the rows has each of them once
    spread = [np.ptp(lengths[at.numpy()]) for at in batches]
    assert np.mean(spread) < 10  # batches as they are drawn spread over 50 and more
    assert len(list(texts.alike(lengths[:3], 10, 5, torch.Generator()))) == 5


def test_the_learning_rate_rises_and_falls_in_lines() -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule, rates = texts.linear(optimiser, 20), []
    for _ in range(20):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert np.diff(rates[2:]) == pytest.approx(-1 / 18)
    assert rates[-1] == pytest.approx(1 / 18)


def test_columns_of_padding_alone_are_cut_off() -> None:
    assert texts.trimmed(np.array([[1, 5, 0, 0], [1, 0, 0, 0]]), 0).tolist() == [[1, 5], [1, 0]]
    assert texts.trimmed(np.zeros((2, 3), np.int64), 0).shape == (2, 1)


# weights from a folder


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_an_encoder_from_a_folder_answers_as_it_does_there_is_rebuilt_and_goes_on_learning(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "kept", kind)
    with loop.seeded(0):
        net, guessing = texts.pretrained(str(folder), 3, longest=64, pooling="first")
    net.eval()
    # texts longer than there are places are cut: RoBERTa's places begin behind the padding's
    assert net.arch["longest"] == (18 if kind == "roberta" else 20)
    data = torch.from_numpy(text_bytes([*SAID, "", "red " * 40]))
    cut = byte_tokenizer() if kind == "roberta" else tokenizer()
    asked = cut([*SAID, ""], padding=True, truncation=True, max_length=net.arch["longest"], return_tensors="pt")
    with quiet():
        whole: Any = AutoModelForMaskedLM.from_pretrained(folder).eval()
    wanted = whole.base_model(input_ids=asked["input_ids"], attention_mask=asked["attention_mask"]).last_hidden_state[:, 0]
    assert torch.allclose(net.features(data)[:-1], wanted, atol=1e-5)
    assert net(data).isfinite().all()
    assert str(tmp_path) not in json.dumps(net.arch)
    again = networks.build(json.loads(json.dumps(net.arch))).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(net(data), again(data))
    # the head that guesses is the folder's own
    head = {key: value for key, value in whole.state_dict().items() if not key.startswith(whole.base_model_prefix + ".")}
    assert head.keys() == guessing.keys()
    assert all(torch.equal(head[key], guessing[key]) for key in head)
    with loop.seeded(0) as generator:
        losses = texts.pretrain(net, net.tokens(data.numpy()), steps=3, batch=4, lr=1e-3, generator=generator, guessing=guessing)
    assert np.isfinite(losses).all()


def test_an_encoder_without_a_head_that_guesses_gets_a_fresh_one(tmp_path: Path) -> None:
    folder = saved(tmp_path / "kept", "bert")
    with quiet():
        BertForMaskedLM.from_pretrained(folder).base_model.save_pretrained(folder)
    with loop.seeded(0):
        _, guessing = texts.pretrained(str(folder), 3, longest=8, pooling="mean")
    assert guessing == {}


def test_what_cannot_be_loaded_is_refused_in_a_sentence(tmp_path: Path) -> None:
    def load(name: object) -> None:
        texts.pretrained(str(name), 3, longest=8, pooling="mean")

    with pytest.raises(UserError, match=r"there is no folder .*absent; give a folder with an encoder or a hub id"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no encoder that can be loaded here"):
        load(tmp_path / "empty")
    with quiet():
        GPT2LMHeadModel(GPT2Config(vocab_size=70, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "writer")
        tokenizer().save_pretrained(tmp_path / "writer")
    with pytest.raises(UserError, match="writer holds no encoder that can be loaded here"):
        load(tmp_path / "writer")
    bare = saved(tmp_path / "bare", "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(UserError, match=r"the tokenizer of .*bare has no tokenizer.json or no padding; save it anew with 'transformers'"):
        load(bare)
    more = saved(tmp_path / "more", "bert")
    wider = tokenizer()
    wider.add_tokens(["castle"])
    wider.save_pretrained(more)
    with pytest.raises(UserError, match=r"knows \d+ tokens, and its encoder \d+; give weights and tokenizer that were saved together"):
        load(more)


def test_a_tokenizer_without_a_mask_cannot_be_pre_trained_on(tmp_path: Path) -> None:
    folder = saved(tmp_path / "kept", "bert")
    cut = tokenizer()
    cut.mask_token = None
    cut.save_pretrained(folder)
    with loop.seeded(0) as generator:
        net, _ = texts.pretrained(str(folder), 3, longest=8, pooling="mean")
        with pytest.raises(UserError, match="no mask, so that nothing can be pre-trained on more texts; set 'pretrain_steps' to 0"):
            texts.pretrain(net, net.tokens(text_bytes(SAID)), steps=1, batch=2, lr=1e-3, generator=generator)
