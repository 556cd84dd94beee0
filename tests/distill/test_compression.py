"""Compression: integers, cuts, splits and zeros by hand, rows that leave early, and a small network that is stored and served as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor, nn

from tasks.core import loop, networks
from tasks.core.compact import Compact, Int8Linear, to_int8
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import configured
from tasks.core.networks import Net
from tasks.distill._compress import low_rank, prune, prune_channels, quantised, with_exit, zeros_held
from tasks.distill.compression import SMOKE, Config, compression, counted, learnt, left_early, packed

QUICK = Config(steps=6, batch=16)
ALL = Config(techniques=("prune_channels", "low_rank", "early_exit", "prune", "kd", "quantise"), steps=4, batch=16, exit_threshold=0.12)


def teacher(seed: int = 0, classes: int = 10, norm: str = "", widths: tuple[int, ...] = (8, 6)) -> Any:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=widths, hidden=16, mean=0.3, std=0.4, norm=norm).eval()


def pictures(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def made(data: Dataset, *techniques: str, **change: Any) -> Any:
    return compression([teacher()], data, QUICK.model_copy(update={"techniques": techniques, **change})).net


def same(one: Net, other: Net) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return one.arch == other.arch and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_integers_by_hand() -> None:
    stored, scale = to_int8(torch.tensor([[0.0, 1.27, -0.634], [0.0, 0.0, 0.0]]))
    assert stored.tolist() == [[0, 127, -63], [0, 0, 0]]
    assert stored.dtype == torch.int8
    assert scale[0].item() == pytest.approx(0.01)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-20, 20))
def test_integers_are_those_of_torch_and_no_weight_moves_by_more_than_half_a_scale(seed: int, power: float) -> None:
    weights = 10 ** (power / 4) * torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    stored, scale = to_int8(weights)
    theirs = torch.fake_quantize_per_channel_affine(weights, scale.flatten(), torch.zeros(5), 0, -127, 127)
    assert ((stored * scale - theirs).abs() <= scale * 1.0001).all()  # a tie may fall to either side
    assert torch.isclose(stored * scale, theirs).float().mean() > 0.95
    assert ((stored * scale - weights).abs() <= scale * 0.5001).all()
    assert stored.abs().max() == 127


@pytest.mark.parametrize("norm", ["", "batch"])
def test_channels_that_are_zero_are_cut_and_nothing_changes(norm: str) -> None:
    net = teacher(norm=norm)
    second = 4 if norm else 3
    with torch.no_grad():
        for layer, rows in ((net.body[0], [0, 3, 5, 6]), (net.body[second], [1, 2, 4]), (net.body[-2], list(range(0, 16, 2)))):
            layer.weight[rows] = 0
            layer.bias[rows] = 0
        if norm:
            net.body[1].running_mean[[1, 2, 4]] = torch.tensor([0.1, 0.2, -0.3])
            net.body[1].weight[[1, 7]] = torch.tensor([0.5, 2.0])
    slim: Any = prune_channels(net, 0.5)
    assert (slim.arch["widths"], slim.arch["hidden"]) == ([4, 3], 8)
    assert type(slim) is type(net)
    assert torch.allclose(slim.eval()(pictures()), net(pictures()), atol=1e-5)
    assert networks.parameters(slim) < networks.parameters(net)


def test_an_early_head_and_split_layers_are_cut_along() -> None:
    with loop.seeded(3):
        net: Any = with_exit(low_rank(teacher(), 0.4), 0.9)
    with torch.no_grad():
        net.body[0].weight[[0, 3, 5, 6]] = 0
        net.body[0].bias[[0, 3, 5, 6]] = 0
        net.body[3][-1].weight[:3] = 0
        net.body[3][-1].bias[:3] = 0
        net.body[-2][-1].weight[8:] = 0
        net.body[-2][-1].bias[8:] = 0
    slim: Any = prune_channels(net, 0.5)
    for ours, theirs in zip(slim.both(pictures()), net.both(pictures()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert slim.arch["ranks"] == net.arch["ranks"]
    assert slim.early.in_features == net.early.in_features / 2


def test_low_rank_is_the_best_of_its_rank_and_exact_where_that_is_enough() -> None:
    net = teacher(widths=(8, 12))
    thin: Any = low_rank(net, 0.25)
    assert thin.arch["ranks"] == {"3": 3, "7": 4}
    for at, rank in thin.arch["ranks"].items():
        whole, (first, last) = net.body[int(at)].weight.detach().flatten(1), thin.body[int(at)]
        left = whole - (last.weight.flatten(1) @ first.weight.flatten(1))
        # Eckart and Young: the error is the norm of the singular values that are left out
        assert left.norm().item() == pytest.approx(torch.linalg.svdvals(whole)[rank:].norm().item(), rel=1e-4)
    with torch.no_grad():
        for at, rank in thin.arch["ranks"].items():
            weights = net.body[int(at)].weight
            low = torch.rand(len(weights), rank) @ torch.rand(rank, weights[0].numel())
            weights.copy_(low.view_as(weights))
    assert torch.allclose(low_rank(net, 0.25)(pictures()), net(pictures()), rtol=1e-4, atol=1e-4)
    assert low_rank(net, 1.0).arch["ranks"] == {}  # two of the full rank would be larger


def test_the_smallest_weights_become_zero_and_stay_so_while_others_learn() -> None:
    net = teacher()
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    before = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    prune(net, 0.75)
    after = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    assert (after == 0).sum() == round(0.75 * len(before))
    assert after[after > 0].min() >= before[after == 0].max()
    zeros = [layer.weight == 0 for layer in layers]
    with zeros_held(net):
        optimiser = torch.optim.SGD(net.parameters(), 0.5, weight_decay=0.1)
        net(pictures()).square().sum().backward()
        optimiser.step()
    assert all((layer.weight[was] == 0).all() for layer, was in zip(layers, zeros, strict=True))
    assert not torch.equal(torch.cat([layer.weight.detach().abs().flatten() for layer in layers]), after)
    assert "weight" in dict(layers[0].named_parameters())


def test_what_is_learnt_by_hand() -> None:
    # teachers (1/2, 1/2), heads of logits (0, 0) and (ln 9, 0) at T = 1; the second has (9/10, 1/10): KL = ln(5/9)/2 + ln(5)/2
    wanted, heads = torch.full((1, 2), math.log(0.5)), [torch.zeros(1, 2), torch.tensor([[math.log(9), 0.0]])]
    far = (math.log(5 / 9) + math.log(5)) / 2
    assert learnt(heads, wanted, torch.tensor([-1]), 1.0, 1.0).item() == pytest.approx(far)
    assert learnt(heads, wanted, torch.tensor([0]), 1.0, 0.25).item() == pytest.approx(0.25 * far + 0.75 * (math.log(2) - math.log(0.9)))
    # at T = 2 the second head has (3/4, 1/4), and what is found counts four times
    assert learnt(heads[1:], wanted, torch.tensor([-1]), 2.0, 1.0).item() == pytest.approx(2 * (math.log(2 / 3) + math.log(2)), rel=1e-5)


def test_rows_leave_one_by_one_and_the_rest_is_not_run_where_all_do() -> None:
    with loop.seeded(0):
        net = with_exit(teacher(), 0.5)
    images = pictures(40)
    last, early = net.both(images)
    sure = early.softmax(1).amax(1)
    net.arch["exit"] = sure.median().item()
    leaves = sure >= net.arch["exit"]
    assert leaves.sum() == 21
    found = net(images)
    assert torch.allclose(found, torch.where(leaves[:, None], early, last), atol=1e-5)
    assert torch.allclose(found, torch.cat([net(one) for one in images.split(1)]), atol=1e-5)
    assert left_early(net, (images * 255).byte().numpy()) == pytest.approx(leaves.float().mean().item(), abs=0.06)

    pixels = (images * 255).byte().numpy()
    start = 64 * 8 * 9 + 16 * 8 * 10  # 3x3 over 8x8 pixels to 8 channels; then 8 channels of 4x4 to 10 classes
    net.arch["exit"] = 0.0
    assert counted(net, pixels)[1] == start
    net.arch["exit"] = 2.0  # nothing is ever that sure
    assert counted(net, pixels)[1] == start + 16 * 6 * 8 * 9 + 6 * 4 * 16 + 16 * 10
    with pytest.raises(ValueError, match="no early head"):
        left_early(quantised(teacher()), pixels)


def test_an_early_exit_leaves_the_network_behind_it_as_it_was(tiny: Dataset) -> None:
    net = made(tiny.split("train"), "early_exit")
    assert torch.equal(net.both(pictures())[0], with_exit(teacher(), 2.0)(pictures()))
    with loop.seeded(0):
        fresh: Any = with_exit(teacher(), 0.9)
    assert not torch.equal(net.early.weight, fresh.early.weight)


def test_integers_are_what_lies_in_the_file_and_gradients_pass_them_by(tiny: Dataset) -> None:
    net = made(tiny.split("train"), "quantise")
    file = load(packed(net))
    layers = {name for name, value in file.items() if value.dtype == torch.int8}
    assert layers == {"body.0.weight", "body.3.weight", "body.7.weight", "head.weight"}
    assert torch.allclose(net(pictures()), teacher()(pictures()), atol=0.05)
    assert isinstance(net.head, Int8Linear)
    assert networks.parameters(net) == networks.parameters(teacher()) + 8 + 6 + 16 + 10  # a scale for each output
    images = pictures().requires_grad_()
    net.requires_grad_(True)(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not net.head.weight.requires_grad
    assert net.head.scale.grad is not None


def test_a_compressed_network_is_stored_bit_for_bit_and_served_alone(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.core.settings import Settings
    from tasks.core.store import Store, environment

    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    stored = Settings(tmp_path)
    for key, value in environment(stored).items():
        monkeypatch.setenv(key, value)
    store = Store(stored)
    import mlflow

    net = compression([teacher()], tiny.split("train"), ALL).net
    run = store.start("key", "compress", params={}, tags={}, inputs=[])
    ref = store.log_net(run, net, name="small", classes=tiny.info.classes, tags={})
    again = store.load_net(ref)
    assert same(again, net)
    assert isinstance(again, Compact)
    assert again.head.weight.dtype == torch.int8
    rows = tiny.split("test").images()[:20]
    wanted = loop.predict(net, rows)
    assert 0 < left_early(net, rows) < 1
    assert torch.equal(loop.predict(again, rows), wanted)
    served = mlflow.pyfunc.load_model(ref.uri)
    assert np.allclose(served.predict(rows), wanted.softmax(1).numpy(), atol=1e-6)
    source = next(Path(mlflow.artifacts.download_artifacts(ref.uri)).glob("*.py")).read_text()
    assert "class Compact(" in source
    assert "\nfrom tasks" not in source


@pytest.mark.parametrize("norm", ["", "batch"])
def test_a_description_is_plain_and_enough(tiny: Dataset, norm: str) -> None:
    net = compression([teacher(norm=norm)], tiny.split("train"), ALL).net
    again = networks.build(json.loads(json.dumps(net.arch))).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(pictures()), net(pictures()))


def test_figures_are_counted_by_hand(tiny: Dataset) -> None:
    data = tiny.split("train").take(np.arange(50)) + tiny.split("reference").without_labels()
    whole = teacher()
    found = compression([whole], data, QUICK.model_copy(update={"techniques": ("prune", "quantise"), "sparsity": 0.5}))
    weights = 8 * 9 + 6 * 72 + 16 * 24 + 160
    assert found.figures["parameters"] == weights + 2 * 40
    assert found.figures["nonzero"] <= weights - weights // 2 + 2 * 40
    assert found.figures["sparsity"] == 1 - found.figures["nonzero"] / found.figures["parameters"]
    assert found.figures["file_bytes"] == len(packed(found.net)) > found.figures["file_bytes_compressed"]
    assert found.figures["multiply_adds"] == found.figures["teacher_multiply_adds"] == 64 * 72 + 16 * 432 + 384 + 160
    own, theirs = (loop.predict(net, data.images()).argmax(1).numpy() for net in (found.net, whole))
    known = data.labels() >= 0
    assert found.figures["agreement"] == pytest.approx((own == theirs).mean())
    assert found.figures["accuracy_after"] == pytest.approx((own == data.labels())[known].mean())
    assert found.figures["accuracy_before"] == pytest.approx((theirs == data.labels())[known].mean())
    assert "left_early" not in found.figures
    bare = compression([whole], data.without_labels(), QUICK).figures
    assert "accuracy_after" not in bare


def test_distilling_first_begins_a_student_and_later_brings_the_cut_one_back(tiny: Dataset) -> None:
    from tasks.train.supervised import Config as Training
    from tasks.train.supervised import supervised

    train, test = tiny.split("train"), tiny.split("test")
    expert = supervised(train, Training(steps=120, widths=(16, 32), hidden=64))
    cut, back = (
        compression([expert], train.without_labels(), Config(techniques=names, channels=0.4, steps=120)).net
        for names in (("prune_channels",), ("prune_channels", "kd"))
    )
    known = loop.predict(expert, test.images()).argmax(1)
    alike = [(loop.predict(net, test.images()).argmax(1) == known).float().mean().item() for net in (cut, back)]
    assert alike[1] > max(0.8, alike[0] + 0.05)
    assert back.arch["widths"] == [6, 13]
    assert back.arch["kind"] == "convnet"
    student = compression([expert], train, QUICK.model_copy(update={"techniques": ("kd",), "widths": (5,), "hidden": 7})).net
    assert (student.arch["widths"], student.arch["hidden"]) == ([5], 7)
    start = teacher(4)
    on = compression([expert], train, QUICK.model_copy(update={"techniques": ("kd",)}), start=start).net
    assert on.arch == start.arch
    assert same(start, teacher(4))


@pytest.mark.parametrize(
    ("techniques", "told"),
    [
        (("quantise", "kd"), "quantise comes last"),
        (("prune", "low_rank"), "low_rank comes before prune"),
        (("prune", "kd", "prune"), "prune can be done once"),
        ((), "at least 1"),
        (("melt",), "quantise"),
    ],
)
def test_orders_that_make_no_sense_are_refused(techniques: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        configured(Config, "distill.compression", {"techniques": techniques})
    assert configured(Config, "distill.compression", {"techniques": ("kd", "prune", "kd")}).techniques == ("kd", "prune", "kd")


def test_networks_that_cannot_be_compressed_are_refused(tiny: Dataset) -> None:
    data = tiny.split("train").take(np.arange(40))
    small = made(data, "quantise")
    with pytest.raises(UserError, match="teacher 0 is quantised already"):
        compression([small], data, QUICK)
    with pytest.raises(UserError, match="the student to start from is quantised already"):
        compression([teacher()], data, QUICK, start=small)
    assert compression([small], data, QUICK.model_copy(update={"techniques": ("kd",)})).figures["agreement"] >= 0  # it can still teach
    plain = networks.build(
        {"kind": "fcn", "shape": [1, 8, 8], "classes": 10, "depth": 1, "width": 4, "norm": "", "dropout": 0.0, "mean": 0.0, "std": 1.0}
    )
    with pytest.raises(UserError, match="kind 'fcn'; compression takes a 'convnet'"):
        compression([plain], data, QUICK)
    with pytest.raises(UserError, match="at least one teacher"):
        compression([], data, QUICK)
    with pytest.raises(UserError, match="with 'alpha' 0"):
        compression([teacher()], data.without_labels(), QUICK.model_copy(update={"alpha": 0.0}))
    assert SMOKE.techniques[-1] == "quantise"
