"""The parts that the condensers share, against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.condense import _shared
from tasks.condense.random import SMOKE
from tasks.core import loop
from tasks.core.dataset import SCHEMAS, Dataset
from tasks.core.errors import UserError


def prepared(data: Dataset, n: int, seed: int = 0, **changes: object) -> _shared.Source:
    with loop.seeded(seed) as generator:
        return _shared.prepare(data, n, **SMOKE.model_copy(update=changes).for_encoder(), generator=generator, device="cpu")


def test_krr_gives_the_prediction_worked_by_hand() -> None:
    # features 1 and 0 with the bias column: K_ss = [[2, 1], [1, 1]]; trace 3, so ridge 1/3 gives lam = 1 and K_ss + I = [[3, 1], [1, 2]];
    # its inverse is [[2, -1], [-1, 3]] / 5; for targets (5, 0) the weights are (2, -1); the real feature 3 has K_rs = (4, 1): 4*2 - 1 = 7
    condensed, targets, real = torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0], [0.0]]), torch.tensor([[3.0]])
    assert _shared.krr_predict(real, condensed, targets, ridge=1 / 3).item() == pytest.approx(7.0)
    # the loss uses a ridge of 1e-6, almost the exact line 5 * 3 = 15: (15 - 6)^2
    assert _shared.krr_loss(real, condensed, targets, torch.tensor([[6.0]])).item() == pytest.approx(81.0, abs=0.01)


def test_without_a_ridge_worth_the_name_krr_is_the_line_through_two_points() -> None:
    condensed, targets = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[5.0], [1.0]]).double()
    predicted = _shared.krr_predict(torch.tensor([[3.0], [-1.0]]).double(), condensed, targets, ridge=1e-12)
    assert predicted.ravel().tolist() == pytest.approx([13.0, -3.0])


@given(st.floats(0.1, 100))
def test_lam_scales_with_the_trace(scale: float) -> None:
    # one condensed row f with the bias column: k = f^2 + 1 = trace, so the prediction at f itself is y * k / (k + ridge * k) at any scale
    row, target = torch.tensor([[scale]]), torch.tensor([[2.0]])
    assert _shared.krr_predict(row, row, target, ridge=0.25).item() == pytest.approx(2 / 1.25, rel=1e-5)


def test_no_gradient_flows_through_lam() -> None:
    # real feature 1, condensed feature f, target 1: p = (f + 1) / (f^2 + 1 + lam). At f = 1 with lam held at .5 * 2 = 1, dp/df =
    # (3 - 2 * 2) / 9 = -1/9; were lam to move with f, p = (f + 1) / (1.5 (f^2 + 1)) would give (2 - 2 * 2) / 6 = -1/3
    row = torch.tensor([[1.0]], requires_grad=True)
    _shared.krr_predict(torch.tensor([[1.0]]), row, torch.tensor([[1.0]]), ridge=0.5).sum().backward()
    assert row.grad is not None
    assert row.grad.item() == pytest.approx(-1 / 9)


def test_krr_on_the_real_rows_themselves_has_almost_no_loss() -> None:
    features, targets = (torch.randn(20, 40, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert _shared.krr_loss(features, features, targets, targets).item() < 1e-4
    assert _shared.krr_loss(features, features[:5], targets[:5], targets).item() > 0.1


def test_images_and_targets_both_receive_a_gradient() -> None:
    net = _shared.SmallNet((1, 8, 8), 3, (4, 4), 0.3, 0.3).eval()
    images, targets = torch.rand(5, 1, 8, 8, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = _shared.krr_loss(net.features(torch.rand(9, 1, 8, 8)).detach(), net.features(images), targets, torch.randn(9, 3))
    loss.backward()
    assert images.grad is not None
    assert targets.grad is not None
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()
    assert (targets.grad.abs().amax(1) > 0).all()


def test_barlow_twins_loss_is_zero_for_identical_decorrelated_views() -> None:
    view = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert _shared.barlow_twins_loss(view, view, 1.0).item() == pytest.approx(0, abs=1e-5)


def test_barlow_twins_loss_counts_redundant_and_disagreeing_dimensions() -> None:
    same = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # C is all ones: two off-diagonal ones
    assert _shared.barlow_twins_loss(same, same, 0.5).item() == pytest.approx(1.0, abs=1e-4)
    assert _shared.barlow_twins_loss(same, -same, 0.0).item() == pytest.approx(8.0, abs=1e-4)  # C_ii = -1: 2 * (1 + 1)^2
    assert _shared.barlow_twins_loss(same, 7 * same + 3, 0.5).item() == pytest.approx(1.0, abs=1e-4)  # scale and offset do not count


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (1, 28, 28), (3, 64, 64)])
def test_networks_fit_the_image_shape(shape: tuple[int, int, int]) -> None:
    net = _shared.SmallNet(shape, 7, (4, 4, 4), 0.5, 0.2).eval()
    images = torch.rand(2, *shape)
    assert net(images).shape == (2, 7)
    assert net.features(images).shape[1] == net.head.in_features >= 4 * 4 * 4
    assert net.body[0].stride == ((2, 2) if min(shape[1:]) >= 16 else (1, 1))


def test_augmentation_without_strength_changes_nothing() -> None:
    images = torch.rand(6, 3, 9, 7)
    torch.testing.assert_close(_shared.augment(images, 0.0, 0.0, False, torch.Generator().manual_seed(0)), images)


def test_a_shift_moves_by_whole_pixels_and_continues_the_edge() -> None:
    images = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1) / 64
    moved = _shared.augment(images, 0.125, 0.0, False, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[:1], (1, 1, 1, 1), mode="replicate")[0, 0]
    possible = torch.stack([padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    off = (moved[:, 0, None] - possible[None]).abs().amax((2, 3))
    assert off.amin(1).max() < 1e-4
    assert len(off.argmin(1).unique()) == 9


def test_a_shift_that_does_not_continue_the_edge_lets_black_in() -> None:
    images = torch.ones(50, 1, 8, 8)
    moved = _shared.augment(images, 0.125, 0.0, False, torch.Generator().manual_seed(0), fill="black")
    sides = {round(float(one.sum())) for one in moved}
    assert sides == {64, 56, 49}  # not moved, moved by one pixel along one side, along both
    assert torch.equal(_shared.augment(images, 0.125, 0.0, False, torch.Generator().manual_seed(0), fill="edge").round(), images)


def test_only_flips_mirror_an_image() -> None:
    images = torch.rand(1, 1, 8, 8).repeat(40, 1, 1, 1)
    flipped = _shared.augment(images, 0.0, 0.0, True, torch.Generator().manual_seed(0))
    mirrored = [torch.allclose(one, images[0].flip(2), atol=1e-5) for one in flipped]
    kept = [torch.allclose(one, images[0], atol=1e-5) for one in flipped]
    assert 5 < sum(mirrored) < 35
    assert sum(mirrored) + sum(kept) == 40


def test_a_rotation_turns_both_ways_by_at_most_what_was_asked_for() -> None:
    image = torch.zeros(300, 1, 17, 17)
    image[:, 0, 2, 8] = 1  # six pixels above the middle
    turned = _shared.augment(image, 0.0, 30.0, False, torch.Generator().manual_seed(0))[:, 0]
    at = torch.arange(17.0) - 8
    across, down = ((turned.sum(dim) * at).sum(1) / turned.sum((1, 2)) for dim in (1, 2))
    angle = torch.rad2deg(torch.atan2(across, -down))
    assert angle.abs().max() < 31
    assert angle.min() < -25
    assert angle.max() > 25


def test_augmentation_follows_its_generator_alone() -> None:
    images = torch.rand(4, 1, 8, 8)
    one, two = (_shared.augment(images, 0.1, 9.0, True, torch.Generator().manual_seed(3), contrast=0.3, noise=0.1) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(("n", "rows"), [(21, 20), (500, 200)])
def test_more_samples_than_rows_is_an_error_that_names_both(tiny: Dataset, n: int, rows: int) -> None:
    data = tiny.split("train").take(np.arange(rows))
    with pytest.raises(UserError, match=rf"n = {n} .*{rows} rows"):
        prepared(data, n)


def test_more_samples_than_source_rows_is_an_error_that_names_the_setting(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="n = 61 samples: the data has 200 rows, of which source_rows lets 60 be used; valid: 1 to 60"):
        prepared(tiny.split("train"), 61)


def test_no_samples_at_all_is_an_error(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="n is 0"):
        prepared(tiny.split("train"), 0)


def test_targets_are_standardised_over_the_source_rows(tiny: Dataset) -> None:
    source = prepared(tiny.split("train"), 5)
    assert len(source.ids) == 60
    torch.testing.assert_close(source.targets.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(source.targets.std(0, correction=0), torch.ones(8), atol=1e-3, rtol=0)
    assert not any(weights.requires_grad for weights in source.encoder.parameters())


def test_training_the_encoder_lowers_its_loss(tiny: Dataset) -> None:
    short, long = (prepared(tiny.split("train"), 5, encoder_steps=steps, encoder_batch=64).encoder_loss for steps in (2, 80))
    assert long < 0.7 * short


def test_ids_and_images_of_the_source_belong_together(tiny: Dataset) -> None:
    source = prepared(tiny.split("train"), 5)
    assert np.array_equal(tiny.with_ids(source.ids).images(), source.images)
    assert tiny.with_ids(source.ids).ids() == source.ids


def test_nearest_rows_are_taken_once_each() -> None:
    features = np.array([[0.0], [1.0], [5.0]])
    assert _shared.nearest_distinct(features, np.array([[0.1], [0.2], [0.3]])).tolist() == [0, 1, 2]
    assert _shared.nearest_distinct(features, np.array([[4.0], [0.9]])).tolist() == [2, 1]


def test_kmeans_finds_one_row_of_each_heap_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    heaps = np.repeat(np.eye(3, 4, dtype=np.float32) * 100, 20, axis=0) + np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    chosen = _shared.kmeans_positions(heaps, 3, seed=1)
    assert sorted(chosen // 20) == [0, 1, 2]
    assert torch.get_num_threads() == threads


def test_held_out_loss_prefers_right_targets_to_shuffled_ones(tiny: Dataset) -> None:
    source = prepared(tiny.split("train"), 40)
    images, targets = loop.to_float(source.images[:40]), source.targets[:40]
    arms = {"right": (images, targets), "wrong": (images, targets.flip(0)), "right again": (images, targets)}
    found = _shared.held_out_losses(arms, tiny.split("validation"), source, **SMOKE.for_measuring(), seed=0, device="cpu")
    assert found["right"] < found["wrong"]
    assert found["right"] == found["right again"]  # the same nets for every arm


def test_held_out_data_of_another_shape_or_none_is_an_error(tiny: Dataset) -> None:
    source = prepared(tiny.split("train"), 5)
    with pytest.raises(UserError, match="held-out data has 0 rows"):
        _shared.held_out_losses({}, tiny.take(np.array([], dtype=int)), source, **SMOKE.for_measuring(), seed=0, device="cpu")


def test_rows_keep_exact_pixels_and_show_them_clipped() -> None:
    images = torch.tensor([-0.25, 0.5, 1.5, 0.2]).reshape(1, 1, 2, 2)
    rows = _shared.condensed_rows("x", images, torch.tensor([[1.5, -2.0]]), np.array([2]), ["a", "b", "c"])
    assert rows.schema.equals(SCHEMAS["condensed"])
    row = rows.to_pylist()[0]
    assert row["pixels"] == images.ravel().tolist()
    assert row["target"] == [1.5, -2.0]
    assert row["parents"] == ["c", "a", "b"]  # first the one that it started from
    assert row["sample_id"] == "condensed-x-00000"
    assert (row["label"], row["caption"], row["split"]) == (None, None, "train")
    labelled = _shared.condensed_rows("x", images, torch.zeros(1, 2), np.array([0]), ["a"], np.array([3]))
    assert labelled["label"].to_pylist() == [3]
    unknown = _shared.condensed_rows("x", images, torch.zeros(1, 2), np.array([0]), ["a"], np.array([-1]))
    assert unknown["label"].to_pylist() == [None]
    from tasks.core.dataset import decode

    assert decode([row["image"]["bytes"]], (1, 2, 2)).ravel().tolist() == [0, 128, 255, 51]
