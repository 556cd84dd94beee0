"""A question put to described networks and devices finds all that run there and nothing else; names and file sizes do not tell.

Claim   on 24 networks and 10 devices the query's precision and recall are 1 against true needs, and its F1 is at least .10 above that of
        a look-up by name. The paper gives a query and no figure; .10 is asked for because a look-up that errs less often than that
        would do for a small collection
Arms    semantic: `registry.semantic_management`; names: task, sensor and size letter read off a version's name, the letter by the best
        rule for flash and RAM; sizes: task and sensor off the name, and a file that fits into flash; truth: 1
Equal   the same networks, devices and questions (each device, each of two tasks). True needs are plain sums over widths and plain
        comparisons with what each device was drawn with, before units, kinds of sensors and parts were written down
Tuned   the letters' rule alone, on 10 draws from 1000: the best of 262,144 (F1 .68, the median rule's .43) lets small ones run from 16 kB
        of RAM, medium ones from 32 kB of flash and of RAM, large ones nowhere. The query has nothing to tune
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.core import loop, networks
from tasks.core.claim import Beats, Claim, Row
from tasks.core.errors import UserError
from tasks.registry import Offer, Place, Ranking
from tasks.registry.semantic_management import Config, describe

CLAIM = Claim(
    text="a query over described networks and devices finds exactly what runs there; a look-up by name errs",
    data=(),
    headline=Beats("semantic", "names", "f1", by=0.10),
    also=(
        Beats("semantic", "truth", "precision", by=-1e-9),
        Beats("semantic", "truth", "recall", by=-1e-9),
        Beats("semantic", "sizes", "f1", by=0.10),
    ),
)
KIB = 1024
TASKS = {"digits": ("camera",), "people": ("camera",), "keywords": ("microphone",), "gestures": ("accelerometer", "gyroscope")}
WRITTEN = {"camera": ("camera", "RGB camera", "grey-camera"), "microphone": ("microphone", "PDM microphone")}
LEAST = {"s": (0, 16), "m": (32, 32), "l": (0, 999)}  # thousand bytes of flash and of RAM for a size letter, see `Tuned`


class Drawn(NamedTuple):
    """Networks and devices as a catalogue writes them, and what is true of them: bytes needed, bytes there and sensors."""

    versions: dict[str, dict[str, Any]]
    devices: dict[str, dict[str, Any]]
    needs: dict[str, tuple[str, set[str], int, int]]
    has: dict[str, tuple[set[str], int, int, bool]]


def measure(method: Callable[..., Ranking], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """Precision, recall and F1 of each arm over all questions. Raises UserError for data: there is none to read."""
    if data:
        raise UserError("this claim draws its networks and devices and reads no data; leave out --data")
    drawn = draw(seed, *((8, 3) if small else (24, 10)))
    arms = {"semantic": method, "names": switched_off, "sizes": by_size}
    counts = {arm: np.zeros(3) for arm in arms}  # right, given, true
    tasks = np.random.default_rng(seed).permuted(np.tile(list(TASKS), (len(drawn.devices), 1)), axis=1)[:, :2]
    for device, asked in zip(drawn.devices, tasks, strict=True):
        for task in asked.tolist():
            true = {name for name in drawn.versions if runs(drawn.needs[name], drawn.has[device], task)}
            for arm, ask in arms.items():
                offer = Offer(facts={"versions": drawn.versions, "devices": drawn.devices})
                given = {place.version for place in ask(offer, Config(device=device, task=task), seed=seed).places}
                counts[arm] += [len(true & given), len(given), len(true)]
    rows = [Row("truth", "precision", 1.0), Row("truth", "recall", 1.0)]
    for arm, (right, given, true) in counts.items():
        rows += [Row(arm, "precision", right / max(given, 1)), Row(arm, "recall", right / max(true, 1))]
        rows += [Row(arm, "f1", 2 * right / max(given + true, 1))]
    return rows


def switched_off(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Ranking:
    """Look up by name: the task and sensors that the name says, and its size letter against the device's flash and RAM."""
    board = offer.facts["devices"][cfg.device]
    flash, ram = in_bytes(board["flash"]), in_bytes(board["ram"])
    letters = {letter for letter, (stored, held) in LEAST.items() if flash >= stored * 1000 and ram >= held * 1000}
    return Ranking(tuple(Place(name, 0.0, "name") for name in named(offer, cfg) if name.partition("/")[0].split("-")[2] in letters))


