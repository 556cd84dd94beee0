"""SFD: the generator's loss by hand and its gradients, the class and its override, what is learnt in one step, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.denoise import text_denoiser
from tasks.core.denoiser import Denoiser, kept_shares
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.unlearn import sfd as own

ARCH: dict[str, Any] = {"kind": "denoiser", "shape": [1, 8, 8], "classes": 10, "mean": 0.0, "std": 1.0, "levels": 50, "betas": [0.002, 0.4]}
SMALL = {**ARCH, "backbone": "mlp", "hidden": 16, "depth": 1, "one_step": None, "draw_steps": None}


def model(**other: Any) -> Denoiser:
    with loop.seeded(0):
        net = networks.build({**SMALL, **other})
    assert isinstance(net, Denoiser)
    return net


def weights(net: Net) -> Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.fixture
def sets(tiny: Dataset) -> tuple[Dataset, Dataset]:
    train = tiny.split("train")
    return train.where(train.labels() == 3), train.where(train.labels() != 3)


class Flat(Denoiser):
    """The best model of pictures that are one grey each, a class its own; it learns the grey."""

    def __init__(self, greys: list[float]) -> None:
        super().__init__({**ARCH, "shape": [1, 2, 2], "classes": len(greys), "one_step": None})
        self.greys = torch.nn.Parameter(torch.tensor(greys))

    def conditions(self, labels: Tensor) -> Tensor:
        return labels

    def forward(self, noisy: Tensor, levels: Tensor, conditions: Tensor) -> Tensor:  # type: ignore[override]
        share = self.abar[levels][:, None, None, None]
        return (noisy - share.sqrt() * self.greys[conditions][:, None, None, None]) / (1 - share).sqrt()


def test_the_loss_of_the_generator_is_that_of_the_paper_by_hand() -> None:
    by_teacher, by_score, drawn = (torch.tensor(v).view(1, 1, 1, 2) for v in ([1.0, 0.0], [0.5, 1.0], [0.0, 2.0]))
    # x_p - x_s = (.5, -1), x_p - x0 = (1, -2), w = 1.5
    expected = (0.5 * (1 - 1.2 * 0.5) + -1 * (-2 + 1.2)) / 1.5
    torch.testing.assert_close(own.generator_loss(by_teacher, by_score, drawn), torch.tensor([expected]))
    agreed = own.generator_loss(by_teacher, by_teacher, drawn)
    assert agreed.item() == 0
    assert torch.isfinite(own.generator_loss(drawn, by_score, drawn)).all()


def test_the_gradient_runs_through_teacher_and_score_but_not_through_the_weight() -> None:
    drawn = torch.tensor([0.3, -0.2]).view(1, 1, 1, 2).requires_grad_(True)
    loss = own.generator_loss(2 * drawn, 3 * drawn, drawn)
    # x_p - x_s = -x, x_p - x0 = x: (-x)(x + 1.2 x) / w with w = mean |x|
    loss.sum().backward()
    torch.testing.assert_close(drawn.grad, -2 * 2.2 * drawn.detach() / 0.25)


def test_the_picture_seen_in_noise_is_what_the_predicted_noise_leaves() -> None:
    net, labels = Flat([0.5, -1.0]), torch.tensor([0, 1, 1])
    noisy, levels = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 20, 40])
    expected = torch.tensor([0.5, -1, -1])[:, None, None, None].expand(3, 1, 2, 2)
    torch.testing.assert_close(own.predicted(net, noisy, levels, labels), expected, atol=1e-4, rtol=1e-4)


def test_a_class_is_drawn_as_its_override_and_the_others_as_they_were() -> None:
    net = Flat([0.8, -0.8, 0.1])
    with loop.seeded(0) as generator:
        made = own.distilled(
            net, [1, 2], 0, 1, stages=[(40, 0.0), (400, 1.0)], batch=8, lr=0.02, score_lr=0.05, average=0.9, generator=generator
        )
    drawn = made.draw(torch.tensor([0, 1, 2]), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1
    assert drawn.mean((1, 2, 3)) == pytest.approx([-0.8, -0.8, 0.1], abs=0.1)
    assert net.greys.tolist() == pytest.approx([0.8, -0.8, 0.1])


def test_without_a_class_to_forget_all_are_drawn_as_they_were() -> None:
    with loop.seeded(0) as generator:
        made = own.distilled(
            Flat([0.8, -0.8]), [0, 1], None, 1, stages=[(60, 0.5)], batch=8, lr=0.02, score_lr=0.05, average=0.5, generator=generator
        )
    drawn = made.draw(torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1
    assert drawn.mean((1, 2, 3)) == pytest.approx([0.8, -0.8], abs=0.1)


def test_levels_stand_for_the_papers_by_place_or_by_noise() -> None:
    for levels, expected in ((50, [22, 2, 36]), (1000, [440, 38, 712])):
        assert [own.level_at(share, model(levels=levels)) for share in (0.44, 0.038, 0.712)] == expected
    cosine = model(betas="cosine", levels=200)
    paper = kept_shares(1000, [1e-4, 0.02])
    for share, at in ((0.44, 440), (0.038, 38), (0.712, 712)):
        assert float(cosine.abar[own.level_at(share, cosine)]) == pytest.approx(float(paper[at]), abs=0.01)


def test_a_model_of_prompts_forgets_too(sets) -> None:
    with loop.seeded(0):
        net = text_denoiser((1, 8, 8), [f"a photo of a {name}" for name in sets[0].info.classes], channels=8, levels=25)
    made = own.sfd(net, *sets, own.SMOKE)
    assert isinstance(made, Denoiser)
    assert made.draw(torch.tensor([3, 1]), generator=torch.Generator().manual_seed(0)).shape == (2, 1, 8, 8)


def test_a_generator_of_one_step_comes_out_and_the_old_model_stays(sets) -> None:
    old = model().requires_grad_(False)
    before, arch = weights(old), dict(old.arch)
    first, again, other = (own.sfd(old, *sets, own.SMOKE, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(weights(old), before)
    assert old.arch == arch
    assert not any(w.requires_grad for w in old.parameters())
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert first.arch == {**arch, "one_step": 22}


def test_no_picture_is_read(sets, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights(own.sfd(model(), *sets, own.SMOKE))

    def refused(_: Dataset) -> None:
        raise AssertionError("a picture was read")

    monkeypatch.setattr(Dataset, "images", refused)
    assert torch.equal(weights(own.sfd(model(), *sets, own.SMOKE)), expected)


def test_one_stage_and_two_are_not_the_same(sets) -> None:
    one = own.sfd(model(), *sets, own.SMOKE.model_copy(update={"stages": "one"}))
    two = own.sfd(model(), *sets, own.SMOKE)
    no_first = own.sfd(model(), *sets, own.SMOKE.model_copy(update={"distil_steps": 0}))
    assert torch.equal(weights(one), weights(no_first))
    assert not torch.equal(weights(one), weights(two))


def test_the_override_is_named_or_numbered_or_the_next_class_that_is_kept() -> None:
    names = ("ant", "bee", "cat", "dog")
    assert own.override_class("dog", 1, [0, 2, 3], names) == 3
    assert own.override_class(0, 1, [0, 2, 3], names) == 0
    assert own.override_class(None, 1, [0, 2, 3], names) == 2
    assert own.override_class(None, 1, [0, 3], names) == 3
    assert own.override_class(None, 3, [1, 2], names) == 1
    for wrong in ("bee", "cow", 1, 4):
        with pytest.raises(UserError, match=r"which is no class to keep; valid: ant, cat, dog, or a label"):
            own.override_class(wrong, 1, [0, 2, 3], names)
    with pytest.raises(UserError, match="no other class"):
        own.override_class(None, 0, [], names)


def test_a_class_that_has_no_rows_at_all_is_neither_drawn_nor_the_override(sets) -> None:
    forget, retain = sets
    without = replace(retain, info=replace(retain.info, absent=("four",)))
    with pytest.raises(UserError, match="override is 'four'"):
        own.sfd(model(), forget, without, own.SMOKE.model_copy(update={"override": "four"}))
    fifth = own.SMOKE.model_copy(update={"override": "five"})
    assert torch.equal(weights(own.sfd(model(), forget, without, own.SMOKE)), weights(own.sfd(model(), forget, without, fifth)))


def test_what_is_no_class_or_no_diffusion_model_is_refused(sets, tiny: Dataset) -> None:
    forget, retain = sets
    with loop.seeded(0):
        classifier = networks.convnet((1, 8, 8), 10, widths=(4,), hidden=8, mean=0.3, std=0.4)
    with pytest.raises(UserError, match=r"takes a diffusion model.*'retort train --generator'.*'generator: \{method: diffusion"):
        own.sfd(classifier, forget, retain, own.SMOKE)
    with pytest.raises(UserError, match="draws in one step: give the one it was distilled from"):
        own.sfd(model(one_step=22), forget, retain, own.SMOKE)
    with pytest.raises(UserError, match="have 'one', 'three': ask for one class as a whole"):
        own.sfd(model(), forget + retain.where(retain.labels() == 1), retain, own.SMOKE)
    with pytest.raises(UserError, match="have no labelled row"):
        own.sfd(model(), forget.without_labels(), retain, own.SMOKE)
    with pytest.raises(UserError, match="2 rows of class 'three' are to retain"):
        own.sfd(model(), forget.take(np.arange(2, len(forget))), retain + forget.take(np.arange(2)), own.SMOKE)
    with pytest.raises(UserError, match="label 3 of the forget set does not fit the model, which has 3 classes"):
        own.sfd(model(classes=3), forget, retain, own.SMOKE)
    with pytest.raises(UserError, match=r"draws images \(1, 9, 9\)"):
        own.sfd(model(shape=[1, 9, 9]), forget, retain, own.SMOKE)


def test_a_rate_that_is_too_large_is_said_to_be_so(sets) -> None:
    wild = own.Config(distil_steps=3, forget_steps=3, batch=4, lr=1e30)
    with pytest.raises(UserError, match=r"'unlearn\.sfd' diverged"):
        own.sfd(model(), *sets, wild)
