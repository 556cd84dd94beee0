"""A text-to-image diffusion model is adapted to a few real shots by LoRA, and then draws a training set for each class.

Paper   DataDream: Few-shot Guided Dataset Generation (2024), arXiv 2407.10910
Idea    LoRA on the attention of UNet and text encoder, first weights Gaussian, trained on K shots a class with the plain denoising loss
        ||prediction(noisy image, level, "a <domain> photo of a <class>") - target||^2, no prior preservation. `dset`: one LoRA for all
        classes; `cls`: one for each. Then DDIM with guidance, empty + w (conditional - empty), w = 2. The classifier's loss weighs
        real and drawn batches apart (`train.clip_lora`, `train.supervised`).
        Of several `guidance` and `sampling_steps` that combination is used whose few samples are nearest to the shots (pixel Frechet).
Small   Where `pretrained` is empty, a pixel UNet of 0.2 M weights and a one-layer CLIP text encoder are trained here on `base`, so the
        base rows are parents of every sample. It has attention in the middle only, so its LoRA is on convolutions and time projections
        too: attention alone hardly moves pixels (share of samples judged right .30, one trial). It predicts velocity, as Stable
        Diffusion 2.1 does: with the noise as target it came to .29 instead of .99 in as many steps (one trial).
Limits  Holds in part (tests/claims/generate/datadream.py: 8x8 digits, 5 seeds, 8 shots a class, guidance 1). The samples' Frechet distance
        falls from 85 to 8.5 and a classifier of samples alone reaches .857 (unadapted .599), but with augmented real shots the gain is
        below a point: .918, unadapted samples .909 (+.009, interval .003 to .014), none .911 (+.007, -.002 to .016). At one shot a
        class unadapted samples help far more (.778) than adapted ones (.645; none .635). `cls` costs a LoRA for each class and was no
        better (.830 alone, .911). Guidance 2, the default and the paper's, makes samples less varied: alone .752 instead of .853
        (validation rows, 3 seeds). Of Stable Diffusion only tiny components in its folder layout were run, on a CPU. Models with two
        text encoders, such as Stable Diffusion XL, do not load; all runs in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field, field_validator
from torch import Tensor

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.denoise import denoise, draw, load, pixel_frechet, prompt
from tasks.core.errors import UserError
from tasks.core.method import Made, MethodConfig, method
from tasks.core.text_to_image import Diffuser, build, quiet
from tasks.generate import _shared

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
# matched by the end of the module's name; `conv` are the layers that change the size
CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "time_emb_proj")
COMPARED = 16  # samples a class for the Frechet figures, the same number before and after: the distance depends on it


class Config(MethodConfig):
    """Settings of `datadream`."""

    # not said otherwise: chosen on validation rows of the digits, for half a minute on one CPU thread
    variant: Literal["dset", "cls"] = Field("dset", description="one LoRA for all classes, or one for each")  # both are the paper's
    domain: str = Field("", description="word for the kind of picture: 'a <domain> photo of a <class>'")
    pretrained: str | None = Field(None, description="Stable Diffusion as a folder or hub id; none: a small base is trained here")
    channels: int = Field(16, ge=8, multiple_of=8, description="channels of the small base's first level")
    prediction: Literal["epsilon", "v_prediction"] = Field("v_prediction", description="the small base's target")
    base_steps: int = Field(500, ge=1, description="batches seen by the small base")
    base_lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW for the small base")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of the base's prompts left empty")  # Ho and Salimans 2022
    lora_steps: int = Field(150, ge=1, description="batches seen by each LoRA")  # paper: 200 epochs
    lora_lr: float | None = Field(None, gt=0, description="none: 1e-2 for the small base, 1e-4 for a pre-trained one")
    lora_on: Literal["auto", "attention", "all"] = Field("auto", description="auto: all for the small base, attention for others")
    rank: int = Field(8, ge=1, description="rank of the LoRA")  # paper: 16
    alpha: int = Field(8, ge=1, description="its scale is alpha / rank")  # paper: 16, the same scale of 1
    batch: int = Field(16, ge=1, description="images of each step")  # paper: 8
    guidance: float | tuple[float, ...] = Field(2.0, description="weight of the prompt; 1: none, more varied samples; or several")  # paper
    sampling_steps: int | tuple[int, ...] = Field(6, description="DDIM steps; or several, of which the best is taken")  # paper: 50

    @field_validator("guidance", "sampling_steps")
    @classmethod
    def _from_one(cls, value: Any) -> Any:
        if min(several(value), default=0) < 1:
            raise ValueError("must be 1 or more, or several such numbers")
        return value


def several(value: Any) -> tuple[Any, ...]:
    """Numbers of a setting that may be one or several, each once."""
    return tuple(dict.fromkeys(value)) if isinstance(value, tuple) else (value,)


SMOKE = Config(base_steps=4, lora_steps=3, sampling_steps=2, batch=4, channels=8, rank=2, variant="cls", lora_on="attention")


def add_lora(model: Diffuser, name: str, *, rank: int, alpha: int, everywhere: bool) -> list[Tensor]:
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


def choose_lora(model: Diffuser, name: str) -> None:
    """Let one of several LoRAs act alone."""
    model.unet.set_adapter(name)
    model.text.set_adapter(name)


def same_state(generator: torch.Generator) -> torch.Generator:
    """A generator that gives what this one would give next, which is left as it is."""
    return torch.Generator().set_state(generator.get_state())


def nearest(tried: list[npt.NDArray[np.uint8]], hows: list[dict[str, Any]], images: npt.NDArray[np.uint8]) -> tuple[int, dict[str, float]]:
    """Which of several sets of samples is nearest to the images in pixel Frechet distance, the first of equals; and each one's distance.

    `hows` say each set's guidance and steps.
    """
    distances = [pixel_frechet(samples, images) for samples in tried]
    best = int(np.argmin(distances))
    figures = {f"pixel_frechet_guidance_{how['guidance']:g}_steps_{how['steps']}": d for how, d in zip(hows, distances, strict=True)}
    return best, figures | {"guidance": float(hows[best]["guidance"]), "sampling_steps": float(hows[best]["steps"])}


@method(
    paper="DataDream: Few-shot Guided Dataset Generation",
    arxiv="2407.10910",
    claim="adapted samples are less than half as far from the shots as the base's own samples, in pixel Frechet distance",
)
def datadream(shots: Dataset, base: Dataset, n: int, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """`n` rows a class, drawn by a diffusion model that was adapted to `shots`.

    Raises UserError where a class has no shots, where there is nothing to train a base on, where a pre-trained one cannot be loaded, or
    where too little is there to choose guidance or steps by.
    """
    shots = shots.where(shots.labels() >= 0)
    labels, names, ids = shots.labels(), shots.info.classes, shots.ids()
    there = [at for at, name in enumerate(names) if name not in shots.info.absent or np.any(labels == at)]
    bare = [names[at] for at in there if not np.any(labels == at)]
    if bare:
        raise UserError(f"class {bare[0]!r} has no shots: DataDream needs one labelled real image of every class, or more")
    images, prompts = shots.images(), [prompt(cfg.domain, name) for name in names]
    hows = [{"guidance": w, "steps": k} for w in several(cfg.guidance) for k in several(cfg.sampling_steps)]
    few = min(n, COMPARED)
    compared = len(images) > 1 and few * len(there) > 1
    if len(hows) > 1 and not compared:
        raise UserError("guidance and sampling_steps are chosen by distance to the shots: that needs two shots, and two samples or more")
    curve: list[dict[str, float]] = []
    figures: dict[str, float] = {}
    with quiet(), loop.seeded(seed) as generator:
        if cfg.pretrained is None:
            model, losses = _train_base(base, shots.info.shape, prompts, cfg, generator, device)
            figures["base_loss"] = _shared.last(losses)
            curve += _shared.curve(losses, 0)
        else:
            model = load(cfg.pretrained, shots.info.shape).to(device)
        tokens = model.tokens(prompts)
        before = [prompts[label] for label in there for _ in range(few)]
        unadapted = [draw(model, before, **how, generator=same_state(generator)) for how in hows[1:]]
        unadapted = [draw(model, before, **hows[0], generator=generator), *unadapted]
        everywhere = cfg.lora_on == "all" or (cfg.lora_on == "auto" and cfg.pretrained is None)
        made: dict[int, npt.NDArray[np.uint8]] = {}
        tried: list[list[npt.NDArray[np.uint8]]] = [[] for _ in hows]
        groups = {f"{cfg.variant}{group[0]}": group for group in ([there] if cfg.variant == "dset" else [[label] for label in there])}
        ends, best = [], 0

        def draw_rows(name: str, count: int, how: dict[str, Any], source: torch.Generator) -> npt.NDArray[np.uint8]:
            return draw(model, [prompts[label] for label in groups[name] for _ in range(count)], **how, generator=source)

        for name, group in groups.items():
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
            ends.append(_shared.last(losses))
            curve += _shared.curve(losses, curve[-1]["step"] if curve else 0)
            if len(hows) == 1:
                made.update(zip(group, np.split(draw_rows(name, n, hows[0], generator), len(group)), strict=True))
                remove_lora(model, name)
            else:
                for pieces, how in zip(tried, hows, strict=True):
                    pieces.append(draw_rows(name, few, how, same_state(generator)))
        if len(hows) > 1:
            best, found = nearest([np.concatenate(pieces) for pieces in tried], hows, images)
            figures |= found
            for name, group in groups.items():
                choose_lora(model, name)
                made.update(zip(group, np.split(draw_rows(name, n, hows[best], generator), len(group)), strict=True))
    figures["adapted_loss"] = float(np.mean(ends))
    if compared:
        figures["pixel_frechet_unadapted"] = pixel_frechet(unadapted[best], images)
        figures["pixel_frechet"] = pixel_frechet(np.concatenate([made[label][:few] for label in made]), images)
    of_base = base.ids() if cfg.pretrained is None else []
    shown = [[i for i, label in zip(ids, labels, strict=True) if cfg.variant == "dset" or label == own] for own in range(len(names))]
    tables = [
        _shared.rows("datadream", label, names[label], [prompts[label]] * n, made[label], [*shown[label], *of_base], cfg, seed)
        for label in made
    ]
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
