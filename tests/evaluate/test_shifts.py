"""Shifts: each by hand, and what is measured under them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.evaluate.shifts import CONTRAST, GLARE, SHIFTS, SMOKE, Config, shifts, spoil

FLAT = np.full((2, 1, 8, 8), 100, np.uint8)


def net_of(data: Dataset, seed: int = 0) -> Net:
    with loop.seeded(seed):
        return networks.convnet(data.info.shape, len(data.info.classes), widths=(8,), hidden=16, mean=0.3, std=0.3)


@pytest.mark.parametrize("shift", ["blur", "contrast", "pixelate"])
def test_a_flat_image_stays_flat_where_a_shift_only_moves_detail(shift: str) -> None:
    assert (spoil(FLAT, shift, 5) == 100).all()


def test_glare_adds_light_and_never_leaves_the_range() -> None:
    assert (spoil(FLAT, "glare", 3) == round(100 + 255 * GLARE[2])).all()
    assert (spoil(np.full_like(FLAT, 250), "glare", 5) == 255).all()


def test_contrast_draws_values_to_the_mean() -> None:
    image = np.array([[[[0, 200], [0, 200]]]], np.uint8)
    half = 100 * CONTRAST[1]
    assert spoil(image, "contrast", 2).ravel().tolist() == [100 - half, 100 + half] * 2


def test_blur_keeps_the_mean_of_a_point_and_spreads_it_evenly() -> None:
    image = np.zeros((1, 1, 9, 9), np.uint8)
    image[0, 0, 4, 4] = 255
    found = spoil(image, "blur", 5)[0, 0].astype(int)
    assert abs(found.sum() - 255) <= 10  # rounding of 49 values
    assert (found == found.T).all()
    assert found[4, 4] > found[4, 5] > found[4, 6]


def test_noise_has_the_stated_width_and_follows_the_seed() -> None:
    image = np.full((50, 1, 16, 16), 128, np.uint8)
    found = spoil(image, "noise", 4, seed=1)
    assert found.astype(float).std() / 255 == pytest.approx(0.09, rel=0.05)
    assert (found == spoil(image, "noise", 4, seed=1)).all()
    assert (found != spoil(image, "noise", 4, seed=2)).any()


@pytest.mark.parametrize("shift", sorted(SHIFTS))
def test_a_higher_severity_takes_images_further_away(shift: str, tiny: Dataset) -> None:
    images = tiny.images()[:50]
    away = [np.abs(spoil(images, shift, severity).astype(int) - images).mean() for severity in (1, 3, 5)]
    assert away[0] <= away[1] <= away[2]
    assert away[2] > 0


def test_figures_are_means_and_minima_over_shifts(tiny: Dataset) -> None:
    rows = {"test": tiny.split("test"), "shift late": tiny.split("validation")}
    found = shifts({"a": net_of(tiny)}, rows, SMOKE)
    by = {name: figure.value for name, figure in found.figures["a"].items()}
    assert by["shifted_accuracy"] == pytest.approx(np.mean([by[f"accuracy_{name}"] for name in SHIFTS]))
    assert by["worst_shift_accuracy"] == min(by[f"accuracy_{name}"] for name in [*SHIFTS, "late"])
    assert found.per_sample is not None
    assert np.mean(found.per_sample["shifted"].to_numpy()) == pytest.approx(by["shifted_accuracy"])
    assert set(found.data) == {"test", "shift late"}


def test_a_network_that_answers_one_class_is_moved_by_no_shift(tiny: Dataset) -> None:
    net = net_of(tiny)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.arange(10.0))
    test = tiny.split("test")
    expected = float((test.labels() == 9).mean())
    found = shifts({"a": net}, {"test": test}, Config(severity=5)).figures["a"]
    assert {round(figure.value, 9) for figure in found.values()} == {round(expected, 9)}


def test_without_labels_nothing_can_be_measured(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="no row in the role 'test' has a label"):
        shifts({"a": net_of(tiny)}, {"test": tiny.without_labels()})
