from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks.core import clip, loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.train.real_linear import SCALE, SMOKE, Config, fit_head, prompts, rate, real_linear, zero_shot

PROBE = Config(clip_steps=3, clip_batch=8, passes=2.0, batch=16, warm_up=5, lr=1e-2)


def fitted(weights: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, steps: int = 1, **changes: float) -> torch.Tensor:
    recipe = {"batch": 4, "lr": 0.01, "weight_decay": 0.0, "warm_up": 0, "warm_up_lr": 0.0, **changes}
    generator = torch.Generator().manual_seed(0)
    return fit_head(weights, images, labels, weights, torch.arange(len(weights)), steps=steps, generator=generator, **recipe)


def test_prompts_call_a_class_by_the_name_that_is_given() -> None:
    found = prompts(("gym shoe", "bag"), {"gym shoe": "trainer"}, ("a {}", "the {} {"))
    assert found == [["a trainer", "the trainer {"], ["a bag", "the bag {"]]
    with pytest.raises(UserError, match="'hat' is no class of the data; there are bag"):
        prompts(("bag",), {"hat": "cap"}, ("a {}",))
    with pytest.raises(UserError, match=r"'a bag' has no \{\}"):
        prompts(("bag",), {}, ("a bag",))


def test_zero_shot_weights_are_unit_means_of_unit_embeddings() -> None:
    texts = torch.tensor([[[3.0, 0.0], [0.0, 0.5]], [[0.0, -2.0], [0.0, -1.0]]])
    assert torch.allclose(zero_shot(texts), torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


def test_the_rate_rises_in_a_line_and_falls_by_a_cosine() -> None:
    rates = [rate(step, 100, 1e-4, 50, 1e-5) for step in range(100)]
    assert rates[:2] == pytest.approx([1e-5, 1e-5 + 9e-5 / 50])
    assert rates[50] == max(rates) == 1e-4
    assert rates[75] == pytest.approx(1e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(0, 10, 1e-4, 0, 1e-5) == 1e-4


def test_one_step_moves_each_weight_against_the_slope_of_images_and_prompts_together() -> None:
    weights = F.normalize(torch.tensor([[1.0, 0.2], [0.3, 1.0]]), dim=-1)
    images, labels = torch.tensor([[0.0, 7.0]]), torch.tensor([0])  # an image that is taken for the other class; its length is no matter
    wanted = weights.clone().requires_grad_(True)
    rows = torch.cat([torch.tensor([[0.0, 1.0]] * 4), weights.repeat(2, 1)])
    slope = torch.autograd.grad(F.cross_entropy(SCALE * rows @ wanted.T, torch.tensor([0] * 4 + [0, 1] * 2)), wanted)[0]
    moved = fitted(weights, images, labels) - weights
    assert torch.allclose(moved, -0.01 * slope / (slope.abs() + 1e-8), atol=1e-6)  # Adam's first step


def test_the_zero_shot_weights_stay_as_they_are() -> None:
    weights = torch.eye(3)
    learned = fitted(weights, torch.rand(9, 3), torch.arange(9) % 3, steps=20)
    assert torch.equal(weights, torch.eye(3))
    assert not learned.requires_grad
    assert not torch.equal(learned, weights)


def test_rows_of_a_class_draw_its_weights_to_them() -> None:
    weights = torch.eye(3)
    rare = F.normalize(torch.tensor([[0.6, 0.0, 0.4]]), dim=-1)  # a third class that zero-shot takes for the first
    images, labels = torch.cat([torch.eye(3)[:2].repeat(4, 1), rare.repeat(4, 1)]), torch.tensor([0, 1] * 4 + [2] * 4)
    assert int((rare @ weights.T).argmax()) == 0
    assert int((rare @ fitted(weights, images, labels, steps=100).T).argmax()) == 2


def test_a_diverged_probe_is_reported() -> None:
    with pytest.raises(UserError, match="diverged"):
        fitted(torch.eye(2), torch.tensor([[math.nan, 1.0]]), torch.tensor([0]))


@pytest.fixture(scope="module")
def started(tiny: Dataset) -> networks.Net:
    """A CLIP classifier that has learnt nothing, with a head of length 1."""
    with loop.seeded(0):
        model = clip.small(tiny.info.shape, tiny.captions(), mean=0.3, std=0.35)
        head = clip.text_features(model, [f"a photo of a {name}" for name in tiny.info.classes]).detach()
    return clip.as_net(model, head, tiny.info.shape)


def test_the_final_head_is_half_the_learned_and_half_the_zero_shot_one(tiny: Dataset, started: networks.Net) -> None:
    heads = [real_linear(tiny, PROBE.model_copy(update={"learned": share}), start=started).head.weight for share in (0.0, 0.5, 1.0)]
    assert torch.allclose(heads[0], started.head.weight, atol=1e-6)
    assert torch.allclose(heads[1], (heads[0] + heads[2]) / 2, atol=1e-6)
    assert not torch.allclose(heads[2], heads[0], atol=1e-3)


def test_a_start_keeps_its_tower_and_stays_as_it_was(tiny: Dataset, started: networks.Net) -> None:
    before = {name: value.clone() for name, value in started.state_dict().items()}
    net = real_linear(tiny, PROBE, start=started)
    assert all(torch.equal(before[name], value) for name, value in started.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items() if name.startswith("tower."))
    again = networks.build(net.arch)
    again.load_state_dict(net.state_dict())
    images = tiny.take(np.arange(5)).images()
    assert torch.equal(loop.predict(again, images), loop.predict(net, images))


def test_the_probe_learns_the_rows_that_have_a_label(tiny: Dataset, started: networks.Net) -> None:
    data = tiny.split("train")
    net = real_linear(data, PROBE.model_copy(update={"passes": 40.0, "learned": 1.0}), start=started)
    right = [float((loop.predict(one, data.images()).argmax(1).numpy() == data.labels()).mean()) for one in (started, net)]
    assert right[1] > right[0] + 0.3


def test_a_named_clip_is_taken_as_it_is_with_all_templates(tiny: Dataset, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    with loop.seeded(1):
        model = clip.small(tiny.info.shape, [*tiny.captions(), "the digit nought"])
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path)
    templates = ("the digit {}", "a photo of {}")
    cfg = PROBE.model_copy(update={"pretrained": str(tmp_path), "learned": 0.0, "templates": templates, "names": {"zero": "nought"}})
    net = real_linear(tiny, cfg)
    told = clip.text_features(model, ["the digit nought", "a photo of nought"]).detach()
    assert torch.allclose(net.head.weight[0], F.normalize(told.mean(0), dim=-1), atol=1e-5)
    with pytest.raises(UserError, match="pretrained: there is no folder"):
        real_linear(tiny, SMOKE.model_copy(update={"pretrained": str(tmp_path / "none")}))


def test_what_does_not_fit_is_refused(tiny: Dataset, started: networks.Net) -> None:
    with pytest.raises(UserError, match="no row of the data has a label"):
        real_linear(tiny.without_labels(), SMOKE)
    with pytest.raises(UserError, match="is no CLIP classifier"):
        plain = networks.convnet(tiny.info.shape, 10, widths=(4,), hidden=8, mean=0.3, std=0.3)
        real_linear(tiny, SMOKE, start=plain)
    with pytest.raises(UserError, match="takes images"):
        real_linear(replace(tiny, info=replace(tiny.info, classes=(*tiny.info.classes, "ten"))), SMOKE, start=started)
    with pytest.raises(UserError, match="has no class name"):
        real_linear(replace(tiny, info=replace(tiny.info, classes=tiny.info.classes[:5])), SMOKE)
