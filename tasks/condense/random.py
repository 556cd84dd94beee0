"""Real images drawn at random, with the targets of a self-supervised encoder: what any condenser must beat.

Paper   none: a baseline
Idea    n source rows drawn by the seed; target = g(image), g the frozen Barlow Twins encoder that KRR-ST uses
Small   nothing is left out
Limits  the targets depend on every row that trained the encoder, so each sample has all of them as parents, not its own image alone
"""

from __future__ import annotations

from tasks.condense import _shared, _start
from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.method import Made, method


class Config(_shared.Settings):
    """Settings of the encoder and of measuring; drawing has none."""


SMOKE = Config(source_rows=60, widths=(4, 8), dim=8, encoder_steps=3, encoder_batch=16, inner_steps=3, nets=1, held_out_rows=20)


@method(paper="none: a baseline", claim="the held-out KRR loss that condense.krr_st and condense.kmeans must beat")
def random(
    data: Dataset, held_out: Dataset, n: int, cfg: Config = Config(), *, start: Dataset | None = None, seed: int = 0, device: str = "cpu"
) -> Made:
    """Draw n rows and give them targets. Raises UserError where there are fewer rows than n, no held-out rows, or a start."""
    _start.refuse("random", start)
    with loop.seeded(seed) as generator:
        source = _shared.prepare(data, n, **cfg.for_encoder(), generator=generator, device=device)
        chosen = _shared.random_positions(len(source.ids), n, generator)
        images, targets = loop.to_float(source.images[chosen]), source.targets[chosen]
        arms = {"random": (images, targets)}
        losses = _shared.held_out_losses(arms, held_out, source, **cfg.for_measuring(), seed=seed, device=device)
    figures = {"heldout_loss": losses["random"], "encoder_loss": source.encoder_loss}
    return Made(_shared.condensed_rows("random", images, targets, chosen, source.ids), figures)
