"""KRR-ST: its pool, its gradients and the whole run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks.condense import _shared
from tasks.condense.kmeans import Config as KmeansConfig
from tasks.condense.kmeans import kmeans
from tasks.condense.krr_st import SMOKE, Config, Pool, krr_st, outer_gradient
from tasks.condense.random import Config as RandomConfig
from tasks.condense.random import random
from tasks.core import catalog
from tasks.core.dataset import Dataset, decode
from tasks.core.errors import UserError
from tasks.core.method import Made


def pool(limit: int, size: int = 3) -> tuple[Pool, torch.Tensor, torch.Tensor]:
    images, targets = torch.rand(6, 1, 8, 8), torch.randn(6, 2)
    made = Pool(size, images, targets, widths=(4,), mean=0.5, std=0.3, limit=limit, lr=0.01, generator=torch.Generator().manual_seed(0))
    return made, images, targets


def test_nets_of_the_pool_start_at_different_ages_below_the_limit() -> None:
    made, _, _ = pool(limit=12, size=6)
    assert all(1 <= count < 12 for count in made.counts)
    assert len(set(made.counts)) > 1


def test_a_net_at_the_limit_is_replaced_once_and_its_count_starts_from_zero() -> None:
    made, images, targets = pool(limit=5, size=1)
    seen, nets = [], []
    for _ in range(11):
        nets.append(made.nets[0])
        made.advance(0, images, targets)
        seen.append(made.counts[0])
    first = seen.index(0)
    assert seen[first:] == [(at - first) % 5 for at in range(first, 11)]
    fresh = [at for at in range(1, 11) if nets[at] is not nets[at - 1]]
    assert fresh == [at + 1 for at in range(10) if seen[at] == 0]


def test_advancing_one_net_leaves_the_others_as_they_are() -> None:
    made, images, targets = pool(limit=50)
    before = [[weights.clone() for weights in net.parameters()] for net in made.nets]
    made.advance(1, images, targets)
    same = [all(torch.equal(a, b) for a, b in zip(old, net.parameters(), strict=True)) for old, net in zip(before, made.nets, strict=True)]
    assert same == [True, False, True]


def test_a_limit_of_one_step_gives_fresh_nets_only() -> None:
    made, images, targets = pool(limit=1)
    made.advance(0, images, targets)
    assert made.counts[0] == 0


def test_the_outer_gradient_is_that_of_the_krr_loss_and_touches_no_weight() -> None:
    torch.manual_seed(0)
    net = _shared.SmallNet((1, 8, 8), 2, (3,), 0.5, 0.3).double().eval()
    images, targets = torch.rand(4, 1, 8, 8).double().requires_grad_(), torch.randn(4, 2).double().requires_grad_()
    real, wanted = torch.rand(7, 1, 8, 8).double(), torch.randn(7, 2).double()
    for_images, for_targets, loss = outer_gradient(net, images, targets, real, wanted)
    step = torch.zeros_like(images)
    step[2, 0, 3, 4] = 1e-6
    with torch.no_grad():
        again = _shared.krr_loss(net.features(real), net.features(images + step), targets, wanted).item()
        moved = F.mse_loss(_shared.krr_predict(net.features(real), net.features(images), targets), wanted).item()
    assert loss == pytest.approx(moved)
    assert (again - loss) / 1e-6 == pytest.approx(for_images[2, 0, 3, 4].item(), rel=1e-2)
    assert for_targets.abs().amin() > 0
    assert all(weights.grad is None for weights in net.parameters())


@pytest.mark.parametrize(("init", "baseline"), [("random", random), ("kmeans", kmeans)])
def test_without_outer_steps_it_is_the_baseline_whose_rows_it_begins_as(
    init: Literal["random", "kmeans"], baseline: Callable[..., Made], tiny: Dataset
) -> None:
    settings = SMOKE.model_dump()
    data, held_out = tiny.split("train"), tiny.split("validation")
    ours = krr_st(data, held_out, 7, Config(**settings | {"outer_steps": 0, "init": init}), seed=5)
    shared = {name: settings[name] for name in RandomConfig.model_fields}
    theirs = baseline(data, held_out, 7, {"random": RandomConfig, "kmeans": KmeansConfig}[init](**shared), seed=5)
    for column in ("image", "pixels", "target", "parents"):
        assert ours.rows[column].equals(theirs.rows[column])
    assert ours.figures["heldout_loss"] == ours.figures[f"heldout_loss_{init}"] == theirs.figures["heldout_loss"]
    assert (ours.figures["won_over_random"] == 0) == (init == "random")
    assert ours.figures["pixels_moved"] == 0


def test_other_first_rows_leave_the_arms_that_it_is_compared_with_as_they_are(tiny: Dataset) -> None:
    one, other = (
        krr_st(tiny.split("train"), tiny.split("validation"), 7, SMOKE.model_copy(update={"init": init}), seed=5).figures
        for init in ("random", "kmeans")
    )
    for figure in ("heldout_loss_random", "heldout_loss_kmeans", "encoder_loss"):
        assert one[figure] == other[figure]
    assert one["heldout_loss"] != other["heldout_loss"]


def test_rows_that_nobody_knows_how_to_begin_as_are_refused() -> None:
    with pytest.raises(UserError, match=r"condense\.krr_st.*init.*'random' or 'kmeans'"):
        catalog.configure("condense.krr_st", {"init": "herding"})


@pytest.mark.parametrize("init", ["random", "kmeans"])
def test_the_course_leads_from_real_images_to_what_was_learned(init: str, tiny: Dataset) -> None:
    data = tiny.split("train")
    cfg = SMOKE.model_copy(update={"outer_steps": 32, "init": init})
    made = krr_st(data, tiny.split("validation"), 20, cfg, seed=2)
    assert made.course is not None
    steps = made.course["step"].to_numpy().reshape(-1, 12)
    assert steps[:, 0].tolist() == [0, 1, 2, 4, 8, 16, 32]
    assert (steps == steps[:, :1]).all()
    images = decode(made.course["image"].combine_chunks().field("bytes").to_pylist(), (1, 8, 8)).reshape(7, 12, 1, 8, 8)
    rows = dict(zip(made.rows["sample_id"].to_pylist(), made.rows.to_pylist(), strict=True))
    real = dict(zip(data.ids(), data.images(), strict=True))
    for at, name in enumerate(made.course["sample_id"].to_pylist()[:12]):
        np.testing.assert_array_equal(images[0, at], real[rows[name]["parents"][0]])
        np.testing.assert_array_equal(images[-1, at], decode([rows[name]["image"]["bytes"]], (1, 8, 8))[0])
    still = krr_st(data, tiny.split("validation"), 20, cfg.model_copy(update={"outer_steps": 0}), seed=2)
    assert still.course is None


def test_parents_are_all_source_rows_and_no_held_out_row(tiny: Dataset) -> None:
    made = krr_st(tiny.split("train"), tiny.split("validation"), 4, SMOKE)
    parents = made.rows["parents"].to_pylist()
    assert all(len(own) == len(set(own)) == 60 for own in parents)
    assert len({frozenset(own) for own in parents}) == 1
    assert set(parents[0]) <= set(tiny.split("train").ids())
    assert len({own[0] for own in parents}) == 4  # what each started from


def test_same_seed_same_rows_and_another_seed_others(tiny: Dataset) -> None:
    state = torch.get_rng_state()
    one, two, three = (krr_st(tiny.split("train"), tiny.split("validation"), 4, SMOKE, seed=seed) for seed in (1, 1, 2))
    assert one.rows.equals(two.rows)
    assert one.figures == two.figures
    assert one.curve == two.curve
    assert not one.rows["pixels"].equals(three.rows["pixels"])
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_held_out_only_measures(tiny: Dataset) -> None:
    one, two = (krr_st(tiny.split("train"), tiny.split(split), 4, SMOKE) for split in ("validation", "reference"))
    assert one.rows.equals(two.rows)
    assert one.figures["heldout_loss"] != two.figures["heldout_loss"]


def test_both_images_and_targets_are_learned(tiny: Dataset) -> None:
    before, after = (
        krr_st(tiny.split("train"), tiny.split("validation"), 4, SMOKE.model_copy(update={"outer_steps": steps})) for steps in (0, 6)
    )
    for column in ("pixels", "target"):
        old, new = (np.array(made.rows[column].to_pylist()) for made in (before, after))
        assert (np.abs(old - new).max(axis=1) > 1e-3).all()


def test_what_a_shift_lets_in_is_a_setting(tiny: Dataset) -> None:
    wide = SMOKE.model_copy(update={"outer_shift": 0.25})
    edge, black = (
        krr_st(tiny.split("train"), tiny.split("validation"), 4, wide.model_copy(update={"outer_fill": fill})) for fill in ("edge", "black")
    )
    assert edge.rows["parents"].equals(black.rows["parents"])
    assert not edge.rows["pixels"].equals(black.rows["pixels"])


def test_it_wins_over_random_images_on_held_out_digits(tiny: Dataset) -> None:
    cfg = Config(widths=(16, 32), dim=32, encoder_steps=60, outer_steps=80, inner_steps=40, outer_batch=64, nets=2)
    made = krr_st(tiny.split("train", "reference"), tiny.split("validation", "test"), 20, cfg)
    assert made.figures["won_over_random"] > 0.15
    assert made.curve[-1]["loss"] < made.curve[0]["loss"]


def test_too_few_rows_is_an_error(tiny: Dataset) -> None:
    with pytest.raises(UserError, match="n = 30 samples: the data has 20 rows"):
        krr_st(tiny.take(np.arange(20)), tiny.split("validation"), 30, SMOKE)
