"""Continual inference: steps against clips, the retroactive attention by hand and where plain sums fail, costs by hand, and the student."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tasks.core import loop, networks, served
from tasks.core.continual import Block, Continual, TimeConv, Window, attend, retroactive, single_output
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill.continual_inference import Config, both_ways, continual_inference, described, largest_difference, operations

QUICK = Config(widths=(4,), deep=1, hidden=8, heads=2, steps=6, batch=8)


def network(shape: tuple[int, int, int] = (1, 12, 8), **change: object) -> Continual:
    arch = {"kind": "continual", "shape": list(shape), "classes": 5, "mean": 0.3, "std": 0.4, "widths": [3, 4], "deep": 1, "kernel": 3}
    with loop.seeded(0):
        net = networks.build({**arch, "hidden": 8, "heads": 2, "wide": 12, "blocks": 1, **change}).eval()
    assert isinstance(net, Continual)
    return net


def teacher(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(8,), hidden=16, mean=0.3, std=0.4)


def weights(net: Net) -> Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def along(net: Continual, rows: Tensor) -> list[Tensor]:
    """Answers to the frames of streams (B, C, T, W); empty where there is none."""
    stream = net.start_stream()
    return [torch.empty(0) if (said := net.step(stream, rows[:, :, t])) is None else said for t in range(rows.shape[2])]


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 5])
def test_steps_answer_as_the_windows_that_end_there_and_not_before_a_window_is_full(blocks: int, kernel: int) -> None:
    net = network((2, 16, 9), blocks=blocks, kernel=kernel)
    rows = torch.rand(3, 2, 60, 9, generator=torch.Generator().manual_seed(1))
    said = along(net, rows)
    assert [len(logits) for logits in said] == [0] * 15 + [3] * 45
    for t in range(15, 60):
        start = t - 15
        wanted = net(rows[:, :, start : t + 1], start)
        assert torch.allclose(said[t], wanted, atol=1e-5)
        # the windows do differ, by more than what is let pass
        assert start == 0 or (said[t] - said[t - 1]).abs().max() > 1e-4


def test_a_frame_that_left_the_window_is_forgotten_wholly() -> None:
    net = network(blocks=2)
    one, two = torch.rand(2, 1, 1, 40, 8, generator=torch.Generator().manual_seed(2)).double()
    two[:, :, 10:] = one[:, :, 10:]
    net.double()
    a, b = along(net, one), along(net, two)
    assert (a[20] - b[20]).abs().max() > 1e-4
    assert (a[21] - b[21]).abs().max() < 1e-12


def test_streams_side_by_side_do_not_touch_each_other_nor_does_a_second_state() -> None:
    net, rows = network(blocks=2), torch.rand(2, 1, 30, 8)
    together, alone = along(net, rows), along(net, rows[1:])
    assert torch.allclose(together[-1][1:], alone[-1], atol=1e-6)


def test_positions_come_round_after_twice_the_window_less_one() -> None:
    net, clip = network(), torch.rand(1, 1, 12, 8)
    assert len(net.positions) == 2 * 6 - 1
    assert torch.allclose(net(clip), net(clip, 11), atol=1e-6)
    assert not torch.allclose(net(clip), net(clip, 5), atol=1e-3)
    pair = net(clip.repeat(2, 1, 1, 1), torch.tensor([0, 5]))
    assert torch.allclose(pair, torch.cat([net(clip), net(clip, 5)]), atol=1e-6)


def test_in_training_rows_get_positions_by_lot_and_in_evaluation_the_first() -> None:
    net, clip = network(), torch.rand(1, 1, 12, 8).repeat(64, 1, 1, 1)
    assert (net(clip) - net(clip)[0]).abs().max() < 1e-5
    with loop.seeded(0):
        drawn = net.train()(clip)
    assert len(drawn.detach().round(decimals=4).unique(dim=0)) == 11


def test_a_convolution_adds_its_input_with_the_delay_of_its_middle_frame() -> None:
    layer = TimeConv(1, 1, 3, 1)
    nn.init.zeros_(layer.conv.weight)
    assert layer.conv.bias is not None
    nn.init.constant_(layer.conv.bias, 2.0)
    frames = torch.arange(5.0).reshape(1, 1, 5, 1)
    assert layer(frames).flatten().tolist() == [3.0, 4.0, 5.0]
    assert TimeConv(1, 2, 3, 1).delay == TimeConv(1, 1, 3, 2).delay == 0


def test_a_block_is_torchs_own_encoder_layer() -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    block = Block(8, 2, 12)
    pairs = [(block.out, theirs.self_attn.out_proj), (block.wide, theirs.linear1), (block.narrow, theirs.linear2)]
    for ours, other in [*pairs, (block.norm1, theirs.norm1), (block.norm2, theirs.norm2)]:
        ours.load_state_dict(other.state_dict())
    block.qkv.load_state_dict({"weight": theirs.self_attn.in_proj_weight, "bias": theirs.self_attn.in_proj_bias})
    tokens = torch.randn(3, 7, 8)
    assert torch.allclose(block(tokens), theirs(tokens), atol=1e-5)
    assert torch.allclose(block.newest(tokens), theirs(tokens)[:, -1:], atol=1e-5)


def test_attention_by_hand() -> None:
    # scores 0 and ln 3: weights 1/4 and 3/4 of the values 0 and 8
    found = attend(torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [math.log(3)]]]]), torch.tensor([[[[0.0], [8.0]]]]))
    assert found.item() == pytest.approx(6.0)


def plain_sums(n: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last row but one of the last window, by the paper's update of what it was a step before, in the precision of the rows (T, d)."""
    row, at = query[-2], len(query) - 2
    scores = (key @ row).exp()
    window = slice(at + 1 - n, at + 1)
    total, weighted = scores[window].sum(), scores[window] @ value[window]
    gone, come = at + 1 - n, at + 1
    total = total - scores[gone] + scores[come]
    return (weighted - scores[gone] * value[gone] + scores[come] * value[come]) / total


