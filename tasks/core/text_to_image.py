"""Diffusion with text conditions: one set of components, and the network made of them that can be rebuilt from a small dictionary.

Self-contained as `denoiser.py` is: a copy of both travels with registered models.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core.denoiser import Denoiser

NOISE_LEVELS = 200  # a tenth to a fifth of the usual number is enough for small images
TEXT_WIDTH = 64
SMALLEST_MAP = 8  # the UNet halves its maps until they are at most this wide


@dataclass
class Diffuser:
    """The components of a text-to-image diffusion model, and how data set images fit into it.

    scheduler  a `DDPMScheduler`: noise levels and what the UNet predicts (noise, velocity or sample)
    vae        None: the UNet works on pixels
    shape      channels, height, width of the data set's images
    size       height, width of the model's own images
    padded     True: images are padded to `size` and cropped back; False: they are resized to it and back
    device     where the networks are; asking the UNet itself walks all its modules
    """

    unet: Any
    text: Any
    tokenizer: Any
    scheduler: Any
    vae: Any
    shape: tuple[int, int, int]
    size: tuple[int, int]
    padded: bool
    device: str = "cpu"

    def to(self, device: str) -> Diffuser:
        """Move every network; gives itself."""
        for part in (self.unet, self.text, self.vae):
            if part is not None:
                part.to(device)
        self.device = device
        return self

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L), padded to the encoder's length and cut there."""
        longest = min(self.tokenizer.model_max_length, self.text.config.max_position_embeddings)
        found = self.tokenizer(list(prompts), padding="max_length", max_length=longest, truncation=True)
        return torch.tensor(found["input_ids"])

    def conditions(self, tokens: Tensor) -> Tensor:
        """Text conditions (N, L, D) for token ids (N, L). Equal rows are encoded once."""
        distinct, where = torch.unique(tokens, dim=0, return_inverse=True)
        encoded: Tensor = self.text(distinct.to(self.device)).last_hidden_state
        return encoded[where.to(self.device)]

    def to_latents(self, images: npt.NDArray[np.uint8], generator: torch.Generator) -> Tensor:
        """What the UNet denoises, (N, c, h, w), for uint8 images (N, C, H, W): pixels in [-1, 1], or a draw from the VAE's posterior."""
        fitted = self._enlarge(torch.from_numpy(np.array(images)).to(self.device).float().div_(255) * 2 - 1)
        if self.vae is None:
            return fitted
        with torch.no_grad():
            posterior = self.vae.encode(fitted).latent_dist
        drawn = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        latents: Tensor = (drawn - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> npt.NDArray[np.uint8]:
        """uint8 images (N, C, H, W) in the data set's shape, from latents (N, c, h, w)."""
        if self.vae is not None:
            latents = self.vae.decode(latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)).sample
        pixels = self._reduce(latents).clamp(-1, 1).add(1).mul(127.5).round()
        return pixels.to("cpu", torch.uint8).numpy()

    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        scale = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.unet.config.in_channels, self.size[0] // scale, self.size[1] // scale

    def _enlarge(self, images: Tensor) -> Tensor:
        (height, width), (_, h, w) = self.size, self.shape
        if self.padded:
            return F.pad(images, (0, width - w, 0, height - h), mode="replicate")
        wanted = (self.vae or self.unet).config.in_channels
        if images.shape[1] == 1 and wanted > 1:
            images = images.expand(-1, wanted, -1, -1)
        return F.interpolate(images, size=self.size, mode="bilinear", antialias=True, align_corners=False)

    def _reduce(self, images: Tensor) -> Tensor:
        channels, h, w = self.shape
        if self.padded:
            return images[:, :, :h, :w]
        if channels == 1:
            images = images.mean(1, keepdim=True)
        return F.interpolate(images, size=(h, w), mode="bilinear", antialias=True, align_corners=False)


