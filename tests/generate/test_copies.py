from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tasks.core.dataset import QUARANTINE, SCHEMAS, Dataset, encode, image_column
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.generate._copies import near_copies, nearest, points, squared, without_copies
from tests.claims.samples import dataset

REAL = np.random.default_rng(0).integers(0, 256, (400, 1, 8, 8), dtype=np.uint8)


@pytest.fixture
def rng() -> np.random.Generator:
    """Of each test's own, since of fresh samples the share is near by lot: no test's draws depend on which ran before it."""
    return np.random.default_rng(3)


@pytest.fixture(scope="module")
def real() -> Dataset:
    return dataset(REAL, np.zeros(len(REAL), dtype=np.int64), ("one",))


def made_of(images: np.ndarray) -> Made:
    n = len(images)
    columns: dict[str, Any] = {
        "sample_id": [f"g{at}" for at in range(n)],
        "image": image_column(encode(images)),
        "label": [0] * n,
        "caption": [""] * n,
        "split": ["train"] * n,
        "parents": [["r0"]] * n,
        "_clean": [None] * n,
    }
    return Made(pa.table(columns, schema=SCHEMAS["image"]), {"loss": 1.0})


def test_distances_are_those_of_the_definition(rng: np.random.Generator) -> None:
    some, others = rng.normal(size=(5, 7)), rng.normal(size=(4, 7))
    expected = ((some[:, None] - others) ** 2).sum(2)
    np.testing.assert_allclose(squared(some, others), expected, rtol=1e-4)


def test_the_nearest_real_row_is_found_and_a_row_is_not_its_own_neighbour(real: Dataset) -> None:
    vectors = points(REAL[:3], "pixels")
    assert nearest(vectors, real, "pixels").max() < 1e-6
    own = nearest(vectors, real, "pixels", own=np.arange(3))
    expected = [np.sort(np.linalg.norm(points(REAL, "pixels") - one, axis=1))[1] for one in vectors]
    np.testing.assert_allclose(own, expected, rtol=1e-4)


def test_copies_are_found_whether_dimmed_noisy_or_moved(real: Dataset, rng: np.random.Generator) -> None:
    noisy = (REAL[1].astype(int) + rng.integers(-6, 7, REAL[1].shape)).clip(0, 255).astype(np.uint8)
    moved = np.roll(REAL[2], 3, axis=2)
    fresh = rng.integers(0, 256, (1, 8, 8), dtype=np.uint8)
    found = near_copies(np.stack([REAL[0], noisy, moved, fresh]), real, 0.01)
    assert found.copies.tolist() == [True, True, True, False]
    assert (found.pixels < 1).tolist() == [True, True, False, False]
    assert found.features[2] < 1e-6


def test_of_samples_like_the_rows_about_the_share_goes(real: Dataset) -> None:
    fresh = np.random.default_rng(1).integers(0, 256, (2000, 1, 8, 8), dtype=np.uint8)
    found = near_copies(fresh, real, 0.05)
    for distances in found:
        assert 0.02 < (distances < 1).mean() < 0.09


def test_rows_that_are_there_twice_set_no_bound() -> None:
    twice = dataset(np.concatenate([REAL[:50], REAL[:50]]), np.zeros(100, dtype=np.int64), ("one",))
    assert np.isinf(near_copies(REAL[200:210], twice, 0.01).pixels).all()


def test_near_copies_are_set_aside_with_a_reason_and_without_a_picture(real: Dataset, rng: np.random.Generator) -> None:
    fresh = rng.integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    made, aside = without_copies(made_of(np.concatenate([fresh[:1], REAL[:2], fresh[1:]])), real, 0.01)
    assert made.rows["sample_id"].to_pylist() == ["g0", "g3", "g4"]
    assert made.figures == {"loss": 1.0, "near_copies_pixels": 2, "near_copies_features": 2}
    assert aside.schema == QUARANTINE
    assert aside["value"].to_pylist() == ["g1", "g2"]
    assert aside["reason"][0].as_py() == "near copy of a real row: in pixels at 0.00 of the distance that real rows keep"
    with pytest.raises(UserError, match="all 2 generated rows are near copies"):
        without_copies(made_of(REAL[:2]), real, 0.01)
