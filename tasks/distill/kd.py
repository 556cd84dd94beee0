"""Distil by softened probabilities: the student matches the teacher's at a high temperature, and the labels where there are any.

Paper   Distilling the Knowledge in a Neural Network (2015), arXiv 1503.02531
Idea    L = alpha * T^2 * KL(p_t || p_s) + (1 - alpha) * CE(y, p_s at temperature 1), p_t and p_s at temperature T. At T the small
        probabilities count, which tell what the teacher holds for alike; T^2 keeps the gradients of the first term at one size, whatever
        T is. The first term takes all rows, the second those that have a label. Several teachers are one: the mean of their probabilities.
Small   a two-layer ConvNet and SGD with one cycle of the learning rate, where the paper has 800 units in each of two layers, and speech.
Limits  Fashion-MNIST, 2,000 labelled rows, 1,000 steps, 8 seeds, test: student 82.3% (sd 0.5), the same network on the labels 81.5, teacher
        83.7; with 6,000 unlabelled rows 83.3; on 100 rows 69.5 against 65.6. The student takes over the teacher's confidence: its
        calibration error is 12.3%, that of labels alone 9.6. At T = 4 a learning rate of 0.05 ends at chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.distill import _shared
from tasks.distill._shared import Answers, begun, check, cross_entropy, fit, labelled, log_mean


class Config(_shared.Student):
    """Settings."""

    lr: float = Field(0.01, gt=0, description="peak learning rate of SGD")
    temperature: float = Field(
        4.0, gt=0, description="at which teacher and student are compared"
    )  # paper, section 3: 2.5 to 4 for small nets
    alpha: float = Field(0.9, ge=0, le=1, description="weight of the teacher's term; the labels' gets the rest")  # section 2: most of it


SMOKE = Config(widths=(8,), hidden=16, steps=15, batch=16, shift=1)


def soft_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) in nats, mean over rows; the student's logits (N, K), logarithms (N, K) of p_t at T. Paper, section 2."""
    rows = F.kl_div(F.log_softmax(logits / temperature, 1), teacher, reduction="none", log_target=True).sum(1)
    return temperature**2 * rows.mean()


@method(
    paper="Distilling the Knowledge in a Neural Network (2015)",
    arxiv="1503.02531",
    claim="a student of softened probabilities beats the same student of the labels alone, on test accuracy",
)
def kd(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """A small student of the teachers' mean probabilities and of the labels, fresh or on from a copy of `start`.

    Raises UserError where there is no teacher, no data, they do not fit each other, or `alpha` is 0 and no row has a label.
    """
    check(teachers, data, start)
    if cfg.alpha == 0:
        labelled(data, "with 'alpha' 0 the student learns from labels alone; set 'alpha' above 0")
    images, labels = data.images(), torch.from_numpy(data.labels())
    said = Answers(teachers, data, images, shift=cfg.shift, device=device)
    with loop.seeded(seed) as generator:
        student = begun(start, images, data.info, widths=cfg.widths, hidden=cfg.hidden)

        def loss(seen: Tensor, at: Tensor) -> Tensor:
            logits = student(seen)
            soft = soft_loss(logits, log_mean(said(at, seen), cfg.temperature), cfg.temperature)
            return cfg.alpha * soft + (1 - cfg.alpha) * cross_entropy(logits, labels[at].to(device))

        fit(student, images, loss, **cfg.for_fit(), generator=generator, device=device)
        return student.cpu().eval()
