"""A masked autoregressive transformer with a diffusion head: some tokens are seen, and each of the others is denoised from its output.

Li and others 2024, "Autoregressive Image Generation without Vector Quantization", in the form that LightGen gives it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tasks.core.loop import index_batches
from tasks.core.progress import track

CLIP = 3.0  # norm of the gradients; LightGen's


def patches(pictures: Tensor, side: int) -> Tensor:
    """Tokens (N, L, c * side * side) of pictures (N, c, h, w), row by row."""
    return F.unfold(pictures, side, stride=side).transpose(1, 2)


def pictures(tokens: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Pictures (N, c, h, w) of tokens (N, L, c * side * side): `patches` undone."""
    return F.fold(tokens.transpose(1, 2), size, side, stride=side)


def masked_count(length: int, least: float, generator: torch.Generator) -> int:
    """How many of `length` tokens are masked: their share is normal (mean 1, deviation .25), cut to [least, 1], and rounded up."""
    share = nn.init.trunc_normal_(torch.empty(1), 1.0, 0.25, least, 1.0, generator=generator)
    return min(length, math.ceil(length * float(share)))


def still_masked(length: int, steps: int) -> list[int]:
    """How many tokens are masked after each step of drawing: a cosine from `length` down to 0, at least one token a step."""
    left, found = length, []
    for step in range(1, steps + 1):
        left = min(left - 1, int(length * math.cos(math.pi / 2 * step / steps)))
        found.append(left if step < steps else 0)
        if left <= 0:
            break
    return [*found[:-1], 0]


def pick(values: Tensor, at: Tensor) -> Tensor:
    """values[n, at[n, k]] as (N, k, D), for values (N, L, D) and positions (N, k)."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[2]))


class Head(nn.Module):
    """The noise in a token, from the noisy token, its level and a condition that scales and shifts every layer (AdaLN)."""

    def __init__(self, values: int, condition: int, width: int, depth: int) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__()
        self.waves = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.level = TimestepEmbedding(width, width)
        self.condition, self.inner = nn.Linear(condition, width), nn.Linear(values, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)])
        self.modulations = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(depth)])
        self.last_modulation, self.last = nn.Linear(width, 2 * width), nn.Linear(width, values)
        # at first every block is switched off, and the answer is 0
        for layer in (*self.modulations, self.last_modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, noisy: Tensor, levels: Tensor, conditions: Tensor) -> Tensor:
        """Noise (M, values) in tokens (M, values) at levels (M,), under conditions (M, D)."""
        hidden, by = self.inner(noisy), F.silu(self.level(self.waves(levels)) + self.condition(conditions))
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            shift, scale, gate = modulation(by).chunk(3, dim=-1)
            hidden = hidden + gate * block(_normed(hidden) * (1 + scale) + shift)
        shift, scale = self.last_modulation(by).chunk(2, dim=-1)
        noise: Tensor = self.last(_normed(hidden) * (1 + scale) + shift)
        return noise


def _normed(values: Tensor) -> Tensor:
    return F.layer_norm(values, values.shape[-1:])


class Mar(nn.Module):
    """Encoder over the seen tokens, decoder over all with cross-attention to the text, diffusion head; first weights: torch's generator.

    length, values: tokens of a picture, values of a token; text: width of the text's conditions; bound: drawn values are clipped to it.
    There is no dropout, so that train and eval mode are the same; the network stays in train mode.
    """

    def __init__(
        self,
        length: int,
        values: int,
        text: int,
        *,
        width: int,
        heads: int,
        depth: int,
        aligner: int,
        head_width: int,
        head_depth: int,
        levels: int,
        bound: float,
    ) -> None:
        from diffusers import DDPMScheduler

        super().__init__()
        how: dict[str, Any] = {"nhead": heads, "dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.project, self.text_in, self.into = nn.Linear(values, width), nn.Linear(text, width), nn.Linear(width, width)
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(width, activation="gelu", **how) for _ in range(depth)])
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(width, activation="gelu", **how) for _ in range(depth)])
        self.aligner = nn.ModuleList([nn.TransformerEncoderLayer(width, activation="gelu", **how) for _ in range(aligner)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])  # tokens, seen, text, outputs
        self.places, self.decoder_places = (nn.Parameter(0.02 * torch.randn(length, width)) for _ in range(2))
        self.mask, self.empty = (nn.Parameter(0.02 * torch.randn(1, 1, width)) for _ in range(2))
        self.head = Head(values, width, head_width, head_depth)
        self.scheduler: Any = DDPMScheduler(
            num_train_timesteps=levels, beta_schedule="squaredcos_cap_v2", clip_sample_range=bound, timestep_spacing="trailing"
        )

    def align(self, text: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Text (N, T, width) from the text encoder's conditions (N, T, D); where `dropped` (N,), the learnt empty text."""
        text = self.text_in(text)
        for layer in self.aligner:
            text = layer(text)
        text = self.norms[2](text)
        return text if dropped is None else torch.where(dropped[:, None, None], self.empty, text)

    def forward(self, tokens: Tensor, order: Tensor, masked: int, text: Tensor) -> Tensor:
        """Outputs (N, masked, width) at the first `masked` tokens of each `order` (N, L), from the others; tokens (N, L, v)."""
        hidden = (self.mask + self.decoder_places).expand(len(tokens), -1, -1)
        if masked < order.shape[1]:
            at = order[:, masked:]
            seen = self.norms[0](self.project(pick(tokens, at)) + self.places[at])
            for layer in self.encoder:
                seen = layer(seen)
            seen = self.into(self.norms[1](seen)) + self.decoder_places[at]
            hidden = hidden.scatter(1, at[..., None].expand_as(seen), seen)
        for layer in self.decoder:
            hidden = layer(hidden, text)
        return pick(self.norms[3](hidden), order[:, :masked])


