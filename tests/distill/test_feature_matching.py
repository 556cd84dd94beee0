"""Hints: which layers they are taken of, the regressors, a first stage that leaves the upper half alone, and what follows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill.feature_matching import Config, Layers, cut, feature_matching, hint_loss, hinted, middle, regressor
from tasks.train.supervised import Config as Training
from tasks.train.supervised import supervised

QUICK = Config(widths=(4, 4), hidden=8, hint_steps=3, steps=4, batch=8)
RECIPE = {"steps": 150, "batch": 16, "lr": 0.03, "momentum": 0.9, "weight_decay": 0.0}


def teacher(seed: int = 0, classes: int = 10, widths: tuple[int, ...] = (8, 16), norm: str = "") -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=widths, hidden=16, mean=0.3, std=0.4, norm=norm)


class Flat(Net):
    """A network that is not built of blocks."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        self.hidden = nn.Linear(64, 12)
        self.head = nn.Linear(12, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.hidden(images.flatten(1)).relu()


def flat() -> Net:
    with loop.seeded(9):
        return Flat({"kind": "flat", "shape": [1, 8, 8], "classes": 10, "mean": 0.0, "std": 1.0})


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def test_the_middle_is_counted_over_the_blocks_and_the_hidden_layer() -> None:
    three = teacher(widths=(4, 4, 4))  # of convolution, pooling and ReLU each
    assert [cut(three, "maps", depth) for depth in (0.1, 0.25, 0.26, 0.5, 0.75, 1.0)] == [3, 3, 6, 6, 9, 9]
    assert cut(teacher(widths=(4,)), "auto", 0.5) == 3
    assert cut(teacher(), "auto", 0.5) == 6
    assert cut(teacher(widths=(4, 4, 4), norm="batch"), "auto", 0.5) == 8
    assert cut(three, "features", 0.5) is None
    assert cut(flat(), "auto", 0.5) is None


def test_maps_are_what_the_blocks_give_and_features_what_stands_before_the_last_layer() -> None:
    net, images = teacher(), torch.rand(3, 1, 8, 8)
    assert middle(net, images, 3).shape == (3, 8, 4, 4)
    assert middle(net, images, 6).shape == (3, 16, 2, 2)
    assert torch.allclose(net.body[6:](middle(net, images, 6)), net.features(images))
    assert torch.equal(middle(net, images, None), net.features(images))


def test_a_regressor_gives_the_hints_shape_whatever_it_is_given() -> None:
    for given, wanted in (((2, 4, 2, 2), (2, 16, 4, 4)), ((2, 4, 4, 4), (2, 16, 2, 2)), ((2, 5), (2, 7))):
        assert regressor(torch.zeros(given), torch.zeros(wanted))(torch.zeros(given)).shape == wanted


def test_the_hints_error_is_a_share_of_its_mean_square() -> None:
    hint = torch.tensor([[1.0, 3.0]])
    assert hint_loss(hint, hint).item() == 0
    assert hint_loss(torch.zeros(1, 2), hint).item() == pytest.approx(1)
    assert hint_loss(torch.tensor([[1.0, 1.0]]), hint).item() == pytest.approx(4 / 10)
    assert hint_loss(torch.tensor([[100.0, 100.0]]), 100 * hint).item() == pytest.approx(4 / 10)
    assert hint_loss(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0


@pytest.mark.parametrize(("layers", "still"), [("maps", 2), ("features", 0)])
def test_the_first_stage_brings_the_guided_layer_to_the_hint_and_leaves_what_is_above(tiny: Dataset, layers: Layers, still: int) -> None:
    images, student = tiny.split("train").images(), teacher(7)
    given = supervised(tiny.split("train"), Training(steps=60, widths=(8, 16), hidden=16))
    before = [weights(layer) for layer in (*student.body, student.head) if list(layer.parameters())]
    generator = torch.Generator().manual_seed(0)
    [learnt] = hinted(student, [given], images, RECIPE, layers=layers, depth=0.5, generator=generator, device="cpu")
    with torch.no_grad():
        seen = loop.to_float(images)
        ours, hint = (middle(net, seen, cut(net, layers, 0.5)) for net in (student, given))
        assert hint_loss(learnt(ours), hint) < 0.7 * hint_loss(hint.mean(0, keepdim=True).expand_as(hint), hint)
    after = [weights(layer) for layer in (*student.body, student.head) if list(layer.parameters())]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    # of two convolutions, the hidden and the last layer
    assert same == [False, False, still == 2, True]


def test_a_student_that_was_hinted_follows_its_teacher(tiny: Dataset) -> None:
    train, test = tiny.split("train"), tiny.split("test").images()
    expert = supervised(train, Training(steps=100, widths=(8, 16), hidden=32))
    student = feature_matching([expert], train.without_labels(), Config(widths=(8, 16, 16), hidden=32, hint_steps=60, steps=250, lr=0.02))
    assert (loop.predict(student, test).argmax(1) == loop.predict(expert, test).argmax(1)).float().mean() > 0.6


def test_any_two_networks_can_be_matched_and_several_at_once(tiny: Dataset) -> None:
    data = tiny.split("validation")
    first = weights(feature_matching([teacher()], data, QUICK))
    for given in ([teacher(widths=(8,))], [teacher(norm="batch")], [flat()], [teacher(), flat()], [teacher(1), teacher(2)]):
        found = weights(feature_matching(given, data, QUICK))
        assert torch.isfinite(found).all()
        assert not torch.equal(found, first)


CHANGES = [{"hint_steps": 0}, {"hint_steps": 4}, {"hint_lr": 0.1}, {"layers": "features"}, {"depth": 0.1}, {"tau": 1.0}]


@pytest.mark.parametrize("change", [*CHANGES, {"lam_first": 3.0}, {"lam_last": 0.0}, {"shift": 1}, {"lr": 0.01}])
def test_every_setting_changes_the_student(tiny: Dataset, change: dict[str, object]) -> None:
    data = tiny.split("validation")
    base, other = (feature_matching([teacher()], data, QUICK.model_copy(update=update)) for update in ({}, change))
    assert not torch.equal(weights(base), weights(other))


def test_labels_and_rows_without_them_both_count_and_a_start_is_gone_on_from(tiny: Dataset) -> None:
    data, pool = tiny.split("validation"), tiny.split("reference").without_labels()
    first = weights(feature_matching([teacher()], data, QUICK))
    assert not torch.equal(first, weights(feature_matching([teacher()], data.without_labels(), QUICK)))
    assert not torch.equal(first, weights(feature_matching([teacher()], data + pool, QUICK)))
    old = teacher(5)
    still = feature_matching([teacher()], data, QUICK.model_copy(update={"lr": 1e-9, "hint_lr": 1e-9}), start=old)
    assert torch.allclose(weights(still), weights(old), atol=1e-5)


def test_what_it_cannot_learn_from_is_refused(tiny: Dataset) -> None:
    data = tiny.split("validation")
    with pytest.raises(UserError, match="at least one teacher"):
        feature_matching([], data, QUICK)
    with pytest.raises(UserError, match="a network of kind 'flat' has no maps to match; set 'layers' to features"):
        feature_matching([flat()], data, QUICK.model_copy(update={"layers": "maps"}))
    with pytest.raises(UserError, match="teacher 0 takes images"):
        feature_matching([teacher(classes=3)], data, QUICK)
