"""A student that is pre-trained, then distilled, beats the same student distilled alone, and pre-trained, then fine-tuned on the labels.

Claim   domain of an utterance, of ten, 200 labels: test accuracy of pd is at least .01 above that of both; the sheet of the paper asks
        for one to two points. The paper's gains are larger: it pre-trains on a corpus far larger than what it distils on
Arms    labels: the student by the labels alone; fine-tuned: pre-trained on all 12,000 texts, then by the labels; distilled: by the teacher
        on all texts, from first weights; pd: pre-trained, then distilled, both on all texts; few texts: distilled on 1,000 of them;
        teacher: of two layers of 96 values, pre-trained on all texts, then by the labels
Equal   labelled texts (for teacher, fine-tuned and labels), teacher, student, first weights, batch, 600 steps of distillation. Not the
        steps in all: pd has 3,000 of pre-training besides, and distilled for all 3,600 was worse than for 600 (below), so that the
        stronger of the two is what pd must beat
Tuned   on the validation split. Seed 1000 (student 2,000 and teacher 1,500 steps of pre-training; teacher .588): labels at .001, .003 .519,
        .560; fine-tuned .565, .591; pd at .0005, .002 .623, .613; distilled at .003 .618, for all 2,600 steps .605; on 1,000 texts pd .577,
        distilled .603, all of batch 64. Seed 1001 (as here; teacher .654): fine-tuned at .003 .636; pd .671, .682; distilled at .001, .003
        .686, .693, for all 3,600 steps .672 at .001; on 1,000 texts pd .652, distilled .668
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.networks import Net
from tasks.core.texts import Encoder
from tasks.distill.pretrained_distillation import SMOKE, Config, pretrained_distillation
from tasks.train.bert import Config as Bert
from tasks.train.bert import bert
from tests.claims import texts

CLAIM = Claim(
    text="a student that is pre-trained, then distilled, beats the same student distilled alone, and pre-trained, then fine-tuned",
    data=("clinc150",),
    headline=Beats("pd", "distilled", "accuracy", by=0.01),
    also=(Beats("pd", "fine-tuned", "accuracy", by=0.01),),
)
LABELLED, POOL, FEW = 200, 11_800, 1000
SIZE: dict[str, Any] = {"words": 4096, "longest": 16, "pretrain_batch": 64, "pretrain_lr": 0.002}
STUDENT = Config(**SIZE, layers=2, width=64, heads=2, pretrain_steps=3000, steps=600, batch=32, lr=0.001)
TEACHER = Bert(**SIZE, layers=2, width=96, heads=2, pretrain_steps=2500, steps=150, batch=32, lr=0.003)
SCRATCH_LR = 0.003  # of the student from first weights
LABELS_LR = 0.003


def measure(method: Any, seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Accuracy of all arms on the test split."""
    labelled, others, few = (60, 100, 80) if small else (LABELLED, POOL, FEW)
    cfg, teaching = (SMOKE, Bert(**SMOKE.model_dump(include=set(Encoder.model_fields)), steps=4)) if small else (STUDENT, TEACHER)
    cfg = cfg.model_copy(update={"finetune_steps": 0})
    rows = texts.domains(data[0], seed, labelled, others)
    every, part = rows.known + rows.pool, rows.known + rows.pool.take(np.arange(few - labelled))
    alone = Bert(**cfg.model_dump(include=set(Encoder.model_fields)), steps=teaching.steps, batch=teaching.batch, lr=LABELS_LR)
    unread = {"pretrain_steps": 0}

    teacher = bert(every, teaching, seed=seed)
    read = bert(every, alone.model_copy(update={"steps": 0}), seed=seed)
    # stage 1 is done once, for all that begin with it
    on, same = cfg.model_copy(update=unread), alone.model_copy(update=unread)
    arms = {
        "teacher": teacher,
        "labels": bert(rows.known, same, seed=seed),
        "fine-tuned": bert(rows.known, same, start=read, seed=seed),
        "distilled": switched_off([teacher], every, cfg, seed=seed),
        "pd": method([teacher], every, on, start=read, seed=seed),
        "distilled, few texts": switched_off([teacher], part, cfg, seed=seed),
        "pd, few texts": method([teacher], part, on, start=read, seed=seed),
    }
    return [Row(arm, "accuracy", texts.accuracy(net, rows.test)) for arm, net in arms.items()]


def switched_off(
    teachers: Sequence[Net], data: Dataset, cfg: Config = STUDENT, *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """Distillation from first weights."""
    alone = cfg.model_copy(update={"pretrain_steps": 0, "lr": SCRATCH_LR})
    return pretrained_distillation(teachers, data, alone, seed=seed, device=device)
