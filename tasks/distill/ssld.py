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

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.distill import _shared
from tasks.distill._shared import Images, answers, asked, begun, check, fit, frozen, kl, log_mean


class Config(_shared.Student):
    """Settings."""

    loss: Literal["js", "kl"] = Field("js", description="what the student minimises")  # paper, section 3.1: JS
    mine: int = Field(100, ge=0, description="unlabelled rows to add for each class")  # paper, section 3.2: about 4,000
    lr: float = Field(0.2, gt=0, description="peak learning rate of SGD")
    weight_decay: float = Field(7e-5, ge=0)  # paper, ResNet50-D
    tune_steps: int = Field(100, ge=0, description="batches of the last stage, on labelled rows alone")
    tune_lr_ratio: float = Field(0.01, gt=0, le=1, description="last stage's learning rate over the first's")  # paper, section 3.3


SMOKE = Config(widths=(8,), hidden=16, mine=5, steps=15, batch=16, shift=1, tune_steps=5)


def divergence(student: Tensor, teacher: Tensor, loss: Literal["js", "kl"] = "js") -> Tensor:
    """Mean divergence in nats of log-probabilities (N, K): JS(p_s, p_t), from 0 to ln 2, or KL(p_t || p_s).

    Safe where a probability is nothing: all is computed from logarithms. SSLD, section 3.1.
    """
    if loss == "kl":
        return kl(teacher, student).mean()
    middle = torch.logaddexp(student, teacher) - np.log(2)
    return (kl(student, middle).mean() + kl(teacher, middle).mean()) / 2


def soft_labels(teachers: Sequence[Net], data: Dataset, images: Images, device: str = "cpu") -> Tensor:
    """Logarithm (N, K) of the teachers' mean probabilities for the images of `data`, on the CPU."""
    return log_mean(torch.from_numpy(np.stack(answers(teachers, data, images, device))))


def mined(probabilities: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.int64]:
    """Sorted positions of the rows that are among the `k` highest of some class; ties go to the earlier row. SSLD, section 3.2.

    probabilities (N, K). At most k * K positions: a row that two classes want is given once.
    """
    order = np.argsort(-probabilities, axis=0, kind="stable")[:k]
    return np.unique(order).astype(np.int64)


@method(
    paper="Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative (SSLD, 2021)",
    arxiv="2103.05959",
    claim="a student of soft labels on labelled and mined unlabelled rows beats one of the labelled rows' labels, on test accuracy",
)
def ssld(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """A small student of the teachers' mean probabilities, fresh or on from a copy of `start`; rows of `data` without a label are the pool
    that is mined.

    Raises UserError where there is no teacher, no data, or they do not fit each other.
    """
    check(teachers, data, start)
    has_label = data.labels() >= 0
    rows, pool = data.where(has_label), data.where(~has_label)
    images = rows.images()
    soft = soft_labels(teachers, rows, images, device) if len(images) else torch.empty(0, len(data.info.classes))
    own = len(images)
    if cfg.mine and len(pool):
        found = pool.images()
        said = soft_labels(teachers, pool, found, device)
        at = mined(said.exp().numpy(), cfg.mine)
        images, soft = np.concatenate([images, found[at]]), torch.cat([soft, said[at]])
    if len(images) == 0:
        raise UserError("there is nothing to distil on: the data has no labelled row and 'mine' is 0; set 'mine' above 0")
    live = [frozen(net, device) for net in teachers] if cfg.shift else []
    with loop.seeded(seed) as generator:
        student = begun(start, images, data.info, widths=cfg.widths, hidden=cfg.hidden)

        def loss(seen: Tensor, at: Tensor) -> Tensor:
            wanted = log_mean(asked(live, seen)) if live else soft[at].to(device)
            return divergence(F.log_softmax(student(seen), 1), wanted, cfg.loss)

        stages = [(len(images), cfg.steps, cfg.lr, "distil"), (own, cfg.tune_steps, cfg.lr * cfg.tune_lr_ratio, "fine-tune")]
        for n, steps, lr, what in stages:
            if n and steps:
                how = {**cfg.for_fit(), "steps": steps, "lr": lr}
                fit(student, images[:n], loss, **how, generator=generator, device=device, what=what)
        return student.cpu().eval()
