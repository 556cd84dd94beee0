"""Averages the weights of versions that were fine-tuned from one start: one network's cost, and more accurate than the best of them.

Paper   Model soups: averaging weights of multiple fine-tuned models improves accuracy (ICML 2022), arXiv 2203.05482
Idea    `uniform`: the mean of all ingredients. `greedy`: by falling held-out accuracy, an ingredient stays if the mean of those kept
        and it does not score lower on the held-out rows. `learned`: mixing weights, for each parameter tensor a softmax over the
        ingredients, and one scale beta of the logits, by AdamW on the held-out loss
Small   small networks with batch normalisation, which CLIP does not have: each mean gets its statistics anew from rows of `train`, and
        while mixing weights are learned it runs on each batch's own; of one network they stay. Beta ends up in the last layer
Limits  Fashion-MNIST, ten fine-tunes on 1,000 rows of a network that knew eight classes, 2,000 held-out rows, 10 seeds, test accuracy:
        greedy .854, best on held-out rows .850 (twice the soup was that one), uniform .854, learned .857, ensemble .856, mean of two
        networks from different starts .372. On noisy and dim images .768, .760, .774, .772, .774. Averaged statistics were worse on
        dim images alone, by .007. The gain hangs on ingredients that are alike: at learning rates up to .2 greedy kept one or two of
        ten and gained nothing (validation, 3 seeds). Greedy takes (ingredients - 1) rounds of scoring, each with statistics made anew
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tasks.core import loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, method
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.registry import Offer

State = dict[str, Tensor]
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class Config(MethodConfig):
    """Which soup, and how it is made."""

    kind: Literal["uniform", "greedy", "learned"] = Field("greedy", description="how ingredients are weighed")  # paper: recommended
    strict: bool = Field(False, description="greedy: an ingredient must raise held-out accuracy; else it must not lower it")  # paper: else
    lr: float = Field(0.05, gt=0, description="learned: learning rate of AdamW")  # original code
    epochs: int = Field(5, ge=1, description="learned: passes over the held-out rows")  # original code
    batch: int = Field(256, ge=2, description="rows in a batch, of learning and of batch normalisation's statistics")  # original code
    bn_rows: int = Field(2048, ge=0, description="rows of `train` that re-estimate batch normalisation; 0: statistics are averaged")
    trust_start: bool = Field(False, description="take versions whose start is not known as fine-tuned from that of the others")


SMOKE = Config(kind="learned", epochs=2, batch=16, bn_rows=32, trust_start=True)


@dataclass(frozen=True)
class Soup:
    """A soup, and the share that each version has in it, in the offer's order: 0 for one that greedy left out, for a learned soup the
    mean over its tensors. The shares sum to 1."""

    net: Net
    shares: Mapping[str, float]

    @property
    def kept(self) -> tuple[str, ...]:
        """Versions that the soup holds: those whose data it carries."""
        return tuple(name for name, share in self.shares.items() if share > 0)


@method(
    paper="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time (ICML 2022)",
    arxiv="2203.05482",
    claim="a greedy soup of fine-tuned networks beats the one that is best on held-out rows, on test accuracy, at the cost of one network",
)
def soups(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Net:
    """The soup of `offer.nets`. What it needs, and what it raises, is said at `cook`."""
    return cook(offer, cfg, seed=seed, device=device).net


def cook(offer: Offer, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Soup:
    """The soup of the offer's networks with each one's share.

    Needs `nets`, two or more of one arch (the start itself may be one); `facts["versions"][name]["start"]`, the name of the version (or
    another id) that each was fine-tuned from; `data["choose"]`, labelled held-out rows, for greedy and learned; `data["train"]`, whose
    labels are not looked at, where the networks have batch normalisation and `bn_rows` is above 0. Raises UserError where one of these is
    missing or does not fit, where held-out rows are test rows, and where learning diverged.
    """
    names, nets = list(offer.nets), [copy.deepcopy(net).cpu().eval() for net in offer.nets.values()]
    check_versions({name: net.arch for name, net in offer.nets.items()}, offer.facts.get("versions", {}), cfg.trust_start)
    with loop.seeded(seed) as generator:
        rows = None
        if cfg.bn_rows and batch_norms(nets[0]):
            train = fitting(offer, "train", "they re-estimate batch normalisation; 'bn_rows' of 0 averages its statistics instead")
            some = train.take(torch.randperm(len(train), generator=generator)[: cfg.bn_rows].numpy())
            # in random order: of rows sorted by class each batch would have its own mean
            rows = some.images()[torch.randperm(len(some), generator=generator).numpy()]
        if cfg.kind == "uniform":
            shares = np.full(len(nets), 1 / len(nets))
            net = mixed(nets, rows, batch=cfg.batch, device=device)
        else:
            images, labels = held_out(offer, cfg.kind)
            if cfg.kind == "greedy":
                net, kept = greedy(nets, images, labels, rows, strict=cfg.strict, batch=cfg.batch, device=device)
                shares = np.isin(np.arange(len(nets)), kept) / len(kept)
            else:
                weights, beta = learned_weights(
                    nets, images, labels, lr=cfg.lr, epochs=cfg.epochs, batch=cfg.batch, live=rows is not None,
                    generator=generator, device=device,
                )  # fmt: skip
                net = scaled(mixed(nets, rows, batch=cfg.batch, device=device, weights=weights), beta)
                shares = torch.stack(list(weights.values())).mean(0).numpy()
    return Soup(net, dict(zip(names, (float(share) for share in shares), strict=True)))


def average(states: Sequence[State], weights: Mapping[str, Tensor] | None = None) -> State:
    """Mean of state dicts with the same keys: of float tensors, while counters and other integers are copied from the first.

    weights: for a tensor's name the ingredients' shares (n,), where it is not the plain mean. In float64, so that the mean of equal
    values is that value.
    """
    plain = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    mean = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            share = plain if weights is None else weights.get(name, plain).double()
            stacked = torch.stack([state[name].double() for state in states])
            mean[name] = torch.tensordot(share, stacked, 1).to(first.dtype)
        else:
            mean[name] = first.clone()
    return mean


def mixed(nets: Sequence[Net], rows: Pixels | None, *, batch: int, device: str, weights: Mapping[str, Tensor] | None = None) -> Net:
    """A new network of the averaged weights, on the CPU in eval mode, its batch normalisation re-estimated on `rows` if there are any.

    The mean of one network is that network: its statistics stay as they are.
    """
    net = copy.deepcopy(nets[0])
    net.zero_grad()  # what training left there is copied with the weights
    net.load_state_dict(average([other.state_dict() for other in nets], weights))
    if rows is not None and len(nets) > 1:
        re_estimate(net.to(device), rows, batch=batch, device=device)
    return net.cpu().eval()


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    """Layers of batch normalisation that keep running statistics."""
    return [layer for layer in net.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


@torch.no_grad()
def re_estimate(net: Net, rows: Pixels, *, batch: int, device: str = "cpu") -> None:
    """Set the running statistics of batch normalisation, in place, to the means over batches of the rows (N, C, H, W).

    The mean of networks does not have the mean of their statistics: activations of averaged weights vary less. All else stays in eval
    mode. A shorter last batch is left out: it would count as much as a full one.
    """
    layers = batch_norms(net)
    momenta = [layer.momentum for layer in layers]
    net.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's sign for a plain mean over batches
        layer.train()
    for at in range(0, max(len(rows) - batch, 0) + 1, batch):
        net(loop.to_float(rows[at : at + batch], device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    net.eval()


def accuracy(net: Net, images: Pixels, labels: Labels, device: str = "cpu") -> float:
    """Share of images (N, C, H, W) that the network gives their labels (N,)."""
    return float((loop.predict(net, images, device=device).argmax(1).numpy() == labels).mean())


def greedy(
    nets: Sequence[Net], images: Pixels, labels: Labels, rows: Pixels | None, *, strict: bool, batch: int, device: str = "cpu"
) -> tuple[Net, tuple[int, ...]]:
    """The greedy soup, and the positions of the networks that it kept, in the order in which they came in. Recipe 1 of the paper.

    Held-out images (N, C, H, W) with labels (N,) give the order (ties: the earlier one first) and decide what is kept.
    """
    scores = [accuracy(net, images, labels, device) for net in nets]
    order = sorted(range(len(nets)), key=lambda at: -scores[at])
    kept, best = [order[0]], scores[order[0]]
    soup = mixed([nets[order[0]]], rows, batch=batch, device=device)
    for at in track(order[1:], "greedy soup"):
        trial = mixed([nets[other] for other in [*kept, at]], rows, batch=batch, device=device)
        score = accuracy(trial, images, labels, device)
        if score > best or (score == best and not strict):
            soup, best = trial, score
            kept.append(at)
    return soup, tuple(kept)


def learned_weights(
    nets: Sequence[Net], images: Pixels, labels: Labels, *,
    lr: float, epochs: int, batch: int, live: bool, generator: torch.Generator, device: str = "cpu",
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """Shares (n,) of the networks for each parameter tensor, by its name, and the scale beta of the logits. Appendix I of the paper.

    Both are learned from cross-entropy on held-out images (N, C, H, W) with labels (N,); no weight of a network is. They begin at the
    plain mean and beta 1. `live`: batch normalisation uses each batch's own statistics meanwhile, else the mean of the running ones.
    Raises UserError where the loss is no longer finite.
    """
    mould = copy.deepcopy(nets[0]).to(device)
    mould.load_state_dict(average([net.state_dict() for net in nets]))
    for layer in batch_norms(mould) if live else []:
        layer.train()
    names = [name for name, _ in mould.named_parameters()]
    stacked = [torch.stack([dict(net.named_parameters())[name].detach() for net in nets]).to(device) for name in names]
    logits = torch.zeros(len(names), len(nets), device=device, requires_grad=True)
    beta = torch.ones((), device=device, requires_grad=True)
    optimiser = torch.optim.AdamW([logits, beta], lr=lr, weight_decay=0.0)
    targets = torch.from_numpy(np.array(labels))
    steps = epochs * -(-len(images) // batch)
    batches = loop.index_batches(len(images), batch, steps, generator)
    for _ in track(range(steps), "learned soup"):
        at = next(batches)
        shares = logits.softmax(1)
        weights = {name: torch.tensordot(share, values, 1) for name, share, values in zip(names, shares, stacked, strict=True)}
        answer = beta * functional_call(mould, weights, (loop.to_float(images[at.numpy()], device),))
        loss = F.cross_entropy(answer, targets[at].to(device))
        if not torch.isfinite(loss):
            raise UserError(f"'learned soup' diverged: the held-out loss is no longer a finite number; set a smaller lr than {lr:g}")
        logits.grad, beta.grad = torch.autograd.grad(loss, [logits, beta])
        optimiser.step()
    return dict(zip(names, logits.detach().softmax(1).cpu(), strict=True)), beta.item()


def scaled(net: Net, beta: float) -> Net:
    """The network itself, its logits scaled by beta: in the last layer, so that what is served is calibrated as it was learned."""
    for weights in net.head.parameters():
        weights.data.mul_(beta)
    return net


def check_versions(archs: Mapping[str, dict[str, Any]], versions: Mapping[str, Mapping[str, Any]], trust: bool) -> None:
    """Raises UserError where there are fewer than two versions, two differ in arch, or two are not known to have a common start.

    `trust` lets pass what is not known; a start that is known to be another one is refused all the same.
    """
    if len(archs) < 2:
        raise UserError(f"a soup needs two or more versions, got {len(archs)}")
    first, *others = archs
    for name in others:
        if archs[name] != archs[first]:
            ours, theirs = archs[first], archs[name]
            key = next(key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key))
            differ = f"{key!r} ({ours.get(key)} and {theirs.get(key)})"
            raise UserError(f"{first} and {name} cannot be averaged: their networks differ in {differ}")
    origins = {name: origin(name, versions) for name in archs}
    # a version without a start counts as known where another one comes from it
    named = {found for name, found in origins.items() if found != name or versions.get(name, {}).get("start")}
    known = [name for name in archs if origins[name] in named]
    for name in known[1:]:
        if origins[name] != origins[known[0]]:
            differ = f"({origins[known[0]]} and {origins[name]})"
            raise UserError(f"{known[0]} and {name} cannot be averaged: they were fine-tuned from different starts {differ}")
    if (unknown := [name for name in archs if name not in known]) and not trust:
        one, two = (known[0], unknown[0]) if known else unknown[:2]
        raise UserError(
            f"{one} and {two} are not known to be fine-tuned from one start, without which their mean is of no use; "
            "set 'trust_start' if you know that they are"
        )


def origin(name: str, versions: Mapping[str, Mapping[str, Any]]) -> str:
    """The first known link of the chain of starts that leads to a version: itself where no start is known."""
    chain = [name]
    while (start := versions.get(chain[-1], {}).get("start")) and str(start) not in chain:
        chain.append(str(start))
    return chain[-1]


def fitting(offer: Offer, role: str, why: str) -> Dataset:
    """Rows of a role. Raises UserError where there are none, or where they are not what the networks take."""
    rows = offer.data.get(role)
    if rows is None or len(rows) == 0:
        raise UserError(f"a soup needs rows {role!r} here: {why}")
    arch = next(iter(offer.nets.values())).arch
    if (ours := (tuple(rows.info.shape), len(rows.info.classes))) != (theirs := (tuple(arch["shape"]), arch["classes"])):
        raise UserError(f"rows {role!r} are images {ours[0]} of {ours[1]} classes; the versions take {theirs[0]} and {theirs[1]}")
    return rows


def held_out(offer: Offer, kind: str) -> tuple[Pixels, Labels]:
    """Images and labels of the labelled rows `choose`. Raises UserError where there are none, or where they are test rows."""
    rows = fitting(offer, "choose", f"a {kind} soup is chosen by labelled rows that were held out from training")
    if "test" in set(rows.column("split").to_pylist()):
        raise UserError("rows 'choose' hold rows of the split 'test': what decides on a soup must not measure it; hold out others")
    rows = rows.where(rows.labels() >= 0)
    if len(rows) == 0:
        raise UserError(f"no row of 'choose' has a label: a {kind} soup needs labelled rows that were held out from training")
    return rows.images(), rows.labels()
