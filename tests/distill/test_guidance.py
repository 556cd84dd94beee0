"""Guidance: CKA by hand, the map of layers, what is watched of a network, and targets that come to resemble their guide."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tasks.core import loop, networks, served
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill.guidance import Config, cka, distance, guidance, layer_map, layers_of, plain

QUICK = Config(depth=4, hidden=8, steps=6)


class OneLayer(Net):
    """Nothing with weights before the last layer."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        self.head = nn.Linear(64, arch["classes"])

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def weights(net: Net) -> Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def guide(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(4, 6), hidden=16, mean=0.3, std=0.4)


def target(kind: str, data: Dataset, norm: str = "batch") -> Net:
    with loop.seeded(1):
        return plain(kind, data.images(), data.info, depth=5, width=8, norm=norm, dropout=0.0)


def test_cka_by_hand() -> None:
    # centred: (-1, 1, 0) and (-1, 0, 1) have the Gram products xx' and yy': CKA = (x.y)^2 / (|x|^2 |y|^2) = 1 / 4
    x, y = torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([[3.0], [4.0], [5.0]])
    assert cka(x, y).item() == pytest.approx(0.25)
    # two columns: X = columns x and y; HSIC(X, y) = 1 + 4, HSIC(X, X) = 4 + 2 * 1 + 4, HSIC(y, y) = 4
    assert cka(torch.cat([x, y], 1), y).item() == pytest.approx(5 / (10**0.5 * 2))


def test_cka_of_layers_that_say_nothing_is_nothing_and_has_finite_gradients() -> None:
    flat = torch.ones(4, 3, requires_grad=True)
    found = cka(flat, torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    found.backward()
    assert found.item() == 0
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-12, 3))
def test_cka_is_of_0_to_1_and_blind_to_rotation_shift_and_scale(seed: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 5, generator=generator), torch.randn(12, 2, 3, generator=generator)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    found = cka(x, y).item()
    assert 0 <= found <= 1
    assert cka(10**power * x @ turn, y).item() == pytest.approx(found, abs=1e-4)
    assert cka(x + 3, y).item() == pytest.approx(found, abs=1e-4)
    assert cka(y, x).item() == pytest.approx(found, abs=1e-5)
    assert cka(x, 2 * x).item() == pytest.approx(1, abs=1e-5)


def test_half_precision_is_compared_in_single() -> None:
    x, y = torch.randn(8, 300) * 100, torch.randn(8, 300) * 100
    assert cka(x.half(), y.half()).item() == pytest.approx(cka(x, y).item(), abs=1e-3)


def test_the_map_spreads_the_guides_layers_evenly_over_the_targets() -> None:
    assert layer_map(3, 5) == [0, 2, 4]
    assert layer_map(4, 40) == [0, 13, 26, 39]
    assert layer_map(5, 3) == [0, 0, 1, 2, 2]  # halves to the even one
    assert layer_map(1, 7) == [0]
    assert layer_map(4, 1) == [0, 0, 0, 0]


def test_layers_with_weights_are_watched_in_order_without_the_last(tiny: Dataset) -> None:
    images = torch.rand(3, 1, 8, 8)
    net: Any = guide()
    found = layers_of(net, images)
    assert [tuple(one.shape) for one in found] == [(3, 4, 8, 8), (3, 6, 4, 4), (3, 16)]
    assert torch.allclose(found[0], net.body[0]((images - net.mean) / net.std), atol=1e-6)
    assert torch.allclose(torch.relu(found[2]), net.features(images), atol=1e-6)
    assert [tuple(one.shape) for one in layers_of(target("fcn", tiny), images)] == [(3, 8)] * 5
    assert [tuple(one.shape) for one in layers_of(target("plain_conv", tiny), images)] == [(3, 8, 8, 8)] * 5
    assert not any(module._forward_hooks for module in net.modules())


def test_the_distance_is_a_sum_over_the_guides_layers() -> None:
    x, y = torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([[3.0], [4.0], [5.0]])
    assert distance([x, y], [x, x, x]).item() == pytest.approx(0 + 0.75)
    assert distance([x, y, y, y], [y]).item() == pytest.approx(0.75)
    assert distance([x, y], [x, y]).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [8, 15, 16, 28, 33])
@pytest.mark.parametrize("kind", ["fcn", "plain_conv"])
@pytest.mark.parametrize("norm", ["batch", ""])
def test_a_plain_network_is_rebuilt_from_its_description(kind: str, norm: str, size: int) -> None:
    arch = {"kind": kind, "shape": [3, size, size], "classes": 4, "depth": 3, "width": 6, "norm": norm, "dropout": 0.1}
    net: Any = networks.build({**arch, "mean": 0.25, "std": 0.5}).eval()
    again = networks.build(json.loads(json.dumps(net.arch))).eval()
    again.load_state_dict(net.state_dict())
    images = torch.rand(2, 3, size, size)
    assert net(images).shape == (2, 4)
    assert torch.equal(net(images), again(images))
    assert len([name for name, _ in net.named_modules() if "body" in name]) == 1 + len(net.body)


