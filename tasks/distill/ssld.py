"""Distil by soft labels alone: the student matches the teacher's probabilities on labelled and mined unlabelled rows.

Paper   Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative (SSLD, 2021), arXiv 2103.05959
Idea    L = JS(p_s, p_t) = KL(p_s || m) / 2 + KL(p_t || m) / 2 with m = (p_s + p_t) / 2, at temperature 1 and without ground truth.
        Labels are not needed, so the pool grows: for each class, the unlabelled rows to which the teacher gives that class's
        highest probabilities are added. Last, a short fine-tuning on the labelled rows alone, at a hundredth of the learning rate.
Small   900 steps of a two-layer ConvNet in place of 360 epochs of MobileNetV3; images are not augmented unless `shift` is set, so that
        the teachers answer each row once. Step one of the paper, taking the validation rows' duplicates out of the pool, is left to
        whoever makes the pool. Whether the paper's fine-tuning keeps JS is not said; here it does.
Limits  Fashion-MNIST, 2,000 labelled and 6,000 unlabelled rows, 1,500 steps, 5 seeds, test: student 82.5% (sd 0.4), the same network on the
        labels 81.1, without the unlabelled rows 81.4, teacher 83.8, with all rows' labels 85.4. KL instead of JS came to 83.2, and as
        many unlabelled rows by lot instead of mined ones to 82.8: the gain is that of more rows, not of JS or of mining, which takes
        the rows that are easy already. JS has small gradients and wants a higher learning rate than KL (.15 against .05); at 0.05 it
        lags by 4 points, a rate of 1 ends at chance. `shift` doubles the time and gained nothing on 8x8 digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, method
from tasks.core.networks import Net
from tasks.core.progress import track


class Config(MethodConfig):
    """Settings. The defaults of the student keep it under a quarter of the default teacher at every image size from 8 to 32."""

    widths: tuple[int, ...] = Field((16, 32), min_length=1, description="channels of each convolution of the student")
    hidden: int = Field(48, ge=1, description="features before the student's last layer")
    loss: Literal["js", "kl"] = Field("js", description="what the student minimises")  # paper, section 3.1: JS
    mine: int = Field(100, ge=0, description="unlabelled rows to add for each class")  # paper, section 3.2: about 4,000
    steps: int = Field(800, ge=1, description="batches of the main stage")
    batch: int = Field(64, ge=1)
    lr: float = Field(0.2, gt=0, description="peak learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(7e-5, ge=0)  # paper, ResNet50-D
    shift: int = Field(0, ge=0, le=4, description="pixels by which images are moved at random, for student and teacher alike")
    tune_steps: int = Field(100, ge=0, description="batches of the last stage, on labelled rows alone")
    tune_lr_ratio: float = Field(0.01, gt=0, le=1, description="last stage's learning rate over the first's")  # paper, section 3.3


SMOKE = Config(widths=(8,), hidden=16, mine=5, steps=15, batch=16, shift=1, tune_steps=5)


def divergence(student: Tensor, teacher: Tensor, loss: Literal["js", "kl"] = "js") -> Tensor:
    """Mean divergence in nats of log-probabilities (N, K): JS(p_s, p_t), from 0 to ln 2, or KL(p_t || p_s).

    Safe where a probability is nothing: all is computed from logarithms. SSLD, section 3.1.
    """
    if loss == "kl":
        return _kl(teacher, student)
    middle = torch.logaddexp(student, teacher) - np.log(2)
    return (_kl(student, middle) + _kl(teacher, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # xlogy's rule: a term with p = 0 is 0, also where its logarithm is -inf
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(1).mean()


def soft_labels(teachers: Sequence[Net], images: npt.NDArray[np.uint8], device: str = "cpu") -> Tensor:
    """Logarithm (N, K) of the teachers' mean probabilities, on the CPU."""
    logs = torch.stack([F.log_softmax(loop.predict(net, images, device=device), 1) for net in teachers])
    return torch.logsumexp(logs, 0) - np.log(len(teachers))


def mined(probabilities: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.int64]:
    """Sorted positions of the rows that are among the `k` highest of some class; ties go to the earlier row. SSLD, section 3.2.

    probabilities (N, K). At most k * K positions: a row that two classes want is given once.
    """
    order = np.argsort(-probabilities, axis=0, kind="stable")[:k]
    return np.unique(order).astype(np.int64)


