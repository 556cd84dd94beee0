"""Look one model's queries up in another model's gallery, to tell whether it can be replaced without indexing everything again.

Paper   Stationary Representations: Optimally Approximating Compatibility and Implications for Improved Model Replacements (2024),
        arXiv 2405.02581: its compatibility test
Idea    a query's answer is the label of the gallery row whose embedding is closest by cosine. C_ij is the share of right answers where
        model i embeds the queries and model j the gallery. i is compatible with j if C_ij > C_jj: the replaced model gains at once. A gate
        reads that gain off an interval; how far below 0 its low end may lie is the gate's matter
Small   nothing is left out; closest row, where the paper's code averages each class of the gallery (`against` sets it)
Limits  C_ij > C_jj is strict: one query more counts, none does not; so read the interval. Where two models answer 40% of 4,000 queries
        differently it is .02 wide on either side. Class means forgive more than rows: the same versions on Fashion-MNIST, each trained on
        its own with the fixed classifier, have .626 by means and .499 by rows in the older gallery (5 seeds)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop, metrics
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.method import MethodConfig, method
from tasks.core.metrics import Figure
from tasks.core.networks import Net, takes
from tasks.core.progress import track

CHAMPION = "champion"


class Config(MethodConfig):
    """Settings."""

    against: Literal["rows", "classes"] = Field("rows", description="what a query is compared with: gallery rows, or their mean by class")
    draws: int = Field(2000, ge=10, description="bootstrap draws behind the interval of `compatibility`")


SMOKE = Config(draws=20)


@method(
    paper="Stationary Representations: Optimally Approximating Compatibility and Implications for Improved Model Replacements (2024)",
    arxiv="2405.02581",
    claim="a model trained on its own is called incompatible where its classifier is learned, not where it is the old one's fixed one",
)
def compatibility(
    models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Config = Config(), *, seed: int = 0, device: str = "cpu"
) -> Evidence:
    """Figures of each model, with labelled rows of role `test` as queries and of role `gallery` as what is searched: `self_retrieval`,
    the share of queries that find their label in its own gallery. Where a model is named `champion`, of each other one: `cross_retrieval`,
    the same in the champion's gallery, and `compatibility`, that less the champion's own, on the same queries.

    details: `order` of the models, `matrix` C_ij (queries of i, gallery of j), `average_compatibility`, the share of pairs i after j with
    C_ij > C_jj (None for one model), `average_accuracy` over all i not before j, and `not_comparable`, why a pair finds nothing.
    Models need not know all classes of the rows: only their embeddings are read.

    Raises UserError where there is no model, a role or its labels are missing, a model takes other images, or the two roles share rows.
    """
    if not models:
        raise UserError("there is nothing to evaluate: no model was given")
    queries, gallery = (labelled(models, data, role) for role in ("test", "gallery"))
    shared = sorted(set(queries.ids()) & set(gallery.ids()))
    if shared:
        raise UserError(f"{len(shared)} rows are both in 'test' and in 'gallery', and would find themselves: take them out of one")
    labels, known = queries.labels(), gallery.labels()
    pixels = {"test": queries.inputs(), "gallery": gallery.inputs()}
    embedded = {
        name: {role: directions(net, pixels[role], device) for role in pixels}
        for name, net in zip(models, track(list(models.values()), "compatibility"), strict=True)
    }
    hits: dict[tuple[str, str], npt.NDArray[np.bool_]] = {}
    why = []
    for mine, of in embedded.items():
        for theirs, other in embedded.items():
            sizes = of["test"].shape[1], other["gallery"].shape[1]
            if sizes[0] != sizes[1]:
                why.append(f"{mine} embeds in {sizes[0]} values, the gallery of {theirs} has {sizes[1]}: nothing can be found")
                hits[mine, theirs] = np.zeros(len(labels), dtype=bool)
            else:
                hits[mine, theirs] = retrieved(of["test"], *searched(other["gallery"], known, cfg.against)) == labels
    order = list(models)
    figures: dict[str, dict[str, Figure]] = {name: {"self_retrieval": metrics.share(hits[name, name])} for name in order}
    for name in order:
        if CHAMPION in models and name != CHAMPION:
            figures[name]["cross_retrieval"] = metrics.share(hits[name, CHAMPION])
            own = hits[CHAMPION, CHAMPION]
            figures[name]["compatibility"] = metrics.difference(hits[name, CHAMPION], own, seed=seed, draws=cfg.draws)
    matrix = np.array([[hits[mine, theirs].mean() for theirs in order] for mine in order])
    details: dict[str, Any] = {
        "order": order,
        "matrix": matrix.tolist(),
        "average_compatibility": average_compatibility(matrix),
        "average_accuracy": float(matrix[np.tril_indices(len(order))].mean()),
        "not_comparable": why,
        "rows": {"test": len(labels), "gallery": len(known)},
    }
    return Evidence(figures, {role: data[role].md5 for role in pixels}, details)


def labelled(models: Mapping[str, Net], data: Mapping[str, Dataset], role: str) -> Dataset:
    """The labelled rows of a role. Raises UserError where it is missing or has none, or a model takes images of another shape."""
    if role not in data:
        raise UserError(f"the evaluation needs data in the role {role!r}; it got {', '.join(sorted(data)) or 'none'}")
    rows = data[role].where(data[role].labels() >= 0)
    if len(rows) == 0:
        raise UserError(f"no row in the role {role!r} has a label: nothing can be measured on it")
    for name, net in models.items():
        if tuple(net.arch["shape"]) != tuple(rows.info.shape):
            raise UserError(f"model {name!r} takes {takes(net.arch)}; role {role!r} has {rows.holds}")
    return rows


class _Embedding(nn.Module):
    """A network that answers with its features."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net.features(images).flatten(1)


