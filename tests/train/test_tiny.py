"""TinyReptile and TinyMetaFed: devices, online steps, what the server does with them, and what is sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.train import tiny_metafed as metafed
from tasks.train._shared import Stream, decayed, draw_stream, first_network, learn_online, pool_of, sensed, sensor
from tasks.train.tiny_metafed import tiny_metafed
from tasks.train.tiny_reptile import Config, follow, tiny_reptile
from tests import tables

QUICK = Config(rounds=6, ways=3, shots=2, widths=(4,), hidden=8)
SPARSE = metafed.Config(rounds=6, ways=3, shots=2, widths=(4,), hidden=8)
SENSED = {"gain": 0.0, "offset": 0.0}


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in net.parameters()])


def line(weight: float = 0.0) -> nn.Linear:
    net = nn.Linear(1, 1)
    nn.init.constant_(net.weight, weight)
    nn.init.zeros_(net.bias)
    return net


def test_online_steps_are_taken_one_by_one_in_the_streams_order() -> None:
    # squared error: the first sample (1, 1) moves w and b from 0 to .2; the second (2, 0) then errs by .6
    net = line()
    learn_online(net, Stream(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]])), 0.1, loss=F.mse_loss)
    assert net.weight.item() == pytest.approx(0.2 - 0.1 * 2 * 0.6 * 2)
    assert net.bias.item() == pytest.approx(0.2 - 0.1 * 2 * 0.6)


def test_only_the_named_weights_learn() -> None:
    net = line()
    learn_online(net, Stream(torch.tensor([[1.0]]), torch.tensor([[1.0]])), 0.1, [net.bias], loss=F.mse_loss)
    assert (net.weight.item(), net.bias.item()) == (0.0, pytest.approx(0.2))


def test_the_server_goes_a_part_of_the_way_and_less_each_round() -> None:
    server, device = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    assert torch.equal(follow(server, device, 0.25), torch.tensor([1.5, 1.5]))
    assert torch.equal(follow(server, device, 0.0), server)
    assert [decayed(0.8, at, 4) for at in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_one_round_of_tiny_reptile_by_hand(tiny: Dataset) -> None:
    cfg = QUICK.model_copy(update={"rounds": 1, "step": 0.4})
    pool = pool_of(tiny.split("train"), 3)
    with loop.seeded(5) as generator:
        net = first_network(pool, tiny, None, ways=3, labels="names", widths=(4,), hidden=8)
        before = weights(net).clone()
        stream = draw_stream(pool, ways=3, shots=2, labels="names", gain=0.3, offset=0.1, generator=generator)
        learn_online(net, stream, cfg.lr)
    wanted = before + 0.4 * (weights(net) - before)
    assert torch.allclose(weights(tiny_reptile(tiny.split("train"), cfg, seed=5)), wanted, atol=1e-7)


def test_a_device_has_its_own_classes_rows_and_sensor(tiny: Dataset) -> None:
    pool = pool_of(tiny.split("train"), 3)
    generator = torch.Generator().manual_seed(0)
    stream = draw_stream(pool, ways=3, shots=4, labels="names", **SENSED, generator=generator)
    counts = torch.bincount(stream.labels)
    assert sorted(counts[counts > 0].tolist()) == [4, 4, 4]
    images = {(image.tobytes(), int(label)) for image, label in zip(tiny.images(), tiny.labels(), strict=True)}
    whole = (stream.images * 255).round().to(torch.uint8).numpy()
    assert all((image.tobytes(), int(label)) in images for image, label in zip(whole, stream.labels, strict=True))
    slots = draw_stream(pool, ways=3, shots=4, labels="slots", **SENSED, generator=generator)
    assert set(slots.labels.tolist()) == {0, 1, 2}
    assert slots.labels.tolist() != sorted(slots.labels.tolist())


@given(st.floats(0, 0.99), st.floats(0, 1), st.integers(0, 2**31))
def test_a_sensor_stays_in_its_bounds(gain: float, offset: float, seed: int) -> None:
    times, plus = sensor(gain, offset, torch.Generator().manual_seed(seed))
    assert 1 - gain - 1e-6 <= times <= 1 + gain + 1e-6
    assert abs(plus) <= offset + 1e-6
    given = sensed(torch.linspace(0, 1, 5), times, plus)
    assert given.min() >= 0
    assert given.max() <= 1


def test_what_a_sensor_makes_of_pixels() -> None:
    assert torch.allclose(sensed(torch.tensor([0.0, 0.5, 1.0]), 1.2, -0.1), torch.tensor([0.0, 0.5, 1.0]))


def test_digits_are_learnt_device_by_device(tiny: Dataset) -> None:
    net = tiny_reptile(tiny.split("train"), Config(rounds=250, ways=5, shots=4, widths=(8,), hidden=32, gain=0.1, offset=0.0), seed=0)
    test = tiny.split("test")
    assert (loop.predict(net, test.images()).argmax(1).numpy() == test.labels()).mean() > 0.5
    assert not net.training


@pytest.mark.parametrize(("method", "cfg"), [(tiny_reptile, QUICK), (tiny_metafed, SPARSE)])
def test_seed_start_and_slots(tiny: Dataset, method, cfg) -> None:  # type: ignore[no-untyped-def]
    train = tiny.split("train")
    first, again, other = (weights(method(train, cfg, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, weights(method(train + tiny.split("reference").without_labels(), cfg, seed=1)))
    start = method(train, cfg, seed=1)
    on = method(train, cfg.model_copy(update={"widths": (16,)}), start=start, seed=3)
    assert torch.equal(weights(start), first)
    assert on.arch == start.arch
    assert not torch.equal(weights(on), first)
    assert method(train, cfg.model_copy(update={"labels": "slots"})).arch["classes"] == 3
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\) of 10 classes; here they are \(1, 8, 8\) and 3"):
        method(train, cfg.model_copy(update={"labels": "slots"}), start=start)
    with pytest.raises(UserError, match="a device sees 3 classes, but only 2 have labelled rows; set ways to 2 or less"):
        method(train.where(train.labels() < 2), cfg)
    with pytest.raises(UserError, match="diverged"):
        method(train, cfg.model_copy(update={"lr": 1e30}))


def test_a_label_without_a_name_is_refused(tmp_path: Path) -> None:
    wide = tables.dataset(tmp_path / "wide", np.zeros((3, 1, 8, 8), np.uint8), [0, 1, 2], classes=("a", "b"))
    with pytest.raises(UserError, match="label 2 has no class name"):
        tiny_reptile(wide, QUICK)


def test_the_largest_changes_of_all_tensors_together_are_sent() -> None:
    changes = [torch.tensor([[0.1, -5.0], [0.2, 0.3]]), torch.tensor([4.0, 0.0, -0.4, 0.05, 0.01, 0.02])]
    kept = metafed.largest(changes, 0.3)
    assert torch.equal(kept[0], torch.tensor([[0.0, -5.0], [0.0, 0.0]]))
    assert torch.equal(kept[1], torch.tensor([4.0, 0.0, -0.4, 0.0, 0.0, 0.0]))
    assert all(torch.equal(a, b) for a, b in zip(metafed.largest(changes, 1.0), changes, strict=True))


def test_bytes_are_counted_with_the_places_of_the_values() -> None:
    assert metafed.message_bytes(1000, 1000) == 4000
    assert metafed.message_bytes(1000, 100) == 400 + 125  # one bit for each of 1000 is less than two bytes for each of 100
    assert metafed.message_bytes(1000, 10) == 40 + 20
    assert metafed.message_bytes(200, 5) == 20 + 5
    assert metafed.traffic(1000, rounds=7, top=0.1) == metafed.Traffic(28_000, 7 * 525)
    assert metafed.sent_values(3, 0.01) == 1


def test_the_head_never_travels_and_few_weights_change_in_one_round(tiny: Dataset) -> None:
    cfg = SPARSE.model_copy(update={"rounds": 1, "step": 1.0, "top": 0.1})
    start = tiny_reptile(tiny.split("train"), QUICK, seed=0)
    net = tiny_metafed(tiny.split("train"), cfg, start=start, seed=2)
    local, travels = metafed.parts(net)
    before_local, before = metafed.parts(start)
    assert all(torch.equal(a, b) for a, b in zip(local, before_local, strict=True))
    changed = sum(int((a != b).sum()) for a, b in zip(travels, before, strict=True))
    values = sum(value.numel() for value in travels)
    assert 0 < changed <= metafed.sent_values(values, 0.1)
    fresh = tiny_metafed(tiny.split("train"), cfg, seed=2)
    assert not fresh.head.weight.any()
    assert not fresh.head.bias.any()


def test_one_round_of_tiny_metafed_by_hand(tiny: Dataset) -> None:
    cfg = SPARSE.model_copy(update={"rounds": 2, "clients": 2, "step": 1.0, "top": 1.0, "support": 0.5})
    start = tiny_reptile(tiny.split("train"), QUICK, seed=0)
    first = [value.detach().clone() for value in start.parameters()]
    pool, changes = pool_of(tiny.split("train"), 3), []
    with loop.seeded(4) as generator:
        for _ in range(2):
            net = first_network(pool, tiny, start, ways=3, labels="names", widths=(4,), hidden=8)
            stream = draw_stream(pool, ways=3, shots=2, labels="names", gain=0.3, offset=0.1, generator=generator)
            learn_online(net, Stream(stream.images[:3], stream.labels[:3]), cfg.lr, list(net.head.parameters()))
            learn_online(net, Stream(stream.images[3:], stream.labels[3:]), cfg.lr, list(net.body.parameters()))
            changes.append([value.detach() - before for value, before in zip(net.parameters(), first, strict=True)])
    found = tiny_metafed(tiny.split("train"), cfg, start=start, seed=4)
    for (name, value), before, one, two in zip(found.named_parameters(), first, *changes, strict=True):
        wanted = before if name.startswith("head.") else before + 0.5 * (one + two) / 2  # the second of two rounds: half the step
        assert torch.allclose(value, wanted, atol=1e-7)


def test_a_stream_too_short_to_be_parted_is_refused() -> None:
    stream = Stream(torch.zeros(2, 1), torch.zeros(2))
    assert [len(part.labels) for part in metafed.parted(stream, 0.5)] == [1, 1]
    with pytest.raises(UserError, match="a stream of 2 rows cannot be parted at"):
        metafed.parted(stream, 0.1)
