"""A compact masked autoregressive student learns from a large teacher's pictures, then to prefer real pictures to its own.

Paper   LightGen: Efficient Image Generation through Knowledge Distillation and Direct Preference Optimization (2025), arXiv 2503.08619
Idea    The teacher, a text-to-image diffuser, draws pictures for varied prompts; a small masked transformer with a diffusion head
        learns the noise of their masked tokens (no teacher's outputs are matched). Then Diffusion-DPO: log sigmoid(-beta [(error -
        reference's) of a real picture - (the same) of the student's own one for its prompt]), mask, noise and levels the same in all.
Small   Tokens are patches of the teacher's latents, of pixels where it has no VAE; text is its own encoder's. The decoder's blocks hold the
        cross-attention; no dropout, constant weight of the levels, no second resolution. Prompts: captions that name the class, else
        templates. Errors are summed over a picture's values, so that beta does not hang on its size. A step costs 33 ms of one CPU core.
Limits  Does not hold here (tests/claims/generate/lightgen.py: 8x8 digits, 1,800 steps, 5 seeds): of the student's samples 52% show all
        that the prompt says, tuned by preferences 52% (-.005, interval -.046 to .036), by as many plain steps on the same 200 real
        pictures 59% (-.076, -.108 to -.044). What tells real pictures from its own is mostly not what the prompt says: preferences
        bring the Frechet distance from 1.86 to 1.63 only, plain steps to .95. Use `tuning: winners` at this size. Varied prompts do
        teach: four a class instead of one +.27 (.14 to .40) at the same number of pictures. 1,200 of them instead of 75: +.057 (-.036
        to .149). With 450 steps the student is hardly trained (14%). Seeds differ by .15. Of Stable Diffusion only tiny components were
        run, on a CPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.denoise import denoise, draw, load, pixel_frechet
from tasks.core.errors import UserError
from tasks.core.method import Made, MethodConfig, method
from tasks.core.text_to_image import Diffuser, build, quiet
from tasks.generate._mar import Mar, fit, patches, pictures, sample
from tasks.generate._preference import tune
from tasks.generate._shared import curve, last, rows

AT_ONCE = 512  # pictures drawn or encoded at a time
COMPARED = 16  # samples a class for the Frechet figures


class Config(MethodConfig):
    """Settings of `lightgen`."""

    # not said otherwise: from trials on validation rows of the digits
    pretrained: str | None = Field(None, description="the teacher: Stable Diffusion as a folder or hub id; none: one is trained here")
    templates: tuple[str, ...] = Field(
        ("a photo of a {}", "a picture of a {}", "an image of a {}"), min_length=1, description="prompts where the base has no captions"
    )
    variety: int = Field(0, ge=0, description="prompts of a class that the teacher draws for; 0: all")
    channels: int = Field(16, ge=8, multiple_of=8, description="channels of the small teacher's first level")
    base_steps: int = Field(500, ge=1, description="batches seen by the small teacher")
    base_lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW for the small teacher")
    base_batch: int = Field(32, ge=1, description="images of each of its steps")
    teacher_images: int = Field(1500, ge=1, description="pictures that the teacher draws")  # paper: 2 M; gains end near 1 M
    teacher_guidance: float = Field(2.0, ge=1, description="guidance of the teacher; 1: none, more varied")
    teacher_steps: int = Field(6, ge=1, description="the teacher's DDIM steps")
    patch: int = Field(2, ge=1, description="side of a token, in latents or pixels")  # paper
    width: int = Field(48, ge=8, multiple_of=4, description="width of the student")  # paper: 1024
    depth: int = Field(2, ge=1, description="blocks of encoder and of decoder")  # paper: 16
    aligner: int = Field(1, ge=0, description="blocks between the text encoder and the student")  # paper: 6
    head_width: int = Field(64, ge=8, multiple_of=2, description="width of the diffusion head")  # paper: 1536
    head_depth: int = Field(2, ge=1, description="blocks of the diffusion head")  # paper: 8
    levels: int = Field(1000, ge=2, description="noise levels of the head")  # MAR
    steps: int = Field(1500, ge=1, description="batches seen by the student")  # paper: 100,000
    batch: int = Field(32, ge=1, description="images of each of its steps")  # paper: 2048
    repeats: int = Field(2, ge=1, description="noises for each output of the transformer")  # MAR
    lr: float = Field(2e-3, gt=0, description="learning rate of AdamW for the student")  # paper: 1e-4
    weight_decay: float = Field(0.02, ge=0)  # paper
    mask_min: float = Field(0.7, gt=0, lt=1, description="least share of masked tokens")  # paper
    text_drop: float = Field(0.1, ge=0, lt=1, description="share of texts dropped in training")  # paper
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the running mean of the weights")  # paper: .9999, over more steps
    tuning: Literal["dpo", "winners"] = Field("dpo", description="preferences, or plain training on the shots in as many steps")
    dpo_steps: int = Field(60, ge=0, description="batches of preferences; 0: none")
    dpo_batch: int = Field(32, ge=1, description="pairs of each")
    dpo_lr: float = Field(3e-5, gt=0, description="learning rate of the tuning")  # paper: 1e-8, for a beta of 5000 on means
    beta: float = Field(5.0, gt=0, description="how near the student stays to what it was")  # paper: .3, as 5000 on a mean of 16,384 values
    losers: int = Field(4, ge=1, description="own samples drawn for each shot")
    guidance: float = Field(2.0, ge=1, description="weight of the prompt when drawing; 1: no guidance")  # paper: 4
    sampling_steps: int = Field(2, ge=1, description="steps in which the tokens are unmasked")  # paper: 64
    head_steps: int = Field(10, ge=1, description="steps in which each token is denoised")  # MAR: 100


SMOKE = Config(
    base_steps=3, base_batch=4, channels=8, teacher_images=24, teacher_steps=2, width=16, depth=1, head_width=16, head_depth=1, steps=3,
    batch=4, repeats=2, dpo_steps=2, dpo_batch=4, losers=1, sampling_steps=3, head_steps=2,
)  # fmt: skip


def prompts_of(name: str, captions: Sequence[str], templates: Sequence[str]) -> list[str]:
    """What is said of a class: the different captions that name it, in order; where there are none, the templates."""
    named = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    found = [text for text in dict.fromkeys(captions) if named.search(text)]
    return found or list(dict.fromkeys(template.format(name) for template in templates))


def dealt(prompts: Sequence[Sequence[str]], n: int) -> list[str]:
    """`n` prompts, of each class as many as of any other or one more, and so of each prompt of a class."""
    turns = [[own[at % len(own)] for own in prompts] for at in range(-(-n // max(1, len(prompts))))]
    return [text for turn in turns for text in turn][:n]


@method(
    paper="LightGen: Efficient Image Generation through Knowledge Distillation and Direct Preference Optimization",
    arxiv="2503.08619",
    claim="after preference tuning more of the samples show what their prompts say than after plain training on the same pictures",
)
def lightgen(shots: Dataset, base: Dataset, n: int, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """`n` rows a class, drawn by a small student of a text-to-image teacher; `shots` are the real pictures that it comes to prefer.

    Raises UserError where a class has neither shots nor base rows, where there is nothing to train a teacher on or to prefer, where a
    pre-trained teacher cannot be loaded, and where the student diverges.
    """
    shots = shots.where(shots.labels() >= 0)
    labels, names, of_base = shots.labels(), shots.info.classes, base.labels()
    there = [at for at, name in enumerate(names) if name not in shots.info.absent or np.any(labels == at)]
    bare = [names[at] for at in there if not np.any(labels == at) and (cfg.pretrained is not None or not np.any(of_base == at))]
    if bare:
        raise UserError(f"class {bare[0]!r} has no shots and no base rows: nothing says what its pictures look like")
    if cfg.dpo_steps and len(shots) == 0:
        raise UserError("there are no labelled shots to prefer: give some, or set 'dpo_steps' to 0")
    said = np.array([*base.captions(), *shots.captions()], dtype=object)
    prompts = {at: prompts_of(names[at], said[np.append(of_base, labels) == at], cfg.templates) for at in there}
    wanted = {at: [own[k % len(own)] for k in range(n)] for at, own in prompts.items()}
    of_shots = [text if text in prompts[at] else prompts[at][0] for at, text in zip(labels, shots.captions(), strict=True)]
    images = shots.images()
    with quiet(), loop.seeded(seed) as generator:
        teacher, taught = _teacher(base, shots.info.shape, prompts, cfg, generator, device)
        told = dealt([own[: cfg.variety or None] for own in prompts.values()], cfg.teacher_images)
        drawn = draw(teacher, told, guidance=cfg.teacher_guidance, steps=cfg.teacher_steps, generator=generator)
        texts = list(dict.fromkeys([*told, *of_shots, *(text for own in wanted.values() for text in own)]))
        place = {text: at for at, text in enumerate(texts)}
        text = conditions_of(teacher, texts)
        tokens = tokens_of(teacher, drawn, cfg.patch, generator)
        _, length, values = tokens.shape
        student = Mar(
            length,
            values,
            text.shape[2],
            width=cfg.width,
            heads=4,
            depth=cfg.depth,
            aligner=cfg.aligner,
            head_width=cfg.head_width,
            head_depth=cfg.head_depth,
            levels=cfg.levels,
            bound=float(tokens.abs().max()),
        ).to(device)
        same: dict[str, Any] = {"mask_min": cfg.mask_min, "repeats": cfg.repeats, "generator": generator}
        how: dict[str, Any] = {"steps": cfg.steps, "batch": cfg.batch, "lr": cfg.lr, "weight_decay": cfg.weight_decay, "ema": cfg.ema}
        which = torch.tensor([place[one] for one in told])
        student, learned = fit(student, tokens, text, which, text_drop=cfg.text_drop, **how, **same)
        loop.check_finite(student, "student", cfg.lr)

        def ask(asked: Sequence[str]) -> Tensor:
            by: dict[str, Any] = {
                "steps": cfg.sampling_steps,
                "head_steps": cfg.head_steps,
                "guidance": cfg.guidance,
                "generator": generator,
            }
            some = torch.tensor([place[one] for one in asked]).split(AT_ONCE)
            return torch.cat([sample(student, text[at.to(device)], **by).cpu() for at in some])

        tuned: list[float] = []
        if cfg.dpo_steps:
            winners = tokens_of(teacher, images, cfg.patch, generator)
            losers = ask(np.repeat(of_shots, cfg.losers).tolist()).view(len(winners), cfg.losers, *winners.shape[1:])
            by: dict[str, Any] = {"kind": cfg.tuning, "steps": cfg.dpo_steps, "batch": cfg.dpo_batch, "lr": cfg.dpo_lr, "beta": cfg.beta}
            student, tuned = tune(student, winners, losers, text[[place[one] for one in of_shots]], **by, **same)
            loop.check_finite(student, "preferences", cfg.dpo_lr)
        made = ask([one for own in wanted.values() for one in own])
        shown = np.concatenate([images_of(teacher, part, cfg.patch) for part in made.split(AT_ONCE)])
    figures = {name: last(losses) for name, losses in (("base", taught), ("student", learned), ("tuning", tuned)) if losses}
    figures = {f"{name}_loss": value for name, value in figures.items()}
    if min(len(images), len(drawn), len(shown)) > 1:
        some = shown[:: max(1, len(shown) // len(drawn))]
        figures |= {"pixel_frechet_teacher": pixel_frechet(drawn, images), "pixel_frechet": pixel_frechet(some, images)}
    # a pre-trained teacher saw no base row, but what a row's caption says is asked for, and stands beside what was drawn
    asked = {text for own in prompts.values() for text in own}
    quoted = [name for name, caption in zip(base.ids(), base.captions(), strict=True) if cfg.pretrained is None or caption in asked]
    parents = [*shots.ids(), *quoted]
    tables = [
        rows("lightgen", at, names[at], own, shown[k * n : (k + 1) * n], parents, cfg, seed) for k, (at, own) in enumerate(wanted.items())
    ]
    points = [*curve(taught, 0), *curve(learned, len(taught)), *curve(tuned, len(taught) + len(learned))]
    return Made(pa.concat_tables(tables), figures, tuple(points))


def _teacher(
    base: Dataset, shape: tuple[int, int, int], prompts: dict[int, list[str]], cfg: Config, generator: torch.Generator, device: str
) -> tuple[Diffuser, list[float]]:
    """The pre-trained teacher, or a small one trained on the base with the losses of its training."""
    if cfg.pretrained is not None:
        return load(cfg.pretrained, shape).to(device), []
    if len(base) == 0:
        raise UserError("there are no base rows to train a teacher on: give some, or name a pre-trained one with 'pretrained'")
    if base.info.shape != shape:
        raise UserError(f"base images have shape {base.info.shape}, shots {shape}: both must be the same")
    told = []
    for row, (label, caption) in enumerate(zip(base.labels().tolist(), base.captions(), strict=True)):
        own = prompts.get(label, [caption])
        told.append(caption if caption in own else own[row % len(own)])
    model = build(shape, [*told, *(text for own in prompts.values() for text in own)], channels=cfg.channels, prediction="v_prediction")
    model.to(device)
    losses = denoise(
        model,
        base.images(),
        model.tokens(told),
        [*model.unet.parameters(), *model.text.parameters()],
        steps=cfg.base_steps,
        batch=cfg.base_batch,
        lr=cfg.base_lr,
        weight_decay=0.0,
        prompt_dropout=cfg.text_drop,
        generator=generator,
        what="teacher",
    )
    for part in (model.unet, model.text):
        part.requires_grad_(False)
    return model, losses


@torch.no_grad()
def conditions_of(teacher: Diffuser, texts: Sequence[str]) -> Tensor:
    """The text encoder's conditions (P, T, D)."""
    return torch.cat([teacher.conditions(some) for some in teacher.tokens(texts).split(AT_ONCE)])


def tokens_of(teacher: Diffuser, images: npt.NDArray[np.uint8], patch: int, generator: torch.Generator) -> Tensor:
    """Tokens (N, L, v) of images, on the CPU. Raises UserError where the teacher's latents do not fall into such patches."""
    _, height, width = teacher.latent_shape()
    if height % patch or width % patch:
        raise UserError(f"the teacher's pictures of {height}x{width} do not fall into patches of {patch}; set another 'patch'")
    starts = range(0, len(images), AT_ONCE)
    return torch.cat([patches(teacher.to_latents(images[at : at + AT_ONCE], generator), patch).cpu() for at in starts])


def images_of(teacher: Diffuser, tokens: Tensor, patch: int) -> npt.NDArray[np.uint8]:
    """Images (N, C, H, W) of tokens (N, L, v)."""
    return teacher.to_images(pictures(tokens.to(teacher.device), teacher.latent_shape()[1:], patch))
