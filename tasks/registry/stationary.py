"""A new version whose embeddings can be looked up in the gallery that an older version made: the classifier is fixed beforehand.

Paper   Stationary Representations: Optimally Approximating Compatibility and Implications for Improved Model Replacements (2024),
        arXiv 2405.02581
Idea    the last layer is no parameter but the vertices of a regular simplex, more than there are classes; a class keeps its vertex for
        good, so every version's embeddings gather around the same directions. CE runs over all vertices, also those that wait for a
        class. Fine-tuning may add the paper's term for what the first inequality of compatibility leaves open,
        lam * CE + (1 - lam) * mean_i[ -mu o_i.n_i + logsumexp_j mu o_i.n_j ], j over rows of another class, o and n the embeddings of the
        old version, which is frozen, and of the new one, at length 1
Small   64 vertices instead of 1,024; small convolutions instead of a ResNet-18 or RegNetY; new data holds rows of the old classes too, so
        that nothing is rehearsed
Limits  trained on its own a version finds far more in the old gallery than with a learned classifier, not as much as the old one did.
        Fashion-MNIST, old version on 300 rows, new one on 3,000, closest of 2,000 gallery rows (5 seeds): old .695; trained on its own
        .499 (sd .11; learned .104), fine-tuned .666, HOC .708. Old version on 6 of 10 classes: .680; .450 (learned .078), .580, .622.
        HOC costs .03 to .04 once all is indexed again. A learned classifier fine-tuned from the old one keeps .726 and .598: the simplex
        pays where first weights are new. On validation rows 1,500 steps instead of 600 cost .05, 16 vertices .04 to .07, more weight decay
        helped with new classes and hurt without (1 or 2 seeds). At the default size 3 s of one CPU core
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, method
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.registry import Offer


class Config(MethodConfig):
    """Settings."""

    how: Literal["first", "independent", "fine-tuned", "hoc"] = Field(
        "independent",
        description="a first version, whatever is offered; or one for the old one's place: trained on its own, on from it, or HOC",
    )
    vertices: int = Field(64, ge=3, description="classes that there is room for; embeddings have one value less")  # paper: 1,024
    lam: float = Field(0.1, ge=0, le=1, description="weight of CE in 'hoc'; the rest stays close to the old version")  # paper's code
    mu: float = Field(10.0, gt=0, description="inverse temperature of that other term")  # paper's code
    steps: int = Field(600, ge=1, description="batches seen")
    batch: int = Field(64, ge=2, description="rows of a batch")  # paper: 128
    lr: float = Field(0.05, gt=0, description="peak learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1)  # paper's code
    weight_decay: float = Field(5e-4, ge=0)  # paper's code
    widths: tuple[int, ...] = Field((16, 32), min_length=1, description="channels of each convolution of a fresh network")
    hidden: int = Field(64, ge=1, description="values before the embedding of a fresh network")


SMOKE = Config(how="first", vertices=16, steps=20, batch=16, widths=(8,), hidden=16)


@method(
    paper="Stationary Representations: Optimally Approximating Compatibility and Implications for Improved Model Replacements (2024)",
    arxiv="2405.02581",
    claim="far more queries of an independently trained version find their class in the old gallery than with a learned classifier",
)
def stationary(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Net:
    """A `simplex` network of the labelled rows of role `train`. Without networks it is a first version; with one, an earlier result of
    this method, it replaces that one: classes are known by name, the old ones keep their vertices, others take unused ones.

    Raises UserError where rows of a class are missing, several networks are offered, the old one is of another kind, number of vertices
    or vertex table, it does not fit the images that it is to be trained on, or there are more classes than vertices.
    """
    if "train" not in offer.data:
        raise UserError(f"'stationary' trains on data in the role 'train'; it got {', '.join(sorted(offer.data)) or 'none'}")
    rows, data = labelled(offer.data["train"]), offer.data["train"].info
    old = None if cfg.how == "first" else replaced(offer.nets, cfg.vertices)
    if old is None and cfg.how in ("fine-tuned", "hoc"):
        raise UserError(f"how is {cfg.how!r}, but there is no old version to go on from: offer one, or set how to 'first'")
    table = assigned(data.classes, {} if old is None else old.arch["table"], cfg.vertices)
    names = {"names": list(data.classes), "classes": len(data.classes), "table": table}
    pixels = rows.images()
    with loop.seeded(seed) as generator:
        if old is None or cfg.how == "independent":
            mean, std = loop.pixel_stats(pixels)
            body = {
                "shape": list(data.shape),
                "widths": list(cfg.widths),
                "hidden": cfg.hidden,
                "mean": round(mean, 6),
                "std": round(std, 6),
            }
            net = networks.build({"kind": "simplex", "vertices": cfg.vertices, **body, **names})
        else:
            net = grown(old, names, data.shape)
        at = torch.tensor([table[name] for name in data.classes])
        return fit(
            net, pixels, at[torch.from_numpy(rows.labels())], networks.simplex(cfg.vertices), old if cfg.how == "hoc" else None,
            lam=cfg.lam, mu=cfg.mu, steps=cfg.steps, batch=cfg.batch, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay,
            generator=generator, device=device,
        )  # fmt: skip


def labelled(data: Dataset) -> Dataset:
    """The rows with a label. Raises UserError where a class that is not absent has none, or there is one class only."""
    labels, classes = data.labels(), data.info.classes
    if len(set(classes)) < max(2, len(classes)):
        raise UserError(
            f"a vertex belongs to a class name: the data needs two or more, all different; it has {', '.join(classes) or 'none'}"
        )
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    if len(counts) > len(classes):
        raise UserError(f"label {len(counts) - 1} has no class name: labels must lie below {len(classes)}")
    missing = [name for name, count in zip(classes, counts, strict=True) if count == 0 and name not in data.info.absent]
    if missing:
        raise UserError(f"class {missing[0]!r} has no labelled row in 'train' ({len(missing)} such): every class needs at least one")
    return data.where(labels >= 0)


def replaced(nets: Mapping[str, Net], vertices: int) -> Net | None:
    """The old version, or None where there is none. Raises UserError where it cannot share a vertex table with a new one."""
    if not nets:
        return None
    if len(nets) > 1:
        raise UserError(f"a new version replaces one old version, but {len(nets)} are offered: {', '.join(nets)}")
    ((name, old),) = nets.items()
    if old.arch["kind"] != "simplex":
        raise UserError(
            f"{name} has no fixed classifier, so there are no vertices to keep; set how to 'first' and index its gallery again once"
        )
    if old.arch["vertices"] != vertices:
        raise UserError(f"{name} has {old.arch['vertices']} vertices and the new version {vertices}: set vertices to the old number")
    table = old.arch["table"]
    at = [table.get(known, vertices) for known in old.arch["names"]]
    distinct = len(set(table.values())) == len(table) and all(0 <= vertex < vertices for vertex in [*at, *table.values()])
    if not distinct or not torch.allclose(old.head.weight.cpu(), networks.simplex(vertices)[at], atol=1e-5):
        raise UserError(f"the last layer of {name} is not the vertices of its table: offer the version as it was made")
    return old


def assigned(names: Sequence[str], taken: Mapping[str, int], vertices: int) -> dict[str, int]:
    """The vertex of each class name: those taken stay, each new name gets the last one that is free.

    Raises UserError where there are more classes than vertices.
    """
    table = dict(taken)
    free = sorted(set(range(vertices)) - set(table.values()))
    new = [name for name in names if name not in table]
    if len(new) > len(free):
        raise UserError(f"{len(new)} new classes, but {len(free)} of {vertices} vertices are free; more can only be had in a first version")
    return table | {name: free.pop() for name in new}


def grown(old: Net, names: Mapping[str, object], shape: tuple[int, ...]) -> Net:
    """A copy of the old version that tells the named classes apart. Raises UserError where the images have another shape."""
    if tuple(old.arch["shape"]) != tuple(shape):
        raise UserError(f"the old version takes images {tuple(old.arch['shape'])}, the data has {tuple(shape)}: set how to 'independent'")
    net = networks.build({**old.arch, **names})
    weights = {key: value for key, value in old.state_dict().items() if key != "head.weight"}
    net.load_state_dict({**net.state_dict(), **weights})
    return net


def fit(
    net: Net,
    pixels: npt.NDArray[np.uint8],
    targets: Tensor,
    vertices: Tensor,
    old: Net | None,
    *,
    lam: float,
    mu: float,
    steps: int,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
    device: str = "cpu",
) -> Net:
    """Train in place by SGD with one cycle of the learning rate: CE of the embeddings against all vertices (K, K - 1), as they are and not
    at length 1 (so does the paper's code); with an old version `lam * CE + (1 - lam) * hoc`.

    pixels (N, C, H, W) uint8, targets (N,) vertices. Gives the network back on the CPU, in eval mode. Raises UserError where it diverged.
    """
    net.to(device).train()
    vertices = vertices.to(device)
    before = None if old is None else copy.deepcopy(old).to(device).eval()
    optimiser = torch.optim.SGD(
        [weights for weights in net.parameters() if weights.requires_grad], lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    schedule = loop.one_cycle(optimiser, lr, steps)
    batches = loop.index_batches(len(targets), batch, steps, generator)
    for _ in track(range(steps), "stationary"):
        at = next(batches)
        images, wanted = loop.to_float(pixels[at.numpy()], device), targets[at].to(device)
        embedded = net.features(images)
        loss = F.cross_entropy(embedded @ vertices.T, wanted)
        if before is not None:
            with torch.no_grad():
                theirs = before.features(images)
            loss = lam * loss + (1 - lam) * hoc(embedded, theirs, wanted, mu)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    loop.check_finite(net, "stationary", lr)
    return net.cpu().eval()


def hoc(new: Tensor, old: Tensor, labels: Tensor, mu: float) -> Tensor:
    """Mean over rows i of `-mu old_i.new_i + log sum_j exp(mu old_i.new_j)`, j over the rows of another class; embeddings (N, D), labels
    (N,). They are brought to length 1. A row without any other class in the batch has the first term only.

    Paper, equation 4. Its code sets the products of one class to 0 and leaves them in the sum; here they are left out, as in the formula.
    """
    similar = mu * F.normalize(old, dim=1) @ F.normalize(new, dim=1).T
    other = labels[:, None] != labels[None, :]
    some = other.any(1)
    apart = similar[some].masked_fill(~other[some], -torch.inf)
    return (torch.logsumexp(apart, 1).sum() - similar.diagonal().sum()) / len(labels)
