"""Handwritten digits as a web crawl would have them: images with captions, some of which are wrong or about something else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tasks.core.dataset import encode
from tasks.pool import _draw
from tasks.pool._base import BATCH, Raw, Source

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LOOK_ALIKE = (6, 7, 3, 8, 9, 6, 0, 1, 3, 4)  # what a hurried reader takes each digit for
TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the number {} written by hand",
    "a small grey picture of a {}",
    "somebody wrote the digit {}",
    "scan of a form: {}",
)
UNRELATED = (
    "a red bicycle leaning on a wall",
    "fresh bread on a wooden table",
    "two dogs running on a beach",
    "a sailing boat in the morning fog",
    "the opening hours of the town library",
    "a bowl of tomato soup with basil",
    "mountains under the first snow",
    "buy one pair of shoes, get another free",
    "a cat asleep on a warm radiator",
    "click here to read the whole story",
    "children flying a kite in the park",
    "an old radio in a shop window",
)


def read(
    *,
    noise: float,
    unrelated: float,
    test: float,
    validation: float,
    reference: float,
    reference_rows: int,
    limit: int | None,
    seed: int,
) -> Source:
    """scikit-learn's 1,797 digits, 8x8, with captions. `noise` is the share of the train rows whose caption is spoiled; of the spoiled
    ones, the share `unrelated` speaks of something else, and of the rest one half names the look-alike digit, one half any other digit.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    truth = digits.target.astype(np.int64)
    rows = _draw.sample(len(truth), limit)
    ids = [f"digits-{row:04d}" for row in rows]
    drawn = _draw.numbers(ids)
    split = _draw.splits(drawn, ["train"] * len(ids), test=test, validation=validation, reference=reference)
    split[_over(drawn[:, _draw.REFERENCE], split == "reference", reference_rows)] = "train"
    said = spoil(truth[rows], ids, split == "train", noise=noise, unrelated=unrelated, seed=seed)

    def batches() -> Iterator[list[Raw]]:
        for start in range(0, len(rows), BATCH):
            some = range(start, min(start + BATCH, len(rows)))
            blobs = encode(images[rows[some.start : some.stop]])
            yield [
                Raw(
                    "digits",
                    int(rows[at]),
                    ids[at],
                    blobs[at - start],
                    label=None if said[at] < 0 else int(said[at]),
                    caption=caption(int(said[at]), int(drawn[at, _draw.WORDING]) + seed),
                    split=str(split[at]),
                    clean=bool(said[at] == truth[rows[at]]),
                )
                for at in some
            ]

    return Source(
        "digits",
        len(rows),
        batches,
        classes=NAMES,
        splits=frozenset(("train", "reference", "validation", "test")),
        licence="BSD-3-Clause (scikit-learn); CC BY 4.0 (data)",
        origin="scikit-learn load_digits: the test set of UCI's Optical Recognition of Handwritten Digits, 8x8; captions are made",
    )


def spoil(
    truth: npt.NDArray[np.int64], ids: list[str], train: npt.NDArray[np.bool_], *, noise: float, unrelated: float, seed: int
) -> npt.NDArray[np.int64]:
    """What each caption speaks of (N,): the digit, another one, or -1 for something unrelated.

    Rows are put in the order of a hash of seed and id, and shares are cut from that order: they hold to within one row, and a row that
    is taken away changes no more than the rows at the cuts.
    """
    said = truth.copy()
    drawn = _draw.numbers([f"{seed}/{i}" for i in ids])
    order = np.flatnonzero(train)[np.argsort(drawn[train, 0], kind="stable")]
    bad = order[: round(noise * len(order))]
    bad = bad[np.argsort(drawn[bad, 1], kind="stable")]
    away, wrong = np.split(bad, [round(unrelated * len(bad))])
    said[away] = -1
    alike, other = np.split(wrong, [len(wrong) // 2])
    said[alike] = np.array(LOOK_ALIKE)[truth[alike]]
    said[other] = (truth[other] + 1 + (drawn[other, 2] % np.uint64(9)).astype(np.int64)) % 10
    return said


def caption(digit: int, wording: int) -> str:
    """A caption about a digit (-1: about something else), worded as the number says."""
    return UNRELATED[wording % len(UNRELATED)] if digit < 0 else TEMPLATES[wording % len(TEMPLATES)].format(NAMES[digit])


def _over(drawn: _draw.Numbers, mask: npt.NDArray[np.bool_], most: int) -> npt.NDArray[np.int64]:
    """Positions in the mask past the `most` with the lowest numbers."""
    at = np.flatnonzero(mask)
    return at[np.argsort(drawn[at], kind="stable")][most:]
