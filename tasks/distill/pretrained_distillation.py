"""Distil into a student that has read: it first learns to guess masked words, then follows its teachers on texts that need no labels.

Paper   Well-Read Students Learn Better: On the Importance of Pre-training Compact Models (2019), arXiv 1908.08962
Idea    three stages, one after the other. (1) The small encoder itself is pre-trained: masked-LM on all texts, where others cut it out of
        the teacher. (2) L = - sum_y p_t(y | x) log p_s(y | x) over all texts, no label in it; several teachers are one: the mean of their
        probabilities. (3) If wanted, fine-tuning on the labels of those texts that have one. (1) and (2) may see the same texts.
Small   2 layers of 48 values, words by a hash; the texts of (1) are those of (2), where the paper pre-trains on a far larger general
        corpus: give `pretrained` or a student to start from that has learnt on one.
Limits  2 layers of 64 values on CLINC150, domain of an utterance, 200 labels and 11,800 texts besides, 5 seeds, test: labels alone 56.7%
        (sd 1.9), pre-trained and fine-tuned 64.0, pre-trained and distilled 67.9 (sd 2.2), distilled alone 68.1; the teacher, 1.7 times as
        large, 65.5. So distilling is worth four points (0.1 to 7.8), and pre-training the student before it nothing; the teacher was
        pre-trained on the same texts. Distilled on 1,000 texts 66.1, without pre-training 66.4. The teacher takes 2.2 times as long for an
        answer. Pre-training on other, far more texts, as in the paper, was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, texts
from tasks.core.dataset import Dataset
from tasks.core.method import method
from tasks.core.networks import Net
from tasks.distill._shared import Answers, check, labelled, log_mean

READS = "text"


class Config(texts.Encoder):
    """Settings: those of the encoder and its pre-training, of distillation, and of fine-tuning."""

    width: int = Field(48, ge=2, description="values of a state of a fresh encoder")
    steps: int = Field(1000, ge=1, description="batches of distillation")
    batch: int = Field(32, ge=1, description="texts of a batch of distillation and of fine-tuning")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW in distillation")
    finetune_steps: int = Field(0, ge=0, description="batches of labelled texts after distillation; 0: none")
    finetune_lr: float = Field(3e-4, gt=0, description="peak learning rate of AdamW in fine-tuning")

    def for_fit(self) -> dict[str, Any]:
        """Keyword arguments of `texts.fit` in distillation."""
        return self.model_dump(include={"steps", "batch", "lr"})


SMOKE = Config(layers=1, width=16, heads=2, words=64, longest=16, pretrain_steps=3, steps=5, batch=8, finetune_steps=3)


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """- sum_y p_t log p_s in nats, mean over rows; the student's logits (N, K), logarithms (N, K) of p_t. Paper, section 3."""
    return F.cross_entropy(logits, teacher.exp())


@method(
    paper="Well-Read Students Learn Better: On the Importance of Pre-training Compact Models (2019)",
    arxiv="1908.08962",
    claim="a student that is pre-trained, then distilled, beats one that is only distilled and one that is pre-trained, then fine-tuned",
)
def pretrained_distillation(
    teachers: Sequence[Net], data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """A small student that was pre-trained on all texts of `data` and then followed the teachers on them; on from a copy of `start`.

    Raises UserError where there is no teacher, the rows are no texts, they do not fit each other, `pretrained` cannot be loaded, or
    fine-tuning is wanted and no row has a label.
    """
    named = [(f"teacher {at}", net) for at, net in enumerate(teachers)]
    texts.check(data, *named, ("the student to start from", start))
    check(teachers, data, start)
    if cfg.finetune_steps:
        labelled(data, "fine-tuning learns from labels alone; set 'finetune_steps' to 0")
    labels = torch.from_numpy(data.labels())
    known = torch.nonzero(labels >= 0).flatten()
    said = Answers(teachers, data, data.inputs(), device=device)
    with loop.seeded(seed) as generator:
        student, tokens = texts.begin(data, cfg, start=start, generator=generator, device=device)

        def soft(logits: Tensor, at: Tensor) -> Tensor:
            return soft_cross_entropy(logits, log_mean(said(at, at)))

        texts.fit(student, tokens, soft, **cfg.for_fit(), generator=generator, device=device, what="distil")
        if cfg.finetune_steps:
            own = labels[known].to(device)
            how: dict[str, Any] = {"steps": cfg.finetune_steps, "batch": cfg.batch, "lr": cfg.finetune_lr}

            def hard(logits: Tensor, at: Tensor) -> Tensor:
                return F.cross_entropy(logits, own[at])

            texts.fit(student, tokens[known.numpy()], hard, **how, generator=generator, device=device, what="fine-tune")
        return student.cpu().eval()
