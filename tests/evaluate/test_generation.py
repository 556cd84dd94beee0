"""Drawn images under a judge: shares, unlearning accuracy, distance and calls against hand-worked numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.core import networks
from tasks.core.dataset import Dataset
from tasks.core.denoiser import Denoiser
from tasks.core.errors import UserError
from tasks.evaluate.generation import Config, generation
from tests import tables

CLASSES = ("a", "b", "c")
JUDGE = tables.told([[6, 0, 0], [0, 6, 0], [0, 0, 6]])  # pixel 0 is an a, 1 a b, 2 a c


class Prints(Denoiser):
    """Draws the pixels that a table has for a label, one after the other."""

    def draw(self, labels: Tensor, *, generator: torch.Generator, steps: int | None = None) -> Tensor:
        seen: dict[int, int] = {}
        pixels = []
        for label in labels.tolist():
            table = self.arch["table"][label]
            pixels.append(table[seen.get(label, 0) % len(table)])
            seen[label] = seen.get(label, 0) + 1
        return torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1)


def prints(*table: list[int], classes: int = 3, **arch: object) -> Prints:
    own = {"kind": "prints", "shape": [1, 1, 1], "classes": classes, "mean": 0.0, "std": 1.0, "levels": 50, "betas": [0.01, 0.2]}
    return Prints({**own, "table": list(table), **arch})


@pytest.fixture(autouse=True)
def told_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.KINDS, "told", tables.Told)


@pytest.fixture
def test_rows(tmp_path: Path) -> Dataset:
    return tables.dataset(tmp_path / "test", tables.pixels(0, 0, 1, 1, 2, 0), [0, 0, 1, 1, 2, 2], classes=CLASSES)


def of_class(folder: Path, label: int) -> Dataset:
    return tables.dataset(folder, tables.pixels(label, label), [label, label], classes=CLASSES, prefix="f")


def test_figures_by_hand(test_rows: Dataset) -> None:
    drawing = {"right": prints([0], [1], [2]), "half": prints([0], [1, 0], [2], draw_steps=10)}
    found = generation({"judge": JUDGE, **drawing}, {"test": test_rows}, Config(each=4)).figures
    assert found["judge"]["accuracy"].value == pytest.approx(5 / 6)
    assert [found[name]["class_accuracy"].value for name in drawing] == [1, pytest.approx(10 / 12)]
    assert [found[name]["worst_class_accuracy"].value for name in drawing] == [1, 0.5]
    assert [found[name]["calls"].value for name in drawing] == [50, 10]
    assert all("ua" not in found[name] for name in drawing)
    # one value a pixel: squared difference of means, and of standard deviations (with n - 1)
    drawn, real = np.repeat([0, 1, 2], 4) / 255, np.array([0, 0, 1, 1, 2, 0]) / 255
    distance = (drawn.mean() - real.mean()) ** 2 + (drawn.std(ddof=1) - real.std(ddof=1)) ** 2
    assert found["right"]["frechet"].value == pytest.approx(distance, abs=1e-9)


def test_a_forgotten_class_counts_for_ua_alone(test_rows: Dataset, tmp_path: Path) -> None:
    drawing = {"kept": prints([0], [1], [2], one_step=20), "gone": prints([0], [1], [1]), "part": prints([0], [1], [2, 0, 0, 0])}
    rows = {"test": test_rows, "forget": of_class(tmp_path / "forget", 2)}
    found = generation({"judge": JUDGE, **drawing}, rows, Config(each=4))
    assert [found.figures[name]["ua"].value for name in drawing] == [0, 100, 75]
    assert [found.figures[name]["class_accuracy"].value for name in drawing] == [1, 1, 1]
    assert found.figures["kept"]["calls"].value == 1
    assert len({found.figures[name]["frechet"].value for name in drawing}) == 1
    assert found.details["judged"]["gone"][2] == [0, 4, 0]


def test_a_class_without_test_rows_is_not_drawn(test_rows: Dataset) -> None:
    found = generation({"judge": JUDGE, "m": prints([0], [1], [0])}, {"test": test_rows.where(test_rows.labels() != 2)}, Config(each=2))
    assert found.figures["m"]["class_accuracy"].value == 1


def test_what_is_missing_or_does_not_fit_gets_a_sentence(test_rows: Dataset, tmp_path: Path) -> None:
    good, rows = prints([0], [1], [2]), {"test": test_rows}
    with pytest.raises(UserError, match="need a judge"):
        generation({"m": good}, rows)
    with pytest.raises(UserError, match="need a judge"):
        generation({"judge": good, "m": good}, rows)
    with pytest.raises(UserError, match="no diffusion model was given"):
        generation({"judge": JUDGE}, rows)
    with pytest.raises(UserError, match="model 'other' is a classifier"):
        generation({"judge": JUDGE, "other": JUDGE}, rows)
    with pytest.raises(UserError, match="'m' draws images"):
        generation({"judge": JUDGE, "m": prints([0], [1], classes=2)}, rows)
    with pytest.raises(UserError, match="no class that is not forgotten"):
        twos = test_rows.where(test_rows.labels() == 2)
        generation({"judge": JUDGE, "m": good}, {"test": twos, "forget": of_class(tmp_path / "forget", 2)})
