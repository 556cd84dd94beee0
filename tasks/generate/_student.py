"""The student of a director: a compact diffusion model that trains on pairs of prompt and picture, a round at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.denoise import denoising_target, draw
from tasks.core.progress import track
from tasks.core.text_to_image import Diffuser


class Pair(NamedTuple):
    """A prompt and the picture that was stored for it, (C, H, W) uint8, of the teacher at a position."""

    prompt: str
    image: npt.NDArray[np.uint8]
    teacher: int


class Student:
    """A diffusion model in training: AdamW at a constant rate after a warm-up, and averaged weights that draw."""

    def __init__(
        self,
        model: Diffuser,
        *,
        lr: float,
        weight_decay: float,
        warm_up: int,
        ema: float,
        batch: int,
        prompt_dropout: float,
        guidance: float,
        sampling_steps: int,
        generator: torch.Generator,
    ) -> None:
        from diffusers.training_utils import EMAModel

        self.model, self.generator, self.batch, self.dropout = model, generator, batch, prompt_dropout
        model.unet.requires_grad_(True)
        model.text.requires_grad_(True)
        self.weights = [*model.unet.parameters(), *model.text.parameters()]
        self.optimiser = torch.optim.AdamW(self.weights, lr=lr, weight_decay=weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: min(1.0, (step + 1) / max(1, warm_up)))
        self.average = EMAModel(self.weights, decay=ema)
        self.how: dict[str, Any] = {"guidance": guidance, "steps": sampling_steps, "generator": generator}

    def train(self, pairs: Sequence[Pair], steps: int) -> float:
        """Mean denoising loss of `steps` batches of the pairs."""
        model, generator = self.model, self.generator
        images, tokens, empty = np.stack([pair.image for pair in pairs]), model.tokens([pair.prompt for pair in pairs]), model.tokens([""])
        batches = loop.index_batches(len(pairs), self.batch, steps, generator)
        total = 0.0
        for _ in track(range(steps), "train student"):
            at = next(batches)
            clean = model.to_latents(images[at.numpy()], generator)
            noise = torch.randn(clean.shape, generator=generator).to(model.device)
            levels = torch.randint(model.scheduler.config.num_train_timesteps, (len(at),), generator=generator).to(model.device)
            dropped = torch.rand(len(at), generator=generator) < self.dropout
            conditions = model.conditions(torch.where(dropped[:, None], empty, tokens[at]))
            predicted = model.unet(model.scheduler.add_noise(clean, noise, levels), levels, conditions).sample
            loss = F.mse_loss(predicted, denoising_target(model.scheduler, clean, noise, levels))
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            self.average.step(self.weights)
            total += float(loss.detach())
        return total / steps

    def draw(self, prompts: Sequence[str]) -> npt.NDArray[np.uint8]:
        """One picture for each prompt, (N, C, H, W) uint8, by the averaged weights."""
        self.average.store(self.weights)
        self.average.copy_to(self.weights)
        try:
            return draw(self.model, prompts, **self.how)
        finally:
            self.average.restore(self.weights)
