"""What a step of distillation costs: beside its bare parts, a loop written by hand, the field's own trainer, and with the teacher's answers
looked up instead of asked for.

All of it is `distill.kd` on Fashion-MNIST with a teacher many times the student's size, in CPU time of one process on one thread, which
other work on the machine changes least. Rounds of all alternate, and medians are compared.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.networks import Net
from tasks.core.settings import shared_data
from tasks.distill import _shared
from tasks.distill.kd import Config, kd

ROWS, STEPS, BATCH, ROUNDS = 12_000, 150, 64, 5
T = 4.0
STUDENT: dict[str, Any] = {"widths": (8, 16), "hidden": 32}
Show = Callable[[str, str, str], None]


def project_of(place: Path) -> Dataset:
    """So many rows in a folder of a project, where decoded images and teachers' answers are kept."""
    from tests.claims.samples import dataset, images

    train = images(shared_data() / "fashion_mnist", "train")
    (place / "params.yaml").write_text("seed: 0\n")
    (place / "dvc.yaml").write_text("stages: {}\n")
    some = dataset(train.pixels[:ROWS], train.labels[:ROWS], train.classes)
    shutil.copytree(some.parts[0].folder, place / "data" / "pool")
    return Dataset.open(place / "data" / "pool")


def fresh(data: Dataset, widths: tuple[int, ...], hidden: int) -> Net:
    with loop.seeded(0):
        return networks.convnet(data.info.shape, len(data.info.classes), widths=widths, hidden=hidden, mean=0.286, std=0.353)


def soft(student: Tensor, teacher: Tensor) -> Tensor:
    """Hinton's term, as anyone writes it."""
    return T * T * F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="batchmean")


def per_step(run: Callable[[int], None]) -> float:
    """CPU seconds of one step: so many steps, less a tenth of them, so that what is done once does not count."""
    times = []
    for steps in (STEPS // 10, STEPS):
        began = time.process_time()
        run(steps)
        times.append(time.process_time() - began)
    return (times[1] - times[0]) / (STEPS - STEPS // 10)


def by_hand(data: Dataset, teacher: Net, known: np.ndarray | None) -> Callable[[int], None]:
    """The plain loop: batches of the same array, the loss in one line, no checks."""
    pixels, labels = data.images(), torch.from_numpy(data.labels())

    def run(steps: int) -> None:
        student = fresh(data, **STUDENT).train()
        optimiser = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=5e-4)
        schedule = loop.one_cycle(optimiser, 0.1, steps)
        for at in loop.index_batches(len(pixels), BATCH, steps, torch.Generator().manual_seed(0)):
            seen = torch.from_numpy(pixels[at.numpy()]).float().div_(255)
            if known is None:
                with torch.no_grad():
                    told = teacher(seen)
            else:
                told = torch.from_numpy(known[at.numpy()])
            logits = student(seen)
            loss = 0.9 * soft(logits, told) + 0.1 * F.cross_entropy(logits, labels[at])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()

    return run


def bare(data: Dataset, teacher: Net) -> Callable[[int], None]:
    """The teacher's forward pass and the student's step, one after the other as they come, on batches that are ready."""
    pixels, labels = data.images(), torch.from_numpy(data.labels())
    ready = [
        (torch.from_numpy(pixels[at.numpy()]).float().div_(255), labels[at])
        for at in loop.index_batches(len(pixels), BATCH, STEPS, torch.Generator().manual_seed(0))
    ]

    def run(steps: int) -> None:
        student = fresh(data, **STUDENT).train()
        optimiser = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=5e-4)
        for seen, wanted in ready[:steps]:
            with torch.no_grad():
                told = teacher(seen)
            logits = student(seen)
            loss = 0.9 * soft(logits, told) + 0.1 * F.cross_entropy(logits, wanted)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

    return run


def by_trainer(data: Dataset, teacher: Net, place: Path) -> Callable[[int], None]:
    """`transformers.Trainer` with the same loss, network, batches and optimiser, all that it writes and logs switched off."""
    from transformers import Trainer, TrainingArguments

    pixels, labels = data.images(), torch.from_numpy(data.labels())

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(pixels)

        def __getitems__(self, at: list[int]) -> list[list[int]]:
            return [at]

    def collate(batch: list[list[int]]) -> dict[str, Tensor]:
        at = np.array(batch[0])
        return {"images": torch.from_numpy(pixels[at]).float().div_(255), "labels": labels[torch.from_numpy(at)]}

    class Distiller(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            with torch.no_grad():
                told = teacher(inputs["images"])
            logits = model(inputs["images"])
            return 0.9 * soft(logits, told) + 0.1 * F.cross_entropy(logits, inputs["labels"])

    def run(steps: int) -> None:
        student = fresh(data, **STUDENT).train()
        optimiser = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=5e-4)
        how = TrainingArguments(
            output_dir=str(place / "trainer"), per_device_train_batch_size=BATCH, max_steps=steps, use_cpu=True, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0, seed=0,
        )  # fmt: skip
        both = (optimiser, loop.one_cycle(optimiser, 0.1, steps))
        Distiller(model=student, args=how, train_dataset=Rows(), data_collator=collate, optimizers=both).train()

    return run


def report(show: Show) -> None:
    """Measure, and say."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = project_of(place)
        teacher = fresh(data, (64, 128), 128).eval().requires_grad_(False)
        began = time.process_time()
        known = _shared.answers([teacher], data, data.images())[0]
        once = time.process_time() - began
        assert isinstance(known, np.memmap), "answers on so many rows of a project are mapped"

        def ours(shift: int) -> Callable[[int], None]:
            def run(steps: int) -> None:
                kd([teacher], data, Config(**STUDENT, steps=steps, batch=BATCH, shift=shift))

            return run

        runs = {
            "bare": bare(data, teacher), "moved": ours(1), "mapped": ours(0), "by hand": by_hand(data, teacher, known),
            "by hand, asking": by_hand(data, teacher, None), "trainer": by_trainer(data, teacher, place),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(per_step(run))
    ms = {name: 1000 * statistics.median(values) for name, values in times.items()}
    show("distill.kd, images moved, the teacher asked each step", f"{ms['moved']:.2f} ms", "")
    show("over the bare teacher's forward and student's step", f"{ms['moved'] / ms['bare']:.3f}", "1.05 or less")
    show("over a loop by hand that asks too, and moves nothing", f"{ms['moved'] / ms['by hand, asking']:.3f}", "")
    show("distill.kd, the teacher's answers mapped", f"{ms['mapped']:.2f} ms", "")
    show("over a loop written by hand with the same answers", f"{ms['mapped'] / ms['by hand']:.3f}", "1.03 or less")
    show("times as fast as asking each step", f"{ms['by hand, asking'] / ms['mapped']:.2f}", "more than 1")
    show(f"the answers for {ROWS:,} rows, once, in steps that ask", f"{1000 * once / ms['by hand, asking']:.0f}", "")
    show("transformers.Trainer over distill.kd, both asking", f"{ms['trainer'] / ms['moved']:.2f}", "1 or more")
