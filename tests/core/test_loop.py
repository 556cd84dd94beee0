"""The training loop: seeds, batches, schedules, prediction and the weighting of real and synthetic rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks
from tasks.core.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8)).astype(np.uint8)
LABELS = np.arange(30) % 3
RECIPE = {"steps": 6, "batch": 4, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "real_weight": 0.8}


def net(seed: int = 0) -> networks.Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), 3, widths=(4,), hidden=8, mean=0.5, std=0.3)


def fitted(synthetic: np.ndarray, images: np.ndarray = IMAGES, **changes: object) -> torch.Tensor:
    with loop.seeded(1) as generator:
        made = loop.fit_supervised(net(), images, LABELS[: len(images)], synthetic, generator=generator, **{**RECIPE, **changes})
    return torch.cat([weights.detach().flatten() for weights in made.parameters()])


def test_seeded_gives_the_same_numbers_twice_and_puts_the_global_state_back() -> None:
    torch.manual_seed(11)
    np.random.seed(11)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    draws = []
    for _ in range(2):
        with loop.seeded(5) as generator:
            draws.append((torch.rand(3, generator=generator).tolist(), torch.rand(3).tolist(), np.random.rand()))
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_seeded_puts_the_global_state_back_after_an_error_too() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), loop.seeded(5):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 12))
def test_batches_are_whole_passes_over_all_rows(n: int, size: int, steps: int) -> None:
    batches = list(loop.index_batches(n, size, steps, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [size] * steps
    drawn = torch.cat(batches).tolist()
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))


def test_no_rows_give_no_batches() -> None:
    with pytest.raises(ValueError, match="no rows"):
        next(loop.index_batches(0, 4, 1, torch.Generator()))


def test_pixels_become_floats_between_0_and_1_in_memory_of_their_own() -> None:
    images = np.array([0, 51, 255], dtype=np.uint8).reshape(3, 1, 1, 1)
    images.setflags(write=False)
    assert loop.to_float(images).flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_pixel_stats_look_at_no_more_than_ten_thousand_images() -> None:
    images = np.zeros((15_000, 1, 1, 1), dtype=np.uint8)
    images[1::2] = 255  # every second image is looked at, so that only the black ones are
    assert loop.pixel_stats(images) == (0.0, 1.0)
    assert loop.pixel_stats(images[:4]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no images"):
        loop.pixel_stats(images[:0])


def test_prediction_keeps_each_modules_mode_and_does_not_depend_on_the_batch_size() -> None:
    made = net().train()
    made.body[0].eval()
    logits = loop.predict(made, IMAGES)
    assert made.training
    assert not made.body[0].training
    assert torch.allclose(logits, loop.predict(made, IMAGES, size=7), atol=1e-6)
    assert loop.predict(made, IMAGES[:0]).numel() == 0


@pytest.mark.parametrize("steps", range(1, 12))
def test_one_cycle_runs_for_any_number_of_steps_and_ends_near_nothing(steps: int) -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = loop.one_cycle(optimiser, 0.1, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert max(rates) <= 0.1 + 1e-9
    assert steps == 1 or rates[-1] < 1e-4


def test_the_loss_weighs_the_batch_terms_and_not_the_rows() -> None:
    # one step of plain SGD from the same start moves along the gradient, so that the steps add up as the terms do
    synthetic = np.arange(30) >= 10
    start = torch.cat([weights.detach().flatten() for weights in net().parameters()])
    one = {"steps": 1, "batch": 30, "momentum": 0.0}
    real_only, made_only, both = (fitted(synthetic, **one, real_weight=w) - start for w in (1.0, 0.0, 0.8))
    assert torch.allclose(both, 0.8 * real_only + 0.2 * made_only, atol=1e-6)
    assert not torch.allclose(real_only, made_only, atol=1e-4)


def test_rows_of_one_kind_are_trained_on_with_their_full_weight() -> None:
    real = fitted(np.zeros(30, dtype=bool), real_weight=0.8)
    made = fitted(np.ones(30, dtype=bool), real_weight=0.8)
    assert torch.equal(real, made)
    assert torch.equal(real, fitted(np.zeros(30, dtype=bool), real_weight=0.1))


def test_extra_loss_is_added_and_after_step_runs_after_each_update() -> None:
    seen: list[tuple[str, int]] = []

    def penalty(step: int, made: networks.Net) -> torch.Tensor:
        seen.append(("loss", step))
        return 10 * sum(weights.square().sum() for weights in made.parameters())

    plain = fitted(np.zeros(30, dtype=bool), steps=3)
    shrunk = fitted(np.zeros(30, dtype=bool), steps=3, extra_loss=penalty, after_step=lambda step, _: seen.append(("after", step)))
    assert seen == [(what, step) for step in range(3) for what in ("loss", "after")]
    assert shrunk.norm() < plain.norm()


def test_training_separates_what_can_be_separated_and_ends_in_eval_mode() -> None:
    images = np.zeros((30, 1, 8, 8), dtype=np.uint8)
    images[np.arange(30), 0, :, 2 * LABELS] = 255
    with loop.seeded(0) as generator:
        made = loop.fit_supervised(net(), images, LABELS, np.zeros(30, dtype=bool), generator=generator, **{**RECIPE, "steps": 60})
    assert not made.training
    assert np.array_equal(loop.predict(made, images).argmax(1).numpy(), LABELS)


def test_no_rows_and_divergence_are_errors() -> None:
    with pytest.raises(ValueError, match="no rows to train on"):
        fitted(np.zeros(0, dtype=bool), images=IMAGES[:0])
    with pytest.raises(UserError, match=r"diverged.*smaller lr than 1e\+20"):
        fitted(np.zeros(30, dtype=bool), lr=1e20)
