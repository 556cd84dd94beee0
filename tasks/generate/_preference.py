"""Diffusion-DPO for a masked transformer with a diffusion head: real pictures are preferred to the model's own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core.loop import index_batches
from tasks.core.progress import track
from tasks.generate._mar import Mar, errors, masked_count, noise_for, optimiser_of, update


def preference_loss(won: Tensor, lost: Tensor, won_before: Tensor, lost_before: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-beta [(won - won_before) - (lost - lost_before)]), averaged; all (N,), errors of a picture, `before` the reference's.

    Diffusion-DPO (Wallace and others 2023) with a constant weight of the levels. Errors are summed over a picture's values, not averaged:
    the paper's beta of 5000 on the mean of 16,384 values is .3 on their sum, whatever the picture's size.
    """
    return -F.logsigmoid(-beta * ((won - won_before) - (lost - lost_before))).mean()


def tune(
    net: Mar, winners: Tensor, losers: Tensor, text: Tensor, *, kind: str, steps: int, batch: int, lr: float, beta: float,
    mask_min: float, repeats: int, generator: torch.Generator,
) -> tuple[Mar, list[float]]:  # fmt: skip
    """A copy of the student, tuned on winners (N, L, v) and its own samples for their texts, losers (N, k, L, v); and the losses.

    kind `dpo`: preferences, the reference being the student itself; `winners`: the plain loss on the winners, losers left aside.
    """
    from diffusers.optimization import get_cosine_schedule_with_warmup

    device, (_, length, values) = text.device, winners.shape
    tuned, before = copy.deepcopy(net).requires_grad_(True), copy.deepcopy(net).requires_grad_(False)
    optimiser = optimiser_of(tuned, lr, 0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, steps // 10), steps)
    losses = []
    for _, at in zip(track(range(steps), "preferences"), index_batches(len(winners), batch, steps, generator), strict=True):
        masked = masked_count(length, mask_min, generator)
        order = torch.rand((len(at), length), generator=generator).argsort(1).to(device)
        drawn = noise_for(len(at), masked, values, net.scheduler.config.num_train_timesteps, repeats, generator)
        noise, levels = (part.to(device) for part in drawn)
        which = torch.randint(losers.shape[1], (len(at),), generator=generator)
        won, lost, texts = winners[at].to(device), losers[at, which].to(device), text[at.to(device)]
        # the same mask, noise and levels for both pictures and both networks, or the differences are mostly noise
        if kind == "dpo":
            won_now, lost_now, won_before, lost_before = (
                errors(model, tokens, order, masked, model.align(texts), noise, levels)
                for model in (tuned, before)
                for tokens in (won, lost)
            )
            loss = preference_loss(won_now, lost_now, won_before, lost_before, beta)
        else:
            loss = errors(tuned, won, order, masked, tuned.align(texts), noise, levels).mean() / (masked * values)
        losses.append(update(tuned, loss, optimiser, schedule))
    return tuned.requires_grad_(False), losses