def block_widths(channels: int, height: int, width: int) -> tuple[int, ...]:
    """Channels of the UNet's levels: doubled at each halving (at most fourfold), until the smallest map is at most 8 pixels wide.

    At least two levels: 8 px -> (c, 2c), 28 px -> (c, 2c, 4c), 64 px -> (c, 2c, 4c, 4c).
    """
    levels = 2
    while max(height, width) / 2 ** (levels - 1) > SMALLEST_MAP:
        levels += 1
    return tuple(channels * min(2**level, 4) for level in range(levels))


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, first to last, after which each of the words is one piece. A word's last character carries `</w>`.

    A word is first put together by the merges of those before it; what is still in pieces then gets new merges, from the left. New ones
    rank last, so that no earlier word is touched.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            known = [(ranks[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in ranks]
            at = min(known)[1] if known else 0
            ranks.setdefault((pieces[at], pieces[at + 1]), len(ranks))
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return list(ranks)


def make_tokenizer(prompts: Sequence[str]) -> Any:
    """A CLIP tokenizer in whose vocabulary every word of the prompts is one token; an unknown word falls apart into known pieces.

    It is not trained by `tokenizers`: its trainer numbers the pieces differently each time.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    splitter = CLIPTokenizer().backend_tokenizer
    texts = [splitter.normalizer.normalize_str(text) for text in sorted(set(prompts))]
    merges = word_merges(sorted({word for text in texts for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text)}))
    letters = sorted(ByteLevel.alphabet())
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    made = CLIPTokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]  # the annotation knows no pairs; the code wants them
    made.model_max_length = min(77, max(len(ids) for ids in made(list(prompts))["input_ids"]))
    return made


def build(
    shape: tuple[int, int, int], prompts: Sequence[str], *, channels: int, prediction: str, levels: int = NOISE_LEVELS, spare: int = 0
) -> Diffuser:
    """A fresh pixel diffusion model for images of one shape: UNet with cross-attention in the middle, CLIP text encoder, DDPM scheduler.

    `spare`: tokens that a prompt may have beyond the longest of `prompts`. `channels` must be a multiple of 8. First weights come from
    torch's global generator: call it inside `loop.seeded`.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer(prompts)
    tokenizer.model_max_length += spare
    widths = block_widths(channels, shape[1], shape[2])
    step = 2 ** (len(widths) - 1)
    size = (-(-shape[1] // step) * step, -(-shape[2] // step) * step)
    unet: Any = UNet2DConditionModel(
        sample_size=size,
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, whatever its name says
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # the prompts differ in one word of seven, which speaks through one attention: with the usual first weights it is a few hundredths
    # of the signal there, and is still not heard after some hundred steps
    with torch.no_grad():
        text.embeddings.token_embedding.weight.mul_(10)
        unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(8)
    scheduler = DDPMScheduler(num_train_timesteps=levels, beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    return Diffuser(unet, text, tokenizer, scheduler, None, shape, size, padded=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log lines, warnings and progress bars of transformers and diffusers; what was set before is set again."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        try:
            yield
        finally:
            for log, (level, bars) in zip(logs, before, strict=True):
                log.set_verbosity(level)
                if bars:
                    log.enable_progress_bar()


class TextDenoiser(Denoiser):
    """A diffusion model of prompts, which also knows the prompt of each class.

    arch besides that of `Denoiser` (`betas` must be "cosine"): `prompts`, one for each class, by label; `words`, further texts whose
    words are to be tokens; `channels`, `spare` and `prediction` ("epsilon" or "v_prediction") of `build`.
    """

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        if arch["betas"] != "cosine":
            raise ValueError(f"betas are {arch['betas']!r}; a model of prompts has 'cosine'")
        if len(arch["prompts"]) != arch["classes"]:
            raise ValueError(f"there are {len(arch['prompts'])} prompts for {arch['classes']} classes")
        channels, height, width = arch["shape"]
        how = {name: arch[name] for name in ("channels", "prediction", "levels", "spare")}
        with quiet():
            made = build((channels, height, width), [*arch["prompts"], *arch["words"]], **how)
        self.unet, self.text = made.unet, made.text
        self._rest = (made.tokenizer, made.scheduler, None, made.shape, made.size)

    @property
    def diffuser(self) -> Diffuser:
        """The components, as `tasks.core.denoise` trains them and draws with them: not copies."""
        return Diffuser(self.unet, self.text, *self._rest, padded=True, device=str(self.abar.device))

    @property
    def drawn_shape(self) -> tuple[int, int, int]:
        return self.diffuser.latent_shape()

    def to_images(self, pictures: Tensor) -> Tensor:
        return super().to_images(pictures[:, :, : self.arch["shape"][1], : self.arch["shape"][2]])

    def conditions(self, labels: Tensor) -> Tensor:
        """Text conditions (N, L, D) of the classes' prompts. Raises ValueError for a label that is no class."""
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.arch["classes"]:
            raise ValueError(f"labels are 0 to {self.arch['classes'] - 1}; there are {int(labels.min())} to {int(labels.max())}")
        return self.encode([self.arch["prompts"][label] for label in labels.tolist()])

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text conditions (N, L, D) of any texts."""
        return self.diffuser.conditions(self.diffuser.tokens(texts))

    def encode_prefixed(self, prefixes: Tensor, tokens: Tensor) -> Tensor:
        """Text conditions (N, L, D) of prefixes (N, k, D), free token embeddings, and then a text's own tokens (1, L) less the last k."""
        n, k, _ = prefixes.shape
        own = self.text.embeddings.token_embedding(tokens)
        whole = torch.cat([own[:, :1].expand(n, -1, -1), prefixes, own[:, 1 : own.shape[1] - k].expand(n, -1, -1)], 1)
        # the encoder takes ids alone: what it looks up for them is replaced
        hook = self.text.embeddings.token_embedding.register_forward_hook(lambda *_: whole)
        try:
            conditions: Tensor = self.text(tokens.expand(n, -1)).last_hidden_state
        finally:
            hook.remove()
        return conditions

    def predict(self, noisy: Tensor, levels: Tensor, conditions: Tensor) -> Tensor:
        """What the UNet itself says (N, C, H, W): noise or velocity, as `prediction` has it. Odd sizes are padded and cut back."""
        (height, width), (_, h, w) = noisy.shape[2:], self.drawn_shape
        padded = F.pad(noisy, (0, w - width, 0, h - height), mode="replicate")
        predicted: Tensor = self.unet(padded, levels, conditions).sample
        return predicted[:, :, :height, :width]

    def forward(self, noisy: Tensor, levels: Tensor, conditions: Tensor) -> Tensor:  # type: ignore[override]
        predicted = self.predict(noisy, levels, conditions)
        if self.arch["prediction"] == "epsilon":
            return predicted
        share = self.abar[levels][:, None, None, None]  # velocity: sqrt(abar) noise - sqrt(1 - abar) picture
        return share.sqrt() * predicted + (1 - share).sqrt() * noisy
