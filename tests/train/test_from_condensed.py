"""Pre-training on condensed samples: what it fits, what it gives, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.condense import _shared
from tasks.core import loop, networks
from tasks.core.dataset import Dataset, Writer
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.train.from_condensed import Config, fit_targets, from_condensed, headed, samples
from tasks.train.supervised import Config as Labelled
from tasks.train.supervised import supervised

QUICK = Config(epochs=6, batch=8, widths=(4,), hidden=8)


@pytest.fixture
def condensed(tiny: Dataset, tmp_path: Path) -> Dataset:
    """Twenty digits whose targets are how bright their four quarters are; some pixels lie outside [0, 1]."""
    pixels = loop.to_float(tiny.split("train").images()[:20]) * 1.5 - 0.25
    quarters = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)
    targets = (quarters - quarters.mean(0)) / quarters.std(0)
    with Writer(tmp_path / "condensed", replace(tiny.info, schema="condensed")) as out:
        out.write(_shared.condensed_rows("x", pixels, targets, np.arange(20), tiny.split("train").ids()[:20]))
    return Dataset.open(tmp_path / "condensed")


def body(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in net.state_dict().items() if not name.startswith("head")])


def test_samples_are_the_exact_pixels_and_targets(condensed: Dataset, tiny: Dataset) -> None:
    pixels, targets = samples(condensed)
    torch.testing.assert_close(pixels, loop.to_float(tiny.split("train").images()[:20]) * 1.5 - 0.25)
    assert pixels.min() < -0.1
    assert targets.shape == (20, 4)


def test_the_targets_are_learnt(condensed: Dataset) -> None:
    pixels, targets = samples(condensed)
    with loop.seeded(0) as generator:
        net = networks.convnet((1, 8, 8), 4, widths=(16,), hidden=32, mean=0.3, std=0.5)
        before = torch.nn.functional.mse_loss(net(pixels), targets).item()
        fit_targets(net, pixels, targets, steps=200, batch=20, lr=0.1, momentum=0.9, weight_decay=0.0, generator=generator)
    assert torch.nn.functional.mse_loss(net(pixels), targets).item() < 0.1 * before


def test_one_step_is_a_step_of_sgd_on_the_mean_squared_error(condensed: Dataset) -> None:
    pixels, targets = samples(condensed)
    net = networks.convnet((1, 8, 8), 4, widths=(4,), hidden=8, mean=0.3, std=0.5)
    bias = net.head.bias.detach().clone()
    slope = 2 * (net(pixels) - targets).mean(0).detach() / 4  # of the mean over 20 rows and 4 outputs
    fit_targets(net, pixels, targets, steps=1, batch=20, lr=0.5, momentum=0.9, weight_decay=0.1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net.head.bias.detach(), bias - 0.5 * (slope + 0.1 * bias), atol=1e-5, rtol=1e-4)


def test_it_gives_a_network_for_the_classes_that_fine_tuning_can_start_from(condensed: Dataset, tiny: Dataset) -> None:
    net = from_condensed(condensed, QUICK)
    assert net.arch == {**net.arch, "kind": "convnet", "classes": 10, "widths": [4], "hidden": 8, "shape": [1, 8, 8], "norm": "batch"}
    assert not net.training
    tuned = supervised(tiny.split("train"), Labelled(steps=1, batch=4, lr=1e-6, widths=(64,)), start=net)
    for before, after in zip(net.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)


def test_a_network_of_supervised_training_has_the_same_settings_and_size(condensed: Dataset, tiny: Dataset) -> None:
    fields = (Config.model_fields[name] for name in ("widths", "hidden"))
    assert [field.default for field in fields] == [Labelled.model_fields[name].default for name in ("widths", "hidden")]
    ours = from_condensed(condensed, QUICK.model_copy(update={"norm": ""}))
    theirs = supervised(tiny.split("train"), Labelled(steps=1, batch=4, widths=(4,), hidden=8))
    assert {**ours.arch, "mean": 0, "std": 0} == {**theirs.arch, "mean": 0, "std": 0}


def test_a_fresh_last_layer_leaves_the_rest_and_the_original_as_they_are() -> None:
    net = networks.convnet((1, 8, 8), 4, widths=(4,), hidden=8, mean=0.3, std=0.5)
    weights = net.head.weight.detach().clone()
    changed = headed(net, 7)
    assert torch.equal(body(net), body(changed))
    assert changed.head.weight.shape == (7, 8)
    assert torch.equal(net.head.weight, weights)
    assert net.arch["classes"] == 4


def test_from_a_start_pre_training_goes_on_with_a_copy_of_its_body(condensed: Dataset) -> None:
    start = from_condensed(condensed, QUICK)
    before = body(start)
    near = from_condensed(condensed, QUICK.model_copy(update={"lr": 1e-6, "widths": (16,)}), start=start)
    assert torch.equal(body(start), before)
    assert near.arch == start.arch
    moved = [(after - old).abs().max().item() for after, old in zip(near.body.parameters(), start.body.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-3


def test_the_same_seed_gives_the_same_network_and_another_seed_another(condensed: Dataset) -> None:
    state = torch.get_rng_state()
    one, two, three = (from_condensed(condensed, QUICK, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(body(one), body(two))
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(body(one), body(three))
    assert torch.equal(state, torch.get_rng_state())


def test_rows_of_another_schema_are_refused_with_what_would_be_valid(tiny: Dataset) -> None:
    with pytest.raises(UserError, match=r"train\.from_condensed takes condensed rows, such as data/condensed; these are of schema 'image'"):
        from_condensed(tiny.split("train"), QUICK)


def test_no_rows_and_no_classes_are_refused(condensed: Dataset) -> None:
    with pytest.raises(UserError, match="there are no condensed rows"):
        from_condensed(condensed.take(np.array([], dtype=int)), QUICK)
    with pytest.raises(UserError, match="name no classes"):
        from_condensed(replace(condensed, info=replace(condensed.info, classes=())), QUICK)


def test_a_start_for_other_images_or_of_another_kind_is_refused(condensed: Dataset) -> None:
    wide = networks.convnet((1, 12, 12), 10, widths=(4,), hidden=8, mean=0.3, std=0.5)
    with pytest.raises(UserError, match=r"a convnet for images \(1, 12, 12\); .* a convnet for \(1, 8, 8\)"):
        from_condensed(condensed, QUICK, start=wide)
    arch = {**from_condensed(condensed, QUICK).arch, "kind": "simplex", "vertices": 3, "classes": 2, "names": ["a", "b"]}
    simplex = networks.build({**arch, "table": {"a": 0, "b": 1}})
    with pytest.raises(UserError, match="is a simplex for images"):
        from_condensed(condensed, QUICK, start=simplex)


def test_a_learning_rate_that_diverges_is_an_error(condensed: Dataset) -> None:
    with pytest.raises(UserError, match="'pre-train' diverged"):
        from_condensed(condensed, QUICK.model_copy(update={"lr": 1e6, "epochs": 50}))
