"""Deep mutual learning: the student and untrained peers learn side by side, each from the labels and from what the others say.

Paper   Deep Mutual Learning (2017), arXiv 1706.00384
Idea    L_k = CE(y, p_k) + mean over the other networks l of KL(p_l || p_k), at temperature 1, p_l held fixed. Each network finds its own
        way to the same answers; where they differ in what else they hold possible, their mean is softer and generalises better. The first
        term takes the rows that have a label, the second all. No trained teacher is needed: what is taken from each of those given is its
        description alone, from which a peer with fresh weights is made.
Small   all networks step on the same batch at once; in the paper one after the other, each seeing the others' last step. A two-layer
        ConvNet beside one of four times its size, in place of ResNet-32 beside WRN-28-10.
Limits  Fashion-MNIST, 250 labelled rows, 640 steps of 32, 10 seeds, test: student 72.0% (sd 1.7), alone 71.3, of a trained teacher (`kd`)
        71.5, teacher 72.4; calibration error 16.9% against 18.6 and 22.1. Above `kd` in 8 of 10 seeds, too little to tell. Takes the time
        of training the peer, every time. On 2,000 rows it gained nothing in one trial, and with 6,000 unlabelled ones besides it lost 1.5
        points to the labels alone (2 seeds, validation): untrained peers have little to say of them, and they fill the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.distill import _shared
from tasks.distill._shared import begun, check, cross_entropy, fit, kl, labelled, peers


class Config(_shared.Student):
    """Settings; those of training are the peers' too."""

    lr: float = Field(0.05, gt=0, description="peak learning rate of SGD")
    weight: float = Field(1.0, ge=0, description="weight of what the others say against the labels")  # paper, equation 4


SMOKE = Config(widths=(8,), hidden=16, steps=15, batch=16, shift=1)


def mimicry(logs: Sequence[Tensor]) -> list[Tensor]:
    """For each of M networks the mean over the others l of KL(p_l || p_k) in nats, mean over rows, p_l held fixed; 0 for one alone.

    logs: log-probabilities (N, K) of each. Paper, equation 7.
    """
    found = []
    for at, ours in enumerate(logs):
        others = [kl(theirs.detach(), ours).mean() for theirs in (*logs[:at], *logs[at + 1 :])]
        found.append(torch.stack(others).mean() if others else ours.new_zeros(()))
    return found


@method(
    paper="Deep Mutual Learning (2017)",
    arxiv="1706.00384",
    claim="a student that learns beside untrained peers beats the same student alone, and one of a trained teacher, on test accuracy",
)
def dml(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """The student of a cohort: beside it one fresh peer of each teacher's description. Of `start`, where given, it goes on from a copy.

    Raises UserError where there is no teacher, no data, they do not fit each other, or no row has a label.
    """
    check(teachers, data, start)
    labelled(data, "networks that learn from each other alone agree on nothing true")
    images, labels = data.images(), torch.from_numpy(data.labels())
    with loop.seeded(seed) as generator:
        student = begun(start, images, data.info, widths=cfg.widths, hidden=cfg.hidden)
        cohort = [student, *peers(teachers)]

        def loss(seen: Tensor, at: Tensor) -> Tensor:
            logits = [net(seen) for net in cohort]
            hard = torch.stack([cross_entropy(each, labels[at].to(device)) for each in logits]).sum()
            return hard + cfg.weight * torch.stack(mimicry([F.log_softmax(each, 1) for each in logits])).sum()

        fit(nn.ModuleList(cohort), images, loss, **cfg.for_fit(), generator=generator, device=device)
        return student.cpu().eval()
