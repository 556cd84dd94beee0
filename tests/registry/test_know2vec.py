"""Know2Vec: boundaries and the ranking loss by hand, what a version is asked, what a matcher keeps, and queries that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.registry import Offer
from tasks.registry._knowledge import answers, blend, boundary, embedded, in_order, probed, ranking_loss, task_cells, unit, zoo_tasks
from tasks.registry.know2vec import SMOKE, Config, Matcher, Reader, asking, fit_matcher, fit_reader, know2vec, left_out, rank, read_each

ASKING = {"draws": 2, "candidates": 4, "others": 2, "anchors": 2, "bisections": 8, "most": 4}


class Bright(nn.Module):
    """Names an image by its mean brightness: class i from the i-th limit on. Counts the images it was asked about; has no weights."""

    def __init__(self, *limits: float, sure: float = 1.0) -> None:
        super().__init__()
        self.limits, self.sure, self.asked = limits, sure, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        found = sum((x.mean((1, 2, 3)) >= limit).long() for limit in self.limits)
        return self.sure * F.one_hot(torch.as_tensor(found), len(self.limits) + 1).float()

    def __getattr__(self, name: str) -> Any:
        if name in {"features", "body", "head", "mean", "std", "classes"}:
            raise AssertionError(f"{name} was looked at: no black box")
        return super().__getattr__(name)


def greys(*values: int) -> np.ndarray:
    """One plain image (1, 2, 2) for each value."""
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)


def brightness(images: np.ndarray) -> np.ndarray:
    """A two-dimensional embedding."""
    level = images.mean((1, 2, 3)).astype(np.float32) / 255
    return np.stack([level, 1 - level], 1)


def net(seed: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Net:
    with loop.seeded(seed):
        return networks.convnet(shape, 10, widths=(4,), hidden=8, mean=0.3, std=0.3).eval()


@pytest.fixture(scope="module")
def matcher(tiny: Dataset) -> Matcher:
    return fit_matcher(tiny.split("train"), SMOKE, seed=3)


def offer(tiny: Dataset, nets: dict[str, Net], **facts: Any) -> Offer:
    return Offer(nets, {"train": tiny.split("train"), "query": tiny.split("reference")}, None, facts)


def test_the_boundary_lies_where_the_answer_turns() -> None:
    probes, version = greys(0, 200), Bright(0.4)  # at 102 of 255, so 0.51 of the way
    said = answers(version, probes)
    assert said.tolist() == [0, 1]
    share, turned = boundary(version, probes, np.array([0, 1]), np.array([1, 0]), said, 10)
    assert share == pytest.approx([0.51, 0.49], abs=0.004)  # images have whole grey levels
    assert answers(version, turned).tolist() == [1, 0]  # just over the switch
    before = blend(probes[[0, 1]], probes[[1, 0]], (share - 1 / 200).astype(np.float32))
    assert answers(version, before).tolist() == [0, 1]


@given(st.integers(1, 254), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_each_bisection_halves_the_way_that_is_left(limit: int, steps: int) -> None:
    version = Bright((limit - 0.5) / 255)
    probes = greys(0, 255)
    share, turned = boundary(version, probes, np.array([0]), np.array([1]), np.array([0, 1]), steps)
    assert version.asked == steps
    assert answers(version, turned).tolist() == [1]
    assert limit / 255 - 0.003 <= share[0] <= limit / 255 + 2.0**-steps + 0.003


def test_a_turn_into_a_third_class_counts_too() -> None:
    version = Bright(0.3, 0.7)
    _, turned = boundary(version, greys(0, 255), np.array([0]), np.array([1]), np.array([0, 2]), 10)
    assert answers(version, turned).tolist() == [1]


def test_a_mixture_takes_its_share_of_each_image() -> None:
    assert blend(greys(0, 100), greys(200, 0), np.array([0.25, 0.5], np.float32))[:, 0, 0, 0].tolist() == [50, 50]


def test_only_labels_are_asked_for_and_every_image_is_counted() -> None:
    probes = greys(*range(0, 256, 8))
    version, surer = Bright(0.5), Bright(0.5, sure=50.0)
    found = probed(version, probes, brightness, **ASKING)
    assert found.calls == version.asked
    # the probes; 2 draws of 8 candidates held against 2 others in 4 calls, and of 2 pairs of 2 anchors in 8 calls
    assert found.calls == 32 + 2 * (8 * 2 * 4 + 2 * 2 * 8)
    assert np.array_equal(probed(surer, probes, brightness, **ASKING).cells, found.cells)  # how sure it is does not show


def test_cells_are_boundaries_off_the_diagonal_and_the_class_itself_on_it() -> None:
    probes = greys(*range(0, 256, 8))
    cells = probed(Bright(0.5), probes, brightness, **ASKING).cells
    assert cells.shape == (2, 2, 2, 2)
    assert cells[:, 0, 1, 0] == pytest.approx(0.5, abs=0.01)
    assert cells[:, 1, 0, 0] == pytest.approx(0.5, abs=0.01)
    assert (cells[:, 0, 0, 0] < cells[:, 0, 0, 1]).all()
    assert (cells[:, 1, 1, 0] > cells[:, 1, 1, 1]).all()
    assert np.linalg.norm(cells[:, [0, 1], [0, 1]], axis=-1) == pytest.approx(1)


def test_a_version_that_names_one_class_has_that_cell_alone() -> None:
    found = probed(Bright(2.0), greys(0, 100), brightness, **ASKING)
    assert found.cells.shape == (2, 1, 1, 2)
    assert found.calls == 2


def test_the_most_frequent_classes_are_looked_at() -> None:
    limits = [at / 10 for at in range(1, 10)]
    assert probed(Bright(*limits), greys(*range(0, 256, 4)), brightness, **ASKING).cells.shape == (2, 4, 4, 2)


def test_ranking_loss_by_hand() -> None:
    model = torch.eye(3)[:2]
    query = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    own = torch.eye(2, dtype=torch.bool)
    # cosines [[.6, 0], [.8, 1]]; for each model .4 + 0 - .6 < 0 and .4 + .8 - 1 = .2; for each query .4 + .8 - .6 = .6 and < 0
    assert ranking_loss(model, query, own, 0.4).item() == pytest.approx(0.2 / 2 + 0.6 / 2)
    assert ranking_loss(model, query, own, 0.0).item() == pytest.approx(0.2 / 2)
    assert ranking_loss(model, model, own, 0.4).item() == 0


def test_pairs_of_one_task_do_not_push_each_other_away() -> None:
    model = torch.eye(3)[[0, 0]]
    assert ranking_loss(model, model, torch.eye(2, dtype=torch.bool), 0.4).item() == pytest.approx(0.8)
    assert ranking_loss(model, model, torch.ones(2, 2, dtype=torch.bool), 0.4).item() == 0


def test_a_task_is_read_as_a_network_that_does_it_perfectly() -> None:
    features = np.array([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [9.0, 9.0]], np.float32)
    cells = task_cells(features, np.array([5, 5, 7, -1]), 10)
    assert cells.tolist() == [[[3, 0], [1.5, 0.5]], [[1.5, 0.5], [0, 1]]]
    three = task_cells(features, np.array([5, 5, 7, 8]), 2)
    assert three.shape == (2, 2, 2)


def test_rows_are_put_in_order_by_nearness_to_their_own_class() -> None:
    k = 3
    anchors = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.6, 0.8]]), dim=1)
    cells = torch.arange(k * k * 3.0).view(1, k, k, 3)
    cells[0, range(k), range(k)] = anchors
    ordered = in_order(cells)[0]
    wanted = [[0, 1, 2], [1, 0, 2], [2, 1, 0]]
    assert all(torch.equal(ordered[i], cells[0, i, row]) for i, row in enumerate(wanted))


@given(st.permutations(range(4)), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_a_vector_does_not_depend_on_the_order_of_classes(order: list[int], seed: int) -> None:
    with loop.seeded(seed):
        reader, cells = Reader(6, 5, 7).eval(), torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        read = reader(cells)
        assert torch.allclose(reader(cells[:, order][:, :, order]), read, atol=1e-6)
        assert torch.equal(reader(cells), read)  # initial states are zero
    assert torch.allclose(read.norm(dim=1), torch.ones(2))


def test_tasks_of_different_sizes_are_read_side_by_side() -> None:
    with loop.seeded(0):
        reader = Reader(6, 5, 7).eval()
        cells = [torch.randn(k, k, 6) for k in (3, 2, 3, 1)]
    with torch.no_grad():
        read = read_each(reader, cells)
        assert all(torch.allclose(read[at], reader(one[None])[0], atol=1e-6) for at, one in enumerate(cells))


def test_zoo_tasks_repeat_only_when_all_were_drawn() -> None:
    tasks = zoo_tasks(4, (2, 3), 18, 0)
    pairs, triples = tasks[::2], tasks[1::2]
    assert len(set(pairs[:6])) == 6  # all pairs of four
    assert len(set(triples[:4])) == len(set(triples[4:8])) == 4
    assert all(task == tuple(sorted(set(task))) for task in tasks)


def test_the_reader_learns_to_bring_a_network_and_its_task_together() -> None:
    with loop.seeded(0) as generator:
        centres = F.normalize(torch.randn(5, 8), dim=1)
        members = [centre + 0.02 * torch.randn(20, 8) for centre in centres]
        tasks = zoo_tasks(5, (2,), 10, 0)
        means = [centres[list(task)] for task in tasks]
        cells = [((own[:, None] + own[None]) / 2)[None] for own in means]
        reader = Reader(8, 8, 16)
        fit_reader(reader, cells, tasks, members, shots=3, steps=150, batch=10, lr=1e-2, margin=0.4, generator=generator)
        reader.eval()
        with torch.no_grad():
            vectors = read_each(reader, [one[0] for one in cells])
    assert ranking_loss(vectors, vectors, torch.eye(10, dtype=torch.bool), 0.4).item() < 0.1
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in reader.parameters())


def test_a_reader_that_diverged_is_said_so() -> None:
    with loop.seeded(0) as generator:
        members = [torch.full((4, 8), torch.inf) for _ in range(3)]
        cells = [torch.randn(1, 2, 2, 8) for _ in range(3)]
        with pytest.raises(UserError, match="reader' diverged"):
            fit_reader(
                Reader(8, 4, 4), cells, [(0, 1), (0, 2), (1, 2)], members, shots=2, steps=3, batch=3, lr=0.1, margin=0.4,
                generator=generator,
            )  # fmt: skip


def test_a_matcher_comes_back_from_its_arrays(matcher: Matcher, tiny: Dataset, tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **matcher.to_arrays())
    with np.load(tmp_path / "m.npz", allow_pickle=False) as stored:
        again = Matcher.from_arrays(dict(stored))
    assert again.cfg == matcher.cfg
    assert again.shape == (1, 8, 8)
    assert np.array_equal(again.knowledge(net(1)), matcher.knowledge(net(1)))
    assert np.array_equal(again.query(tiny.split("reference")), matcher.query(tiny.split("reference")))
    assert np.linalg.norm(matcher.knowledge(net(1))) == pytest.approx(1, abs=1e-5)


def test_a_version_is_asked_as_a_black_box(matcher: Matcher) -> None:
    limits = (0.2, 0.3)
    version = Bright(*limits)
    vector = matcher.knowledge(version)  # type: ignore[arg-type]
    assert version.asked == matcher.probe(version).calls  # type: ignore[arg-type]
    assert np.array_equal(matcher.knowledge(Bright(*limits, sure=9.0)), vector)  # type: ignore[arg-type]


def test_one_seed_gives_one_ranking_and_leaves_all_alone(tiny: Dataset) -> None:
    nets = {f"m/{at}": net(at) for at in range(3)}
    before, state = copy.deepcopy(nets), torch.get_rng_state()
    given = offer(tiny, nets)
    query = given.data["query"].images().copy()
    first, again = know2vec(given, SMOKE, seed=5), know2vec(given, SMOKE, seed=5)
    assert first == again
    assert first != know2vec(given, SMOKE, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(given.data["query"].images(), query)
    for name, old in before.items():
        ours, theirs = nets[name].state_dict(), old.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert not nets[name].training
        assert all(each.requires_grad and each.grad is None for each in nets[name].parameters())
    one, two = (fit_matcher(tiny.split("train"), SMOKE, seed=5).to_arrays() for _ in range(2))
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_stored_vectors_are_taken_and_the_version_is_not_asked(matcher: Matcher, tiny: Dataset) -> None:
    nets = {"m/1": net(1), "m/2": net(2)}
    query = matcher.query(tiny.split("reference"))
    stored = {"m/1": {"knowledge": query}, "m/2": {"knowledge": -query}}
    made = know2vec(offer(tiny, nets, matcher=matcher.to_arrays(), versions=stored))
    assert [place.version for place in made.places] == ["m/1", "m/2"]
    assert [place.score for place in made.places] == pytest.approx([1, -1], abs=1e-5)
    assert made.places[0].reason == "cosine 1.000 with the query"
    fitted = know2vec(offer(tiny, nets, matcher=matcher.to_arrays()))
    assert {place.version: place.score for place in fitted.places}["m/1"] == pytest.approx(
        float(matcher.knowledge(net(1)) @ query), abs=1e-5
    )


def test_versions_for_images_of_another_shape_are_left_out_with_the_reason(matcher: Matcher, tiny: Dataset) -> None:
    nets = {"m/1": net(1), "rgb/1": net(2, (3, 8, 8))}
    made = know2vec(offer(tiny, nets, matcher=matcher.to_arrays()))
    assert [place.version for place in made.places] == ["m/1"]
    assert left_out(nets, (1, 8, 8)) == {"rgb/1": "it takes images of (3, 8, 8), the query's have (1, 8, 8)"}


def test_ties_keep_the_order_of_the_offer() -> None:
    one = np.array([1.0, 0.0], np.float32)
    assert [place.version for place in rank({"b/1": one, "a/1": one, "c/1": -one}, one).places] == ["b/1", "a/1", "c/1"]


def test_vectors_of_another_matcher_are_refused() -> None:
    with pytest.raises(UserError, match=r"the vector of a/1 has the shape \(3,\), the query's \(2,\): another matcher made it"):
        rank({"a/1": np.ones(3, np.float32)}, np.ones(2, np.float32))


def test_what_is_missing_is_named(tiny: Dataset, matcher: Matcher) -> None:
    nets, rows = {"m/1": net(1)}, tiny.split("reference")
    with pytest.raises(UserError, match="no versions to rank"):
        know2vec(offer(tiny, {}))
    with pytest.raises(UserError, match="no query"):
        know2vec(Offer(nets, {"train": rows}))
    with pytest.raises(UserError, match="nothing to fit the matcher on"):
        know2vec(Offer(nets, {"query": rows}))
    with pytest.raises(UserError, match=r"not a matcher of registry\.know2vec"):
        know2vec(offer(tiny, nets, matcher={"told": np.zeros(3, np.uint8)}))
    with pytest.raises(UserError, match=r"names? 0 classes; valid: two or more"):
        know2vec(Offer(nets, {"query": rows.without_labels()}, None, {"matcher": matcher.to_arrays()}))


def test_rows_and_classes_that_do_not_fit_are_refused(tiny: Dataset, matcher: Matcher) -> None:
    with pytest.raises(UserError, match=r"of \(11,\) classes cannot be trained on rows of 10 classes"):
        fit_matcher(tiny.split("train"), SMOKE.model_copy(update={"classes": (11,)}))
    with pytest.raises(UserError, match=r"of \(1,\) classes cannot"):
        fit_matcher(tiny.split("train"), SMOKE.model_copy(update={"classes": (1,)}))
    with pytest.raises(UserError, match="rows of 0 classes"):
        fit_matcher(tiny.split("train").without_labels(), SMOKE)
    other = Matcher(matcher.encoder, matcher.mean, matcher.reader, np.zeros((4, 3, 8, 8), np.uint8), matcher.cfg)
    with pytest.raises(UserError, match=r"query images have the shape \(1, 8, 8\); this matcher reads \(3, 8, 8\)"):
        other.query(tiny.split("reference"))


def test_embeddings_are_centred_on_the_rows_of_the_matcher(tiny: Dataset, matcher: Matcher) -> None:
    assert matcher.embed(tiny.split("train").images()).mean(0) == pytest.approx(0, abs=1e-4)
    raw = embedded(matcher.encoder, matcher.probes, torch.zeros(64))
    assert np.allclose(raw - matcher.mean.numpy(), matcher.embed(matcher.probes), atol=1e-5)


def test_unit_gives_length_one_but_leaves_nothing_at_nothing() -> None:
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]


def test_the_settings_of_a_question_are_those_of_the_config() -> None:
    assert asking(Config(draws=7))["draws"] == 7
    assert set(asking(Config())) == set(ASKING)
