"""All distillers on one teacher and one size of student: accuracy, calibration error, and CPU seconds, with their spread over seeds.

Fashion-MNIST: 2,000 labelled train rows, on which the teacher was trained, 6,000 without labels, and the test split. Methods stand at their
defaults but for the student's size and, where they have them, as many steps; nothing is tuned here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tasks.core import catalog, loop, metrics
from tasks.core.dataset import Dataset
from tasks.core.method import Taught
from tasks.core.networks import Net
from tasks.core.settings import shared_data

LABELLED, POOL, SEEDS = 2000, 6000, 3
STUDENT: dict[str, Any] = {"widths": (8, 16), "hidden": 32, "steps": 1400}
# settings without which a method would not make a student of this size, or another arm of it that people ask for
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bd_kd, offline": ("bd_kd", {"online": False, "lr": 0.0025}),  # as its claim: at the default rate it diverges
    "guidance, into a convnet": ("guidance", {"target": "convnet"}),
    "compression, 8 bits": ("compression", {"techniques": ("quantise",)}),
    "compression, fewer channels and kd": ("compression", {"techniques": ("prune_channels", "kd")}),
}
Figures = tuple[float, float, float, int]  # accuracy, ECE, CPU seconds, bytes


def settings(name: str, own: dict[str, Any]) -> Any:
    """A method's config with the student's size and steps where it knows them."""
    config = catalog.get(f"distill.{name}").config
    return config(**{key: value for key, value in {**STUDENT, **own}.items() if key in config.model_fields})


def measure(seed: int) -> dict[str, Figures]:
    """Every arm for one seed."""
    from tests.claims.samples import images
    from tests.claims.students import drawn, labels_only, teacher

    train, test = (images(shared_data() / "fashion_mnist", split) for split in ("train", "test"))
    rows = drawn(train, seed, LABELLED, POOL)
    expert = teacher(rows.known, seed, 1500)
    found: dict[str, Figures] = {}

    def note(arm: str, make: Callable[[], Net | Taught]) -> Net:
        began = time.process_time()
        made = make()
        seconds = time.process_time() - began
        net = made.net if isinstance(made, Taught) else made
        probabilities = loop.predict(net, test.pixels).softmax(1).numpy()
        hits = probabilities.argmax(1) == test.labels
        size = sum(value.numel() * value.element_size() for value in net.state_dict().values())
        found[arm] = (float(hits.mean()), metrics.ece(probabilities.max(1), hits), seconds, size)
        return net

    note("the teacher", lambda: expert)
    alone = note("the student of the labels", lambda: labels_only(rows.known, settings("kd", {}), seed))
    data: Dataset = rows.known + rows.pool
    for arm, (name, own) in arms().items():
        start = alone if name == "general_transfer" else None  # it goes on from a student that is trained
        note(arm, partial(catalog.get(f"distill.{name}").entry, [expert], data, settings(name, own), start=start, seed=seed))
    return found


def arms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Each method for images as it comes, but for those that `ARMS` sets to something, and the arms there: name, method and settings."""
    plain = [name.partition(".")[2] for name in catalog.cards() if name.startswith("distill.") and catalog.get(name).reads != "text"]
    set_to = {name for name, _ in ARMS.values()} - {"bd_kd"}
    found: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in plain if name not in set_to}
    return found | {arm: what for arm, what in ARMS.items() if what[0] in plain}


def report(show: Callable[[str, str, str], None]) -> None:
    """Measure all seeds and print a line for each arm."""
    found = [measure(seed) for seed in range(SEEDS)]
    for arm in found[0]:
        accuracy, error, seconds, size = ([one[arm][at] for one in found] for at in range(4))
        spread = f"{statistics.fmean(accuracy):.4f} (sd {statistics.stdev(accuracy):.4f})"
        more = f"ECE {statistics.fmean(error):.3f}, {statistics.fmean(seconds):.1f} s, {statistics.fmean(size) / 1024:.1f} KiB"
        show(f"{arm}: accuracy", spread, f"to be read; {more}")