def test_layers_of_a_fully_connected_network_are_counted_by_hand() -> None:
    arch = {"kind": "fcn", "shape": [1, 4, 4], "classes": 3, "depth": 3, "width": 5, "dropout": 0.0, "mean": 0.0, "std": 1.0}
    assert networks.parameters(networks.build({**arch, "norm": ""})) == (16 * 5 + 5) + 2 * (25 + 5) + (5 * 3 + 3)
    assert networks.parameters(networks.build({**arch, "norm": "batch"})) == (16 * 5 + 5) + 2 * (25 + 5) + (5 * 3 + 3) + 3 * 10


@pytest.mark.parametrize("kind", ["fcn", "plain_conv"])
def test_what_travels_with_a_model_answers_where_this_package_is_not(kind: str, tiny: Dataset, tmp_path: Path) -> None:
    net = target(kind, tiny).eval()
    lines = served.source(net).splitlines()
    own = "\n".join(lines[: next(at for at, line in enumerate(lines) if line.startswith("# The entry that travels"))])
    images = torch.rand(2, 1, 8, 8)
    save_file({**net.state_dict(), "images": images}, tmp_path / "net.safetensors")
    (tmp_path / "arch.json").write_text(json.dumps(net.arch))
    (tmp_path / "alone.py").write_text(
        own + "\nimport json, sys\nfrom safetensors.torch import load_file\nweights = load_file('net.safetensors')\n"
        "images = weights.pop('images')\nnet = build(json.load(open('arch.json'))).eval()\nnet.load_state_dict(weights)\n"
        "assert not any(name.startswith('tasks') for name in sys.modules)\nprint(net(images).tolist())\n"
    )
    ran = subprocess.run([sys.executable, "-P", "alone.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert torch.allclose(torch.tensor(json.loads(ran.stdout)), net(images), atol=1e-6)


@pytest.mark.parametrize("untrained", [False, True])
def test_a_guided_network_comes_to_resemble_its_guide_and_one_without_a_guide_less(tiny: Dataset, untrained: bool) -> None:
    rows = tiny.split("train")
    cfg = Config(depth=6, hidden=16, steps=60, lr=0.01, untrained=untrained)
    led = guidance([guide(3)], rows, cfg)
    left = guidance([guide(3)], rows, cfg.model_copy(update={"alpha": 0.0}))
    assert led.figures["cka_before"] == left.figures["cka_before"]
    assert led.figures["cka_after"] > left.figures["cka_after"] + 0.1


def test_an_untrained_guide_has_the_build_and_not_the_weights_of_the_teacher(tiny: Dataset) -> None:
    rows = tiny.split("train").take(np.arange(70))
    fresh = [guidance([guide(seed)], rows, QUICK.model_copy(update={"untrained": True})).net for seed in (1, 2)]
    own = [guidance([guide(seed)], rows, QUICK).net for seed in (1, 2)]
    assert torch.equal(weights(fresh[0]), weights(fresh[1]))
    assert not torch.equal(weights(own[0]), weights(own[1]))


def test_guidance_ends_after_the_first_steps(tiny: Dataset) -> None:
    rows = tiny.split("train").take(np.arange(70))
    nets = {k: weights(guidance([guide()], rows, QUICK.model_copy(update={"guided_steps": k})).net) for k in (None, 2, 6, 7)}
    assert not torch.equal(nets[2], nets[6])
    assert torch.equal(nets[6], nets[7])
    assert torch.equal(nets[6], nets[None])


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.0},
        {"noise": True},
        {"optimiser": "sgd"},
        {"norm": ""},
        {"dropout": 0.3},
        {"target": "convnet"},
        {"target": "plain_conv"},
    ],
)
def test_every_setting_changes_the_network(tiny: Dataset, change: dict[str, object]) -> None:
    rows = tiny.split("train").take(np.arange(70))
    base, other = (weights(guidance([guide()], rows, QUICK.model_copy(update=update)).net) for update in ({}, change))
    assert base.shape != other.shape or not torch.equal(base, other)


def test_a_start_is_led_on_and_rows_without_label_only_by_likeness(tiny: Dataset) -> None:
    start, rows = target("fcn", tiny), tiny.split("train").take(np.arange(70))
    before = weights(start)
    more = rows + tiny.split("reference").without_labels()
    led = [guidance([guide(), guide(5)], data, QUICK, start=start).net for data in (rows, more)]
    assert torch.equal(weights(start), before)
    assert led[0].arch == start.arch
    assert not torch.equal(weights(led[0]), weights(led[1]))


def test_no_teacher_no_label_too_few_rows_and_misfits_are_refused(tiny: Dataset) -> None:
    data = tiny.split("train")
    with pytest.raises(UserError, match="at least one teacher"):
        guidance([], data, QUICK)
    with pytest.raises(UserError, match="no row of the data has a label: guidance is beside"):
        guidance([guide()], data.without_labels(), QUICK)
    with pytest.raises(UserError, match="CKA is that of 64 different rows; the data has 9"):
        guidance([guide()], data.take(np.arange(9)), QUICK)
    with pytest.raises(UserError, match="teacher 0 takes images"):
        guidance([guide(classes=3)], data, QUICK)
    shallow = OneLayer({"shape": [1, 8, 8], "classes": 10, "mean": 0.3, "std": 0.4})
    for teacher, start in ((shallow, None), (guide(), shallow)):
        with pytest.raises(UserError, match="one of the networks has none"):
            guidance([teacher], data, QUICK, start=start)
    with pytest.raises(ValueError, match="batch"):
        Config(batch=32)
