"""A text-to-image diffusion model is adapted to a few real shots with LoRA, and then draws the training set that they could not be.

Paper   DataDream: Few-shot Guided Dataset Generation (2024), arXiv 2407.10910
Idea    LoRA on the attention of UNet and text encoder, trained on K shots a class with the plain denoising loss
Small   tbd
Limits  tbd
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import SCHEMAS, Dataset, encode, image_column
from tasks.core.errors import UserError
from tasks.core.loop import index_batches, to_float
from tasks.core.method import Made, MethodConfig, method
from tasks.core.progress import track
from tasks.generate._shared import Diffuser, build, load, quiet

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
# matched by the end of the module's name; `conv` are the layers that change the size
CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "time_emb_proj")
BETA = 0.99
LOGGED_EVERY = 20
COMPARED = 16  # samples a class for the Frechet figures, the same number before and after: the distance depends on it


class Config(MethodConfig):
    """Settings of `datadream`."""

    variant: Literal["dset", "cls"] = Field("dset", description="one LoRA for all classes, or one for each")  # paper, section 3
    domain: str = Field("", description="word for the kind of picture: 'a <domain> photo of a <class>'")
    pretrained: str | None = Field(None, description="Stable Diffusion as a folder or hub id; none: a small base is trained here")
    channels: int = Field(16, ge=8, multiple_of=8, description="of the small base's first level")
    prediction: Literal["epsilon", "v_prediction"] = Field("v_prediction", description="what the small base predicts")
    base_steps: int = Field(400, ge=1)
    base_lr: float = Field(3e-3, gt=0)
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of the base's prompts left empty, for guidance")
    lora_steps: int = Field(150, ge=1, description="for each LoRA")
    lora_lr: float | None = Field(None, gt=0, description="none: 1e-2 for the small base, 1e-4 for a pre-trained one")
    lora_on: Literal["auto", "attention", "all"] = Field("auto")
    rank: int = Field(8, ge=1)
    alpha: float = Field(8, gt=0)
    batch: int = Field(32, ge=1)
    guidance: float = Field(2.0, ge=1)  # paper
    sampling_steps: int = Field(8, ge=1)


SMOKE = Config(base_steps=4, lora_steps=3, sampling_steps=2, batch=4, channels=8, rank=2, variant="cls", lora_on="attention")


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
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay, betas=(0.9, BETA), fused=True)
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


def add_lora(model: Diffuser, name: str, *, rank: int, alpha: float, everywhere: bool) -> list[Tensor]:
    """Add a LoRA called `name` to UNet and text encoder, make it the active one, and give its weights; all others are frozen.

    `everywhere`: also on the UNet's convolutions and time projections.
    """
    from peft import LoraConfig

    found = []
    for part, targets in ((model.unet, ATTENTION + (CONVOLUTIONS if everywhere else ())), (model.text, TEXT_ATTENTION)):
        part.requires_grad_(False)
        part.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets)), adapter_name=name
        )
        found += [weights for weights in part.parameters() if weights.requires_grad]
    return found


def remove_lora(model: Diffuser, name: str) -> None:
    """Take a LoRA off UNet and text encoder."""
    model.unet.delete_adapters(name)
    model.text.delete_adapter(name)


def pixel_frechet(ours: npt.NDArray[np.uint8], theirs: npt.NDArray[np.uint8]) -> float:
    """Squared Frechet distance of two Gaussians fitted to images (N, C, H, W), averaged down to at most 8x8 pixels in [0, 1].

    |m1 - m2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)). Raises ValueError for fewer than two images on a side.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError("a Frechet distance needs two images on each side")
    side = (min(8, ours.shape[2]), min(8, ours.shape[3]))
    flat = [F.adaptive_avg_pool2d(to_float(images), side).flatten(1).double().numpy() for images in (ours, theirs)]
    means, (first, second) = [f.mean(0) for f in flat], [np.cov(f, rowvar=False) for f in flat]
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


