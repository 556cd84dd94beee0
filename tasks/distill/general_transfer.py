"""Distil into a student that is trained already, and each row's target comes from whoever is surer of it: a teacher, or itself as it was.

Paper   Fantastic Gains and Where to Find Them: On the Existence and Prospect of General Knowledge Transfer between Any Pretrained Model
        (2023), arXiv 2310.17653: KL with data partitioning (KL+DP)
Idea    L = T^2 KL(target || student) without ground truth, where a row's target are the probabilities of the model, among the teachers
        and a frozen copy of the student as it came, that gives the row's label the highest probability; without a label, the one whose
        highest probability is highest. So the student keeps what it knows where it knows better, also beside a weaker teacher. What a
        teacher has to give is measured first: positive flips, rows that it has right and the student wrong. Of several teachers one
        comes after another, each on the student that the last one left (`sequential`), or all compete for each row (`together`).
Small   hundreds of steps with one cycle of the learning rate in place of 20 epochs at a constant one. The contrastive losses, top-k
        matching and averaging of weights that the paper compares with are left out, and merging students is the registry's.
Limits  Fashion-MNIST, three networks of 1,000 rows each, weak at three classes of their own, 3,000 rows without labels, 5 seeds, test: with
        a weaker teacher students go from 68.6% to 75.0 (KL alone: 65.4; with labels to say whom to follow: 78.4; trained on with these
        labels: 83.7, so labels are worth more as labels). 97% of pairs gain. Networks of the same rows gain little: 81.4 to 81.8. Of two
        teachers, together 78.5, one after another 77.4, one alone 75.8. On rows that the student has learnt by heart `transfer` is
        negative also where it gains elsewhere. What is sure and wrong is followed too: calibrate a teacher that is too sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Taught, method
from tasks.core.networks import Net
from tasks.distill import _shared
from tasks.distill._shared import answers, asked, begun, check, fit, frozen, kl

Rule = Literal["label", "confidence", "none"]


class Config(_shared.Student):
    """Settings. The student is the one to start from: `widths` and `hidden` have no say here."""

    partition: Rule = Field("label", description="whom to follow: as labels say, else the surest; the surest; none: always a teacher")
    order: Literal["sequential", "together"] = Field("sequential", description="several teachers one after another, or all at once")
    temperature: float = Field(1.0, gt=0, description="of the divergence; confidence is compared at 1")  # authors' code
    steps: int = Field(500, ge=1, description="batches of each teacher in turn")
    lr: float = Field(0.05, gt=0, description="peak learning rate of SGD")
    weight_decay: float = Field(1e-4, ge=0)  # authors' code


SMOKE = Config(steps=8, batch=16, shift=1)


def chosen(said: Tensor, labels: Tensor, partition: Rule = "label") -> Tensor:
    """Who is followed on each row (n,): 0 the student as it was, 1 the first teacher, and so on. Fantastic Gains, data partitioning.

    said (1 + M, n, K): logits of the student and of M teachers. labels (n,), -1 an unknown one, for which confidence decides. Between
    equals the student wins, then the earlier teacher. `none` leaves the student out: KL without partitioning.
    """
    shares = F.softmax(said, 2)
    weight = shares.amax(2)
    if partition == "none":
        return 1 + weight[1:].argmax(0)
    if partition == "label":
        of_label = shares[:, torch.arange(len(labels)), labels.clamp_min(0)]
        weight = torch.where(labels >= 0, of_label, weight)
    return weight.argmax(0)


def targets(said: Tensor, labels: Tensor, partition: Rule, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (n, K), at a temperature, of whoever is followed on each row; arguments as those of `chosen`."""
    of_row = said[chosen(said, labels, partition), torch.arange(said.shape[1])]
    return F.log_softmax(of_row / temperature, 1)