def by_size(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Ranking:
    """Look up by name and by whether the file fits into flash."""
    flash = in_bytes(offer.facts["devices"][cfg.device]["flash"])
    return Ranking(tuple(Place(name, 0.0, "size") for name in named(offer, cfg) if offer.facts["versions"][name]["weight_bytes"] <= flash))


def named(offer: Offer, cfg: Config) -> list[str]:
    """Versions whose name says the task, and whose named sensors are all among the device's as written (part of the text will do)."""
    written = " ".join(offer.facts["devices"][cfg.device]["sensors"]).lower().replace("-", " ")
    motion = {"motion": any(word in written for word in ("imu", "marg", "accelerometer"))}
    parts = {name: name.partition("/")[0].split("-") for name in offer.facts["versions"]}
    return [name for name, (task, sensor, _) in parts.items() if task == cfg.task and motion.get(sensor, sensor in written)]


def in_bytes(text: str) -> int:
    """A flash size as data sheets write it; a thousand and 1,024 are told apart."""
    number, unit = text.split()
    return int(float(number) * {"KiB": KIB, "kB": 1000, "MiB": KIB**2, "MB": 1000**2}[unit])


def runs(needs: tuple[str, set[str], int, int], has: tuple[set[str], int, int, bool], task: str) -> bool:
    """True needs against what is there."""
    made_for, sensors, weights, activations = needs
    there, flash, ram, copies = has
    return made_for == task and sensors <= there and weights <= flash and activations + weights * copies <= ram


def draw(seed: int, versions: int, devices: int) -> Drawn:
    """Networks of drawn widths, devices of drawn memory, both as written and as they are."""
    rng = np.random.default_rng(seed)
    drawn = Drawn({}, {}, {}, {})
    for at in range(versions):
        task = list(TASKS)[at % len(TASKS)]
        side, hidden = int(rng.choice([16, 24, 32])), int(rng.choice([8, 32, 128]))
        widths = tuple(int(w) for w in rng.choice([4, 8, 16, 32, 64], size=rng.integers(1, 4)))
        channels = 3 if task == "people" else 1
        with loop.seeded(seed):
            net = networks.convnet((channels, side, side), 10, widths=widths, hidden=hidden, mean=0.5, std=0.5)
        weights, activations = needed(channels, side, widths, hidden)
        letter = "s" if weights < 30_000 else "m" if weights < 150_000 else "l"
        sensor = {"digits": "camera", "people": "camera", "keywords": "microphone", "gestures": "motion"}[task]
        name = f"{task}-{sensor}-{letter}/{at + 1}"
        drawn.versions[name] = {**describe(net), "task": task, "sensor": list(TASKS[task]), "accuracy": round(float(rng.random()), 3)}
        drawn.needs[name] = (task, set(TASKS[task]), weights, activations)
    for at in range(devices):
        flash, flash_text = store(rng, [16, 64, 128, 256, 512, 1024])
        ram, ram_text = store(rng, [4, 8, 16, 32, 64, 256])
        sensors = [str(rng.choice(WRITTEN[kind])) for kind in ("camera", "microphone") if rng.random() < 0.7]
        there = {kind for kind, texts in WRITTEN.items() if set(sensors) & set(texts)}
        motion = str(rng.choice(["IMU", "MARG", "accelerometer", "none"]))
        sensors += [motion] if motion != "none" else []
        there |= {"none": set(), "accelerometer": {"accelerometer"}}.get(motion, {"accelerometer", "gyroscope"})
        copies = bool(rng.random() < 0.3)
        drawn.devices[f"board-{at}"] = {
            "sensors": sensors, "flash": flash_text, "ram": ram_text, "weights_in": "ram" if copies else "flash",
        }  # fmt: skip
        drawn.has[f"board-{at}"] = (there, flash, ram, copies)
    return drawn


def store(rng: np.random.Generator, sizes: list[int]) -> tuple[int, str]:
    """A drawn memory in bytes, and as a data sheet writes it."""
    number, unit = int(rng.choice(sizes)), str(rng.choice(["KiB", "kB"]))
    return number * (KIB if unit == "KiB" else 1000), f"{number} {unit}"


def needed(channels: int, side: int, widths: tuple[int, ...], hidden: int) -> tuple[int, int]:
    """Bytes of weights (with the two pixel statistics) and of the largest layer's input and output, float32, by hand."""
    values, peak = 2, 0
    for at, out in enumerate(widths):
        after = side // 2 if at == 0 else side  # all sides here are 16 or more and even: the first layer halves them
        values += out * channels * 9 + out
        peak = max(peak, channels * side**2 + out * after**2, out * after**2 + out * (after // 2) ** 2)
        channels, side = out, after // 2
    flat = channels * side**2
    values += flat * hidden + hidden + hidden * 10 + 10
    return 4 * values, 4 * max(peak, flat + hidden, hidden + 10)