def moved(images: npt.NDArray[np.uint8], shift: int, generator: torch.Generator) -> npt.NDArray[np.uint8]:
    """Each image (N, C, H, W) moved by up to `shift` pixels in each direction, edges repeated."""
    n, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)), mode="edge")
    down, right = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator).numpy()
    rows, columns = down + np.arange(height), right + np.arange(width)
    return padded[np.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].transpose(0, 3, 1, 2)


@method(
    paper="Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative (SSLD, 2021)",
    arxiv="2103.05959",
    claim="a student of soft labels on labelled and mined unlabelled rows beats one of the labelled rows' labels, on test accuracy",
)
def ssld(teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Net:
    """A small student of the teachers' mean probabilities; rows of `data` without a label are the pool that is mined.

    Raises UserError where there is no teacher, no data, or they do not fit each other.
    """
    check(teachers, data)
    labelled = data.labels() >= 0
    rows, pool = data.where(labelled), data.where(~labelled)
    images = rows.images()
    soft = soft_labels(teachers, images, device) if len(images) else torch.empty(0, len(data.info.classes))
    own = len(images)
    if cfg.mine and len(pool):
        found = pool.images()
        answers = soft_labels(teachers, found, device)
        at = mined(answers.exp().numpy(), cfg.mine)
        images, soft = np.concatenate([images, found[at]]), torch.cat([soft, answers[at]])
    if len(images) == 0:
        raise UserError("there is nothing to distil on: the data has no labelled row and 'mine' is 0; set 'mine' above 0")
    with loop.seeded(seed) as generator:
        mean, std = loop.pixel_stats(images)
        student = networks.convnet(data.info.shape, len(data.info.classes), widths=cfg.widths, hidden=cfg.hidden, mean=mean, std=std)
        stages = [(len(images), cfg.steps, cfg.lr, "distil"), (own, cfg.tune_steps, cfg.lr * cfg.tune_lr_ratio, "fine-tune")]
        for n, steps, lr, what in stages:
            if n and steps:
                match(
                    student,
                    teachers,
                    images[:n],
                    soft[:n],
                    loss=cfg.loss,
                    steps=steps,
                    batch=cfg.batch,
                    lr=lr,
                    momentum=cfg.momentum,
                    weight_decay=cfg.weight_decay,
                    shift=cfg.shift,
                    generator=generator,
                    device=device,
                    what=what,
                )
        return student.cpu().eval()


def match(
    student: Net,
    teachers: Sequence[Net],
    images: npt.NDArray[np.uint8],
    soft: Tensor,
    *,
    loss: Literal["js", "kl"],
    steps: int,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    shift: int,
    generator: torch.Generator,
    device: str = "cpu",
    what: str = "distil",
) -> None:
    """Train the student in place on soft labels: log-probabilities (N, K) of the images, or the teachers' own on moved images."""
    student.to(device).train()
    optimiser = torch.optim.SGD(student.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = loop.one_cycle(optimiser, lr, steps)
    batches = loop.index_batches(len(images), batch, steps, generator)
    for _ in track(range(steps), what):
        at = next(batches)
        seen, wanted = images[at.numpy()], soft[at]
        if shift:
            seen = moved(seen, shift, generator)
            wanted = soft_labels(teachers, seen, device)
        answer = F.log_softmax(student(loop.to_float(seen, device)), 1)
        optimiser.zero_grad(set_to_none=True)
        divergence(answer, wanted.to(device), loss).backward()
        optimiser.step()
        schedule.step()
    loop.check_finite(student, what, lr)


def check(teachers: Sequence[Net], data: Dataset) -> None:
    """Raises UserError where there is no teacher or no row, or a teacher takes other images or classes than the data has."""
    if not teachers:
        raise UserError("distillation needs at least one teacher, got none")
    if len(data) == 0:
        raise UserError("there is nothing to distil on: the data has no rows")
    ours = (tuple(data.info.shape), len(data.info.classes))
    for at, teacher in enumerate(teachers):
        theirs = (tuple(teacher.arch["shape"]), teacher.arch["classes"])
        if theirs != ours:
            raise UserError(f"teacher {at} takes images {theirs[0]} of {theirs[1]} classes; the data has {ours[0]} and {ours[1]}")