@pytest.mark.parametrize(("scale", "fails"), [(1.0, False), (30.0, True), (400.0, True)])
def test_retroactive_rows_are_right_also_where_plain_sums_lose_all_digits_or_overflow(scale: float, fails: bool) -> None:
    torch.manual_seed(3)
    n, block, window = 6, Block(8, 1, 12).double(), Window()
    with torch.no_grad():
        block.qkv.weight[:16] *= scale
        tokens = torch.randn(1, 80, 8).double()
        query, key, value = (part[0, 0] for part in block.project(tokens))
        worst = worst_plain = 0.0
        for t in range(80):
            found = retroactive(block, window, tokens[:, t : t + 1], n)
            assert (found is None) == (t < n - 1)
            if found is not None and t >= n:
                assert window.rows is not None
                rows = (window.rows[1] / window.rows[0])[0, 0]
                at = slice(t + 1 - n, t + 1)
                wanted = attend(query[at], key[at][None, None], value[at][None, None])[0, 0]
                worst = max(worst, float((rows - wanted).abs().max()))
                plain = plain_sums(n, *(part[: t + 1].float() for part in (query, key, value)))
                gap = float((plain - wanted[-2]).abs().max())
                worst_plain = max(worst_plain, gap if math.isfinite(gap) else math.inf)
    assert worst < 1e-8
    assert (worst_plain > 1e-2) == fails
    assert (window.afresh > 1) == fails  # 1: the first window


def test_the_newest_tokens_output_is_the_same_by_either_attention() -> None:
    torch.manual_seed(0)
    block, one, two = Block(8, 2, 12), Window(), Window()
    for token in torch.randn(20, 1, 1, 8):
        alone, rows = single_output(block, one, token, 5), retroactive(block, two, token, 5)
        if alone is None or rows is None:
            assert alone is rows is None
        else:
            assert torch.allclose(alone, rows[:, -1:], atol=1e-5)


def test_costs_by_hand() -> None:
    net = network((1, 12, 8), widths=[4], deep=1, hidden=8, wide=16, heads=2)
    # frames of 4 places: 9 and 36 products for each of 4 channels and places; 8 tokens of 16 values
    convolutions, one_token = [10 * 4 * 4 * 9, 8 * 4 * 4 * 36], 16 * 8
    keys_values, newest, head = 8 * 16, 8 * 8 + 2 * 8 * 8 + 8 * 8 + 2 * 8 * 16, 8 * 5
    clip = sum(convolutions) + 8 * (one_token + keys_values) + newest + head
    step = 4 * 4 * (9 + 36) + one_token + keys_values + newest + head
    assert operations(net) == (2 * clip, 2 * step)


def test_a_step_of_two_blocks_costs_less_than_a_clip_but_no_tenth() -> None:
    of_clip, of_step = operations(network((1, 28, 28), widths=[8, 16], hidden=32, heads=4, wide=64, blocks=2))
    assert 2 < of_clip / of_step < 10


def test_what_makes_no_network_or_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="3 convolutions of 3 frames leave 1 of 7"):
        network((1, 7, 8))
    with pytest.raises(ValueError, match="the kernel is odd"):
        network(kernel=4)
    with pytest.raises(ValueError, match="8 values cannot be split over 3 heads"):
        network(heads=3)
    net = network()
    with pytest.raises(ValueError, match=r"a frame of a stream is \(streams, 1, 8\), got \(1, 1, 7\)"):
        net.step(net.start_stream(), torch.zeros(1, 1, 7))


def test_figures_are_those_of_the_student(tiny: Dataset) -> None:
    taught = continual_inference([teacher()], tiny.split("train"), QUICK)
    net, figures = taught.net, taught.figures
    assert figures["flops_ratio"] == figures["flops_clip"] / figures["flops_step"] > 1
    assert (figures["flops_clip"], figures["flops_step"]) == operations(net)
    assert figures["frames_before"] == 7
    assert figures["largest_difference"] < 1e-5


