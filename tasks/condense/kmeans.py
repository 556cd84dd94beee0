"""The real images nearest to k-means centres of the target features: a covering choice of real data, and a strong baseline.

Paper   none: a baseline
Idea    k-means with n centres on g(image), g the frozen Barlow Twins encoder that KRR-ST uses; per centre the nearest row not taken yet
Small   nothing is left out
Limits  the centres and the targets depend on all source rows, so each sample has all of them as parents, not its own image alone
"""

from __future__ import annotations

from tasks.condense import _shared, _start
from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.method import Made, method


class Config(_shared.Settings):
    """Settings of the encoder and of measuring; the choice has none."""


SMOKE = Config(source_rows=60, widths=(4, 8), dim=8, encoder_steps=3, encoder_batch=16, inner_steps=3, nets=1, held_out_rows=20)


@method(paper="none: a baseline", claim="lower held-out KRR loss than condense.random, with real images only")
def kmeans(
    data: Dataset, held_out: Dataset, n: int, cfg: Config = Config(), *, start: Dataset | None = None, seed: int = 0, device: str = "cpu"
) -> Made:
    """Choose n rows and give them targets. Raises UserError where there are fewer rows than n, no held-out rows, or a start."""
    _start.refuse("kmeans", start)
    with loop.seeded(seed) as generator:
        source = _shared.prepare(data, n, **cfg.for_encoder(), generator=generator, device=device)
        drawn = _shared.random_positions(len(source.ids), n, generator)
        chosen = _shared.kmeans_positions(source.targets.numpy(), n, seed)
        arms = {name: (loop.to_float(source.images[at]), source.targets[at]) for name, at in (("kmeans", chosen), ("random", drawn))}
        losses = _shared.held_out_losses(arms, held_out, source, **cfg.for_measuring(), seed=seed, device=device)
    figures = {"heldout_loss": losses["kmeans"], "heldout_loss_random": losses["random"], "encoder_loss": source.encoder_loss}
    return Made(_shared.condensed_rows("kmeans", *arms["kmeans"], chosen, source.ids), figures)
