"""Diffusion with text conditions at work: prompts, models, the denoising loss, guidance, drawing pictures, their distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core.errors import UserError
from tasks.core.loop import index_batches, to_float
from tasks.core.progress import track
from tasks.core.text_to_image import NOISE_LEVELS, Diffuser, TextDenoiser


def prompt(domain: str, name: str) -> str:
    """`a <domain> photo of a <class>`; without a domain word, `a photo of a <class>` (paper, section 3.1)."""
    return " ".join(f"a {domain} photo of a {name}".split())


def denoising_target(scheduler: Any, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """What the UNet should predict for (N, c, h, w) inputs at noise levels (N,): the noise, or the velocity, as the scheduler says.

    Raises UserError for a kind of prediction that is not known.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(clean, noise, levels)
        return velocity
    if kind == "sample":
        return clean
    raise UserError(f"the scheduler's prediction_type is {kind!r}; valid: epsilon, v_prediction, sample")


def denoise(
    model: Diffuser,
    images: npt.NDArray[np.uint8],
    tokens: Tensor,
    weights: Sequence[Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    prompt_dropout: float,
    generator: torch.Generator,
    what: str,
) -> list[float]:
    """Train `weights` on the denoising loss ||prediction(noisy, level, prompt) - target||^2 (paper, equation 1); gives the losses.

    images (N, C, H, W) uint8, tokens (N, L). AdamW, a cosine with a tenth of the steps as warm-up.
    """
    from diffusers.optimization import get_cosine_schedule_with_warmup

    device = model.device
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, steps // 10), steps)
    batches = index_batches(len(images), batch, steps, generator)
    empty = model.tokens([""])
    losses = []
    for _ in track(range(steps), what):
        at = next(batches)
        clean = model.to_latents(images[at.numpy()], generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        levels = torch.randint(model.scheduler.config.num_train_timesteps, (len(at),), generator=generator).to(device)
        dropped = torch.rand(len(at), generator=generator) < prompt_dropout
        conditions = model.conditions(torch.where(dropped[:, None], empty, tokens[at]))
        predicted = model.unet(model.scheduler.add_noise(clean, noise, levels), levels, conditions).sample
        loss = F.mse_loss(predicted, denoising_target(model.scheduler, clean, noise, levels))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def guided(model: Diffuser, noisy: Tensor, level: Tensor, conditions: Tensor, empty: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: empty + guidance * (conditional - empty) (Ho and Salimans 2022); at 1 the conditional prediction itself."""
    conditional: Tensor = model.unet(noisy, level, conditions).sample
    if guidance == 1:
        return conditional
    unconditional: Tensor = model.unet(noisy, level, empty.expand(len(noisy), -1, -1)).sample
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def draw(model: Diffuser, prompts: Sequence[str], *, guidance: float, steps: int, generator: torch.Generator) -> npt.NDArray[np.uint8]:
    """One image for each prompt, (N, C, H, W) uint8, by deterministic DDIM from Gaussian noise."""
    from diffusers import DDIMScheduler

    device, shape = model.device, model.latent_shape()
    scheduler = DDIMScheduler.from_config(model.scheduler.config, timestep_spacing="trailing", clip_sample=model.vae is None)
    scheduler.set_timesteps(steps)
    at_once = min(256, max(1, 2**18 // int(np.prod(shape))))
    pieces = []
    for start in range(0, len(prompts), at_once):
        some = list(prompts[start : start + at_once])
        conditions, empty = model.conditions(model.tokens(some)), model.conditions(model.tokens([""]))
        noisy = torch.randn((len(some), *shape), generator=generator).to(device)
        for level in scheduler.timesteps:
            predicted = guided(model, noisy, level.to(device), conditions, empty, guidance)
            noisy = scheduler.step(predicted, level, noisy, use_clipped_model_output=model.vae is None).prev_sample
        pieces.append(model.to_images(noisy))
    return np.concatenate(pieces)


def load(name: str, shape: tuple[int, int, int]) -> Diffuser:
    """Load Stable Diffusion's components from a local folder or a hub id (safetensors only).

    Raises UserError where the folder is not there or a component cannot be loaded.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    here = Path(name).expanduser()
    # a hub id is `name` or `owner/name`; everything else can only be a path
    if not here.is_dir() and (here.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(
            f"pretrained: there is no folder {name}; give a folder with unet/, text_encoder/, ... or a hub id like 'owner/name'"
        )
    source = str(here) if here.is_dir() else name
    try:
        unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", use_safetensors=True)
        text = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
        scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
        vae = None
        if not here.is_dir() or (here / "vae").is_dir():
            vae = AutoencoderKL.from_pretrained(source, subfolder="vae", use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"pretrained: {name} holds no Stable Diffusion components that can be loaded here ({reason})") from None
    scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    known = unet.config.sample_size
    if known is None:  # convolutions take any size: the image's own, rounded up
        step = scale * 2 ** (len(unet.config.block_out_channels) - 1)
        known = [-(-side // step) * step // scale for side in shape[1:]]
    height, width = (known, known) if isinstance(known, int) else known
    model = Diffuser(unet, text, tokenizer, scheduler, vae, shape, (height * scale, width * scale), padded=False)
    for part in (unet, text, vae):
        if part is not None:
            part.eval().requires_grad_(False)
    return model


def pixel_frechet(ours: npt.NDArray[np.uint8], theirs: npt.NDArray[np.uint8]) -> float:
    """Squared Frechet distance of two Gaussians fitted to images (N, C, H, W), averaged down to at most 8x8 pixels in [0, 1].

    |m1 - m2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)). Raises ValueError for fewer than two images on a side.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError("a Frechet distance needs two images on each side")
    side = (min(8, ours.shape[2]), min(8, ours.shape[3]))
    flat = [F.adaptive_avg_pool2d(to_float(images), side).flatten(1).double().numpy() for images in (ours, theirs)]
    means, (first, second) = [f.mean(0) for f in flat], [np.atleast_2d(np.cov(f, rowvar=False)) for f in flat]
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def text_denoiser(
    shape: tuple[int, int, int],
    prompts: Sequence[str],
    words: Sequence[str] = (),
    *,
    channels: int = 16,
    prediction: str = "v_prediction",
    levels: int = NOISE_LEVELS,
    draw_steps: int = 10,
    spare: int = 4,
) -> TextDenoiser:
    """A fresh `TextDenoiser` with these prompts of the classes, and the words of further texts. First weights as in `build`."""
    own = {"kind": "text_denoiser", "shape": list(shape), "classes": len(prompts), "mean": 0.0, "std": 1.0, "one_step": None}
    texts = {"prompts": list(prompts), "words": sorted(set(words) - set(prompts)), "spare": spare}
    how = {"levels": levels, "betas": "cosine", "draw_steps": draw_steps, "channels": channels, "prediction": prediction}
    return TextDenoiser({**own, **texts, **how})