def test_the_largest_difference_is_one_of_a_probability_and_over_every_window() -> None:
    even, odds = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [1.0, 1.0]])
    assert largest_difference(odds, even) == pytest.approx(0.25)
    stepped, offline = both_ways(network(), torch.rand(4, 1, 12, 8))
    assert stepped.shape == offline.shape == (3 * 12 + 1, 5)
    assert largest_difference(stepped, offline) < 1e-6
    assert largest_difference(stepped[1:], offline[:-1]) > 1e-3


def test_a_student_without_labels_follows_its_teacher_and_streams_as_well(tiny: Dataset) -> None:
    from tasks.train.supervised import Config as Training
    from tasks.train.supervised import supervised

    train, test = tiny.split("train"), tiny.split("test").images()
    expert = supervised(train, Training(steps=100, widths=(8, 16), hidden=32), seed=0)
    cfg = Config(widths=(8, 16), hidden=32, steps=300, lr=0.01)
    net = continual_inference([expert], train.without_labels(), cfg).net
    said, wanted = loop.predict(net, test).argmax(1), loop.predict(expert, test).argmax(1)
    assert (said == wanted).float().mean() > 0.75
    answers = along(net, loop.to_float(test).transpose(0, 1).flatten(1, 2)[None])
    streamed = torch.cat(answers[7::8]).argmax(1)
    assert (streamed == wanted).float().mean() > 0.75


def test_labels_count_by_their_weight_alone_and_rows_without_one_by_the_teachers(tiny: Dataset) -> None:
    train, pool = tiny.split("train").take(np.arange(40)), tiny.split("reference").without_labels()

    def student(data: Dataset, cfg: Config = QUICK, seed: int = 0) -> Tensor:
        return weights(continual_inference([teacher(seed)], data, cfg).net)

    soft, hard = (QUICK.model_copy(update={"alpha": alpha}) for alpha in (1.0, 0.0))
    assert torch.equal(student(train, soft), student(train.without_labels(), soft))
    assert not torch.equal(student(train), student(train.without_labels()))
    assert not torch.equal(student(train), student(train + pool))
    assert torch.equal(student(train, hard, 1), student(train, hard, 2))


@pytest.mark.parametrize(
    "change", [{"temperature": 2.0}, {"alpha": 0.5}, {"shift": 1}, {"lr": 0.02}, {"deep": 0}, {"heads": 4}, {"blocks": 2}]
)
def test_every_setting_changes_the_student(tiny: Dataset, change: dict[str, object]) -> None:
    data = tiny.split("validation")
    base, other = (continual_inference([teacher()], data, QUICK.model_copy(update=update)).net for update in ({}, change))
    assert weights(base).shape != weights(other).shape or not torch.equal(weights(base), weights(other))


def test_a_student_goes_on_from_the_one_that_is_given(tiny: Dataset) -> None:
    data = tiny.split("validation")
    old = continual_inference([teacher()], data, QUICK).net
    before = weights(old)
    still = continual_inference([teacher()], data, QUICK.model_copy(update={"lr": 1e-9}), start=old).net
    assert torch.allclose(weights(still), before, atol=1e-5)
    assert torch.equal(weights(old), before)
    assert still is not old


def test_what_it_cannot_learn_from_is_refused(tiny: Dataset) -> None:
    data = tiny.split("validation")
    with pytest.raises(UserError, match="at least one teacher"):
        continual_inference([], data, QUICK)
    with pytest.raises(UserError, match="the student to start from is a 'convnet'; this method goes on from a 'continual' network"):
        continual_inference([teacher()], data, QUICK, start=teacher())
    with pytest.raises(UserError, match="these settings make no network for images of 8 rows: 5 convolutions of 3 frames leave -2 of 8"):
        continual_inference([teacher()], data, QUICK.model_copy(update={"deep": 4}))
    with pytest.raises(UserError, match="no row of the data has a label: with 'alpha' 0"):
        continual_inference([teacher()], data.without_labels(), QUICK.model_copy(update={"alpha": 0.0}))


def test_it_is_described_by_its_arch_and_served_without_this_package(tiny: Dataset, tmp_path: Path) -> None:
    data = tiny.split("validation")
    with loop.seeded(0):
        net = described(data.images(), data.info, widths=(4,), deep=1, kernel=3, hidden=8, heads=2, blocks=2).eval()
    again = networks.build(net.arch)
    again.load_state_dict(net.state_dict())
    clips = loop.to_float(data.images())
    assert torch.equal(again.eval()(clips), net(clips))
    source = served.source(net)
    assert "from tasks" not in source
    space: dict[str, object] = {"__name__": "served"}
    lines = source.partition("# The entry that travels")[0]
    exec(compile(lines, str(tmp_path), "exec"), space)
    alone = space["build"](net.arch)  # type: ignore[operator]
    alone.load_state_dict(net.state_dict())
    stream = alone.start_stream()
    said = [alone.eval().step(stream, clips[:1, :, t]) for t in range(8)]
    assert torch.allclose(said[-1], net(clips[:1]), atol=1e-5)
