"""Traces of forgotten rows that a network's answers do not show: how fast it learns them again, and what its features still tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.core import loop, metrics, networks
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.evaluate._shared import Rows

Found = dict[str, dict[str, Figure]]  # by model and metric


def percent(figure: Figure) -> Figure:
    """A share as percent."""
    return replace(figure, value=100 * figure.value, low=100 * figure.low, high=100 * figure.high)


def recovery(
    models: Mapping[str, Net], forget: Rows, *, rows: int, steps: int, lr: float, margin: float, device: str = "cpu"
) -> tuple[Found, dict[str, Any]]:
    """`relearn` of each model, on the same rows up to the same share right: that of `original` (of all, where it is not there) less a
    margin, as a share of it. With the curves behind it."""
    part, known = spread(forget, rows), 1.0
    if "original" in models:
        known = float(np.mean(loop.predict(models["original"], part.inputs, device=device).argmax(1).numpy() == part.labels))
    target = (1 - margin) * known
    found = {name: relearn(models[name], part, target=target, steps=steps, lr=lr, device=device) for name in track(list(models), "relearn")}
    curves = {name: [round(right, 6) for right in one.curve] for name, one in found.items()}
    details = {"rows": len(part), "target": target, "limit": steps, "accuracy": curves}
    return {name: {"relearn": Figure.exact(one.steps)} for name, one in found.items()}, details


def new_heads(models: Mapping[str, Net], retain: Rows, forget: Rows, test: Rows, *, rows: int, device: str = "cpu") -> Found:
    """`head` of each model, and where there are test rows of a forgotten class `head_test`, in percent; of at most `rows` retained rows
    and as large a part of the forgotten classes."""
    found: Found = {}
    for name, net in models.items():
        of_class = max(1, rows // net.arch["classes"])
        some = spread(forget, of_class * len(np.unique(forget.labels)))
        right = probe(net, spread(retain, rows), some, test, device=device)
        found[name] = {"head": percent(metrics.share(right.forget))}
        if len(test):
            found[name]["head_test"] = percent(metrics.share(right.held))
    return found


class Relearned(NamedTuple):
    """Steps until enough rows were right again, all that were allowed where they never were; and the share right before each step."""

    steps: int
    curve: list[float]


def spread(rows: Rows, most: int) -> Rows:
    """At most `most` rows, evenly spread over all, in their order."""
    n = len(rows)
    if n <= most:
        return rows
    mask = np.zeros(n, dtype=bool)
    mask[np.arange(most) * n // most] = True
    return rows.where(mask)


def relearn(net: Net, rows: Rows, *, target: float, steps: int, lr: float, device: str = "cpu") -> Relearned:
    """Train a copy on all of the rows at once, by plain SGD, until the share of them that is right reaches `target`, for at most `steps`.

    Nothing is drawn: every network sees the same rows in the same order. It stays in eval mode, so that the share is that of the network
    as it would be used. Protocol: "relearn time".
    """
    copy = restored(net, device)
    images, labels = loop.to_float(rows.inputs, device), torch.from_numpy(np.array(rows.labels)).to(device)
    optimiser = torch.optim.SGD([weights for weights in copy.parameters() if weights.requires_grad], lr=lr)
    curve: list[float] = []
    for step in range(steps + 1):
        logits = copy(images)
        curve.append(float((logits.argmax(1) == labels).double().mean()))
        if curve[-1] >= target - 1e-9:
            return Relearned(step, curve)
        loss = F.cross_entropy(logits, labels)
        if step == steps or not torch.isfinite(loss):
            break
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return Relearned(steps, curve)


def restored(net: Net, device: str = "cpu") -> Net:
    """A copy in eval mode whose weights learn as those of a fresh network do: also where the original's are frozen."""
    with loop.seeded(0):
        copy = networks.build(net.arch)
    copy.load_state_dict(net.state_dict())
    return copy.to(device).eval()


@torch.no_grad()
def features(net: Net, images: npt.NDArray[np.uint8], device: str = "cpu", size: int = 1024) -> Tensor:
    """What stands before the last layer (N, D), float64, in eval mode; 0 where a network that diverged gives no number."""
    copy = restored(net, device)
    pieces = [copy.features(loop.to_float(images[at : at + size], device)).cpu().double() for at in range(0, len(images), size)]
    return torch.nan_to_num(torch.cat(pieces), nan=0.0, posinf=0.0, neginf=0.0)


class Probed(NamedTuple):
    """Which forgotten rows (N,), and which held-out ones (M,), a head that was trained anew gets right."""

    forget: npt.NDArray[np.bool_]
    held: npt.NDArray[np.bool_]


def fit_head(inputs: Tensor, targets: Tensor, last: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (D, K) and offset (K,) that fit targets (N, K) to inputs (N, D) of mean 0 by least squares, and what each of the last rows
    (last, K) would be given by the fit without that row. The weights' squares count `ridge` times N.

    Both have a closed form; without row i the fit gives it y - (y - f) / (1 - h), h the leverage of the row.
    """
    n, size = inputs.shape
    offset = targets.mean(0)
    gram = inputs.T @ inputs + ridge * n * torch.eye(size, dtype=inputs.dtype)
    weights = torch.linalg.solve(gram, inputs.T @ (targets - offset))
    asked, wanted = inputs[n - last :], targets[n - last :]
    leverage = 1 / n + (asked * torch.linalg.solve(gram, asked.T).T).sum(1)
    without = wanted - (wanted - asked @ weights - offset) / (1 - leverage)[:, None]
    return weights, offset, without


def probe(net: Net, retain: Rows, forget: Rows, held: Rows, *, ridge: float = 1e-3, device: str = "cpu") -> Probed:
    """Freeze the features, fit a fresh linear head on retained and forgotten rows of all classes, and ask it. Protocol: "re-trained head".

    Its targets are one-hot labels, its inputs the features at mean 0 and deviation 1. A forgotten row is asked of the head fitted without
    it: what is left to tell is whether the features were trained on the row, and not whether the new head was.
    """
    known, gone = features(net, retain.inputs, device), features(net, forget.inputs, device)
    both = torch.cat([known, gone])
    mean, sd = both.mean(0), both.std(0, correction=0)
    sd[sd < 1e-9] = 1
    labels = torch.from_numpy(np.concatenate([retain.labels, forget.labels]))
    hot = F.one_hot(labels, net.arch["classes"]).double()
    weights, offset, without = fit_head((both - mean) / sd, hot, len(forget), ridge)
    asked = (features(net, held.inputs, device) - mean) / sd if len(held) else both[:0]
    return Probed(without.argmax(1).numpy() == forget.labels, (asked @ weights + offset).argmax(1).numpy() == held.labels)
