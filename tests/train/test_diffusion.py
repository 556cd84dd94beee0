"""Training of diffusion models: noise that is learnt, averaged weights, what is gone on from, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.denoiser import ClassDenoiser, Denoiser
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.core.text_to_image import TextDenoiser
from tasks.train import diffusion as own

QUICK = own.SMOKE


def weights(net: Net) -> Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def made(data: Dataset, cfg: own.Config = QUICK, **how: object) -> Denoiser:
    net = own.diffusion(data, cfg, **how)  # type: ignore[arg-type]
    assert isinstance(net, Denoiser)
    return net


def test_the_last_level_is_as_noisy_as_the_papers_thousandth() -> None:
    assert own.betas(1000) == [1e-4, 0.02]
    assert own.betas(100) == pytest.approx([1e-3, 0.2])


def test_the_loss_is_the_squared_error_of_the_noise() -> None:
    class Nothing(ClassDenoiser):
        def forward(self, noisy: Tensor, levels: Tensor, conditions: Tensor) -> Tensor:  # type: ignore[override]
            return torch.zeros_like(noisy)

    arch = {"kind": "denoiser", "shape": [1, 2, 2], "classes": 2, "mean": 0.0, "std": 1.0, "levels": 25, "betas": [0.004, 0.8]}
    net = Nothing({**arch, "backbone": "mlp", "hidden": 8, "depth": 1})
    noise = torch.tensor([1.0, 2.0, 0.0, -1.0]).view(1, 1, 2, 2)
    loss = own.noise_loss(net, torch.ones(1, 1, 2, 2), torch.tensor([1]), torch.tensor([3]), noise)
    assert loss.item() == pytest.approx(1.5)


def test_the_average_moves_slower_and_slower_up_to_its_share() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.0)
        average = own.Average(net, 0.5)
        net.weight.fill_(1.0)
    found = []
    for _ in range(20):
        before = float(average.values[0])
        average.update(net)
        found.append((1 - float(average.values[0])) / (1 - before))
    assert found[0] == pytest.approx(2 / 11)
    assert found[1] == pytest.approx(3 / 12)
    assert found[-1] == pytest.approx(0.5, abs=1e-3)
    average.write(net)
    assert net.weight.item() == pytest.approx(float(average.values[0]))


def test_samples_of_a_class_are_nearer_to_its_mean_than_to_those_of_others(tiny: Dataset) -> None:
    train = tiny.split("train")
    net = made(train, own.Config(steps=400, batch=64, depth=2, levels=50), seed=0)
    labels = np.repeat(np.arange(10), 20)
    drawn = net.draw(torch.from_numpy(labels), generator=torch.Generator().manual_seed(0)).flatten(1).float()
    means = torch.stack([torch.tensor(train.images()[train.labels() == c]).flatten(1).float().mean(0) for c in range(10)])
    assert (torch.cdist(drawn, means).argmin(1).numpy() == labels).mean() > 0.75
    assert not net.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny: Dataset) -> None:
    first, again, other = (weights(made(tiny.split("train"), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_without_a_label_change_nothing(tiny: Dataset) -> None:
    train = tiny.split("train")
    assert torch.equal(weights(made(train)), weights(made(train + tiny.split("reference").without_labels())))


def test_the_settings_describe_the_network(tiny: Dataset) -> None:
    train = tiny.split("train")
    assert made(train).arch["backbone"] == "mlp"
    arch = made(train, QUICK.model_copy(update={"backbone": "unet", "schedule": "cosine", "draw_steps": 3})).arch
    assert (arch["backbone"], arch["widths"], arch["betas"], arch["draw_steps"]) == ("unet", [8, 16], "cosine", 3)


def test_training_goes_on_from_a_copy_whatever_the_settings_say_of_the_network(tiny: Dataset) -> None:
    train = tiny.split("train")
    start = made(train).requires_grad_(False)
    before = weights(start)
    further = made(train, QUICK.model_copy(update={"hidden": 32, "conditions": "text"}), start=start)
    assert torch.equal(weights(start), before)
    assert further.arch == start.arch
    assert not torch.equal(weights(further), before)
    assert all(w.requires_grad for w in further.parameters())


def test_with_prompts_a_model_of_prompts_is_trained_and_gone_on_from(tiny: Dataset) -> None:
    train = tiny.split("train")
    cfg = own.Config(conditions="text", steps=2, batch=4, channels=8, levels=25, draw_steps=2)
    first, again = made(train, cfg, seed=1), made(train, cfg, seed=1)
    assert isinstance(first, TextDenoiser)
    assert torch.equal(weights(first), weights(again))
    assert first.arch["prompts"][3] == "a photo of a three"
    assert (first.arch["levels"], first.arch["draw_steps"]) == (25, 2)
    further = made(train, QUICK, start=first)
    assert isinstance(further, TextDenoiser)
    assert not torch.equal(weights(further), weights(first))
    for wrong, value in (("backbone", "mlp"), ("schedule", "linear")):
        with pytest.raises(UserError, match=f"{wrong} is '{value}', but a model of prompts"):
            own.diffusion(train, cfg.model_copy(update={wrong: value}))


def test_what_cannot_be_trained_on_is_refused(tiny: Dataset) -> None:
    train = tiny.split("train")
    few = train.where(train.labels() != 3)
    with pytest.raises(UserError, match="class 'three' has no labelled row"):
        own.diffusion(few, QUICK)
    assert made(replace(few, info=replace(few.info, absent=("three",)))).arch["classes"] == 10
    with pytest.raises(UserError, match="draw_steps is 26, but there are 25 noise levels"):
        own.diffusion(train, QUICK.model_copy(update={"draw_steps": 26}))
    large = replace(train, info=replace(train.info, shape=(1, 17, 8)))
    with pytest.raises(UserError, match="17x8 are too large for backbone 'mlp'"):
        own.diffusion(large, QUICK.model_copy(update={"backbone": "mlp"}))
    with pytest.raises(UserError, match=r"'train.diffusion' diverged"):
        own.diffusion(train, QUICK.model_copy(update={"lr": 1e30}))


def test_what_cannot_be_gone_on_from_is_refused(tiny: Dataset) -> None:
    train = tiny.split("train")
    with loop.seeded(0):
        classifier = networks.convnet((1, 8, 8), 10, widths=(4,), hidden=8, mean=0.3, std=0.4)
    with pytest.raises(UserError, match="the model to start from is a classifier"):
        own.diffusion(train, QUICK, start=classifier)
    start = made(train)
    other = networks.build({**start.arch, "classes": 4})
    with pytest.raises(UserError, match="of 4 classes"):
        own.diffusion(train, QUICK, start=other)
    start.arch["one_step"] = 11
    with pytest.raises(UserError, match="draws in one step"):
        own.diffusion(train, QUICK, start=start)
