"""An encoder that was pre-trained on texts without labels is more accurate than the same one trained on the labels alone.

Claim   domain of an utterance, of ten, by 200 labels: test accuracy of pre-training on 11,800 texts besides is at least .02 above that of
        the same labels, network and steps of fine-tuning from first weights. BERT's gains over encoders that had not been pre-trained are
        far larger, on far larger corpora; of one network here another seed is worth a point and a half
Arms    pre-trained; labels: the same without the first stage
Equal   labelled texts, network, first weights (the pre-trained arm's before it reads), fine-tuning: 150 batches of 32 and its learning rate
Tuned   on utterances of the validation split or cut from the train split, seed 1000. Labels alone, validation: learning rate .001, .003:
        .519, .560; with first weights of a standard deviation of .02, of BERT's for 768 values, .561, .550. The rest on 3,000 train rows,
        where labels alone had .580 with such first weights. Pre-training, fine-tuned at .001, .003, .01: 3,000 batches of 64 at .002 .648,
        .660, .608; 1,500 at .003 .574, .595. From first weights of .02: 1,500 at .003 .547, .568, 3,000 .595, .637; of 1/8: .431, .493.
        3,000 batches of 32 at .003 with them at .02: .523, .528. Rates of .005 did harm (.378 to .448). On the news of AG, 200 labels,
        1,200 to 2,000 batches of 32, it did harm: .46 to .52, labels alone .52 to .59; at 10 a class of CLINC150's 150 intents .695, .692
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.networks import Net
from tasks.train.bert import SMOKE, Config, bert
from tests.claims import texts

CLAIM = Claim(
    text="by 200 labels, an encoder that was pre-trained on 12,000 texts is more accurate than the same one by the labels alone",
    data=("clinc150",),
    headline=Beats("pre-trained", "labels", "accuracy", by=0.02),
)
LABELLED, POOL = 200, 11_800
SETTING = Config(
    layers=2, width=64, heads=2, words=4096, longest=16, pretrain_steps=3000, pretrain_batch=64, pretrain_lr=0.002, steps=150, lr=0.003
)


def measure(method: Any, seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Accuracy of both arms on the test split."""
    labelled, others, cfg = (60, 100, SMOKE) if small else (LABELLED, POOL, SETTING)
    rows = texts.domains(data[0], seed, labelled, others)
    arms = {
        "pre-trained": method(rows.known + rows.pool, cfg, seed=seed),
        "labels": switched_off(rows.known + rows.pool, cfg, seed=seed),
    }
    return [Row(arm, "accuracy", texts.accuracy(net, rows.test)) for arm, net in arms.items()]


def switched_off(data: Dataset, cfg: Config = SETTING, *, start: Net | None = None, seed: int = 0, device: str = "cpu") -> Net:
    """The same without pre-training."""
    return bert(data, cfg.model_copy(update={"pretrain_steps": 0}), start=start, seed=seed, device=device)
