"""Distribution matching: its loss, its augmentation, its networks and the whole run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tasks.condense._course import Course
from tasks.condense.distribution_matching import KINDS, SMOKE, augmented, distribution_matching, embedder, learn, matching_loss
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STILL = {"color": [0.5, 0.5, 0.5], "flip": [0.5, 0, 0], "crop": [0.5, 0.5, 0], "scale": [0.5, 0.5, 0], "rotate": [0.5, 0, 0]}


def started(**changes: object) -> tuple[torch.Tensor, torch.Tensor, tuple[dict[str, float], ...]]:
    real = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    real[:20, :, :4] += 1
    real[20:, :, :, :4] += 1
    first = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    how = {"widths": (8, 8), "steps": 60, "batch": 20, "lr": 1.0, "kinds": (), "generator": torch.Generator().manual_seed(0)} | changes
    learned, curve = learn(first, real, [np.arange(20), np.arange(20, 40)], [2, 2], **how, device="cpu", watch=Course(1))  # type: ignore[arg-type]
    return first, learned, curve


def test_the_loss_is_the_squared_distance_of_the_means() -> None:
    real, learned = torch.tensor([[0.0, 2.0], [4.0, 2.0], [2.0, 5.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    assert matching_loss(real, learned).item() == pytest.approx((2 - 0.5) ** 2 + (3 - 2) ** 2)


def test_the_loss_sees_means_alone() -> None:
    rows = torch.randn(6, 5)
    assert matching_loss(rows, rows.mean(0, keepdim=True)).item() == pytest.approx(0, abs=1e-10)
    assert matching_loss(rows, rows.flip(0)).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("kind", STILL)
def test_augmentation_in_the_middle_of_its_range_changes_nothing(kind: str) -> None:
    middle = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)  # of the scale: 1
    draw = [middle, middle, 0.0] if kind == "scale" else STILL[kind]
    torch.testing.assert_close(augmented(IMAGES, kind, draw), IMAGES, atol=1e-5, rtol=1e-5)


def test_colours_are_changed_around_their_means_as_worked_by_hand() -> None:
    image = torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2)  # grey: saturation does nothing; brightness adds .25, contrast 1.25 around 2.25
    assert augmented(image, "color", [0.75, 0.9, 0.75]).ravel().tolist() == pytest.approx([1.0, 3.5])
    colours = torch.tensor([0.0, 3.0, 6.0]).reshape(1, 3, 1, 1)
    assert augmented(colours, "color", [0.5, 0.0, 0.5]).ravel().tolist() == pytest.approx([3.0, 3.0, 3.0])  # no saturation at all


def test_a_crop_moves_by_an_eighth_of_the_side_at_most_and_zeros_come_in() -> None:
    up = augmented(IMAGES, "crop", [0.0, 0.5, 0.0])
    assert torch.equal(up[:, :, :7], IMAGES[:, :, 1:])
    assert not up[:, :, 7].any()
    far = augmented(IMAGES, "crop", [0.99, 0.99, 0.0])
    assert torch.equal(far[:, :, 1:, 1:], IMAGES[:, :, :7, :7])
    assert not far[:, :, 0].any()
    assert not far[:, :, :, 0].any()


def test_a_cutout_blanks_a_square_of_half_the_side_or_what_of_it_lies_inside() -> None:
    inside = augmented(torch.ones(1, 1, 8, 8), "cutout", [0.5, 0.5, 0.0])
    assert not inside[..., 2:6, 2:6].any()
    assert inside.sum() == 64 - 16
    assert augmented(torch.ones(1, 1, 8, 8), "cutout", [0.0, 0.99, 0.0]).sum() == 64 - 2 * 3


def test_flips_mirror_left_and_right() -> None:
    assert torch.equal(augmented(IMAGES, "flip", [0.2, 0, 0]), IMAGES.flip(3))


def test_rotation_and_scale_reach_their_ends() -> None:
    dot = torch.zeros(1, 1, 33, 33)
    dot[0, 0, 4, 16] = 1  # twelve pixels above the middle
    at = torch.arange(33.0) - 16

    def place(image: torch.Tensor) -> tuple[float, float]:
        return float((image[0, 0].sum(0) * at).sum() / image.sum()), float((image[0, 0].sum(1) * at).sum() / image.sum())

    across, down = place(augmented(dot, "rotate", [1.0, 0, 0]))
    assert abs(math.degrees(math.atan2(across, -down))) == pytest.approx(15, abs=1)
    assert place(augmented(dot, "scale", [0.0, 1.0, 0.0]))[1] == pytest.approx(-12 / 1.2, abs=0.3)
    assert place(augmented(dot, "scale", [0.0, 0.0, 0.0]))[1] == pytest.approx(-12 * 1.2, abs=0.3)


@pytest.mark.parametrize("kind", [*KINDS, "flip"])
def test_all_images_are_changed_alike_and_the_gradient_passes(kind: str) -> None:
    images = IMAGES[:1].expand(4, -1, -1, -1).clone().requires_grad_()
    changed = augmented(images, kind, [0.3, 0.8, 0.6])
    torch.testing.assert_close(changed, changed[:1].expand_as(changed))
    assert not torch.equal(changed, images)
    changed.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (1, 28, 28), (3, 64, 64)])
def test_an_untrained_network_fits_the_image_shape_and_learns_nothing(shape: tuple[int, int, int]) -> None:
    net = embedder(shape, (4, 4, 4))
    embedded = net(torch.randn(2, *shape))
    assert embedded.shape[1] >= 4 * 2 * 2
    assert torch.isfinite(embedded).all()
    assert not any(weights.requires_grad for weights in net.parameters())


def test_learned_images_come_nearer_to_the_mean_of_their_own_class() -> None:
    _, learned, curve = started()
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    across, down = learned[:, 0, :4, 4:].mean((1, 2)), learned[:, 0, 4:, :4].mean((1, 2))
    assert (across[:2].mean() - down[:2].mean()) > 0.2 > -0.2 > (across[2:].mean() - down[2:].mean())


def test_the_gradient_of_an_image_does_not_fall_with_the_number_of_its_class() -> None:
    real = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    moved = []
    for count in (1, 3):
        torch.manual_seed(0)
        first = real[:1].expand(count, -1, -1, -1) * 0.5
        learned, _ = learn(
            first,
            real,
            [np.arange(9)],
            [count],
            widths=(4,),
            steps=1,
            batch=9,
            lr=0.1,
            kinds=(),
            generator=torch.Generator(),
            device="cpu",
            watch=Course(1),
        )
        moved.append(learned[0] - first[0])
    torch.testing.assert_close(moved[0], moved[1], atol=1e-5, rtol=1e-3)


def test_without_steps_it_gives_the_real_images_that_it_would_start_from(tiny: Dataset) -> None:
    data = tiny.split("train")
    cfg = SMOKE.model_copy(update={"source_rows": 200})
    none, some = (
        distribution_matching(data, tiny.split("validation"), 10, cfg.model_copy(update={"outer_steps": steps}), seed=1) for steps in (0, 6)
    )
    real = dict(zip(data.ids(), data.images(), strict=True))
    for parents, pixels in zip(none.rows["parents"].to_pylist(), none.rows["pixels"].to_pylist(), strict=True):
        np.testing.assert_allclose(np.float32(pixels), real[parents[0]].ravel() / 255, atol=1e-6)
    assert none.rows["parents"].equals(some.rows["parents"])
    assert none.rows["label"].to_pylist() == some.rows["label"].to_pylist() == list(range(10))
    assert not none.rows["pixels"].equals(some.rows["pixels"])
    assert "matching_loss" not in none.figures
    assert all(set(parents) == set(data.ids()) for parents in some.rows["parents"].to_pylist())


def test_targets_are_the_encoders_answers_to_the_learned_images(tiny: Dataset) -> None:
    from tasks.condense import _shared
    from tasks.core import loop

    made = distribution_matching(tiny.split("train"), tiny.split("validation"), 10, SMOKE, seed=4)
    with loop.seeded(4) as generator:
        source = _shared.prepare(tiny.split("train"), 10, **SMOKE.for_encoder(), generator=generator, device="cpu")
    pixels = torch.tensor(made.rows["pixels"].to_pylist()).reshape(10, 1, 8, 8)
    torch.testing.assert_close(source.encoder(pixels), torch.tensor(made.rows["target"].to_pylist()), atol=1e-4, rtol=1e-4)


def test_same_seed_same_rows_and_another_seed_others(tiny: Dataset) -> None:
    state = torch.get_rng_state()
    one, two, three = (distribution_matching(tiny.split("train"), tiny.split("validation"), 10, SMOKE, seed=seed) for seed in (1, 1, 2))
    assert one.rows.equals(two.rows)
    assert (one.figures, one.curve) == (two.figures, two.curve)
    assert not one.rows["pixels"].equals(three.rows["pixels"])
    assert torch.equal(state, torch.get_rng_state())


def test_without_labels_all_rows_are_one_class_and_flips_and_stillness_are_options(tiny: Dataset) -> None:
    data = tiny.split("train").without_labels()
    sets = [
        distribution_matching(data, tiny.split("validation"), 3, SMOKE.model_copy(update=change)).rows
        for change in ({}, {"flips": True}, {"augmentation": False})
    ]
    assert all(rows["label"].null_count == 3 for rows in sets)
    assert len({str(rows["pixels"].to_pylist()) for rows in sets}) == 3


def test_fewer_samples_than_classes_is_an_error(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="n = 3 samples cannot stand for 10 classes of 60 source rows; valid: 10 to 60"):
        distribution_matching(tiny.split("train"), tiny.split("validation"), 3, SMOKE)
