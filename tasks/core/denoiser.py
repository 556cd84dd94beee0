"""Diffusion models that can be rebuilt from a small dictionary. Self-contained as `networks.py` is: a copy travels with registered models.

Pictures are in [-1, 1] inside. With abar the share of the picture's variance that is left at a noise level, a noisy picture is
sqrt(abar) * picture + sqrt(1 - abar) * noise (Ho et al., arXiv 2006.11239), and a network says which noise is in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core.networks import Net

AT_ONCE = 2**20  # values of pictures that are drawn together
MLP_PIXELS = 16  # a larger side is for the convolutions of a UNet


class Denoiser(Net):
    """A diffusion model: predicts the noise in pictures, and draws pictures of a class. It is no classifier: it has no `head`.

    arch: `kind`, `shape` (channels, height, width), `classes`, `mean` 0 and `std` 1; `levels`, the number T of noise levels, the least
    first; `betas`, the variance that each adds: [first, last], even in between, or "cosine"; `draw_steps`, levels that `draw` goes
    through (absent: all); `one_step`, the level at which a one-step generator starts (None: it is none).
    """

    abar: Tensor

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        self.register_buffer("abar", kept_shares(arch["levels"], arch["betas"]), persistent=False)

    @property
    def drawn_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is denoised: that of the pictures."""
        channels, height, width = self.arch["shape"]
        return channels, height, width

    def conditions(self, labels: Tensor) -> Tensor:
        """What `forward` is conditioned on, for labels (N,) int64. Raises ValueError for a label that is no class."""
        raise NotImplementedError

    def forward(self, noisy: Tensor, levels: Tensor, conditions: Tensor) -> Tensor:  # type: ignore[override]
        """The noise (N, C, H, W) in pictures (N, C, H, W) at noise levels (N,) int64, 0 the least, under conditions (N, ...)."""
        raise NotImplementedError

    def noised(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Pictures (N, C, H, W) at noise levels (N,): sqrt(abar) * clean + sqrt(1 - abar) * noise."""
        share = self.abar[levels][:, None, None, None]
        return share.sqrt() * clean + (1 - share).sqrt() * noise

    def clean(self, noisy: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The pictures (N, C, H, W) that `noised` made noisy by this noise."""
        share = self.abar[levels][:, None, None, None]
        return (noisy - (1 - share).sqrt() * noise) / share.sqrt()

    def in_one_step(self, noise: Tensor, conditions: Tensor, level: int) -> Tensor:
        """Pictures (N, C, H, W) from noise of the same shape by one call: what is clean in a noisy nothing at `level` (SiD, SFD)."""
        levels = torch.full((len(noise),), level, device=noise.device)
        start = self.noised(torch.zeros_like(noise), noise, levels)
        return self.clean(start, self(start, levels, conditions), levels)

    @torch.no_grad()
    def draw(self, labels: Tensor, *, generator: torch.Generator, steps: int | None = None) -> Tensor:
        """One picture (C, H, W) uint8 of each label (N,), on the CPU: by deterministic DDIM over `steps` levels, evenly spread, or by one
        call where `one_step` is set. Noise comes from `generator`, on the CPU. Raises ValueError for a bad label or number of steps.
        """
        first = self.arch.get("one_step")
        steps = steps or self.arch.get("draw_steps") or self.arch["levels"]
        if not 1 <= steps <= self.arch["levels"]:
            raise ValueError(f"{steps} steps are too many: the model has {self.arch['levels']} noise levels")
        size = max(1, AT_ONCE // math.prod(self.drawn_shape))
        # drawn at once: in pieces it would be other noise
        noises = torch.randn((len(labels), *self.drawn_shape), generator=generator)
        pieces = []
        for some, noise in zip(labels.split(size), noises.to(self.abar.device).split(size), strict=True):
            conditions = self.conditions(some.to(self.abar.device))
            pictures = self._descend(noise, conditions, steps) if first is None else self.in_one_step(noise, conditions, first)
            pieces.append(self.to_images(pictures))
        return torch.cat(pieces)

    def to_images(self, pictures: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) on the CPU, of pictures in [-1, 1]."""
        return pictures.clamp(-1, 1).add(1).mul(127.5).round().to("cpu", torch.uint8)

    def _descend(self, noisy: Tensor, conditions: Tensor, steps: int) -> Tensor:
        """DDIM without fresh noise (Song et al., arXiv 2010.02502, equation 12), the picture cut to [-1, 1] at each level."""
        path = descent(self.arch["levels"], steps)
        clean = noisy
        for at, level in enumerate(path):
            levels = torch.full((len(noisy),), level, device=noisy.device)
            clean = self.clean(noisy, self(noisy, levels, conditions), levels).clamp(-1, 1)
            if at + 1 < len(path):
                share = self.abar[level]
                noise = (noisy - share.sqrt() * clean) / (1 - share).sqrt()  # the noise that goes with the picture as it was cut
                noisy = self.noised(clean, noise, torch.full_like(levels, path[at + 1]))
        return clean


class ClassDenoiser(Denoiser):
    """A diffusion model of classes, by number.

    arch besides that of `Denoiser`: `backbone`, "mlp" or "unet". mlp, for pictures up to 16x16: `hidden` values in `depth` residual
    blocks. unet: `widths`, the channels of its levels, multiples of 8.
    """

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        if arch["backbone"] not in ("mlp", "unet"):
            raise ValueError(f"backbone {arch['backbone']!r} is not known; known: mlp, unet")
        made = _ResidualMLP if arch["backbone"] == "mlp" else _ClassUNet
        self.body = made(arch)

    def conditions(self, labels: Tensor) -> Tensor:
        """The labels (N,) themselves. Raises ValueError for a label that is no class."""
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.arch["classes"]:
            raise ValueError(f"labels are 0 to {self.arch['classes'] - 1}; there are {int(labels.min())} to {int(labels.max())}")
        return labels

    def forward(self, noisy: Tensor, levels: Tensor, conditions: Tensor) -> Tensor:  # type: ignore[override]
        noise: Tensor = self.body(noisy, levels, conditions)
        return noise


class _ResidualMLP(nn.Module):
    """Pixels, level and class in; residual blocks, each told level and class anew."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        if max(arch["shape"][1:]) > MLP_PIXELS:
            raise ValueError(f"images of {arch['shape'][1]}x{arch['shape'][2]} are too large for an mlp (up to {MLP_PIXELS}); take a unet")
        hidden, pixels = arch["hidden"], math.prod(arch["shape"])
        self.levels = arch["levels"]
        self.of_level = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.of_class = nn.Embedding(arch["classes"], hidden)
        self.into = nn.Linear(pixels, hidden)
        self.blocks = nn.ModuleList(_Block(hidden) for _ in range(arch["depth"]))
        self.out = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, pixels))

    def forward(self, noisy: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        waves = sinusoids(levels * (1000 / self.levels), self.into.out_features)
        told = F.silu(self.of_level(waves) + self.of_class(labels))
        values = self.into(noisy.flatten(1))
        for block in self.blocks:
            values = block(values, told)
        predicted: Tensor = self.out(values)
        return predicted.view_as(noisy)


class _Block(nn.Module):
    """One residual block on values (N, hidden), told level and class (N, hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.first, self.second, self.given = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, values: Tensor, told: Tensor) -> Tensor:
        added: Tensor = self.second(F.silu(self.first(self.norm(values)) + self.given(told)))
        return values + added


class _ClassUNet(nn.Module):
    """diffusers' UNet with an embedding of the class, attention in the middle; odd sizes are padded and cut back."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        channels, height, width = arch["shape"]
        widths = tuple(arch["widths"])
        self.step, self.levels = 2 ** (len(widths) - 1), arch["levels"]
        self.unet: Any = UNet2DModel(
            sample_size=(-(-height // self.step) * self.step, -(-width // self.step) * self.step),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            layers_per_block=1,
            norm_num_groups=8,
            num_class_embeds=arch["classes"],
        )

    def forward(self, noisy: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        height, width = noisy.shape[2:]
        padded = F.pad(noisy, (0, -width % self.step, 0, -height % self.step), mode="replicate")
        noise: Tensor = self.unet(padded, levels * (1000 / self.levels), labels).sample
        return noise[:, :, :height, :width]


def kept_shares(levels: int, betas: list[float] | str) -> Tensor:
    """abar (T,) float32: the share of a picture's variance that is left at each noise level, the product of all 1 - beta up to it.

    betas: [first, last], evenly in between, or "cosine" (Nichol and Dhariwal, arXiv 2102.09672, equation 17, beta at most .999).
    Raises ValueError for another schedule, or betas outside (0, 1).
    """
    if betas == "cosine":
        curve = torch.cos((torch.arange(levels + 1, dtype=torch.float64) / levels + 0.008) / 1.008 * math.pi / 2) ** 2
        added = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    elif isinstance(betas, str) or len(betas) != 2 or not 0 < betas[0] <= betas[1] < 1:
        raise ValueError(f"betas are {betas!r}; valid: 'cosine', or the first and the last, above 0 and below 1")
    else:
        added = torch.linspace(betas[0], betas[1], levels, dtype=torch.float64)
    return torch.cumprod(1 - added, 0).float()


def descent(levels: int, steps: int) -> list[int]:
    """`steps` noise levels of T, evenly spread, the most noise first: it begins at T - 1 (trailing spacing, Lin et al., 2305.08891)."""
    return [round(levels - at * levels / steps) - 1 for at in range(steps)]


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Sines and cosines (N, size) of positions (N,), at wavelengths of 2 pi to 10,000 times that (Vaswani et al., arXiv 1706.03762)."""
    half = size // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=positions.device) / half)
    angles = positions[:, None].float() * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, size - 2 * half))
