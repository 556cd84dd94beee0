"""Networks: rebuilt from their description, the right shapes at every image size, alone in one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import loop, networks


def net(shape: tuple[int, int, int] = (1, 8, 8), widths: tuple[int, ...] = (4, 6), hidden: int = 5) -> networks.Net:
    with loop.seeded(0):
        return networks.convnet(shape, 3, widths=widths, hidden=hidden, mean=0.25, std=0.5)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 3]), st.integers(8, 33), st.integers(8, 33), st.integers(1, 3))
def test_every_image_size_gives_one_row_of_logits_for_each_image(channels: int, height: int, width: int, depth: int) -> None:
    made = net((channels, height, width), (4, 4, 4)[:depth])
    images = torch.rand(2, channels, height, width)
    assert made.features(images).shape == (2, 5)
    assert made(images).shape == (2, 3)


def test_a_network_built_from_its_arch_and_weights_answers_the_same() -> None:
    first = net((3, 17, 20))
    second = networks.build(first.arch)
    second.load_state_dict(first.state_dict())
    images = torch.rand(4, 3, 17, 20)
    assert torch.equal(first(images), second(images))


def test_the_convnet_is_convolution_relu_and_pooling_of_standardised_pixels() -> None:
    made = net(widths=(4,))
    images = torch.rand(3, 1, 8, 8)
    conv, _, _, _, hidden, _ = made.body
    by_hand = torch.nn.functional.max_pool2d(torch.relu(conv((images - 0.25) / 0.5)), 2).flatten(1)
    assert torch.allclose(made.features(images), torch.relu(hidden(by_hand)), atol=1e-6)


def test_weights_stay_contiguous_after_training_steps() -> None:
    made = net()
    optimiser = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        made(torch.rand(4, 1, 8, 8)).sum().backward()
        optimiser.step()
    assert all(weights.is_contiguous() for weights in made.state_dict().values())


def test_parameters_are_counted_by_hand() -> None:
    # two convolutions, 2x2x6 inputs of the hidden layer, the head
    assert networks.parameters(net()) == (4 * 9 + 4) + (6 * 4 * 9 + 6) + (24 * 5 + 5) + (5 * 3 + 3)


def test_an_unknown_kind_and_a_too_small_image_are_refused() -> None:
    with pytest.raises(ValueError, match="'transformer' is not known; known: convnet"):
        networks.build({"kind": "transformer"})
    with pytest.raises(ValueError, match="4x4 are too small for 3 poolings"):
        net((1, 4, 4), (4, 4, 4))


def test_the_file_stands_alone() -> None:
    tree = ast.parse(Path(networks.__file__).read_text(encoding="utf-8"))
    named = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    assert named == {"__future__", "importlib", "typing", "torch"}
