"""Models that say how likely a caption is: a small one that is trained here, and those of `transformers`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.errors import UserError
from tasks.core.progress import track
from tasks.filter._shared import augment

Pixels = npt.NDArray[np.uint8] | None
# images (N, C, H, W) or None, and N captions -> mean loss of a caption's tokens (N,) and their number (N,)
Reader = Callable[[Pixels, Sequence[str]], tuple[Tensor, Tensor]]
EDGE = 256  # the token before and behind a caption; those below are bytes


def mean_loss(logits: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats (N,) of the tokens (N, L) that are `counted` (N, L), bool; NaN where none is.

    logits (N, L, V) say what is expected at the very place of each token.
    """
    each = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view_as(tokens)
    return each.masked_fill(~counted, 0).sum(1) / counted.sum(1)


def as_bytes(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens (N, L + 1) of captions: an edge, their bytes, an edge, and padding; and which of the last L are the caption's (N, L)."""
    coded = [list(text.encode()) for text in captions]
    longest = max(map(len, coded))
    tokens = torch.tensor([[EDGE, *some, EDGE, *[0] * (longest - len(some))] for some in coded])
    return tokens, torch.arange(longest + 1) <= torch.tensor([len(some) for some in coded])[:, None]


class Captioner(nn.Module):
    """Convolutions whose output stands as `prefix` tokens before the caption's bytes in a small causal transformer (Llama's).

    Without a `shape` it reads text alone. First weights come from torch's global generator: build it inside `loop.seeded`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] | None,
        *,
        channels: int,
        prefix: int,
        width: int,
        layers: int,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=EDGE + 1,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            initializer_range=width**-0.5,  # with the usual 0.02 the image is heard only after twice as many steps
            bos_token_id=EDGE,
            eos_token_id=EDGE,
            use_cache=False,
        )
        self.text: Any = LlamaForCausalLM(config)
        self.prefix, self.image = prefix, cast(Any, None)
        if shape is not None:
            side = min(shape[1:])
            if side < 2:
                raise UserError(f"images of {shape[1]}x{shape[2]} pixels are too small to be told apart; valid: 2x2 or more")
            poolings = min(4, max(1, int(math.log2(-(-side // 2) / 2 if side >= 16 else side / 2))))
            widths = tuple(channels * min(2**at, 4) for at in range(poolings))
            self.image = networks.convnet(shape, 1, widths=widths, hidden=prefix * width, mean=mean, std=std, norm="batch")

    def forward(self, images: Tensor | None, tokens: Tensor) -> Tensor:
        """Logits (N, L, 257) of the last L of the tokens (N, L + 1), given those before each and images (N, C, H, W) in [0, 1]."""
        read = self.text.get_input_embeddings()(tokens[:, :-1])
        if self.image is not None:
            read = torch.cat([self.image.features(images).unflatten(1, (self.prefix, -1)), read], 1)
        logits: Tensor = self.text(inputs_embeds=read, logits_to_keep=tokens.shape[1] - 1).logits
        return logits

    @torch.no_grad()
    def read(self, images: Pixels, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A `Reader`, in eval mode: padding is behind the caption, where no token of it looks."""
        device = str(self.text.device)
        tokens, counted = (some.to(device) for some in as_bytes(captions))
        seen = None if images is None or self.image is None else loop.to_float(images, device)
        return mean_loss(self(seen, tokens), tokens[:, 1:], counted), counted.sum(1)


def fit(
    net: Captioner,
    images: Pixels,
    captions: Sequence[str],
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    shift: int,
    noise: float,
    generator: torch.Generator,
    device: str = "cpu",
) -> list[dict[str, float]]:
    """Train in place by AdamW with a one-cycle schedule; gives about 50 rows of `step` and `loss`, in nats for each byte.

    images (N, C, H, W). A batch has `batch` pairs, or N where there are fewer. Raises UserError where the loss is no longer a number.
    """
    net.to(device).train()
    groups = [
        {"params": [weights for weights in net.parameters() if weights.ndim > 1], "weight_decay": weight_decay},
        {"params": [weights for weights in net.parameters() if weights.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    schedule = loop.one_cycle(optimiser, lr, steps)
    batches = loop.index_batches(len(captions), min(batch, len(captions)), steps, generator)
    curve: list[dict[str, float]] = []
    for step in track(range(1, steps + 1), "train captioner"):
        at = next(batches)
        seen = None if images is None else augment(loop.to_float(images[at.numpy()], device), shift, noise, generator)
        tokens, counted = (some.to(device) for some in as_bytes([captions[i] for i in at.tolist()]))
        loss = F.cross_entropy(net(seen, tokens)[counted], tokens[:, 1:][counted])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % max(1, steps // 50) == 0 or step == steps:
            if not math.isfinite(loss.item()):
                raise UserError(f"the captioner's loss is no longer a number at step {step}: set lr lower than {lr}")
            curve.append({"step": step, "loss": loss.item()})
    net.eval()
    return curve


class Loaded:
    """A model of `transformers` with its weights, in float32, as a `Reader`: one that sees images where it is given their `shape`.

    Only the caption's own tokens count, not those that a tokenizer puts around them. Before the caption stand `prompt` and the image, as
    the model's chat template has them if it has one. Raises UserError where the model cannot be loaded whole from a folder or the hub
    (safetensors only), does not take an image and a text so, or sees tokens that it is to predict.
    """

    def __init__(self, name: str, shape: tuple[int, int, int] | None, prompt: str = "", device: str = "cpu") -> None:
        self.prompt, self.before = prompt, ""
        what = "causal language model" if shape is None else "image-to-text model"
        here = Path(name).expanduser()
        # a hub id is `name` or `owner/name`; everything else can only be a path
        if not here.is_dir() and (here.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
            raise UserError(f"model: there is no folder {name}; give a folder of one ({what}) or a hub id like 'owner/name'")
        try:
            self._load(str(here) if here.is_dir() else name, here.is_dir(), shape is not None)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
            raise UserError(f"model: {name} holds no {what} that can be loaded here ({_first_line(error)})") from None
        self.model.to(device).eval().requires_grad_(False)
        blank = None if shape is None else np.zeros((2, *shape), dtype=np.uint8)
        try:
            causal = self._find_start(blank)
        except Exception as error:  # each architecture has its own ways to refuse
            raise UserError(f"model: {name} gives no loss of a caption ({type(error).__name__}: {_first_line(error)})") from None
        if not causal:
            raise UserError(f"model: {name} sees the tokens that it is to predict; give a model that reads from left to right")

    def _load(self, source: str, offline: bool, sees: bool) -> None:
        import transformers as hub

        where: dict[str, Any] = {"local_files_only": offline}
        auto: Any = hub.AutoModelForImageTextToText if sees else hub.AutoModelForCausalLM
        self.model, found = auto.from_pretrained(source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **where)
        if found["missing_keys"]:
            raise ValueError(f"its weights lack {min(found['missing_keys'])}")
        self.processor: Any = hub.AutoProcessor.from_pretrained(source, **where) if sees else None
        self.look: Any = getattr(self.processor, "image_processor", None) or (
            hub.AutoImageProcessor.from_pretrained(source, **where) if sees else None
        )
        self.tokenizer: Any = getattr(self.processor, "tokenizer", None) or hub.AutoTokenizer.from_pretrained(source, **where)
        self.tokenizer.padding_side = "right"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token or self.tokenizer.unk_token

    @property
    def translates(self) -> bool:
        """Whether the image goes into an encoder, and the caption alone into a decoder."""
        return bool(self.model.config.is_encoder_decoder)

    def _find_start(self, blank: Pixels) -> bool:
        """Find what stands before a caption, and its length; gives whether tokens are predicted from those before them alone."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        if self.processor is not None and getattr(self.processor, "chat_template", None):
            asked = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            self.before = self.processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
        elif not self.translates:
            self.before = (getattr(self.processor, "image_token", None) or "") + self.prompt
        self.start = 0
        for _ in range(2):
            inputs, tokens, _ = self._inputs(blank, ["a c", "b c"])
            self.start = int((tokens[0] == tokens[1]).long().cumprod(0).sum())
            if self.start or self.translates:
                break
            self.before = (bos or eos or "") + self.before  # nothing would foretell the first token
        expected = self._expected(inputs, tokens)[:, self.start if self.translates else max(self.start - 1, 0)]
        return bool(torch.allclose(expected[0], expected[1], atol=1e-4))

    def _inputs(self, images: Pixels, captions: Sequence[str]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """What the model takes, the tokens (N, L), and which of them are the captions' own (N, L)."""
        pictures = None if images is None else _pictures(images)
        if self.translates:
            told = self.tokenizer(list(captions), add_special_tokens=False, padding=True, return_tensors="pt")
            inputs = dict(self.look(pictures, return_tensors="pt"))
        else:
            texts = [self.before + caption for caption in captions]
            again = bool(self.tokenizer.bos_token) and self.before.startswith(self.tokenizer.bos_token)
            how = {"padding": True, "return_tensors": "pt", "add_special_tokens": not again}
            told = self.tokenizer(texts, **how) if pictures is None else self.processor(images=pictures, text=texts, **how)
            inputs = {key: value for key, value in told.items() if key != "input_ids"}
        tokens, device = told["input_ids"], self.model.device
        around = [token for token in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id) if token is not None]
        counted = told["attention_mask"].bool() & ~torch.isin(tokens, torch.tensor(around, dtype=torch.long))
        counted[:, : self.start] = False
        return {key: value.to(device) for key, value in inputs.items()}, tokens.to(device), counted.to(device)

    @torch.no_grad()
    def _expected(self, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
        """Logits (N, L, V) at the places of the tokens, or (N, L - 1, V) where nothing foretells the first."""
        if self.translates:
            config, own = self.model.config, self.tokenizer
            starts = (config.decoder_start_token_id, own.bos_token_id, own.cls_token_id, own.eos_token_id)
            first = next(start for start in starts if start is not None)
            logits: Tensor = self.model(**inputs, decoder_input_ids=F.pad(tokens[:, :-1], (1, 0), value=first)).logits
            return logits
        logits = self.model(**inputs, input_ids=tokens).logits
        return logits[:, -tokens.shape[1] :][:, :-1]  # some give logits for the image's places too

    def __call__(self, images: Pixels, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        inputs, tokens, counted = self._inputs(images, captions)
        logits = self._expected(inputs, tokens)
        there = logits.shape[1]
        return mean_loss(logits, tokens[:, -there:], counted[:, -there:]), counted[:, -there:].sum(1)


def _pictures(images: npt.NDArray[np.uint8]) -> list[Any]:
    """Images (N, C, H, W) as RGB pictures: what a processor makes of an array depends on its shape."""
    from PIL import Image

    return [Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).convert("RGB") for image in images]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
