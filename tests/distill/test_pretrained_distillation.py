"""Pre-trained distillation: its loss by hand, what each of its three stages sees, several teachers, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from flows._students import Candidate
from tasks.core import loop, networks, texts
from tasks.core.dataset import Dataset
from tasks.core.encoder import TextClassifier
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.distill.pretrained_distillation import Config, pretrained_distillation, soft_cross_entropy
from tasks.train.bert import Config as Bert
from tasks.train.bert import bert
from tests.claims.texts import text_dataset
from tests.core.test_texts import saved
from tests.train.test_bert import CLASSES, sayings, weights

QUICK = Config(layers=1, width=16, heads=2, words=256, longest=12, pretrain_steps=3, steps=4, batch=8)
ALL = QUICK.model_copy(update={"finetune_steps": 3})


def teacher(seed: int = 0, classes: int = 2) -> TextClassifier:
    with loop.seeded(seed):
        own: dict[str, Any] = {"words": 100, "longest": 16, "dropout": 0.1, "pooling": "mean"}
        return texts.fresh(classes, layers=1, width=32, heads=2, **own)


def permuted(data: Dataset) -> Dataset:
    """The same texts, every label another one."""
    return text_dataset(data.captions(), 1 - data.labels(), CLASSES)


def test_the_soft_cross_entropy_by_hand() -> None:
    # the teacher's probabilities are 1/4 and 3/4, the student's 1/2 and 1/2, then 1/4 and 3/4
    teachers = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    by_hand = (math.log(2) + 0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / 2
    assert soft_cross_entropy(logits, teachers).item() == pytest.approx(by_hand)


def test_a_student_follows_the_mean_of_its_teachers_where_no_label_is_known() -> None:
    recipe = Bert(layers=1, width=32, heads=2, words=256, longest=12, pretrain_steps=0, steps=60, lr=0.01)
    experts = [bert(sayings(seed=seed), recipe, seed=seed) for seed in (0, 1)]
    cfg = QUICK.model_copy(update={"steps": 100, "lr": 0.01})
    student = pretrained_distillation(experts, sayings(seed=2, labelled=False), cfg)
    test = sayings(100, seed=7).inputs()
    said = sum(loop.predict(net, test).softmax(1) for net in experts).argmax(1)
    assert (loop.predict(student, test).argmax(1) == said).float().mean() > 0.95
    assert not student.training
    assert networks.parameters(student) < networks.parameters(experts[0])


def test_no_label_counts_but_in_fine_tuning() -> None:
    data = sayings()
    for known in (permuted(data), data.without_labels()):
        made = (pretrained_distillation([teacher()], rows, QUICK) for rows in (data, known))
        assert torch.equal(*map(weights, made))
    made = (pretrained_distillation([teacher()], rows, ALL) for rows in (data, permuted(data)))
    assert not torch.equal(*map(weights, made))


def test_fine_tuning_sees_the_labelled_texts_alone() -> None:
    pool, known = sayings(seed=3, labelled=False), sayings()
    one, other = (text_dataset(["rain"], [label], CLASSES) for label in (0, 1))
    made = [weights(pretrained_distillation([teacher()], rows, ALL)) for rows in (pool + one, pool + other, pool + known)]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_stages_are_those_of_the_parts_one_after_the_other() -> None:
    data = sayings()
    done = pretrained_distillation([teacher()], data, QUICK, seed=4)
    with loop.seeded(4) as generator:
        net, tokens = texts.begin(data, QUICK, start=None, generator=generator)
        said = loop.predict(teacher(), data.inputs()).softmax(1)

        def loss(logits: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return -(said[at] * logits.log_softmax(1)).sum(1).mean()

        texts.fit(net, tokens, loss, steps=4, batch=8, lr=QUICK.lr, generator=generator)
    # the keys' biases are moved by rounding alone, and answers do not hang on them
    assert torch.allclose(loop.predict(done, data.inputs()), loop.predict(net, data.inputs()), atol=1e-4)


def test_the_same_seed_gives_the_same_student_and_another_seed_another() -> None:
    first, again, other = (weights(pretrained_distillation([teacher()], sayings(), ALL, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_teachers_and_the_student_to_start_from_are_left_as_they_were() -> None:
    given, old = [teacher(1).train(), teacher(2)], teacher(3)
    before = [weights(net) for net in (*given, old)]
    modes = [net.training for net in given]
    student = pretrained_distillation(given, sayings(), ALL, start=old)
    assert all(torch.equal(weights(net), content) for net, content in zip((*given, old), before, strict=True))
    assert [net.training for net in given] == modes
    assert student is not old
    assert student.arch == old.arch
    assert not torch.equal(weights(student), before[2])


def test_every_teacher_counts() -> None:
    one, two = ([teacher(1)], [teacher(1), teacher(2)])
    made = (pretrained_distillation(given, sayings(), QUICK) for given in (one, two))
    assert not torch.equal(*map(weights, made))
    same = (pretrained_distillation(given, sayings(), QUICK) for given in (one, [*one, *one]))
    assert torch.allclose(*map(weights, same), atol=1e-5)


def test_a_student_that_was_pre_trained_elsewhere_is_gone_on_from() -> None:
    data = sayings()
    old = bert(data, Bert(**{**QUICK.model_dump(include=set(texts.Encoder.model_fields)), "steps": 0}))
    still = QUICK.model_copy(update={"pretrain_steps": 0, "lr": 1e-9})
    assert torch.allclose(weights(pretrained_distillation([teacher()], data, still, start=old)), weights(old), atol=1e-5)
    on = still.model_copy(update={"pretrain_steps": 2})
    assert not torch.allclose(weights(pretrained_distillation([teacher()], data, on, start=old)), weights(old), atol=1e-4)


CHANGES: list[dict[str, Any]] = [
    {"layers": 2}, {"width": 32}, {"pooling": "first"}, {"dropout": 0.2}, {"pretrain_steps": 0}, {"pretrain_lr": 1e-3}, {"steps": 5},
    {"batch": 4}, {"lr": 5e-4}, {"finetune_steps": 0}, {"finetune_lr": 1e-3},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_setting_changes_the_student(change: dict[str, Any]) -> None:
    base, other = (weights(pretrained_distillation([teacher()], sayings(24), ALL.model_copy(update=update))) for update in ({}, change))
    assert base.shape != other.shape or not torch.equal(base, other)


def test_teacher_and_student_may_cut_texts_in_different_ways(tmp_path: Any) -> None:
    cfg = QUICK.model_copy(update={"pretrained": str(saved(tmp_path / "kept", "distilbert"))})
    student = pretrained_distillation([teacher()], sayings(), cfg)
    assert student.arch["tokens"]["kind"] == "file"
    assert student.arch["encoder"]["model_type"] == "distilbert"
    assert loop.predict(student, sayings().inputs()).isfinite().all()


def test_what_it_cannot_learn_from_is_refused(tiny: Dataset) -> None:
    def images(classes: int) -> Net:
        return networks.convnet((1, 8, 8), classes, widths=(4,), hidden=8, mean=0.3, std=0.4)

    data = sayings()
    with pytest.raises(UserError, match="at least one teacher"):
        pretrained_distillation([], data, QUICK)
    with pytest.raises(UserError, match=r"these rows hold images \(1, 8, 8\), and this method reads texts"):
        pretrained_distillation([images(10)], tiny.split("train"), QUICK)
    with pytest.raises(UserError, match=r"teacher 1 takes images \(1, 8, 8\) of 2 classes; the data has texts of 2"):
        pretrained_distillation([teacher(), images(2)], data, QUICK)
    with pytest.raises(UserError, match="teacher 0 takes texts of 3 classes; the data has texts of 2"):
        pretrained_distillation([teacher(classes=3)], data, QUICK)
    with pytest.raises(UserError, match="the student to start from takes texts of 3 classes"):
        pretrained_distillation([teacher()], data, QUICK, start=teacher(classes=3))
    with pytest.raises(UserError, match="the data has no rows"):
        pretrained_distillation([teacher()], data.where(np.zeros(60, bool)), QUICK)
    with pytest.raises(UserError, match="no row of the data has a label: fine-tuning learns from labels alone; set 'finetune_steps' to 0"):
        pretrained_distillation([teacher()], data.without_labels(), ALL)


def test_the_first_steps_of_a_sweep_are_few_of_both_stages() -> None:
    short = Candidate("", "distill.pretrained_distillation", {"steps": 40, "pretrain_steps": 200}).shortened(0.25)
    assert short
    assert short.settings == {"steps": 10, "pretrain_steps": 50}
    none = Candidate("", "distill.pretrained_distillation", {"steps": 40, "pretrain_steps": 0}).shortened(0.25)
    assert none
    assert none.settings == {"steps": 10, "pretrain_steps": 0}
