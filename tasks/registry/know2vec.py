"""Ranks the versions of a registry for a new task by vectors read from their answers at decision boundaries, without running them on it.

Paper   Know2Vec: a black-box proxy for neural network retrieval (AAAI 2025), arXiv 2412.16251
Idea    a version answers stored probe images with labels only. Between two probes of different answers bisection finds the image where
        the answer turns. A frozen encoder and a BiLSTM for each class over its boundary images make one vector of it, few labelled images
        of a task likewise another. Both are trained on a zoo of small networks: a margin between a task's own network and the hardest
        other one by cosine, and a cross-entropy that tells the task from the vector
Small   the encoder is a small network fitted on the labelled rows, not ResNet-18. One reader serves both sides, a query's class means
        and the points half-way between them in the places of anchors and boundaries: with one for each side top-1 fell from .60 to .50
        (validation, 4 seeds). Anchors are probes that keep their label longest on the way to others; a class's own cell adds the mean
        of all probes of that answer. The cross-entropy tells the set of classes, so that tasks share what they have in common; states
        begin at zero, not at random. The branch that regresses transfer accuracy is left out
Limits  Fashion-MNIST, 40 networks of three classes each, of sets that no network of the zoo had, queries of five images a class, 5 seeds:
        top-1 .67, plain answers .52, chance .025. Matching the same anchors one to one with the query's class means, with nothing
        trained, gets .66: the gain is that of the probing, not of the reader. What comes first is .11 less accurate on the task than
        the best, far from .02. On validation seeds the gain was less even (.03 to .18), and other first weights moved top-1 by .05.
        A version answers 7,900 images once; running it on a query takes 15. Not tried: many classes, other designs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, method
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.registry import Offer, Place, Ranking
from tasks.registry._knowledge import Floats, Labels, Pixels, Probed, embedded, in_order, probed, ranking_loss, task_cells, zoo_tasks

SHARP = 10.0  # vectors have length 1: without it the cross-entropy is flat


class Config(MethodConfig):
    """How versions are probed, and how the matcher is fitted."""

    zoo: int = Field(80, ge=2, description="small networks that the matcher is fitted on")  # fewer: lower top-1 on unseen tasks
    classes: tuple[int, ...] = Field((3,), min_length=1, description="classes of a zoo network; of several sizes each in turn")
    zoo_rows: int = Field(600, ge=2, description="rows that a zoo network is trained on, at most")
    zoo_steps: int = Field(100, ge=1, description="batches of 32 that it sees")
    encoder_steps: int = Field(500, ge=1, description="batches of 64 that the encoder sees")
    probes: int = Field(400, ge=2, description="probe images, which go with the matcher")
    candidates: int = Field(24, ge=1, description="probes of a class among which its anchors are sought")
    others: int = Field(6, ge=1, description="probes of other classes that each candidate is held against")
    anchors: int = Field(3, ge=1, description="anchors of a class; from each one a boundary is sought")
    bisections: int = Field(8, ge=1, description="calls for a boundary image; half as many for a candidate")  # about 10: original code
    draws: int = Field(4, ge=1, description="times that a version is probed; its vector is their mean")
    most: int = Field(10, ge=2, description="classes of a version or task that are looked at, those with most rows")
    shots: int = Field(5, ge=1, description="images of a class in a training query")  # original code
    hidden: int = Field(64, ge=1, description="width of the BiLSTM")  # original code: 500
    size: int = Field(128, ge=2, description="length of a vector")  # original code: 256
    steps: int = Field(250, ge=1, description="training steps of the reader")  # twice as many: no gain
    batch: int = Field(60, ge=2, description="pairs of a step")  # original code: 200
    lr: float = Field(1e-2, gt=0, description="learning rate of Adam, at its peak")  # original code: 1e-4, ten thousand passes
    margin: float = Field(0.4, ge=0, description="by which the own network must be closer than the hardest other one")  # original code
    dropout: float = Field(0.2, ge=0, lt=1, description="of the reader's input")


SMOKE = Config(
    zoo=4, classes=(2, 3), zoo_rows=40, zoo_steps=4, encoder_steps=4, probes=60, candidates=4, others=2, anchors=2, bisections=4, draws=2,
    most=4, shots=2, hidden=8, size=8, steps=4, batch=4,
)  # fmt: skip


def asking(cfg: Config) -> dict[str, int]:
    """The settings of `probed`."""
    return {name: getattr(cfg, name) for name in ("draws", "candidates", "others", "anchors", "bisections", "most")}


class Reader(nn.Module):
    """Cells (B, K, K, D) to vectors (B, size) of length 1: a BiLSTM over each class's row, then the mean over classes of
    a layer without negative values, so that what one class says is not taken back by another.

    Initial states are zero. The order of a row is canonical: after the own cell the classes by falling cosine of their anchors with it.
    """

    def __init__(self, inputs: int, hidden: int, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.rows = nn.LSTM(inputs, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, size)

    def forward(self, cells: Tensor) -> Tensor:
        b, k = cells.shape[:2]
        cells = in_order(F.normalize(cells, dim=-1))
        _, (last, _) = self.rows(self.drop(cells.flatten(0, 1)))
        classes = F.relu(self.out(torch.cat([last[0], last[1]], -1)))
        return F.normalize(classes.view(b, k, -1).mean(1), dim=-1)


@dataclass(frozen=True)
class Matcher:
    """A fitted matcher: serves any version and any task of its image shape. `cfg` is the setting that it was fitted with."""

    encoder: Net
    mean: Tensor
    reader: Reader
    probes: Pixels
    cfg: Config

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of the images that it reads."""
        return self.probes.shape[1:]

    def probe(self, net: Net, device: str = "cpu") -> Probed:
        """Ask a version; always about the same images, so that the same weights give the same. Only labels are looked at."""
        return probed(net, self.probes, self.embed, device=device, **asking(self.cfg))

    def knowledge(self, net: Net, device: str = "cpu") -> Floats:
        """Vector (size,) of a version, of length 1: to be stored with the hash of its weights."""
        return self.read(self.probe(net, device).cells)

    def query(self, rows: Dataset) -> Floats:
        """Vector (size,) of a task from its labelled rows, a few of each class. Raises UserError where they do not fit the matcher."""
        if rows.info.shape != self.shape:
            raise UserError(f"query images have the shape {rows.info.shape}; this matcher reads {self.shape}: fit one on such rows")
        images, labels = rows.images(), rows.labels()
        return self.read(task_cells(self.embed(images), labels, self.cfg.most)[None])

    @torch.no_grad()
    def read(self, cells: Floats) -> Floats:
        """Vector (size,) of cells (draws, K, K, D)."""
        read: Floats = F.normalize(self.reader(torch.from_numpy(cells)).mean(0), dim=0).numpy()
        return read

    def embed(self, images: Pixels) -> Floats:
        """Embeddings (N, D) of images (N, C, H, W)."""
        return embedded(self.encoder, images, self.mean)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All of it as plain arrays by name."""
        told = json.dumps({"cfg": self.cfg.model_dump(mode="json"), "arch": self.encoder.arch}, sort_keys=True)
        parts = {"encoder": self.encoder.state_dict(), "reader": self.reader.state_dict()}
        weights = {f"{part}.{name}": value.numpy() for part, state in parts.items() for name, value in state.items()}
        return {**weights, "mean": self.mean.numpy(), "probes": self.probes, "told": np.frombuffer(told.encode(), np.uint8)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> Matcher:
        """The matcher that `to_arrays` wrote. Raises UserError where the arrays are not those of one."""
        try:
            told = json.loads(np.asarray(arrays["told"]).tobytes())
            cfg, encoder = Config(**told["cfg"]), networks.build(told["arch"])
            mean, probes = torch.from_numpy(np.array(arrays["mean"])), np.array(arrays["probes"])
            reader = Reader(len(mean), cfg.hidden, cfg.size)
            for part, module in (("encoder.", encoder), ("reader.", reader)):
                module.load_state_dict(
                    {name.removeprefix(part): torch.from_numpy(np.array(a)) for name, a in arrays.items() if name.startswith(part)}
                )
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"these arrays are not a matcher of registry.know2vec ({type(error).__name__}): fit it again") from None
        return Matcher(encoder.eval(), mean, reader.eval(), probes, cfg)


@method(
    paper="Know2Vec: A Black-Box Proxy for Neural Network Retrieval (AAAI 2025)",
    arxiv="2412.16251",
    claim="vectors of label-only boundary probes retrieve the version that was trained for a task more often than its plain answers do",
)
def know2vec(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Ranking:
    """The offer's versions, the best for the query first. Those of another image shape are left out: `left_out` says so.

    Needs `nets` and `data["query"]`, labelled rows of the new task; and `data["train"]`, labelled rows that the matcher is fitted on, or
    `facts["matcher"]`, the arrays of a fitted one. `facts["versions"][name]["knowledge"]`, where stated, is a version's vector; it is
    not asked then. Raises UserError where one of these is missing or does not fit.
    """
    if not offer.nets:
        raise UserError("no versions to rank: offer networks")
    query = offer.data.get("query")
    if query is None or len(query) == 0:
        raise UserError("no query: give 'query' a few labelled rows of each class of the new task")
    if offer.facts.get("matcher"):
        matcher = Matcher.from_arrays(offer.facts["matcher"])
    elif offer.data.get("train"):
        matcher = fit_matcher(offer.data["train"], cfg, seed=seed, device=device)
    else:
        raise UserError("nothing to fit the matcher on: give 'train' labelled rows, or the facts a fitted 'matcher'")
    asked = matcher.query(query)
    absent, facts = left_out(offer.nets, matcher.shape), offer.facts.get("versions", {})
    vectors = {}
    for name in track([name for name in offer.nets if name not in absent], "know2vec: ask versions"):
        stored = facts.get(name, {}).get("knowledge")
        vectors[name] = matcher.knowledge(offer.nets[name], device) if stored is None else np.asarray(stored, np.float32)
    return rank(vectors, asked)


def rank(vectors: Mapping[str, Floats], query: Floats) -> Ranking:
    """Versions by falling cosine of their vectors with the query's, all of length 1. Raises UserError where lengths differ."""
    for name, vector in vectors.items():
        if vector.shape != query.shape:
            raise UserError(f"the vector of {name} has the shape {vector.shape}, the query's {query.shape}: another matcher made it")
    scores = {name: float(vector.astype(np.float64) @ query) for name, vector in vectors.items()}
    best = sorted(scores, key=lambda name: -scores[name])
    return Ranking(tuple(Place(name, scores[name], f"cosine {scores[name]:.3f} with the query") for name in best))


