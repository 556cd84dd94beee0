"""Which versions run on a device: the query against plain loops, units, sensors of a kind and in parts, and what a network needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.registry import Offer
from tasks.registry._graph import graph, size, turtle, words
from tasks.registry.semantic_management import Config, describe, fits, semantic_management, why_not

BOARD = {"flash": "50 kB", "ram": "16 kB", "sensors": ["camera"]}
VERSION = {"task": "digits", "sensor": "camera", "weight_bytes": 20_000, "activation_bytes": 8_000}


def fitting(versions: dict[str, Any], device: dict[str, Any], task: str = "") -> list[str]:
    return [fit.version for fit in fits(graph(versions, {"board": device}), "board", task)]


def conv(widths: tuple[int, ...] = (4,), hidden: int = 8, shape: tuple[int, int, int] = (1, 8, 8), norm: str = "") -> Net:
    with loop.seeded(0):
        return networks.convnet(shape, 10, widths=widths, hidden=hidden, mean=0.3, std=0.3, norm=norm)


SENSORS = ("camera", "microphone", "accelerometer", "gyroscope")
BRINGS = {"imu": {"accelerometer", "gyroscope"}, "rgb camera": {"camera"}, **{s: {s} for s in SENSORS}}
TASKS = ("digits", "words", "gestures")
versions_of = st.dictionaries(
    st.sampled_from([f"{name}/{at}" for name in ("a", "b c", "d#") for at in range(3)]),
    st.fixed_dictionaries(
        {
            "sensor": st.lists(st.sampled_from(SENSORS), min_size=1, max_size=2),
            "task": st.sampled_from(TASKS),
            "weight_bytes": st.integers(0, 6),
            "activation_bytes": st.integers(0, 6),
        },
        optional={"accuracy": st.sampled_from([0.1, 0.5, 0.9]), "runtime": st.sampled_from(["tflm", "onnx"])},
    ),
    min_size=1,
)
devices_of = st.dictionaries(
    st.sampled_from(["one", "two/2"]),
    st.fixed_dictionaries(
        {
            "sensors": st.lists(st.sampled_from(sorted(BRINGS)), max_size=3),
            "flash_bytes": st.integers(0, 6),
            "ram_bytes": st.integers(0, 9),
        },
        optional={
            "tasks": st.lists(st.sampled_from(TASKS), min_size=1, max_size=2),
            "runtime": st.sampled_from(["tflm", "onnx", ["tflm", "onnx"]]),
            "weights_in": st.sampled_from(["flash", "ram"]),
        },
    ),
    min_size=1,
)


def by_loops(versions: dict[str, Any], device: dict[str, Any], task: str) -> list[str]:
    """Every rule as one condition, in order: best accuracy (unknown last), fewest weights, name."""
    there = set().union(*(BRINGS[s] | {s} for s in device["sensors"])) if device["sensors"] else set()
    found = []
    for name, v in versions.items():
        ram = v["activation_bytes"] + (v["weight_bytes"] if device.get("weights_in") == "ram" else 0)
        if (
            v["weight_bytes"] <= device["flash_bytes"]
            and ram <= device["ram_bytes"]
            and there.issuperset(v["sensor"])
            and task in ("", v["task"])
            and v["task"] in device.get("tasks", TASKS)
            and ("runtime" not in v or v["runtime"] in device.get("runtime", v["runtime"]))
        ):
            found.append(name)
    return sorted(found, key=lambda name: (-versions[name].get("accuracy", -1), versions[name]["weight_bytes"], name))


@settings(max_examples=25, deadline=None)
@given(versions_of, devices_of, st.sampled_from(["", *TASKS]))
def test_the_query_finds_what_plain_loops_find_and_the_reasons_agree(versions: Any, devices: Any, task: str) -> None:
    made = graph(versions, devices)
    for name, device in devices.items():
        found = [fit.version for fit in fits(made, name, task)]
        assert found == by_loops(versions, device, task)
        assert {version for version in versions if not why_not(versions[version], device, task)} == set(found)


READ = {"256 KiB": 262_144, "256kB": 256_000, "1.5 MB": 1_500_000, "2MiB": 2_097_152, "1 GiB": 2**30, "12 B": 12, "7": 7, 9: 9}


@pytest.mark.parametrize(("text", "bytes_"), READ.items())
def test_sizes_are_read_in_units_of_a_thousand_and_of_1024(text: Any, bytes_: int) -> None:
    assert size(text, "flash") == bytes_


@pytest.mark.parametrize("text", ["256 KB", "1 Mb", "-1", -1, "many", 1.5, True, None, "1 2"])
def test_a_size_that_can_be_read_in_two_ways_or_none_is_refused(text: Any) -> None:
    with pytest.raises(UserError, match=r"flash of it is .*: write a number of bytes or one with a unit"):
        size(text, "flash of it")


def test_kib_and_kb_decide_at_the_edge() -> None:
    version = {**VERSION, "weight_bytes": 51_200}
    assert fitting({"v/1": version}, {**BOARD, "flash": "50 KiB"}) == ["v/1"]
    assert fitting({"v/1": version}, {**BOARD, "flash": "50 kB"}) == []


def test_weights_count_in_ram_only_where_the_device_copies_them() -> None:
    assert fitting({"v/1": VERSION}, {**BOARD, "ram": 27_999}) == ["v/1"]
    assert fitting({"v/1": VERSION}, {**BOARD, "ram": 27_999, "weights_in": "ram"}) == []
    assert fitting({"v/1": VERSION}, {**BOARD, "ram": 28_000, "weights_in": "ram"}) == ["v/1"]


def test_a_kind_of_a_sensor_and_a_part_of_one_will_do_and_not_the_other_way_round() -> None:
    moves = {**VERSION, "sensor": ["accelerometer", "gyroscope"]}
    assert fitting({"v/1": VERSION}, {**BOARD, "sensors": ["RGB-Camera"]}) == ["v/1"]
    assert fitting({"v/1": {**VERSION, "sensor": "rgb camera"}}, BOARD) == []
    assert fitting({"v/1": VERSION}, {**BOARD, "sensors": ["thermal camera"]}) == []
    assert fitting({"v/1": moves}, {**BOARD, "sensors": ["MARG"]}) == ["v/1"]
    assert fitting({"v/1": moves}, {**BOARD, "sensors": ["accelerometer"]}) == []
    assert words(["RGB-Camera", "  ", "Wärme_bild"]) == ["rgb camera", "wärme bild"]


def test_what_is_not_known_of_a_version_makes_it_unfit() -> None:
    for key in ("sensor", "weight_bytes", "activation_bytes"):
        unknown = {k: v for k, v in VERSION.items() if k != key}
        assert fitting({"v/1": unknown}, BOARD) == []
        assert why_not(unknown, BOARD) == [f"{key} is not known"]
    assert fitting({"v/1": {**VERSION, "task": None}}, {**BOARD, "tasks": ["digits"]}) == []


def test_each_reason_is_named() -> None:
    device = {**BOARD, "flash": 10, "ram": 9, "weights_in": "ram", "tasks": ["words"], "runtime": "tflm", "sensors": []}
    assert why_not({**VERSION, "runtime": "onnx"}, device, "Gestures") == [
        "weights of 20,000 B do not fit into 10 B of flash",
        "activations and weights of 28,000 B do not fit into 9 B of RAM",
        "sensor 'camera' is not on the device",
        "it is made for digits, not for gestures",
        "the device takes words, not digits",
        "it needs onnx; the device has tflm",
    ]


def test_the_best_accuracy_stands_first_then_the_fewest_weights() -> None:
    versions = {
        "big/1": {**VERSION, "accuracy": 0.9},
        "small/1": {**VERSION, "accuracy": 0.9, "weight_bytes": 10},
        "unknown/1": {**VERSION, "weight_bytes": 1},
        "worse/1": {**VERSION, "accuracy": 0.2},
        "words/1": {**VERSION, "task": "words", "accuracy": 1.0},
    }
    ranking = semantic_management(Offer(facts={"versions": versions, "devices": {"b": BOARD}}), Config(task="digits"))
    assert [(place.version, place.score) for place in ranking.places] == [
        ("small/1", 0.9),
        ("big/1", 0.9),
        ("worse/1", 0.2),
        ("unknown/1", 0.0),
    ]
    assert ranking.places[0].reason == "accuracy 0.900; weights 10 of 50,000 B flash, activations 8,000 of 16,000 B RAM; sensors there"


def test_bytes_of_a_network_follow_from_its_layers() -> None:
    facts = describe(conv())
    assert facts["parameters"] == (4 * 9 + 4) + (4 * 16 * 8 + 8) + (8 * 10 + 10)
    assert facts["weight_bytes"] == 4 * (facts["parameters"] + 2)  # and the pixels' mean and deviation
    assert facts["activation_bytes"] == 4 * (4 * 64 + 4 * 16)  # the pooling: 4 x 8 x 8 in, 4 x 4 x 4 out
    assert facts["layers"][0] == ("Conv2d", [4, 8, 8])
    assert describe(conv(norm="batch"))["weight_bytes"] - facts["weight_bytes"] == 4 * 4 * 4  # gain, offset, mean, variance
    wide = describe(conv(hidden=1000))
    assert wide["activation_bytes"] == 4 * (64 + 1000) * 1


def test_a_network_is_described_without_a_trace() -> None:
    net = conv().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    describe(net)
    assert net.training
    assert all(not module._forward_hooks for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_what_is_not_stated_is_computed_from_the_network_and_stated_facts_go_first() -> None:
    offer = Offer({"v/1": conv(), "v/2": conv()}, facts={"versions": {"v/1": {"sensor": "camera"}}, "devices": {"b": BOARD}})
    assert [place.version for place in semantic_management(offer).places] == ["v/1"]
    heavy = {"v/1": {"sensor": "camera", "weight_bytes": 99_999}}
    assert semantic_management(Offer(offer.nets, facts={**offer.facts, "versions": heavy})).places == ()


def test_turtle_says_it_in_the_ontologies_own_terms() -> None:
    from rdflib import Graph

    made = graph({"v/1": {**VERSION, **describe(conv())}}, {"board": {**BOARD, "sensors": ["imu"]}})
    text = turtle(made)
    for term in ("nnet:NeuralNetwork", "s3n:SmartSensor", "ssn:hasSubSystem", "demo:RAM", "td:title", "nnet:Float32", "demo:Gyroscope"):
        assert term in text
    assert len(Graph().parse(data=text, format="turtle")) == len(made)


def test_what_is_missing_or_unknown_is_said() -> None:
    devices = {"b": BOARD, "a": BOARD}
    offer = Offer(facts={"versions": {"v/1": VERSION}, "devices": devices})
    with pytest.raises(UserError, match="device 'c' is not known; known: a, b"):
        semantic_management(offer, Config(device="c"))
    with pytest.raises(UserError, match="several devices are described: name one; known: a, b"):
        semantic_management(offer)
    with pytest.raises(UserError, match="no devices are described"):
        semantic_management(Offer(facts={"versions": {"v/1": VERSION}}))
    with pytest.raises(UserError, match="no versions to choose from"):
        semantic_management(Offer(facts={"devices": devices}))
    with pytest.raises(UserError, match="device board states no ram"):
        graph({}, {"board": {"flash": 1}})
    with pytest.raises(UserError, match="states flash and flash_bytes, and they differ"):
        graph({}, {"board": {"flash": "1 kB", "flash_bytes": 1024, "ram": 1}})
    with pytest.raises(UserError, match="weights_in of device board is 'disk'"):
        graph({}, {"board": {**BOARD, "weights_in": "disk"}})
