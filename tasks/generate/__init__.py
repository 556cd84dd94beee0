"""Generate: a few real shots and a number in, synthetic labelled samples out."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.method import Made


class Generate(Protocol):
    """`n` rows of schema `image` for each class of `shots`; `parents` names every shot that a sample was made from.

    `base` is what a generator is first trained on where no pre-trained one is named; its rows are then parents too.
    """

    def __call__(self, shots: Dataset, base: Dataset, n: int, cfg: Any, *, seed: int = 0, device: str = "cpu") -> Made: ...


SIGNATURE = Generate