def noise_for(n: int, masked: int, values: int, levels: int, repeats: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise (repeats, N, masked, values) and a level (repeats, N, masked) for each masked token."""
    noise = torch.randn((repeats, n, masked, values), generator=generator)
    return noise, torch.randint(levels, (repeats, n, masked), generator=generator)


def errors(net: Mar, tokens: Tensor, order: Tensor, masked: int, text: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """Each picture's squared error (N,) in the noise of its masked tokens, summed over tokens and values, averaged over repeats."""
    outputs, clean = net(tokens, order, masked, text).expand(len(noise), -1, -1, -1), pick(tokens, order[:, :masked]).expand_as(noise)
    noisy = net.scheduler.add_noise(clean.flatten(0, 2), noise.flatten(0, 2), levels.flatten())
    guessed = net.head(noisy, levels.flatten(), outputs.flatten(0, 2)).view_as(noise)
    return (guessed - noise).square().sum((2, 3)).mean(0)


def optimiser_of(net: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW as LightGen sets it; only matrices decay."""
    weights = list(net.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if w.ndim > 1]},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def update(net: nn.Module, loss: Tensor, optimiser: torch.optim.Optimizer, schedule: Any) -> float:
    """One step down the loss, gradients clipped; gives the loss."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), CLIP)
    optimiser.step()
    schedule.step()
    return float(loss.detach())


def fit(
    net: Mar,
    tokens: Tensor,
    text: Tensor,
    which: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    ema: float,
    mask_min: float,
    text_drop: float,
    repeats: int,
    generator: torch.Generator,
) -> tuple[Mar, list[float]]:
    """Train on tokens (N, L, v) with the texts text[which] (N, T, D); gives the running mean of the weights, and the losses.

    Loss: mean squared error of the noise over all masked tokens. Learning rate: constant after a tenth of the steps.
    """
    from diffusers.optimization import get_constant_schedule_with_warmup

    device, averaged = text.device, AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(ema))
    optimiser = optimiser_of(net, lr, weight_decay)
    schedule = get_constant_schedule_with_warmup(optimiser, max(1, steps // 10))
    losses = []
    for _, at in zip(track(range(steps), "student"), index_batches(len(tokens), batch, steps, generator), strict=True):
        n, length, values = len(at), *tokens.shape[1:]
        masked = masked_count(length, mask_min, generator)
        order = torch.rand((n, length), generator=generator).argsort(1).to(device)
        noise, levels = noise_for(n, masked, values, net.scheduler.config.num_train_timesteps, repeats, generator)
        dropped = torch.rand(n, generator=generator) < text_drop
        texts = net.align(text[which[at].to(device)], dropped.to(device))
        loss = errors(net, tokens[at].to(device), order, masked, texts, noise.to(device), levels.to(device)).mean() / (masked * values)
        losses.append(update(net, loss, optimiser, schedule))
        averaged.update_parameters(net)
    student: Any = averaged.module.requires_grad_(False)
    return student, losses


@torch.no_grad()
def sample(net: Mar, text: Tensor, *, steps: int, head_steps: int, guidance: float, generator: torch.Generator) -> Tensor:
    """Tokens (N, L, v) for conditions (N, T, D): in a random order, a few at each step, each denoised in `head_steps` from its output.

    Guidance on the noise, empty + w (conditional - empty), with w rising from 1 to `guidance` while the masked tokens get fewer.
    """
    n, device, (length, _), values = len(text), text.device, net.places.shape, net.project.in_features
    order = torch.rand((n, length), generator=generator).argsort(1).to(device)
    tokens, aligned = torch.zeros((n, length, values), device=device), net.align(text)
    masked = length
    for left in still_masked(length, steps):
        weight = 1 + (guidance - 1) * (length - left) / length
        conditions = [net(tokens, order, masked, aligned)[:, left:].flatten(0, 1)]
        if weight != 1:
            conditions.append(net(tokens, order, masked, net.empty.expand_as(aligned))[:, left:].flatten(0, 1))
        drawn = torch.randn((n * (masked - left), values), generator=generator).to(device)
        net.scheduler.set_timesteps(head_steps)
        for level in net.scheduler.timesteps:
            levels = level.to(device).expand(len(drawn) * len(conditions))
            guessed = net.head(drawn.repeat(len(conditions), 1), levels, torch.cat(conditions)).chunk(len(conditions))
            noise = guessed[0] if len(guessed) == 1 else guessed[1] + weight * (guessed[0] - guessed[1])
            drawn = net.scheduler.step(noise, level, drawn, generator=generator).prev_sample
        at = order[:, left:masked, None].expand(-1, -1, values)
        tokens = tokens.scatter(1, at, drawn.view(n, -1, values))
        masked = left
    return tokens
