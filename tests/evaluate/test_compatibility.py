"""Compatibility: retrieval worked out by hand from networks with chosen embeddings, and the gain that a gate reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tasks.evaluate.compatibility import SMOKE, Config, average_compatibility, compatibility, directions, retrieved, searched
from tests import tables

CLASSES = ("a", "b")


class Placed(Net):
    """Embeds the image of one pixel of value i as row i of a table."""

    def __init__(self, table: list[list[float]], arch: dict[str, Any] | None = None) -> None:
        super().__init__({"kind": "placed", "shape": [1, 1, 1], "classes": 1, "mean": 0.0, "std": 1.0, **(arch or {})})
        self.table = torch.tensor(table)
        self.head = nn.Linear(self.table.shape[1], 1, bias=False)

    def features(self, images: Tensor) -> Tensor:
        return self.table[(images.flatten() * 255).round().long()]


# pixels 0 and 1 are in the gallery, of classes a and b; 2 to 5 are queries of classes a, b, a, b
CHAMPION = Placed([[1, 0], [0, 1], [2, 1], [1, 3], [1, 2], [3, 1]])  # the last two lie on the other class's side
BETTER = Placed([[1, 0], [0, 1], [1, 0], [0, 1], [5, 1], [3, 1]])  # in the same directions, one more right
MIRRORED = Placed([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])  # all right by itself, all wrong in the champion's gallery
LONGER = Placed([[1, 0, 0], [0, 1, 0]] * 3)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Dataset]:
    queries = tables.dataset(tmp_path / "q", tables.pixels(2, 3, 4, 5, 0), [0, 1, 0, 1, None], classes=CLASSES, prefix="q")
    gallery = tables.dataset(tmp_path / "g", tables.pixels(0, 1, 5), [0, 1, None], classes=CLASSES, prefix="g")
    return {"test": queries, "gallery": gallery}


def test_figures_by_hand(data: dict[str, Dataset]) -> None:
    found = compatibility({"champion": CHAMPION, "better": BETTER, "mirrored": MIRRORED}, data, SMOKE)
    values = {name: {key: figure.value for key, figure in of.items()} for name, of in found.figures.items()}
    assert values == {
        "champion": {"self_retrieval": 0.5},
        "better": {"self_retrieval": 0.75, "cross_retrieval": 0.75, "compatibility": 0.25},
        "mirrored": {"self_retrieval": 1.0, "cross_retrieval": 0.0, "compatibility": -0.5},
    }
    assert found.data == {"test": data["test"].md5, "gallery": data["gallery"].md5}


def test_details_by_hand(data: dict[str, Dataset]) -> None:
    found = compatibility({"champion": CHAMPION, "better": BETTER, "mirrored": MIRRORED}, data, SMOKE).details
    # rows: whose queries; columns: whose gallery
    assert found["matrix"] == [[0.5, 0.5, 0.5], [0.75, 0.75, 0.25], [0.0, 0.0, 1.0]]
    # of better on champion, mirrored on champion and mirrored on better only the first gains
    assert found["average_compatibility"] == pytest.approx(1 / 3)
    assert found["average_accuracy"] == pytest.approx((0.5 + 0.75 + 0.75 + 0 + 0 + 1) / 6)
    assert found["order"] == ["champion", "better", "mirrored"]
    assert found["rows"] == {"test": 4, "gallery": 2}
    assert found["not_comparable"] == []


def test_the_gain_has_a_paired_interval_that_a_margin_can_be_read_off(tmp_path: Path) -> None:
    # 400 queries of class a: the champion misses pixel 4 (40 of them), the new model misses 3 (32 of them)
    queries = np.repeat([2, 3, 4], [328, 32, 40])
    rows = {
        "test": tables.dataset(tmp_path / "q", tables.pixels(*queries), [0] * 400, classes=CLASSES, prefix="q"),
        "gallery": tables.dataset(tmp_path / "g", tables.pixels(0, 1), [0, 1], classes=CLASSES, prefix="g"),
    }
    champion = Placed([[1, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    new = Placed([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    gain = compatibility({"champion": champion, "candidate": new}, rows).figures["candidate"]["compatibility"]
    assert gain.value == pytest.approx((40 - 32) / 400)
    # each query adds 1 (40 of them), -1 (32) or 0: the mean's standard error is sqrt(72 / 400 - .02 ** 2) / 20
    half = 1.96 * math.sqrt(72 / 400 - 0.02**2) / 20
    assert (gain.low, gain.high) == pytest.approx((0.02 - half, 0.02 + half), abs=0.005)
    assert gain.low >= -0.03  # so that a gate with a margin of .03 takes it, and one that asks for a gain does not
    assert gain.low < 0


def test_a_gain_or_loss_on_every_query_has_no_spread(data: dict[str, Dataset]) -> None:
    always = Placed([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])
    loss = compatibility({"champion": always, "mirrored": MIRRORED}, data, SMOKE).figures["mirrored"]["compatibility"]
    assert (loss.value, loss.low, loss.high) == (-1, -1, -1)


def test_a_model_is_compatible_with_itself_exactly(data: dict[str, Dataset]) -> None:
    gain = compatibility({"champion": CHAMPION, "again": CHAMPION}, data, SMOKE).figures["again"]["compatibility"]
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)


def test_embeddings_of_another_length_find_nothing_and_the_details_say_why(data: dict[str, Dataset]) -> None:
    found = compatibility({"champion": CHAMPION, "longer": LONGER}, data, SMOKE)
    assert found.figures["longer"]["cross_retrieval"].value == 0
    assert found.figures["longer"]["compatibility"].value == -0.5
    assert found.figures["longer"]["self_retrieval"].value == 1
    assert found.details["not_comparable"] == [
        "champion embeds in 2 values, the gallery of longer has 3: nothing can be found",
        "longer embeds in 3 values, the gallery of champion has 2: nothing can be found",
    ]
    assert found.details["matrix"] == [[0.5, 0], [0, 1]]


def test_without_a_champion_each_model_stands_for_itself_and_details_are_plain_json(data: dict[str, Dataset]) -> None:
    found = compatibility({"one": CHAMPION}, data, SMOKE)
    assert list(found.figures["one"]) == ["self_retrieval"]
    assert found.details["average_compatibility"] is None
    assert json.loads(json.dumps(found.details)) == found.details


def test_a_query_or_gallery_row_without_a_direction_is_never_right(data: dict[str, Dataset]) -> None:
    lost = Placed([[1, 0], [0, 1], [0, 0], [0, 1], [math.nan, 1], [math.inf, 0]])
    assert compatibility({"lost": lost}, data, SMOKE).figures["lost"]["self_retrieval"].value == 0.25
    one = Placed([[0, 0], [1, 0], [-1, 0], [-1, 0], [-1, 0], [1, 0]])  # only the row of class b can be found, however far
    assert compatibility({"one": one}, data, SMOKE).figures["one"]["self_retrieval"].value == 0.5
    nothing = Placed([[0, 0]] * 6)
    assert compatibility({"nothing": nothing}, data, SMOKE).figures["nothing"]["self_retrieval"].value == 0


def test_of_equally_close_rows_the_first_is_the_answer() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert retrieved(queries, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), np.array([5, 6, 7])).tolist() == [6, 5]


def test_queries_in_pieces_are_answered_as_in_one() -> None:
    rng = torch.Generator().manual_seed(0)
    queries, gallery = (nn.functional.normalize(torch.randn(n, 4, generator=rng), dim=1) for n in (11, 30))
    labels = np.arange(30)
    assert retrieved(queries, gallery, labels, size=3).tolist() == retrieved(queries, gallery, labels).tolist()


def test_a_class_of_the_gallery_is_the_mean_of_its_directions() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    means, labels = searched(gallery, np.array([3, 3, 1]), "classes")
    assert labels.tolist() == [1, 3]
    assert torch.allclose(means, torch.tensor([[0.0, -1.0], [math.sqrt(0.5), math.sqrt(0.5)]]))
    assert searched(gallery, np.array([3, 3, 1]), "rows")[0] is gallery


def test_class_means_outvote_a_single_row(tmp_path: Path) -> None:
    # a row of class b lies next to the query of class a, but b's other rows lie on the far side
    rows = {
        "test": tables.dataset(tmp_path / "q", tables.pixels(0), [0], classes=CLASSES, prefix="q"),
        "gallery": tables.dataset(tmp_path / "g", tables.pixels(1, 2, 3, 3), [0, 1, 1, 1], classes=CLASSES, prefix="g"),
    }
    net = Placed([[1, 0], [1, 1], [1, 0], [-1, 0]])
    found = {against: compatibility({"net": net}, rows, Config(against=against)).figures["net"] for against in ("rows", "classes")}
    assert (found["rows"]["self_retrieval"].value, found["classes"]["self_retrieval"].value) == (0, 1)


def test_directions_have_length_one() -> None:
    found = directions(Placed([[3, 4], [0, 0]]), tables.pixels(0, 1))
    assert torch.allclose(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_average_compatibility_counts_gains_only() -> None:
    assert average_compatibility(np.array([[0.5, 0], [0.6, 0]])) == 1
    assert average_compatibility(np.array([[0.5, 0], [0.5, 1]])) == 0  # equal is no gain
    assert average_compatibility(np.array([[0.5]])) is None


def test_models_are_left_as_they_were(data: dict[str, Dataset]) -> None:
    net = Placed([[1, 0], [0, 1]] * 3).train()
    assert compatibility({"m": net}, data, SMOKE).figures == compatibility({"m": net}, data, SMOKE).figures
    assert net.training


def test_what_cannot_be_measured_is_refused(data: dict[str, Dataset], tmp_path: Path) -> None:
    models = {"m": CHAMPION}
    with pytest.raises(UserError, match="no model was given"):
        compatibility({}, data, SMOKE)
    with pytest.raises(UserError, match="role 'gallery'; it got test"):
        compatibility(models, {"test": data["test"]}, SMOKE)
    with pytest.raises(UserError, match="no row in the role 'gallery' has a label"):
        compatibility(models, {**data, "gallery": data["gallery"].without_labels()}, SMOKE)
    with pytest.raises(UserError, match="4 rows are both in 'test' and in 'gallery'"):
        compatibility(models, {**data, "gallery": data["test"]}, SMOKE)
    large = tables.dataset(tmp_path / "large", np.zeros((1, 1, 2, 2), np.uint8), [0], classes=CLASSES)
    with pytest.raises(UserError, match=r"model 'm' takes images \(1, 1, 1\)"):
        compatibility(models, {**data, "test": large}, SMOKE)
