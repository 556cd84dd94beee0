"""Structured pruning adapters: what is learnt and what never changes, cuts by hand, scores by hand, and one dense network in the end."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flows._students import Candidate
from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import configured
from tasks.distill._adapters import Adapted, LowRank, adapted, by_magnitude, by_taylor, largest, whole
from tasks.distill.spa import Config, schedule, spa

QUICK = Config(keep=0.5, rank=3, rounds=2, steps=9, batch=16)


def base(seed: int = 0, norm: str = "", widths: tuple[int, ...] = (8, 6)) -> Any:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), 10, widths=widths, hidden=16, mean=0.3, std=0.4, norm=norm).eval()


def pictures(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def variant(net: Any, rank: int = 3, init_range: float = 0.3) -> Adapted:
    """Adapters that say something: their columns begin far from 0."""
    with loop.seeded(1):
        return adapted(net, rank, init_range).eval()


def test_an_adapter_by_hand_changes_the_middle_of_a_kernel_alone() -> None:
    one = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0], [-1.0]]))
    assert one.added_to(torch.ones(3, 2)).tolist() == [[4, 7], [1, 1], [0, -1]]
    kernels = one.added_to(torch.zeros(3, 2, 3, 3))
    assert kernels[:, :, 1, 1].tolist() == [[3, 6], [0, 0], [-1, -2]]
    kernels.detach()[:, :, 1, 1] = 0
    assert not kernels.any()
    assert one.added_to(torch.zeros(3, 2, 1, 1))[:, :, 0, 0].tolist() == [[3, 6], [0, 0], [-1, -2]]


@pytest.mark.parametrize("norm", ["", "batch"])
def test_the_merged_network_is_the_base_and_its_adapters_and_answers_as_both(norm: str) -> None:
    net = base(norm=norm)
    with_adapters = variant(net)
    dense = with_adapters.merged()
    assert dense.arch == net.arch
    assert torch.allclose(dense.eval()(pictures()), with_adapters(pictures()), atol=1e-5)
    assert not torch.allclose(dense(pictures()), net(pictures()), atol=1e-2)
    own, before = dense.state_dict(), net.state_dict()
    changed = {name for name in own if not torch.equal(own[name], before[name])}
    assert changed == ({"body.0.weight", "body.4.weight", "body.9.weight"} if norm else {"body.0.weight", "body.3.weight", "body.7.weight"})
    assert all(values.requires_grad for values in dense.parameters())


def test_at_first_the_base_answers() -> None:
    with loop.seeded(0):
        fresh = adapted(base(), 16, 1e-4).eval()
    assert torch.allclose(fresh(pictures()), base()(pictures()), atol=1e-3)
    adapters: Any = fresh.adapters
    assert adapters["7"].cols.abs().max() <= 1e-4 < 0.1 < adapters["7"].rows.abs().max()
    # a rank above the layer's inputs or outputs would be of no use
    assert [adapters[at].rows.shape for at in ("0", "3", "7")] == [(1, 1), (6, 8), (16, 24)]


@pytest.mark.parametrize("make", [variant, whole])
def test_a_cut_network_answers_as_the_large_one_with_these_channels_masked(make: Any) -> None:
    large = make(base()).eval()
    kept = [torch.tensor([1, 2, 4, 7]), torch.tensor([0, 5]), torch.arange(0, 16, 3)]
    small = large.cut(kept).eval()
    assert (small.net.arch["widths"], small.net.arch["hidden"]) == ([4, 2], 6)
    masked: Any = large.merged()
    with torch.no_grad():
        for at, channels in zip((0, 3, 7), kept, strict=True):
            gone = torch.ones(len(masked.body[at].weight), dtype=torch.bool)
            gone[channels] = False
            masked.body[at].weight[gone] = 0
            masked.body[at].bias[gone] = 0
    assert torch.allclose(small(pictures()), masked(pictures()), atol=1e-5)
    assert torch.allclose(small.merged()(pictures()), masked(pictures()), atol=1e-5)
    # twice in a row is once
    again = large.cut([torch.arange(1, 8), torch.arange(6), torch.arange(16)]).cut([torch.tensor([0, 1, 3, 6]), *kept[1:]])
    assert torch.allclose(again.eval()(pictures()), small(pictures()), atol=1e-6)


def test_cut_weights_are_those_of_the_base_untouched() -> None:
    net = base()
    kept = [torch.tensor([1, 6]), torch.tensor([2, 3, 4]), torch.tensor([0, 9])]
    small: Any = variant(net).cut(kept)
    assert torch.equal(small.net.body[3].weight, net.body[3].weight[kept[1]][:, kept[0]])
    columns = torch.cat([torch.arange(4) + 4 * channel for channel in (2, 3, 4)])  # each channel is 2x2 values behind the poolings
    assert torch.equal(small.net.body[7].weight, net.body[7].weight[kept[2]][:, columns])
    assert torch.equal(small.net.head.weight, net.head.weight[:, kept[2]])
    assert not any(small.net.body[at].weight.requires_grad for at in (0, 3, 7))
    assert all(values.requires_grad for name, values in small.named_parameters() if not name.endswith(("0.weight", "3.weight", "7.weight")))


def test_what_is_learnt_is_counted_by_hand() -> None:
    net = base()
    # rank 1 for the one input of the first layer, 3 for the others; biases; the last layer
    rows_and_cols, rest = 1 * (1 + 8) + 3 * (8 + 6) + 3 * (24 + 16), 8 + 6 + 16 + 170
    assert variant(net).learnt() == rows_and_cols + rest
    assert whole(net).learnt() == networks.parameters(net)
    small = variant(net).cut([torch.arange(4), torch.arange(3), torch.arange(8)])
    assert small.learnt() == 1 * (1 + 4) + 3 * (4 + 3) + 3 * (12 + 8) + 4 + 3 + 8 + 90


def test_figures_are_counted_by_hand(tiny: Dataset) -> None:
    found = spa([base()], tiny.split("train"), QUICK)
    rest = 4 + 3 + 8 + 90
    assert found.net.arch == {**base().arch, "widths": [4, 3], "hidden": 8}
    assert found.figures == {
        "learnt": 86 + rest, "learnt_adapter": 86, "mask_bits": 30, "channels": 15,
        "weights_left": (4 * 9 + 3 * 36 + 8 * 12 + rest) / networks.parameters(base()),
        "multiply_adds": 64 * 36 + 16 * 108 + 96 + 80, "teacher_multiply_adds": 64 * 72 + 16 * 432 + 384 + 160,
    }  # fmt: skip
    tuned = spa([base()], tiny.split("train"), QUICK.model_copy(update={"mode": "finetune"}))
    assert tuned.net.arch == found.net.arch
    assert tuned.figures["learnt"] == networks.parameters(tuned.net) == networks.parameters(found.net)
    assert tuned.figures["learnt_adapter"] == 0


def test_frozen_weights_can_be_found_in_what_comes_out_and_only_the_middles_differ(tiny: Dataset) -> None:
    net, cfg = base(), QUICK.model_copy(update={"keep": 1.0, "lr": 0.05})
    content = {name: value.clone() for name, value in net.state_dict().items()}
    made: Any = spa([net], tiny.split("train"), cfg).net
    assert all(torch.equal(value, content[name]) for name, value in net.state_dict().items())
    for at in (0, 3):
        change = (made.body[at].weight - net.body[at].weight).detach()
        assert change[:, :, 1, 1].abs().max() > 1e-5
        change[:, :, 1, 1] = 0
        assert not change.any()
    assert torch.linalg.matrix_rank(made.body[7].weight - net.body[7].weight, atol=1e-5, rtol=0) <= 3
    assert not torch.equal(made.body[0].bias, net.body[0].bias)
    assert not torch.equal(made.head.weight, net.head.weight)
    tuned: Any = spa([net], tiny.split("train"), cfg.model_copy(update={"mode": "finetune"})).net
    assert (tuned.body[3].weight != net.body[3].weight).float().mean() > 0.9


def test_scores_by_hand() -> None:
    net = variant(base())
    dense: Any = net.merged()
    for score, at in zip(by_magnitude(net), (0, 3, 7), strict=True):
        assert torch.allclose(score, dense.body[at].weight.flatten(1).norm(p=1, dim=1), rtol=1e-5)
    assert largest(torch.tensor([0.3, 0.1, 0.9, 0.5]), 3).tolist() == [0, 2, 3]

    images, labels = pictures(8), torch.arange(8)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(images), labels, reduction="sum")

    scores = by_taylor(net, loss)
    assert [len(score) for score in scores] == [8, 6, 16]
    assert all(values.grad is None for values in net.parameters())
    # of a hidden unit: d loss / d answer is (p - y) through the last layer, where the unit is awake
    answers = dense.body[:8]((images - 0.3) / 0.4)
    wrong = dense(images).softmax(1) - nn.functional.one_hot(labels, 10)
    by_hand = (answers.clamp_min(0) * (wrong @ dense.head.weight)).abs().sum(0)
    assert torch.allclose(scores[2], by_hand, atol=1e-5)


def test_taylor_leaves_the_statistics_of_a_normalisation_alone() -> None:
    net = variant(base(norm="batch")).train()
    before = net.state_dict()["net.body.1.running_mean"].clone()
    by_taylor(net, lambda: net(pictures()).square().sum())
    assert torch.equal(net.state_dict()["net.body.1.running_mean"], before)
    assert net.training


def test_a_channel_that_changes_nothing_is_cut_first(tiny: Dataset) -> None:
    net = base()
    with torch.no_grad():
        net.body[3].weight[:, [0, 5]] = 0  # what these two channels of the first layer say is heard by nobody
    cfg = QUICK.model_copy(update={"keep": 0.75, "rounds": 1, "steps": 1, "lr": 1e-6, "score": "taylor"})
    assert torch.equal(_first(spa([net], tiny.split("train"), cfg).net), _first(net)[[1, 2, 3, 4, 6, 7]])
    with torch.no_grad():
        net.body[0].weight[[2, 3]] *= 1e-3
    weak: Any = spa([net], tiny.split("train"), cfg.model_copy(update={"score": "magnitude"})).net
    assert torch.allclose(weak.body[0].bias, net.body[0].bias[[0, 1, 4, 5, 6, 7]], atol=1e-4)


def _first(net: Any) -> Tensor:
    """Of each channel of the first layer what the adapter never changes."""
    found: Tensor = net.body[0].weight.detach()[:, 0, 0]
    return found


def test_the_schedule_by_hand() -> None:
    assert schedule([8, 16], 0.25, 3, 100) == [([8, 16], 25), ([6, 12], 25), ([4, 8], 25), ([2, 4], 25)]
    assert [steps for _, steps in schedule([8], 0.5, 4, 3)] == [1, 0, 1, 0, 1]
    assert schedule([8], 1.0, 1, 2) == [([8], 1), ([8], 1)]
    with pytest.raises(UserError, match=r"'keep' 0.05 leaves none of the 8 channels of layer 1; set it to 0.12 or more"):
        schedule([16, 8], 0.05, 2, 10)


@pytest.mark.parametrize("mode", ["splora", "finetune"])
@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_the_same_seed_gives_the_same_variant_and_another_one_another(tiny: Dataset, mode: str, score: str) -> None:
    run = partial(spa, [base()], tiny.split("train"), QUICK.model_copy(update={"mode": mode, "score": score, "shift": 1}))
    one, same, other = (run(seed=seed).net.state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_base_learns_classes_that_it_never_saw(tiny: Dataset) -> None:
    train, test = tiny.split("train"), tiny.split("test")
    with loop.seeded(0) as generator:
        old, net = train.where(train.labels() < 5), base(widths=(16, 16))
        how: dict[str, Any] = {"steps": 150, "batch": 32, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "real_weight": 1.0}
        loop.fit_supervised(net, old.images(), old.labels(), old.synthetic(), generator=generator, **how)
    new, asked = train.where(train.labels() >= 5), test.where(test.labels() >= 5)
    made = spa([net], new, Config(keep=0.5, rank=4, rounds=2, steps=500, batch=32, lr=0.05)).net

    def hits(net: Any) -> float:
        return float((loop.predict(net, asked.images()).argmax(1).numpy() == asked.labels()).mean())

    assert hits(net) == 0
    assert hits(made) > 0.6  # of five classes one is right by chance


def test_rows_without_a_label_are_left_out_or_learnt_from_the_base(tiny: Dataset) -> None:
    train, more = tiny.split("train").take(np.arange(60)), tiny.split("reference").without_labels()
    alone, both = (spa([base()], data, QUICK).net.state_dict() for data in (train, train + more))
    assert all(torch.equal(alone[name], both[name]) for name in alone)
    softly = QUICK.model_copy(update={"alpha": 0.5})
    alone, both = (spa([base()], data, softly).net.state_dict() for data in (train, train + more))
    assert any(not torch.equal(alone[name], both[name]) for name in alone)
    # by the base's answers alone a variant of it comes closer to it than by a cut alone
    images, sure = more.images(), base()
    with torch.no_grad():
        sure.head.weight *= 30
    known = loop.predict(sure, images).log_softmax(1)

    def far(steps: int) -> float:
        cfg = QUICK.model_copy(update={"alpha": 1.0, "steps": steps, "lr": 0.05, "batch": 32})
        said = loop.predict(spa([sure], more, cfg).net, images).log_softmax(1)
        return float((known.exp() * (known - said)).sum(1).mean())

    assert far(200) < 0.5 * far(1)


def test_what_makes_no_sense_is_refused_with_a_way_out(tiny: Dataset) -> None:
    data = tiny.split("train").take(np.arange(40))
    with pytest.raises(UserError, match="at least one teacher"):
        spa([], data, QUICK)
    with pytest.raises(UserError, match="spa adapts one base, got 2 teachers: name the one with --teacher"):
        spa([base(), base(1)], data, QUICK)
    with pytest.raises(UserError, match="leave --student away, or name it as --teacher"):
        spa([base()], data, QUICK, start=base(1))
    plain = networks.build(
        {"kind": "fcn", "shape": [1, 8, 8], "classes": 10, "depth": 1, "width": 4, "norm": "", "dropout": 0.0, "mean": 0.0, "std": 1.0}
    )
    with pytest.raises(UserError, match="kind 'fcn'; spa adapts a 'convnet': distill it to one with kd first"):
        spa([plain], data, QUICK)
    with pytest.raises(UserError, match="no row of the data has a label: with 'alpha' 0"):
        spa([base()], data.without_labels(), QUICK)
    with pytest.raises(UserError, match=r"leaves none of the 6 channels of layer 1; set it to 0.17 or more"):
        spa([base()], data, QUICK.model_copy(update={"keep": 0.07}))
    with pytest.raises(UserError, match=r"distill.spa has no setting 'ranks'; did you mean 'rank'\?"):
        configured(Config, "distill.spa", {"ranks": 3})


def test_a_sweep_can_shorten_it_to_a_step(tiny: Dataset) -> None:
    short = Candidate("", "distill.spa", {**QUICK.model_dump(), "rounds": 5, "steps": 12}).shortened(0.1)
    assert short is not None
    assert short.settings["steps"] == 1
    made = spa([base()], tiny.split("train"), Config(**short.settings)).net
    assert (made.arch["widths"], made.arch["hidden"]) == ([4, 3], 8)
