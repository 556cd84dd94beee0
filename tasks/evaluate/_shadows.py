"""A membership attack that knows how hard each row is, by networks that were trained without it (LiRA, offline)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tasks.core import loop, metrics, networks
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.evaluate._shared import Rows
from tasks.evaluate._traces import Found, percent

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
FALSE_ALARMS = 0.05  # share of the strangers that may be called members


class Shadows(NamedTuple):
    """Networks (K), and which rows of the pool (K, N) each was trained on: with every half comes the other half."""

    nets: list[Net]
    members: Bools


_MADE: dict[str, Shadows] = {}  # the latest few: methods that are measured one after another share them
KEEP = 4


def single_rows(
    models: Mapping[str, Net], retain: Rows, forget: Rows, strangers: Rows, *, count: int, steps: int, seed: int, device: str = "cpu"
) -> tuple[Found, str]:
    """`lira_auc` and `lira_members` of each model, by shadows of its own architecture; with a sentence that says of what.

    The score of a row is how much surer the model is of it than the shadows trained without it: LiRA's offline score with one variance for
    all rows, which changes no order. Every row is held against one network of each pair, a stranger too, though none has seen it: against
    all of them its score would be less noisy, and the two no longer alike. A row is called a member where it scores above 95% of strangers.
    """
    if len(strangers) < 2:
        return {}, "no attack on single rows: there are no test rows like the forgotten ones"
    pool, of_forget = joined(retain, forget)
    drawn = halves(len(strangers), count, np.random.default_rng(seed))
    found: Found = {}
    usual: dict[str, tuple[Floats, Floats]] = {}
    for name, net in models.items():
        if (kind := kind_of(net)) not in usual:
            made = shadows(net, pool, count=count, steps=steps, seed=seed, device=device)
            usual[kind] = expected(made.nets, forget, ~made.members[:, of_forget], device), expected(made.nets, strangers, drawn, device)
        ours, theirs = (confidence(net, rows, device) - mean for rows, mean in zip((forget, strangers), usual[kind], strict=True))
        called = ours > np.quantile(theirs, 1 - FALSE_ALARMS)
        found[name] = {"lira_auc": area(ours, theirs), "lira_members": percent(metrics.share(called))}
    said = f"{count} shadow networks, {len(strangers)} strangers, of which {FALSE_ALARMS:.0%} are called members"
    return found, said


def shadows(like: Net, pool: Rows, *, count: int, steps: int, seed: int, device: str = "cpu") -> Shadows:
    """`count` networks of the same architecture as `like`, each trained with the shared recipe on a random half of the pool; kept.

    Pixel statistics are those of the half. Raises UserError where training diverged.
    """
    key = _digest(f"{kind_of(like)} {count} {steps} {seed} {device}", pool)
    if key not in _MADE:
        nets, members = [], halves(len(pool), count, np.random.default_rng(seed))
        recipe = loop.Recipe(steps=steps).model_dump()
        for at in track(range(count), "shadows"):
            half = pool.where(members[at])
            mean, std = loop.pixel_stats(half.inputs)
            with loop.seeded(seed + at) as generator:
                net = networks.build({**like.arch, "mean": round(mean, 6), "std": round(std, 6)})
                fit = loop.fit_supervised(net, half.inputs, half.labels, half.synthetic, generator=generator, device=device, **recipe)
            nets.append(fit)
        while len(_MADE) >= KEEP:
            del _MADE[next(iter(_MADE))]
        _MADE[key] = Shadows(nets, members)
    return _MADE[key]


def kind_of(net: Net) -> str:
    """Its architecture without the pixel statistics, which are those of its training rows."""
    return json.dumps({name: value for name, value in net.arch.items() if name not in ("mean", "std")}, sort_keys=True)


def halves(n: int, count: int, rng: np.random.Generator) -> Bools:
    """Which of n rows belong to each of `count` sets (count, n), `count` even: random halves, each followed by its complement."""
    found: list[Bools] = []
    for _ in range(count // 2):
        half = np.zeros(n, dtype=bool)
        half[rng.permutation(n)[: n // 2]] = True
        found += [half, ~half]
    return np.array(found)


def confidence(net: Net, rows: Rows, device: str = "cpu") -> Floats:
    """log(p / (1 - p)) of the true label's probability p (N,), from the logits, so that it does not saturate; 0 where it is no number.

    LiRA, section IV-C: over networks this is nearly normal, which p and its logarithm are not.
    """
    logits = loop.predict(net, rows.inputs, device=device).double()
    at = torch.from_numpy(np.array(rows.labels))[:, None]
    others = logits.scatter(1, at, -torch.inf).logsumexp(1)
    found: Floats = torch.nan_to_num(logits.gather(1, at)[:, 0] - others, nan=0.0, posinf=0.0, neginf=0.0).numpy()
    return found


def expected(known: Sequence[Net], rows: Rows, unseen: Bools, device: str = "cpu") -> Floats:
    """Mean confidence in each row (N,) of those of the `known` networks (K) that were trained without it: `unseen` (K, N)."""
    outside = np.stack([confidence(net, rows, device) for net in known])
    mean: Floats = (outside * unseen).sum(0) / unseen.sum(0)
    return mean


def area(ours: Floats, theirs: Floats) -> Figure:
    """Share of the pairs in which ours (M,) is the larger one, equal ones half, with DeLong's 95% interval; of theirs (N,)."""

    def below(one: Floats, other: Floats) -> Floats:
        """For each of one, the share of the other that lies below it."""
        ordered = np.sort(other)
        found: Floats = (np.searchsorted(ordered, one, "left") + np.searchsorted(ordered, one, "right")) / (2 * len(other))
        return found

    mine, yours = below(ours, theirs), 1 - below(theirs, ours)
    value = float(mine.mean())
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in (mine, yours) if len(part) > 1))
    return Figure(value, max(0.0, value - 1.959964 * float(error)), min(1.0, value + 1.959964 * float(error)))


def joined(one: Rows, other: Rows) -> tuple[Rows, npt.NDArray[np.int64]]:
    """The rows of both in the order of their ids, so that another request for the same data finds its networks made; and where the rows
    of the other one stand in it."""
    ids = one.ids + other.ids
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    images, labels = np.concatenate([one.inputs, other.inputs]), np.concatenate([one.labels, other.labels])
    synthetic = np.concatenate([one.synthetic, other.synthetic])
    places = np.argsort(order)
    return Rows([ids[at] for at in order], images[order], labels[order], synthetic[order]), places[len(one) :]


def _digest(words: str, pool: Rows) -> str:
    total = hashlib.sha256(words.encode())
    for values in (pool.inputs, pool.labels, pool.synthetic):
        total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()
