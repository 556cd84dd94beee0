"""Figures with intervals, from per-sample results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Figure:
    """A measured value with the ends of its 95% interval; `low` and `high` are the value itself where none was computed."""

    value: float
    low: float
    high: float

    @staticmethod
    def exact(value: float) -> Figure:
        """A figure without sampling error, such as a number of parameters."""
        return Figure(float(value), float(value), float(value))


def share(hits: npt.NDArray[np.bool_]) -> Figure:
    """Share of true values with its Wilson score interval. Raises ValueError for no values."""
    n = len(hits)
    if n == 0:
        raise ValueError("a share of nothing is not defined")
    z, p = 1.959964, float(np.mean(hits))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(p, min(p, float(centre - half)), max(p, float(centre + half)))


def difference(ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_], *, seed: int = 0, draws: int = 2000) -> Figure:
    """Mean of `ours - theirs` over the same samples, with a paired bootstrap interval (percentiles).

    Raises ValueError where the two are not of one length or are empty.
    """
    if len(ours) != len(theirs) or len(ours) == 0:
        raise ValueError(f"a paired comparison needs the same samples on both sides, got {len(ours)} and {len(theirs)}")
    gaps = ours.astype(np.float64) - theirs.astype(np.float64)
    n = len(gaps)
    # the gaps are -1, 0 or 1, so that a bootstrap sample is a draw from a multinomial over three counts
    counts = np.array([(gaps == -1).sum(), (gaps == 0).sum(), (gaps == 1).sum()]) / n
    drawn = np.random.default_rng(seed).multinomial(n, counts, size=draws)
    means = (drawn[:, 2] - drawn[:, 0]) / n
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(float(gaps.mean()), float(low), float(high))


def per_class_accuracy(labels: Ints, predicted: Ints, classes: int) -> list[float]:
    """Accuracy within each class (classes,); NaN for a class without samples."""
    return [float(np.mean(predicted[labels == c] == c)) if np.any(labels == c) else float("nan") for c in range(classes)]


def confusion(labels: Ints, predicted: Ints, classes: int) -> npt.NDArray[np.int64]:
    """Counts (classes, classes): row = true class, column = predicted class."""
    flat = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


def reliability(confidence: Floats, hits: npt.NDArray[np.bool_], bins: int = 15) -> list[dict[str, float]]:
    """Equal-width confidence bins (low, high]: count, mean confidence, accuracy. Empty bins are left out."""
    at = bin_of(confidence, bins)
    rows = []
    for b in range(bins):
        inside = at == b
        if inside.any():
            rows.append(
                {
                    "low": b / bins,
                    "high": (b + 1) / bins,
                    "count": float(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(hits[inside].mean()),
                }
            )
    return rows


def bin_of(confidence: Floats, bins: int) -> npt.NDArray[np.int64]:
    """Which of `bins` equal steps of (0, 1] each confidence (N,) lies in."""
    # float32 values a hair above an edge would land one bin too high
    edges = np.asarray(confidence, dtype=np.float64) * bins
    return np.clip(np.ceil(edges - 1e-6).astype(np.int64) - 1, 0, bins - 1)


def ece(confidence: Floats, hits: npt.NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error: count-weighted mean of |accuracy - confidence| over the bins (Guo et al. 2017, arXiv 1706.04599).

    Raises ValueError for no values.
    """
    if len(hits) == 0:
        raise ValueError("a calibration error of nothing is not defined")
    rows = reliability(confidence, hits, bins)
    return sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(hits)


def mean(values: Floats, *, seed: int = 0, draws: int = 1000) -> Figure:
    """Mean of per-sample values (N,) with a bootstrap interval (percentiles). Raises ValueError for no values."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("a mean of nothing is not defined")
    means = np.concatenate([counts @ values for counts in resampled(len(values), seed, draws)]) / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    value = float(values.mean())
    return Figure(value, min(value, float(low)), max(value, float(high)))


def calibration_error(confidence: Floats, hits: npt.NDArray[np.bool_], bins: int = 15, *, seed: int = 0, draws: int = 1000) -> Figure:
    """`ece` with a bootstrap interval. Raises ValueError for no values.

    Noise adds to an absolute value, and resampling adds to it once more. The interval is therefore the reflected one
    (`2 * value - percentile`, cut at 0), which takes that second part off; the first stays, so that a well calibrated model's true
    error lies at the interval's low end or below it.
    """
    value = ece(confidence, hits, bins)
    at, n = bin_of(confidence, bins), len(hits)
    gaps = np.zeros((n, bins))
    gaps[np.arange(n), at] = hits - np.asarray(confidence, dtype=np.float64)
    errors = np.concatenate([np.abs(counts @ gaps).sum(1) for counts in resampled(n, seed, draws)]) / n
    low, high = 2 * value - np.percentile(errors, [97.5, 2.5])
    return Figure(value, max(0.0, min(value, float(low))), max(value, float(high)))


def resampled(n: int, seed: int, draws: int) -> Iterator[npt.NDArray[np.float64]]:
    """How often each of n samples is drawn, (some, n) at a time so that memory stays small."""
    generator = np.random.default_rng(seed)
    some = max(1, min(draws, 2_000_000 // n))
    for start in range(0, draws, some):
        yield generator.multinomial(n, np.full(n, 1 / n), size=min(some, draws - start)).astype(np.float64)
