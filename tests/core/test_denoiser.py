"""Diffusion models: noise and its inverse by hand, the path of drawing, one step, both backbones, what is refused."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.core import denoiser as dn
from tasks.core import loop, networks
from tasks.core.denoiser import ClassDenoiser, Denoiser

ARCH: dict[str, Any] = {"kind": "denoiser", "shape": [1, 4, 5], "classes": 3, "mean": 0.0, "std": 1.0, "levels": 40, "betas": [0.01, 0.3]}
MLP = {**ARCH, "backbone": "mlp", "hidden": 8, "depth": 2}
UNET = {**ARCH, "shape": [3, 7, 9], "backbone": "unet", "widths": [8, 16]}


def net(arch: dict[str, Any] = MLP) -> Denoiser:
    with loop.seeded(0):
        made = networks.build(arch)
    assert isinstance(made, ClassDenoiser)
    return made


class Knows(Denoiser):
    """A perfect model of one picture: it says the very noise that lies on it, and counts how often it is asked."""

    def __init__(self, picture: Tensor, **arch: Any) -> None:
        super().__init__({**ARCH, **arch})
        self.picture, self.asked = picture, []

    def conditions(self, labels: Tensor) -> Tensor:
        return labels

    def forward(self, noisy: Tensor, levels: Tensor, conditions: Tensor) -> Tensor:  # type: ignore[override]
        self.asked.append(int(levels[0]))
        share = self.abar[levels][:, None, None, None]
        return (noisy - share.sqrt() * self.picture) / (1 - share).sqrt()


def test_the_share_that_is_left_is_the_product_of_one_less_beta() -> None:
    torch.testing.assert_close(dn.kept_shares(3, [0.1, 0.3]), torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7]))
    cosine = dn.kept_shares(200, "cosine")
    assert (cosine.diff() < 0).all()
    assert cosine[0] > 0.999
    assert 0 < cosine[-1] < 1e-3


@pytest.mark.parametrize("betas", ["square", [0.1], [0.3, 0.1], [0.0, 0.1], [0.1, 1.0]])
def test_a_schedule_that_is_none_is_refused(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas are"):
        dn.kept_shares(10, betas)


def test_noise_is_mixed_in_by_the_share_that_is_left() -> None:
    model = Knows(torch.zeros(1, 4, 5), levels=3, betas=[0.1, 0.3])
    clean, noise = torch.full((2, 1, 4, 5), 2.0), torch.full((2, 1, 4, 5), -1.0)
    made = model.noised(clean, noise, torch.tensor([0, 2]))
    expected = [2 * 0.9**0.5 - 0.1**0.5, 2 * 0.504**0.5 - 0.496**0.5]
    torch.testing.assert_close(made[:, 0, 0, 0], torch.tensor(expected))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 39), st.integers(0, 2**31))
def test_what_noise_was_put_on_is_taken_off_again(level: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(2, 1, 4, 5, generator=generator) for _ in range(2))
    model, levels = net(), torch.full((2,), level)
    torch.testing.assert_close(model.clean(model.noised(clean, noise, levels), noise, levels), clean, atol=1e-3, rtol=1e-3)


def test_drawing_goes_down_from_the_most_noise_in_even_steps() -> None:
    assert dn.descent(100, 4) == [99, 74, 49, 24]
    assert dn.descent(5, 5) == [4, 3, 2, 1, 0]
    assert dn.descent(7, 1) == [6]


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_a_perfect_model_draws_its_picture_in_any_number_of_steps(steps: int) -> None:
    picture = torch.linspace(-1, 1, 20).view(1, 4, 5)
    model = Knows(picture)
    drawn = model.draw(torch.tensor([0, 2]), generator=torch.Generator().manual_seed(0), steps=steps)
    assert drawn.dtype == torch.uint8
    assert (drawn.float() - (picture + 1) * 127.5).abs().max() <= 1
    assert model.asked == dn.descent(40, steps)


def test_how_many_steps_are_taken_is_the_models_own_unless_it_is_told() -> None:
    picture, labels = torch.zeros(1, 4, 5), torch.tensor([1])
    for arch, expected in (({}, 40), ({"draw_steps": 5}, 5), ({"draw_steps": 5, "one_step": 17}, 1)):
        model = Knows(picture, **arch)
        model.draw(labels, generator=torch.Generator().manual_seed(0))
        assert len(model.asked) == expected
    assert model.asked == [17]
    with pytest.raises(ValueError, match="41 steps are too many"):
        Knows(picture).draw(labels, generator=torch.Generator(), steps=41)


def test_one_step_gives_what_is_clean_in_noise_without_a_picture() -> None:
    model, noise, labels = net(), torch.randn(3, 1, 4, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])
    share = float(model.abar[10])
    start, levels = (1 - share) ** 0.5 * noise, torch.full((3,), 10)
    expected = start / share**0.5 - ((1 - share) / share) ** 0.5 * model(start, levels, labels)
    torch.testing.assert_close(model.in_one_step(noise, labels, 10), expected)
    assert model.in_one_step(noise, labels, 10).requires_grad


def test_the_same_generator_draws_the_same_pictures_and_leaves_the_global_one() -> None:
    model, labels = net(), torch.tensor([0, 1, 2, 1])
    before = torch.get_rng_state()
    first, again, other = (model.draw(labels, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_many_pictures_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, labels = net({**MLP, "one_step": 10}), torch.arange(7) % 3
    whole = model.draw(labels, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(dn, "AT_ONCE", 40)
    assert torch.equal(whole, model.draw(labels, generator=torch.Generator().manual_seed(1)))
    assert model.draw(labels[:0], generator=torch.Generator()).shape == (0, 1, 4, 5)


@pytest.mark.parametrize("arch", [MLP, UNET])
def test_each_backbone_hears_class_and_level_and_keeps_the_shape(arch: dict[str, Any]) -> None:
    model = net(arch)
    pictures = torch.randn(2, *arch["shape"], generator=torch.Generator().manual_seed(0))
    levels, labels = torch.tensor([3, 30]), torch.tensor([0, 2])
    said = model(pictures, levels, model.conditions(labels))
    assert said.shape == pictures.shape
    assert not torch.allclose(said, model(pictures, levels, torch.tensor([1, 1])))
    assert not torch.allclose(said, model(pictures, torch.tensor([4, 31]), labels))


@pytest.mark.parametrize("arch", [MLP, UNET])
def test_a_model_built_from_its_arch_and_weights_draws_the_same(arch: dict[str, Any]) -> None:
    first = net(arch)
    second = networks.build(first.arch)
    second.load_state_dict(first.state_dict())
    drawn = [model.draw(torch.tensor([0, 2]), generator=torch.Generator().manual_seed(3), steps=2) for model in (first, second)]
    assert torch.equal(*drawn)


def test_it_is_no_classifier() -> None:
    model = net()
    assert not hasattr(model, "head")
    with pytest.raises(NotImplementedError):
        model.features(torch.zeros(1, 1, 4, 5))


def test_what_cannot_be_built_or_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="17x16 are too large for an mlp"):
        net({**MLP, "shape": [1, 17, 16]})
    with pytest.raises(ValueError, match="backbone 'vit' is not known"):
        net({**MLP, "backbone": "vit"})
    with pytest.raises(ValueError, match="labels are 0 to 2; there are 1 to 3"):
        net().draw(torch.tensor([1, 3]), generator=torch.Generator())
    with pytest.raises(ValueError, match=r"known: .*denoiser"):
        networks.build({**MLP, "kind": "gan"})


def test_sinusoids_begin_with_sine_and_cosine_of_the_position() -> None:
    waves = dn.sinusoids(torch.tensor([0, 3]), 5)
    torch.testing.assert_close(waves[0], torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(waves[1, [0, 2]], torch.tensor([3.0, 3.0]).sin() * torch.tensor([1.0, 0]) + torch.tensor([0, -0.98999250]))


def test_the_file_travels_with_networks_alone() -> None:
    tree = ast.parse(Path(dn.__file__).read_text(encoding="utf-8"))
    top = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)} | {
        a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names
    }
    assert top == {"__future__", "math", "typing", "torch", "torch.nn", "tasks.core.networks"}