def flips(said: Tensor, labels: Tensor) -> list[float]:
    """Complementary knowledge of each teacher: the share of labelled rows that it has right and the student wrong.

    said (1 + M, n, K), labels (n,). NaN where no row has a label.
    """
    right = (said.argmax(2) == labels)[:, labels >= 0]
    return [float((ours & ~right[0]).double().mean()) for ours in right[1:]]


def gained(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, float]:
    """What became of the student, of its logits (n, K) before and after: `changed`, the share of rows that it answers otherwise, and of
    labelled rows, where there are any, the shares `won` and `lost` and `transfer`, their difference.
    """
    old, new = before.argmax(1), after.argmax(1)
    found = {"changed": float((old != new).double().mean())}
    known = labels >= 0
    if known.any():
        was, now = (answer[known] == labels[known] for answer in (old, new))
        won, lost = float((now & ~was).double().mean()), float((was & ~now).double().mean())
        found |= {"won": won, "lost": lost, "transfer": won - lost}
    return found


@method(
    paper="Fantastic Gains and Where to Find Them: On the Existence and Prospect of General Knowledge Transfer between Any Pretrained "
    "Model (2023)",
    arxiv="2310.17653",
    claim="a trained student gains from a weaker teacher, on rows without labels, where KL without partitioning loses, on test accuracy",
)
def general_transfer(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Taught:
    """What the teachers know better than `start`, added to a copy of it, on all rows; a label only says whom to follow.

    Figures of teacher i: `flips_i` its positive flips, of the rows with a label, against the student that it meets (without any label
    there is none: `differs_i`, the share of rows that the two answer differently, bounds it from above); `taken_i` the share of rows whose
    target it gave. Of the student on these rows: those of `gained`.

    Raises UserError where there is no student to start from, no teacher, no data, or they do not fit each other.
    """
    if start is None:
        raise UserError(
            "general_transfer goes on from a trained student and got none: name one with `retort distill --student NAME/version`"
        )
    check(teachers, data, start)
    images, labels = data.images(), torch.from_numpy(data.labels())
    rounds = [[at] for at in range(len(teachers))] if cfg.order == "sequential" else [list(range(len(teachers)))]
    figures: dict[str, float] = {}
    before = torch.from_numpy(np.array(answers([start], data, images, device)[0]))
    with loop.seeded(seed) as generator:
        student = begun(start, images, data.info, widths=cfg.widths, hidden=cfg.hidden)
        for at_once in rounds:
            nets = [frozen(student), *(teachers[at] for at in at_once)]
            said = torch.from_numpy(np.stack(answers(nets, data, images, device)))
            figures |= measured(said, labels, cfg.partition, at_once)
            live = [frozen(net, device) for net in nets] if cfg.shift else []

            def loss(seen: Tensor, at: Tensor, said: Tensor = said, live: list[Net] = live) -> Tensor:
                of_batch = asked(live, seen) if live else said[:, at].to(device)
                wanted = targets(of_batch, labels[at].to(device), cfg.partition, cfg.temperature)
                return cfg.temperature**2 * kl(wanted, F.log_softmax(student(seen) / cfg.temperature, 1)).mean()

            fit(student, images, loss, **cfg.for_fit(), generator=generator, device=device, what="transfer")
    student = student.cpu().eval()
    return Taught(student, {**figures, **gained(before, loop.predict(student, images, device=device), labels)})


def measured(said: Tensor, labels: Tensor, partition: Rule, teachers: Sequence[int]) -> dict[str, float]:
    """`flips_i`, `differs_i` and `taken_i` of teachers by their positions; said (1 + M, n, K), the student's first, labels (n,)."""
    follow, answer = chosen(said, labels, partition), said.argmax(2)
    found: dict[str, float] = {}
    for at, (teacher, share) in enumerate(zip(teachers, flips(said, labels), strict=True), 1):
        found[f"taken_{teacher}"] = float((follow == at).double().mean())
        found[f"differs_{teacher}"] = float((answer[at] != answer[0]).double().mean())
        if share == share:
            found[f"flips_{teacher}"] = share
    return found