def directions(net: Net, pixels: npt.NDArray[np.uint8], device: str = "cpu") -> Tensor:
    """Embeddings (N, D) at length 1; a row of zeros where one has no direction: it is 0, or not finite."""
    found = loop.predict(_Embedding(net), pixels, device=device)
    return F.normalize(torch.where(found.isfinite().all(1, keepdim=True), found, 0.0), dim=1)


def searched(gallery: Tensor, labels: npt.NDArray[np.int64], against: str) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """What queries are compared with (M, D), and its labels (M,): the gallery's rows (N, D), or the mean direction of each class."""
    if against == "rows":
        return gallery, labels
    classes = np.unique(labels)
    return F.normalize(torch.stack([gallery[torch.from_numpy(labels == c)].mean(0) for c in classes]), dim=1), classes


def retrieved(queries: Tensor, gallery: Tensor, labels: npt.NDArray[np.int64], size: int = 1024) -> npt.NDArray[np.int64]:
    """The label of the gallery row (M, D) closest to each query (N, D), of those equally close the first; all at length 1 or 0.

    -1 where the query has no direction, or no row of the gallery has one.
    """
    without = gallery.abs().sum(1) == 0
    if bool(without.all()):
        return np.full(len(queries), -1, dtype=np.int64)
    nearest = [(some @ gallery.T).masked_fill(without, -torch.inf).argmax(1) for some in queries.split(size)]
    found = labels[torch.cat(nearest).numpy()]
    return np.where((queries.abs().sum(1) == 0).numpy(), -1, found)


def average_compatibility(matrix: npt.NDArray[np.float64]) -> float | None:
    """Share of pairs (i after j) of the T models with C_ij > C_jj, of C (T, T): 2 / (T (T - 1)) times their number. None for T = 1."""
    later, earlier = np.tril_indices(len(matrix), -1)
    if len(later) == 0:
        return None
    return float((matrix[later, earlier] > matrix[earlier, earlier]).mean())
