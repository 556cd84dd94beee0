"""A student with balanced divergences is better calibrated than one of mutual learning or of a trained teacher, and no less accurate.

Claim   calibration error of bd_kd, mean over three capacity gaps, is at least a tenth below that of dml, and below that of kd; it is below
        that of dml at each gap; accuracy is no worse than that of either by more than .01, which is what two seeds of one network differ
        by. The paper gives lower calibration error than other online distillation and better accuracy; of the first a trial on noisy digits
        gave a fifth, of which half is asked for, of the second nothing beyond the seeds' spread
Arms    labels; kd: offline, of the trained teacher; dml; bd_kd; reverse: bd_kd with the reverse divergence alone, at the sum of the
        weights. At the gap of 4 besides: forward: the forward one alone; flipped: the other orientation; offline: bd_kd of the frozen
        teacher
Equal   250 labelled rows, first weights, batch, steps: 640 of 32, 82 passes; teacher and peer of 16 and 32 channels; students of as many,
        a quarter and a fourteenth of their parameters (gap 1, 4, 14)
Tuned   the learning rate, by accuracy and not by calibration, on 5,000 validation rows (the train split's rows 50,000 to 55,000), three
        seeds from 1000, gap 4: labels .02, .05: .726, .726; kd .005, .01: .730, .721; dml .01, .02, .05: .725, .733, .732; bd_kd .005,
        .01, .02: .704, .725, .741; offline .0025, .005: .713, .663. At gap 14, two seeds, dml .02, .05: .713, .701; bd_kd .02, .04: .722,
        .709. Smaller rates give smaller calibration errors to all arms alike: dml at .01 has .092 in place of .149. The temperature: 1, 2
        or 4 at .02: accuracy .723, .730, .741, calibration error .170, .156, .124. Forward alone had .738 and .120, reverse alone .741
        and .127, flipped .738 and .125 (dml: .733 and .149): at one temperature and weight the direction decided nothing there
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.networks import Net
from tasks.distill import dml, kd
from tasks.distill.bd_kd import Config
from tests.claims import students
from tests.claims.samples import images

GAPS = {1: ((16, 32), 64), 4: ((8, 16), 32), 14: ((4, 8), 16)}
CLAIM = Claim(
    text="balanced divergences give a student a lower calibration error than mutual learning and offline KD, at no loss of accuracy",
    data=("fashion_mnist",),
    headline=Beats("bd_kd", "dml", "ece", by=0.1, better="lower", relative=True),
    also=(
        Beats("bd_kd", "kd", "ece", by=0.1, better="lower", relative=True),
        *(Beats("bd_kd", "dml", f"gap {gap} ece", better="lower", relative=True) for gap in GAPS),
        Beats("bd_kd", "dml", "accuracy", by=-0.01),
        Beats("bd_kd", "kd", "accuracy", by=-0.01),
    ),
    seeds=8,
)
STUDENT = Config(steps=640, batch=32, lr=0.02)
KD_LR, OFFLINE_LR, MIDDLE = 0.005, 0.0025, 4


def measure(method: Any, seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """All arms for one seed: accuracy and calibration error on the test split, at each gap and as the mean of those."""
    test = images(data[0], "test")
    known = students.drawn(images(data[0], "train"), seed, 100 if small else 250).known
    teacher = students.teacher(known, seed, 30 if small else 320, *GAPS[1])
    rows = students.figures("teacher", teacher, test)
    for gap, (widths, hidden) in GAPS.items():
        changes = {"widths": widths, "hidden": hidden, **({"steps": 20} if small else {})}
        arms = students_of(method, teacher, known, STUDENT.model_copy(update=changes), seed, every=gap == MIDDLE)
        rows += [row for arm, net in arms.items() for row in students.figures(arm, net, test, f"gap {gap}")]
    for metric in ("accuracy", "error", "ece"):
        for arm in ("labels", "kd", "dml", "bd_kd", "reverse"):
            found = [row.value for row in rows if row.arm == arm and row.metric.endswith(f" {metric}")]
            rows.append(Row(arm, metric, float(np.mean(found))))
    return rows


def students_of(method: Any, teacher: Net, known: Dataset, cfg: Config, seed: int, every: bool) -> dict[str, Net]:
    """The student of each arm; `every` includes those that are shown at one gap only."""

    def changed(**settings: Any) -> Net:
        net: Net = method([teacher], known, cfg.model_copy(update=settings), seed=seed)
        return net

    one_way = {"w_hi": cfg.w_hi + cfg.w_lo, "w_lo": 0.0}
    found = {
        "bd_kd": changed(),
        "dml": switched_off([teacher], known, cfg, seed=seed),
        "reverse": changed(orientation="reverse", **one_way),
        "kd": kd.kd([teacher], known, kd.Config(**{**shared(cfg), "lr": KD_LR}), seed=seed),
        "labels": students.labels_only(known, cfg, seed),
    }
    if every:
        found["forward"] = changed(orientation="forward", **one_way)
        found["flipped"] = changed(orientation="flipped")
        found["offline"] = changed(online=False, lr=OFFLINE_LR)
    return found


def switched_off(
    teachers: Sequence[Net], data: Dataset, cfg: Config = STUDENT, *, start: Net | None = None, seed: int = 0, device: str = "cpu"
) -> Net:
    """Mutual learning."""
    return dml.dml(teachers, data, dml.Config(**shared(cfg)), start=start, seed=seed, device=device)


def shared(cfg: Config) -> dict[str, Any]:
    """What all distillers are set to."""
    return {**cfg.for_fit(), "widths": cfg.widths, "hidden": cfg.hidden}
