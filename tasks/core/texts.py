"""Learning from texts: first encoders, masked-LM pre-training, and the loop that fine-tunes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.encoder import CLS, MASK, PAD, SPECIAL, TextClassifier, Tokens
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig
from tasks.core.networks import Net, takes
from tasks.core.progress import track

MASKED = 0.15  # share of the tokens that are to be guessed; of these 80% are masked, 10% drawn, 10% left (BERT, section 3.1)
SPREAD = 0.02 * 768**0.5  # standard deviation of first weights, times the root of the width: BERT's 0.02 is that of 768 values


class Encoder(MethodConfig):
    """The encoder and its pre-training."""

    # the default learning rates are those of small fresh encoders: one of BERT's size wants 1e-4 in pre-training and 2e-5 to 5e-5 after
    pretrained: str | None = Field(None, description="an encoder to go on from, by hub id or local folder; none: a fresh one")
    layers: int = Field(2, ge=1, description="layers of a fresh encoder")
    width: int = Field(64, ge=2, description="values of a state of a fresh encoder")
    heads: int = Field(2, ge=1, description="heads of attention of a fresh encoder; they share out the width")
    words: int = Field(4096, ge=1, description="places that the words of a fresh encoder are hashed to")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of states and attention that a fresh encoder drops in training")  # BERT: 0.1
    longest: int = Field(32, ge=2, description="tokens of a text that are read")
    pooling: Literal["mean", "first"] = Field("mean", description="what the classifier sees: the mean of the last states, or the first")
    pretrain_steps: int = Field(2000, ge=0, description="batches of masked-LM pre-training on all texts; 0: none")
    pretrain_batch: int = Field(64, ge=1, description="texts of such a batch")
    pretrain_lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW in pre-training")  # BERT: 1e-4, of far larger encoders


def check(data: Dataset, *others: tuple[str, Net | None]) -> None:
    """Raises UserError where the rows are no texts, there are none, or one of the named networks takes something else."""
    if not data.reads:
        raise UserError(f"these rows hold {data.holds}, and this method reads texts: give it a pool of 'texts:PATH'")
    if len(data) == 0:
        raise UserError("there is nothing to learn from: the data has no rows")
    for name, net in others:
        if net is not None and (not isinstance(net, TextClassifier) or net.arch["classes"] != len(data.info.classes)):
            theirs = f"takes {takes(net.arch)} of {net.arch['classes']} classes"
            raise UserError(f"{name} {theirs}; the data has texts of {len(data.info.classes)}")


def begin(
    data: Dataset, cfg: Encoder, *, start: Net | None, generator: torch.Generator, device: str = "cpu"
) -> tuple[TextClassifier, Tokens]:
    """The network before it learns any label, pre-trained on all texts of `data`, and their tokens (N, T). Call it inside `loop.seeded`.

    A copy of `start`; or the encoder `cfg.pretrained`; or a fresh one. Raises UserError where weights cannot be loaded.
    """
    guessing: dict[str, Tensor] = {}
    classes = len(data.info.classes)
    if start is not None:
        assert isinstance(start, TextClassifier)
        net = copy.deepcopy(start).requires_grad_(True)
    elif cfg.pretrained:
        net, guessing = pretrained(cfg.pretrained, classes, longest=cfg.longest, pooling=cfg.pooling)
    else:
        own = cfg.model_dump(include={"layers", "width", "heads", "words", "longest", "dropout", "pooling"})
        net = fresh(classes, **own)
    tokens = net.tokens(data.inputs())
    if cfg.pretrain_steps:
        how: dict[str, Any] = {"steps": cfg.pretrain_steps, "batch": cfg.pretrain_batch, "lr": cfg.pretrain_lr}
        pretrain(net, tokens, **how, guessing=guessing, generator=generator, device=device)
    return net, tokens


def fresh(classes: int, *, layers: int, width: int, heads: int, words: int, longest: int, dropout: float, pooling: str) -> TextClassifier:
    """A fresh BERT of so many layers and values of a state, for hashed words. Call it inside `loop.seeded`.

    Raises UserError where the states cannot be shared out among the heads.
    """
    if width % heads:
        raise UserError(f"a state of {width} values cannot be shared out among {heads} heads; set 'heads' to a divisor of 'width'")
    encoder = {
        "model_type": "bert", "vocab_size": words + SPECIAL, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 4 * width, "max_position_embeddings": longest, "type_vocab_size": 1,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "pad_token_id": PAD,
        "initializer_range": SPREAD / width**0.5,
    }  # fmt: skip
    tokens = {"kind": "hashed", "size": words + SPECIAL, "pad": PAD, "mask": MASK}
    return TextClassifier({**_arch(classes, longest, pooling), "encoder": encoder, "tokens": tokens})


def pretrained(name: str, classes: int, *, longest: int, pooling: str) -> tuple[TextClassifier, dict[str, Tensor]]:
    """An encoder by hub id or local folder (safetensors only) under a fresh classifier, and the weights of the head that guesses masked
    tokens, where it has one. Call it inside `loop.seeded`.

    Raises UserError where there is no such folder, it holds no encoder that can be loaded, or its tokenizer has no `tokenizer.json`.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from tasks.core.text_to_image import quiet

    here = Path(name).expanduser()
    # a hub id is `name` or `owner/name`; everything else can only be a path
    if not here.is_dir() and (here.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(f"pretrained: there is no folder {name}; give a folder with an encoder or a hub id like 'owner/name'")
    source = str(here) if here.is_dir() else name
    try:
        with quiet():
            whole, told = AutoModelForMaskedLM.from_pretrained(source, use_safetensors=True, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"pretrained: {name} holds no encoder that can be loaded here ({str(error).partition(chr(10))[0]})") from None
    base = whole.base_model_prefix + "."
    missing = sorted(key for key in told["missing_keys"] if key.startswith(base) and ".pooler." not in key)
    if missing:
        raise UserError(f"pretrained: {name} holds no encoder that can be loaded here (it has no {missing[0]})")
    # where the files of a tokenizer are missing, one is made up that knows special tokens alone
    words = len(tokenizer) - len(tokenizer.all_special_ids)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None or words <= 0:
        raise UserError(f"pretrained: the tokenizer of {name} has no tokenizer.json or no padding; save it anew with 'transformers'")
    if len(tokenizer) > whole.config.vocab_size:
        known = f"{len(tokenizer)} tokens, and its encoder {whole.config.vocab_size}"
        raise UserError(f"pretrained: the tokenizer of {name} knows {known}; give weights and tokenizer that were saved together")
    config = whole.config.to_diff_dict()
    encoder = {key: value for key, value in config.items() if key not in ("architectures", "transformers_version", "dtype", "torch_dtype")}
    tokens = {
        "kind": "file", "file": json.loads(tokenizer.backend_tokenizer.to_str()), "pad": tokenizer.pad_token_id,
        "mask": tokenizer.mask_token_id, "special": sorted(tokenizer.all_special_ids),
    }  # fmt: skip
    places = next((part for key, part in whole.base_model.named_modules() if key.endswith("position_embeddings")), None)
    if isinstance(places, nn.Embedding):  # RoBERTa and its like count from behind the padding's number
        longest = min(longest, places.num_embeddings - (0 if places.padding_idx is None else places.padding_idx + 1))
    longest = min(longest, tokenizer.model_max_length)
    encoder["model_type"] = whole.config.model_type
    net = TextClassifier({**_arch(classes, longest, pooling), "encoder": encoder, "tokens": tokens})
    own = whole.base_model.float().state_dict()
    net.encoder.load_state_dict({key: value for key, value in own.items() if not key.startswith("pooler.")})
    guessing = {key: value for key, value in whole.float().state_dict().items() if not key.startswith(base)}
    return net, ({} if any(not key.startswith(base) for key in told["missing_keys"]) else guessing)


def pretrain(
    net: TextClassifier,
    tokens: Tokens,
    *,
    steps: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
    device: str = "cpu",
    guessing: dict[str, Tensor] | None = None,
    what: str = "pre-train",
) -> list[float]:
    """Masked-LM pre-training of the encoder in place on tokens (N, T); gives the loss of each step, in nats a token.

    AdamW with a linear rise and fall of the learning rate, as BERT's. `guessing`: first weights of the head that guesses, which is then
    forgotten. Raises UserError where the tokenizer has no mask, or training diverged.
    """
    from transformers import AutoModelForMaskedLM

    how = net.arch["tokens"]
    special = torch.tensor(how.get("special", [PAD, CLS, MASK]))
    if steps and how.get("mask") is None:
        raise UserError("these weights' tokenizer has no mask, so that nothing can be pre-trained on more texts; set 'pretrain_steps' to 0")
    whole: Any = AutoModelForMaskedLM.from_config(net.encoder.config)
    setattr(whole, whole.base_model_prefix, net.encoder)
    whole.tie_weights()
    if guessing:
        whole.load_state_dict(guessing, strict=False)
    else:
        # how frequent each token is stands in the biases from the start: the states would spend long on nothing else
        bias = whole.get_output_embeddings().bias
        if bias is not None:
            counts = 1.0 + np.bincount(tokens[~np.isin(tokens, special.numpy())], minlength=len(bias))
            bias.data.copy_(torch.from_numpy(np.log(counts / counts.sum())))
    whole.to(device).train()
    optimiser = torch.optim.AdamW(whole.parameters(), lr, weight_decay=0.01, fused=True)
    schedule = linear(optimiser, steps)
    batches, losses = alike((tokens != net.pad).sum(1), batch, steps, generator), []
    asked = torch.empty(0)

    def only_asked(_: nn.Module, __: object, given: Any) -> Any:
        # the head's vocabulary is most of the cost: it is asked of the hidden tokens alone
        given.last_hidden_state = given.last_hidden_state[asked.to(device)][None]
        return given

    hook = whole.base_model.register_forward_hook(only_asked)
    try:
        for _ in track(range(steps), what):
            seen = trimmed(tokens[next(batches).numpy()], net.pad)
            shown, asked = mask(seen, special, how["mask"], net.encoder.config.vocab_size, generator)
            guesses = whole(input_ids=shown.to(device), attention_mask=(seen != net.pad).long().to(device)).logits
            # a batch of empty texts alone asks for nothing, and its loss is 0
            loss = F.cross_entropy(guesses[0], seen[asked].to(device), reduction="sum") / max(int(asked.sum()), 1)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    finally:
        hook.remove()
    loop.check_finite(whole, what, lr)
    return losses


def alike(lengths: npt.NDArray[np.int64], size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """As `loop.index_batches`, but texts of like length (N,) come together, so that little padding is worked through.

    16 batches are drawn at once, sorted, cut, and given in random order.
    """
    left = steps
    for drawn in loop.index_batches(len(lengths), 16 * size, -(-steps // 16), generator):
        parts = drawn[torch.from_numpy(lengths)[drawn].argsort(stable=True)].split(size)
        for at in torch.randperm(16, generator=generator)[:left].tolist():
            yield parts[at]
        left -= 16


def mask(tokens: Tensor, special: Tensor, sign: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) with some of them hidden, and which (N, T) are to be guessed, at least one of a batch. BERT, section 3.1.

    `special` ones never are; `sign` hides, `size` is that of the vocabulary.
    """
    free = ~torch.isin(tokens, special)
    drawn = torch.rand(tokens.shape, generator=generator).masked_fill(~free, 2.0)
    asked = ((drawn < MASKED) | (drawn == drawn.min())) & free
    how = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(size, tokens.shape, generator=generator)
    return torch.where(asked & (how < 0.8), sign, torch.where(asked & (how >= 0.9), other, tokens)), asked


def trimmed(tokens: Tokens, pad: int) -> Tensor:
    """The same (N, T) without the columns at the end in which only padding stands."""
    there = np.flatnonzero((tokens != pad).any(0))
    return torch.from_numpy(tokens[:, : int(there[-1]) + 1 if len(there) else 1])


def linear(optimiser: torch.optim.Optimizer, steps: int, warm_up: float = 0.1) -> Any:
    """Learning rate up in a line for a share of the steps, then down in a line to nothing."""
    rise = max(1, round(warm_up * steps))
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda at: min((at + 1) / rise, (steps - at) / max(1, steps - rise), 1.0))


def fit(
    net: TextClassifier,
    tokens: Tokens,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
    device: str = "cpu",
    what: str = "train",
) -> None:
    """Train in place by AdamW, as BERT is fine-tuned, on tokens (N, T).

    `loss(logits, at)` is that of a batch: the logits (n, K) of the rows at positions `at` (n,). The network stays
    on the device, in training mode. Raises UserError where training diverged.
    """
    net.to(device).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=True)
    schedule = linear(optimiser, steps)
    batches = loop.index_batches(len(tokens), batch, steps, generator)
    for _ in track(range(steps), what):
        at = next(batches)
        value = loss(net(trimmed(tokens[at.numpy()], net.pad).to(device)), at)
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    loop.check_finite(net, what, lr)


def _arch(classes: int, longest: int, pooling: str) -> dict[str, Any]:
    return {"kind": "text", "shape": [0, 0, 0], "classes": classes, "mean": 0.0, "std": 1.0, "longest": longest, "pooling": pooling}
