"""`train.bert`: what texts without a label are for, what it starts from, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.encoder import TextClassifier
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.train.bert import SMOKE, Config, bert
from tests.claims.texts import text_dataset

CLASSES = ("money", "weather")
SAID = (("bank", "coin", "loan", "price"), ("rain", "storm", "cloud", "wind"))
COMMON = ("the", "of", "today", "again", "and")
QUICK = Config(layers=1, width=16, heads=2, words=256, longest=12, pretrain_steps=3, steps=4, batch=8)


def sayings(n: int = 60, seed: int = 0, labelled: bool = True) -> Dataset:
    draw = np.random.default_rng(seed)
    rows = [" ".join([*draw.choice(SAID[at % 2], 2), *draw.choice(COMMON, 3)]) for at in range(n)]
    return text_dataset(rows, np.arange(n) % 2 if labelled else np.full(n, -1), CLASSES, prefix=f"s{seed}-")


def weights(net: Net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


def test_two_kinds_of_texts_are_told_apart() -> None:
    net = bert(sayings(), QUICK.model_copy(update={"steps": 80, "lr": 0.01}))
    test = sayings(100, seed=1)
    assert (loop.predict(net, test.inputs()).argmax(1).numpy() == test.labels()).mean() > 0.95
    assert not net.training
    assert networks.reads(net.arch)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (weights(bert(sayings(), QUICK, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_texts_without_a_label_teach_in_pre_training_alone() -> None:
    known, pool = sayings(), sayings(40, seed=3, labelled=False)
    assert not torch.equal(weights(bert(known, QUICK)), weights(bert(known + pool, QUICK)))
    alone = QUICK.model_copy(update={"pretrain_steps": 0})
    assert torch.equal(weights(bert(known, alone)), weights(bert(known + pool, alone)))


def test_labels_are_not_looked_at_where_it_pre_trains_alone() -> None:
    cfg = QUICK.model_copy(update={"steps": 0})
    assert torch.equal(weights(bert(sayings(), cfg)), weights(bert(sayings().without_labels(), cfg)))


def test_it_goes_on_from_a_copy_of_the_model_that_is_given() -> None:
    old = bert(sayings(), QUICK, seed=5)
    before = weights(old)
    still = bert(sayings(), QUICK.model_copy(update={"pretrain_steps": 0, "lr": 1e-9}), start=old)
    assert torch.allclose(weights(still), before, atol=1e-5)
    more = bert(sayings(), QUICK.model_copy(update={"steps": 0, "pretrain_steps": 2}), start=old)
    assert not torch.equal(weights(more), before)
    assert torch.equal(weights(old), before)
    assert more is not old


CHANGES: list[dict[str, Any]] = [
    {"layers": 2}, {"width": 32}, {"heads": 1}, {"words": 100}, {"dropout": 0.2}, {"longest": 4}, {"pooling": "first"},
    {"pretrain_steps": 4}, {"pretrain_batch": 4}, {"pretrain_lr": 5e-4}, {"steps": 5}, {"batch": 4}, {"lr": 2e-3},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_setting_changes_the_model(change: dict[str, Any]) -> None:
    base, other = (bert(sayings(24), QUICK.model_copy(update=update)) for update in ({}, change))
    assert weights(base).shape != weights(other).shape or not torch.equal(weights(base), weights(other))


def test_a_folder_of_weights_is_gone_on_from(tmp_path: Any) -> None:
    from tests.core.test_texts import saved

    cfg = QUICK.model_copy(update={"pretrained": str(saved(tmp_path / "kept", "bert"))})
    net = bert(sayings(), cfg)
    assert isinstance(net, TextClassifier)
    assert net.arch["tokens"]["kind"] == "file"
    assert net.encoder.config.num_hidden_layers == 2
    assert loop.predict(net, sayings().inputs()).isfinite().all()


def test_what_it_cannot_learn_from_is_refused(tiny: Dataset) -> None:
    with pytest.raises(UserError, match=r"these rows hold images \(1, 8, 8\), and this method reads texts: give it a pool of 'texts:PATH'"):
        bert(tiny.split("train"), SMOKE)
    with pytest.raises(UserError, match="the data has no rows"):
        bert(sayings().where(np.zeros(60, bool)), SMOKE)
    images = networks.convnet((1, 8, 8), 2, widths=(4,), hidden=8, mean=0.3, std=0.4)
    with pytest.raises(UserError, match=r"the model to start from takes images \(1, 8, 8\) of 2 classes; the data has texts of 2"):
        bert(sayings(), SMOKE, start=images)
    money = sayings().where(sayings().labels() == 0)
    with pytest.raises(UserError, match="weather"):
        bert(money, SMOKE)
    with pytest.raises(UserError, match="'fine-tune' diverged"):
        bert(sayings(), QUICK.model_copy(update={"lr": float("inf")}))