def left_out(nets: Mapping[str, Net], shape: Sequence[int]) -> dict[str, str]:
    """Versions that cannot be asked about images of this shape, and why."""
    shapes = {name: tuple(net.arch["shape"]) for name, net in nets.items()}
    return {name: f"it takes images of {own}, the query's have {tuple(shape)}" for name, own in shapes.items() if own != tuple(shape)}


def fit_matcher(rows: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Matcher:
    """A matcher from labelled rows: encoder, zoo, its knowledge, reader. Raises UserError where there are too few classes or rows."""
    images, labels = rows.images(), rows.labels()
    images, labels = images[labels >= 0], labels[labels >= 0]
    known, codes = np.unique(labels, return_inverse=True)
    if min(cfg.classes) < 2 or max(cfg.classes) > len(known):
        raise UserError(f"zoo networks of {cfg.classes} classes cannot be trained on rows of {len(known)} classes; valid: 2 to that many")
    with loop.seeded(seed) as generator:
        some = torch.randperm(len(images), generator=generator)[: cfg.probes].numpy()
        encoder = trained(images, codes, len(known), (16, 32), 64, cfg.encoder_steps, 64, generator, device)
        features = embedded(encoder, images, torch.zeros(64))
        mean = torch.from_numpy(features.mean(0))
        features = features - mean.numpy()
        members = [np.flatnonzero(codes == at) for at in range(len(known))]
        tasks = zoo_tasks(len(known), cfg.classes, cfg.zoo, seed)
        cells: list[Tensor] = []
        for task in track(tasks, "know2vec: zoo"):
            own = np.concatenate([members[at] for at in task])
            own = own[torch.randperm(len(own), generator=generator)[: cfg.zoo_rows].numpy()]
            net = trained(images[own], np.searchsorted(task, codes[own]), len(task), (8, 16), 32, cfg.zoo_steps, 32, generator, device)
            cells.append(
                torch.from_numpy(probed(net, images[some], lambda x: embedded(encoder, x, mean), device=device, **asking(cfg)).cells)
            )
        reader = Reader(len(mean), cfg.hidden, cfg.size, cfg.dropout)
        fit_reader(
            reader, cells, tasks, [torch.from_numpy(features[at]) for at in members], shots=cfg.shots, steps=cfg.steps, batch=cfg.batch,
            lr=cfg.lr, margin=cfg.margin, generator=generator,
        )  # fmt: skip
    return Matcher(encoder, mean, reader.eval(), images[some], cfg)


def trained(
    images: Pixels, labels: Labels, classes: int, widths: tuple[int, ...], hidden: int, steps: int, batch: int,
    generator: torch.Generator, device: str,
) -> Net:  # fmt: skip
    """A small network for images (N, C, H, W) with labels (N,) in 0..classes-1."""
    mean, std = loop.pixel_stats(images)
    net = networks.convnet(images.shape[1:], classes, widths=widths, hidden=hidden, mean=mean, std=std, norm="batch")
    return loop.fit_supervised(
        net, images, labels, np.zeros(len(images), bool), steps=steps, batch=batch, lr=0.05, momentum=0.9, weight_decay=5e-4,
        real_weight=1.0, generator=generator, device=device,
    )  # fmt: skip


def read_each(reader: Reader, cells: Sequence[Tensor]) -> Tensor:
    """Vectors (n, size) of cells (K, K, D) of any K each."""
    sizes = [len(one) for one in cells]
    groups = [[at for at, size in enumerate(sizes) if size == k] for k in sorted(set(sizes))]
    read = torch.cat([reader(torch.stack([cells[at] for at in group])) for group in groups])
    return read[torch.tensor([at for group in groups for at in group]).argsort()]


def fit_reader(
    reader: Reader, cells: Sequence[Tensor], tasks: Sequence[tuple[int, ...]], members: Sequence[Tensor], *, shots: int, steps: int,
    batch: int, lr: float, margin: float, generator: torch.Generator,
) -> None:  # fmt: skip
    """Train the reader in place on networks with `cells` (draws, K, K, D) for `tasks`, and queries of `shots` of the features of each
    class, `members` (n, D). The task is told from either vector as its set of classes: so networks of different tasks teach each other.
    """
    tell = nn.Linear(reader.out.out_features, len(members))
    sets = torch.zeros(len(tasks), len(members))
    for at, task in enumerate(tasks):
        sets[at, list(task)] = 1
    pool, ends = torch.cat(list(members)), torch.tensor([len(own) for own in members]).cumsum(0)
    count = [torch.tensor([len(members[c]) for c in task]) for task in tasks]
    first = [ends[list(task)] - own for task, own in zip(tasks, count, strict=True)]
    optimiser = torch.optim.Adam([*reader.parameters(), *tell.parameters()], lr=lr)
    schedule = loop.one_cycle(optimiser, lr, steps)
    reader.train()
    for chosen in track(list(loop.index_batches(len(tasks), min(batch, len(tasks)), steps, generator)), "know2vec: reader"):
        asked, known = [], []
        for at in chosen.tolist():
            known.append(cells[at][int(torch.randint(len(cells[at]), (1,), generator=generator))])
            own = first[at] + (torch.rand(shots, len(tasks[at]), generator=generator) * count[at]).long()
            means = pool[own].mean(0)
            asked.append((means[:, None] + means[None]) / 2)
        model, query = read_each(reader, known), read_each(reader, asked)
        target = sets[chosen]
        loss = ranking_loss(model, query, (target[:, None] == target[None]).all(2), margin)
        for vectors in (model, query):
            loss = loss + F.cross_entropy(SHARP * tell(vectors), target / target.sum(1, keepdim=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    loop.check_finite(reader, "know2vec: reader", lr)
