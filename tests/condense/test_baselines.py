"""The two baselines: real images with the encoder's targets."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.condense import kmeans as kmeans_file
from tasks.condense import random as random_file
from tasks.core.dataset import Dataset, decode
from tasks.core.errors import UserError

BASELINES = [random_file.random, kmeans_file.kmeans]


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_gives_real_images_each_once_with_its_own_id_first(tiny: Dataset, baseline) -> None:
    data = tiny.split("train")
    made = baseline(data, tiny.split("validation"), 9, random_file.SMOKE, seed=2)
    real = dict(zip(data.ids(), data.images(), strict=True))
    shown = decode([one["bytes"] for one in made.rows["image"].to_pylist()], (1, 8, 8))
    own = [parents[0] for parents in made.rows["parents"].to_pylist()]
    assert len(set(own)) == 9
    for name, image, pixels in zip(own, shown, made.rows["pixels"].to_pylist(), strict=True):
        assert np.array_equal(image, real[name])
        assert np.array_equal(np.float32(pixels), (real[name].ravel() / np.float32(255)).astype(np.float32))
    assert all(len(set(parents)) == 60 for parents in made.rows["parents"].to_pylist())


def test_both_baselines_share_encoder_and_measure(tiny: Dataset) -> None:
    ours, theirs = (baseline(tiny.split("train"), tiny.split("validation"), 9, random_file.SMOKE, seed=2) for baseline in BASELINES)
    assert ours.figures["heldout_loss"] == theirs.figures["heldout_loss_random"]
    assert ours.figures["encoder_loss"] == theirs.figures["encoder_loss"]


def test_asked_for_every_row_both_choose_the_same_set(tiny: Dataset) -> None:
    data = tiny.split("validation")
    sets = [
        {own[0] for own in baseline(data, tiny.split("test"), 40, random_file.SMOKE).rows["parents"].to_pylist()} for baseline in BASELINES
    ]
    assert sets[0] == sets[1] == set(data.ids())


@pytest.mark.parametrize("baseline", BASELINES)
def test_too_few_rows_is_an_error(tiny: Dataset, baseline) -> None:
    with pytest.raises(UserError, match="n = 21 samples: the data has 20 rows; valid: 1 to 20"):
        baseline(tiny.take(np.arange(20)), tiny.split("validation"), 21, random_file.SMOKE)