@method(
    paper="DataDream: Few-shot Guided Dataset Generation",
    arxiv="2407.10910",
    claim="tbd",
)
def datadream(shots: Dataset, base: Dataset, n: int, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """`n` rows a class, drawn by a diffusion model that was adapted to `shots`.

    Raises UserError where a class has no shots, where there is nothing to train a base on, or where a pre-trained one cannot be loaded.
    """
    shots = shots.where(shots.labels() >= 0)
    labels, names, ids = shots.labels(), shots.info.classes, shots.ids()
    bare = [name for at, name in enumerate(names) if not np.any(labels == at)]
    if bare:
        raise UserError(f"class {bare[0]!r} has no shots: DataDream needs one labelled real image of every class, or more")
    images, prompts = shots.images(), [prompt(cfg.domain, name) for name in names]
    curve: list[dict[str, float]] = []
    figures: dict[str, float] = {}
    with quiet(), loop.seeded(seed) as generator:
        if cfg.pretrained is None:
            model, losses = _train_base(base, shots.info.shape, prompts, cfg, generator, device)
            figures["base_loss"] = _last(losses)
            curve += _curve(losses, 0)
        else:
            model = load(cfg.pretrained, shots.info.shape).to(device)
        tokens = model.tokens(prompts)
        how = {"guidance": cfg.guidance, "steps": cfg.sampling_steps, "generator": generator}
        few = min(n, COMPARED)
        unadapted = draw(model, [text for text in prompts for _ in range(few)], **how)
        everywhere = cfg.lora_on == "all" or (cfg.lora_on == "auto" and cfg.pretrained is None)
        made: dict[int, npt.NDArray[np.uint8]] = {}
        ends = []
        for group in [range(len(names))] if cfg.variant == "dset" else [[label] for label in range(len(names))]:
            name = f"{cfg.variant}{group[0]}"
            weights = add_lora(model, name, rank=cfg.rank, alpha=cfg.alpha, everywhere=everywhere)
            at = np.flatnonzero(np.isin(labels, group))
            losses = denoise(
                model,
                images[at],
                tokens[torch.from_numpy(labels[at])],
                weights,
                steps=cfg.lora_steps,
                batch=cfg.batch,
                lr=cfg.lora_lr or (1e-2 if cfg.pretrained is None else 1e-4),
                weight_decay=1e-2,
                prompt_dropout=0.0,
                generator=generator,
                what="adapt",
            )
            ends.append(_last(losses))
            curve += _curve(losses, curve[-1]["step"] if curve else 0)
            drawn = draw(model, [prompts[label] for label in group for _ in range(n)], **how)
            made.update({label: drawn[k * n : (k + 1) * n] for k, label in enumerate(group)})
            remove_lora(model, name)
    figures["adapted_loss"] = float(np.mean(ends))
    if len(images) > 1 and few * len(names) > 1:
        figures["pixel_frechet_unadapted"] = pixel_frechet(unadapted, images)
        figures["pixel_frechet"] = pixel_frechet(np.concatenate([made[label][:few] for label in made]), images)
    of_base = base.ids() if cfg.pretrained is None else []
    shown = [[i for i, label in zip(ids, labels, strict=True) if cfg.variant == "dset" or label == own] for own in range(len(names))]
    tables = [_rows(label, names[label], prompts[label], made[label], [*shown[label], *of_base], cfg, seed) for label in made]
    return Made(pa.concat_tables(tables), figures, tuple(curve))


def _train_base(
    base: Dataset, shape: tuple[int, int, int], prompts: list[str], cfg: Config, generator: torch.Generator, device: str
) -> tuple[Diffuser, list[float]]:
    if len(base) == 0:
        raise UserError("there are no base rows to train a generator on: give some, or name a pre-trained one with 'pretrained'")
    if base.info.shape != shape:
        raise UserError(f"base images have shape {base.info.shape}, shots {shape}: both must be the same")
    of_rows = [
        prompt("", base.info.classes[label]) if label >= 0 else caption
        for label, caption in zip(base.labels(), base.captions(), strict=True)
    ]
    model = build(shape, [*prompts, *of_rows], channels=cfg.channels, prediction=cfg.prediction).to(device)
    losses = denoise(
        model,
        base.images(),
        model.tokens(of_rows),
        [*model.unet.parameters(), *model.text.parameters()],
        steps=cfg.base_steps,
        batch=cfg.batch,
        lr=cfg.base_lr,
        weight_decay=0.0,
        prompt_dropout=cfg.prompt_dropout,
        generator=generator,
        what="train base",
    )
    return model, losses


def _rows(label: int, name: str, caption: str, images: npt.NDArray[np.uint8], parents: list[str], cfg: Config, seed: int) -> pa.Table:
    parents = list(dict.fromkeys(parents))
    # an id stands for one content: other settings, another seed or other parents give other ids
    digest = hashlib.md5(json.dumps([cfg.model_dump(), seed, label, parents]).encode(), usedforsecurity=False).hexdigest()[:8]
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    n = len(images)
    offsets = pa.array(np.arange(n + 1) * len(parents), pa.int32())
    columns = {
        "sample_id": [f"datadream-{short}-{at:05d}-{digest}" for at in range(n)],
        "image": image_column(encode(images)),
        "label": pa.array([label] * n, pa.int64()),
        "caption": [caption] * n,
        "split": ["train"] * n,
        "parents": pa.ListArray.from_arrays(offsets, pa.concat_arrays([pa.array(parents, pa.string())] * n)),
        "_clean": pa.nulls(n, pa.bool_()),
    }
    return pa.table(columns, schema=SCHEMAS["image"])


def _last(losses: list[float]) -> float:
    """Mean of the last tenth."""
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _curve(losses: list[float], start: float) -> list[dict[str, float]]:
    """Mean loss over every `LOGGED_EVERY` steps, counted on from `start`."""
    starts = range(0, len(losses), LOGGED_EVERY)
    return [{"step": start + min(at + LOGGED_EVERY, len(losses)), "loss": float(np.mean(losses[at : at + LOGGED_EVERY]))} for at in starts]
