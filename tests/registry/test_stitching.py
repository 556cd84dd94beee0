"""Stitching: costs and points by hand, stitches that are known, what joint training moves, what cannot be stitched, and serving."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net, Stitched
from tasks.registry import Offer
from tasks.registry.stitching import (
    Config,
    activations,
    at_point,
    blocks,
    curve,
    fit_stitches,
    flops,
    joined,
    least_squares,
    paired,
    stitching,
    tune,
    within,
)


def net(seed: int, widths: tuple[int, ...] = (2, 4), hidden: int = 8, shape: tuple[int, int, int] = (1, 8, 8), **also: Any) -> Net:
    with loop.seeded(seed):
        return networks.convnet(shape, also.pop("classes", 10), widths=widths, hidden=hidden, mean=0.3, std=0.3, **also).eval()


def family() -> dict[str, Net]:
    return {"large": net(1, (4, 8), 16), "small": net(0)}


def offer(data: Dataset, nets: dict[str, Net] | None = None, **rows: Dataset) -> Offer:
    return Offer(nets or family(), {"train": data.split("train"), **rows})


def noise(n: int = 6, shape: tuple[int, int, int] = (1, 8, 8)) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def same(one: nn.Module, two: nn.Module) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_window_over_four_blocks_meets_these_pairs() -> None:
    assert paired(4) == [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    assert paired(3, kernel=1) == [(1, 1), (2, 2)]


def test_blocks_of_a_large_image_by_hand() -> None:
    # 28 pixels: the first convolution halves them
    arch = net(0, (4, 8, 16), 16, (1, 28, 28)).arch
    assert blocks(arch) == [
        ([4, 7, 7], 14 * 14 * 9 * 4),
        ([8, 3, 3], 7 * 7 * 9 * 4 * 8),
        ([16, 1, 1], 3 * 3 * 9 * 8 * 16),
        ([16], 16 * 16),
    ]


def test_points_and_their_flops_by_hand() -> None:
    made = joined(family(), window=False)
    small = 64 * 9 * 2, 16 * 9 * 2 * 4, 4 * 4 * 8, 8 * 10
    large = 64 * 9 * 4, 16 * 9 * 4 * 8, 4 * 8 * 16, 16 * 10
    first = small[0] + 16 * 2 * 4 + sum(large[1:])  # a stitch of 2 to 4 channels at 4x4 places
    second = small[0] + small[1] + 4 * 4 * 8 + sum(large[2:])
    assert [(point["name"], point["flops"]) for point in made.arch["points"]] == [
        ("small", sum(small)),
        ("small[:2] > large[2:]", second),
        ("small[:1] > large[1:]", first),
        ("large", sum(large)),
    ]
    assert made.arch["point"] == 3
    assert flops(made) == sum(large)
    assert flops(made, 1) == second


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("size", [8, 9, 17, 28])
def test_flops_are_those_that_torch_counts(window: bool, size: int) -> None:
    nets = {str(at): net(at, (2 + at, 5), 6 + at, (3, size, size)) for at in range(3)}
    made = joined(nets, window=window)
    assert len(made.arch["points"]) == 3 + 2 * (5 if window else 2)
    assert {point["stitch"] for point in made.arch["points"]} == {None, *range(2 * (5 if window else 2))}
    for point in range(len(made.arch["points"])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(noise(1, (3, size, size)), point)
        assert counter.get_total_flops() == 2 * flops(made, point)


def test_anchors_answer_as_they_did_and_are_copies() -> None:
    nets = family()
    made = joined(nets, window=False)
    assert torch.equal(made(noise(), 0), nets["small"](noise()))
    assert torch.equal(made(noise()), nets["large"](noise()))
    assert torch.allclose(made.head(made.features(noise())), made(noise()))
    with torch.no_grad():
        made.anchors[0].head.bias.add_(1)
    assert not same(made.anchors[0], nets["small"])


def test_stitches_between_equal_networks_become_the_identity() -> None:
    one = net(3)
    made = joined({"a": one, "b": copy.deepcopy(one)}, window=False)
    with torch.no_grad():
        for layer in made.stitches:
            assert isinstance(layer, nn.Conv2d)
            layer.weight.copy_(torch.eye(layer.out_channels)[:, :, None, None])
            layer.bias.zero_()
    for point in range(4):
        assert torch.allclose(made(noise(), point), one(noise()), atol=1e-6)


def test_fitted_stitches_of_equal_networks_give_the_networks_answer() -> None:
    one = net(3)
    made = joined({"a": one, "b": copy.deepcopy(one)}, window=False)
    fit_stitches(made, noise(40))
    for point in range(4):
        assert torch.allclose(made(noise(), point), one(noise()), atol=1e-4)


def test_a_path_is_first_blocks_then_stitch_then_last_blocks() -> None:
    nets = family()
    made = joined(nets, window=True)
    for at, point in enumerate(made.arch["points"]):
        if point["stitch"] is not None:
            stitch = made.arch["stitches"][point["stitch"]]
            passed = activations(nets["small"], noise())[stitch["after"]]
            passed = made.stitches[point["stitch"]](passed)
            assert list(passed.shape[1:]) == stitch["shapes"][1]
            assert torch.allclose(nets["large"].head(nets["large"].body[3 * stitch["into"] :](passed)), made(noise(), at), atol=1e-6)


def test_least_squares_recover_a_linear_map() -> None:
    rows = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.arange(12.0).reshape(3, 4), torch.tensor([5.0, -7.0, 0.5])
    found = least_squares(rows, rows @ weight.T + bias)
    assert torch.allclose(found[0], weight, atol=1e-3)
    assert torch.allclose(found[1], bias, atol=1e-3)


def test_least_squares_of_a_dead_channel_leave_it_alone() -> None:
    rows = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    weight, bias = least_squares(rows, 3 * rows[:, 1:] + 1)
    assert weight.tolist()[0] == pytest.approx([0, 3], abs=1e-5)
    assert bias.tolist() == pytest.approx([1], abs=1e-5)


def test_joint_training_moves_anchors_and_stitches_but_not_what_came_in(tiny: Dataset) -> None:
    nets = family()
    before = copy.deepcopy(nets)
    made = stitching(offer(tiny, nets), Config(steps=40, batch=16))
    start = stitching(offer(tiny, nets), Config(steps=0))
    assert all(same(nets[name], before[name]) for name in nets)
    assert same(start.anchors[1], nets["large"])
    assert all(not torch.equal(a, b) for a, b in zip(made.parameters(), start.parameters(), strict=True))


def test_one_step_moves_one_path_alone(tiny: Dataset) -> None:
    rows = tiny.split("train")
    made = joined(family(), window=False)
    before = copy.deepcopy(made)
    tune(
        made, rows.images(), rows.labels(), steps=1, batch=8, lr=1e-2, weight_decay=0.1, kd=0.5,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ways = []
    for point in range(4):
        probe = copy.deepcopy(before)
        probe(noise(), point).sum().backward()
        ways.append({name for name, value in probe.named_parameters() if value.grad is not None})
    theirs = dict(before.named_parameters())
    assert {name for name, value in made.named_parameters() if not torch.equal(value, theirs[name])} in ways


def test_least_squares_and_training_beat_a_random_start(tiny: Dataset) -> None:
    rows, nets = tiny.split("train"), family()
    for at, one in enumerate(nets.values()):
        with loop.seeded(at) as generator:
            loop.fit_supervised(
                one, rows.images(), rows.labels(), rows.synthetic(), steps=80, batch=32, lr=0.1, momentum=0.9, weight_decay=0,
                real_weight=1.0, generator=generator,
            )  # fmt: skip
    arms = [Config(init="random", steps=0), Config(steps=0), Config(steps=100, lr=5e-3)]
    scores = [np.mean([right for *_, right in curve(stitching(offer(tiny, nets), cfg), tiny.split("test"))[1:3]]) for cfg in arms]
    assert scores[0] + 0.1 < scores[1] < scores[2]


def test_curve_and_held_out_accuracies_are_those_of_the_points(tiny: Dataset) -> None:
    choose = tiny.split("validation")
    made = stitching(offer(tiny, choose=choose), Config(steps=5, point=1))
    found = curve(made, choose)
    assert [point["held_out"] for point in made.arch["points"]] == [right for *_, right in found]
    answers = made(loop.to_float(choose.images()), 2).argmax(1).numpy()
    assert found[2] == (made.arch["points"][2]["name"], flops(made, 2), float((answers == choose.labels()).mean()))
    assert made.arch["point"] == 1
    again = networks.build(json.loads(json.dumps(made.arch)))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(noise(), 2), made(noise(), 2))
    assert "held_out" not in stitching(offer(tiny), Config(steps=0)).arch["points"][0]


def test_held_out_rows_decide_nothing(tiny: Dataset) -> None:
    assert same(stitching(offer(tiny, choose=tiny.split("validation")), Config(steps=5)), stitching(offer(tiny), Config(steps=5)))


def test_within_gives_the_largest_point_that_a_budget_allows() -> None:
    made = joined(family(), window=False)
    costs = [point["flops"] for point in made.arch["points"]]
    assert [within(made, cost) for cost in costs] == [0, 1, 2, 3]
    assert within(made, costs[2] - 1) == 1
    assert within(made, 10**9) == 3
    with pytest.raises(UserError, match=f"the cheapest, small, needs {costs[0]}"):
        within(made, costs[0] - 1)


def test_a_view_takes_its_own_point_and_leaves_the_network_alone() -> None:
    made = joined(family(), window=False)
    assert torch.equal(at_point(made, 1)(noise()), made(noise(), 1))
    assert torch.equal(made(noise()), made(noise(), 3))
    with pytest.raises(UserError, match="there is no point 4: this network has 4"):
        at_point(made, 4)
    for point in (-1, 4):
        with pytest.raises(ValueError, match="points are 0 to 3"):
            made(noise(), point)


def test_a_network_without_points_is_refused() -> None:
    with pytest.raises(UserError, match="'convnet' has no points"):
        within(net(0), 1)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (net(1, (2, 4), norm="batch"), "b cannot be stitched: each path would need batch normalisation of its own"),
        (net(1, (2,)), r"a and b cannot be stitched: they have different numbers of blocks"),
        (net(1, classes=3), r"they differ in classes \(10 and 3\)"),
        (net(1, shape=(3, 8, 8)), r"they differ in images \(\[1, 8, 8\] and \[3, 8, 8\]\)"),
        (joined(family(), window=False), "b cannot be stitched: it is of kind 'stitched'"),
    ],
)
def test_what_cannot_be_stitched_is_named(tiny: Dataset, other: Net, said: str) -> None:
    with pytest.raises(UserError, match=said):
        stitching(offer(tiny, {"a": net(0), "b": other}), Config(steps=0))


def test_missing_or_unfit_rows_points_and_versions_are_named(tiny: Dataset) -> None:
    off = Config(steps=0)
    with pytest.raises(UserError, match="two or more versions, got 1"):
        stitching(offer(tiny, {"a": net(0)}), off)
    with pytest.raises(UserError, match="needs labelled rows 'train'"):
        stitching(Offer(family()), off)
    with pytest.raises(UserError, match="needs labelled rows 'train'"):
        stitching(Offer(family(), {"train": tiny.split("train").without_labels()}), off)
    with pytest.raises(UserError, match=r"rows 'train' are images \(1, 8, 8\) of 10 classes; the versions take \(3, 8, 8\) and 10"):
        stitching(offer(tiny, {"a": net(0, shape=(3, 8, 8)), "b": net(1, shape=(3, 8, 8))}), off)
    with pytest.raises(UserError, match="'choose' hold rows of the split 'test'"):
        stitching(offer(tiny, choose=tiny.split("test")), off)
    with pytest.raises(UserError, match="there is no point 4"):
        stitching(offer(tiny), Config(steps=0, point=4))
    with pytest.raises(UserError, match="'stitching' diverged"):
        stitching(offer(tiny), Config(steps=20, lr=1e30))


def test_each_request_to_a_served_version_may_name_its_point(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.core.settings import Settings
    from tasks.core.store import Store, environment

    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    settings = Settings(tmp_path)
    for key, value in environment(settings).items():
        monkeypatch.setenv(key, value)
    store = Store(settings)
    import mlflow

    made = stitching(offer(tiny, choose=tiny.split("validation")), Config(steps=5))
    run = store.start("key", "stitch", params={}, tags={}, inputs=[])
    ref = store.log_net(run, made, name="elastic", classes=tiny.info.classes, tags={})
    served = mlflow.pyfunc.load_model(ref.uri)
    rows = tiny.split("test").images()[:5]
    with torch.no_grad():
        wanted = [made(loop.to_float(rows), point).softmax(1).numpy() for point in range(4)]
    for point in (0, 2, 1):
        assert np.allclose(served.predict(rows, params={"point": point}), wanted[point], atol=1e-6)
    assert np.allclose(served.predict(rows), wanted[3], atol=1e-6)
    assert isinstance(store.load_net(ref), Stitched)
    assert same(store.load_net(ref), made)
    with pytest.raises(ValueError, match="there is no point 9; points are 0 to 3"):
        served.predict(rows, params={"point": 9})
