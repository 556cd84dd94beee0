"""What distillers share: what teachers say of each row, asked once or anew, the mean of several, and the student to start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill import _shared
from tasks.distill._shared import Answers, answers, begun, check, fit, kl, labelled, log_mean, moved


def teacher(seed: int = 0, classes: int = 10) -> Net:
    with loop.seeded(seed):
        return networks.convnet((1, 8, 8), classes, widths=(8,), hidden=16, mean=0.3, std=0.4)


def test_moved_images_are_shifted_and_repeat_their_edge() -> None:
    images = np.arange(48, dtype=np.uint8).reshape(3, 1, 4, 4)
    assert np.array_equal(moved(images, 0, torch.Generator()), images)
    out = moved(images, 1, torch.Generator().manual_seed(3))
    for image, result in zip(images, out, strict=True):
        padded = np.pad(image[0], 1, mode="edge")
        assert any(np.array_equal(result[0], padded[i : i + 4, j : j + 4]) for i in range(3) for j in range(3))
    assert not np.array_equal(out, images)


def test_the_mean_of_teachers_is_that_of_their_probabilities_at_a_temperature() -> None:
    logits = torch.tensor([[[0.0, 2.0]], [[2.0, 0.0]]])
    assert torch.allclose(log_mean(logits).exp(), torch.tensor([[0.5, 0.5]]))
    one = logits[:1]
    assert torch.allclose(log_mean(one, 2.0), torch.log_softmax(torch.tensor([[0.0, 1.0]]), 1))


def test_the_divergence_of_a_certain_row_is_finite_and_of_equal_rows_nothing() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
    q = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    assert kl(p, q).tolist() == pytest.approx([np.log(2), 0.0])


def test_what_was_looked_up_is_what_would_be_asked_and_moved_images_are_asked_anew(tiny: Dataset) -> None:
    rows = tiny.take(np.arange(12))
    images, at = rows.images(), torch.tensor([3, 0, 7])
    seen = loop.to_float(images[at.numpy()])
    known, live = Answers([teacher(1), teacher(2)], rows, images), Answers([teacher(1), teacher(2)], rows, images, shift=1)
    assert known(at, seen).shape == (2, 3, 10)
    assert torch.allclose(known(at, seen), live(at, seen), atol=1e-5)
    other = seen.roll(1, 3)
    assert torch.equal(known(at, other), known(at, seen))
    assert not torch.allclose(live(at, other), live(at, seen), atol=1e-3)


def test_answers_on_many_rows_of_a_project_are_kept_and_found_again(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    shutil.copytree(tiny.parts[0].folder, tmp_path / "data" / "pool")
    rows = Dataset.open(tmp_path / "data" / "pool").split("train")
    monkeypatch.setattr(_shared, "CACHE_FROM_ROWS", 10)
    monkeypatch.setattr(_shared, "AT_ONCE", 7)  # the last piece is a short one
    first = answers([teacher(1)], rows, rows.images())
    (kept,) = (tmp_path / ".retort" / "cache" / "answers").iterdir()
    np.testing.assert_allclose(first[0], loop.predict(teacher(1), rows.images()).numpy(), atol=1e-5)
    inode = kept.stat().st_ino
    assert isinstance(answers([teacher(1)], rows, rows.images())[0], np.memmap)
    assert kept.stat().st_ino == inode
    answers([teacher(2)], rows, rows.images())
    fewer = rows.take(np.arange(20))
    answers([teacher(1)], fewer, fewer.images())
    assert len(list(kept.parent.iterdir())) == 3  # another teacher, and other rows, are not taken for these


def test_a_student_is_fresh_or_a_copy_that_can_learn(tiny: Dataset) -> None:
    images = tiny.images()
    with loop.seeded(0):
        fresh = begun(None, images, tiny.info, widths=(4,), hidden=8)
    old = teacher(3).requires_grad_(False)
    copied = begun(old, images, tiny.info, widths=(4,), hidden=8)
    assert fresh.arch["widths"] == [4]
    assert copied is not old
    assert all(weights.requires_grad for weights in copied.parameters())
    assert not any(weights.requires_grad for weights in old.parameters())


def test_weights_that_are_frozen_stay_and_the_others_learn(tiny: Dataset) -> None:
    images, labels = tiny.images(), torch.from_numpy(tiny.labels()).clamp_min(0)
    net = teacher()
    net.body.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    recipe = {"steps": 3, "batch": 8, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    loss = nn.CrossEntropyLoss()
    fit(net, images, lambda seen, at: loss(net(seen), labels[at]), **recipe, generator=torch.Generator().manual_seed(0))
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_what_does_not_fit_is_named(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="at least one teacher"):
        check([], tiny)
    with pytest.raises(UserError, match="the data has no rows"):
        check([teacher()], tiny.take(np.arange(0)))
    with pytest.raises(UserError, match="teacher 1 takes images"):
        check([teacher(), teacher(classes=3)], tiny)
    with pytest.raises(UserError, match="the student to start from takes images"):
        check([teacher()], tiny, teacher(classes=3))
    with pytest.raises(UserError, match="no row of the data has a label: this loss wants them"):
        labelled(tiny.without_labels(), "this loss wants them")
