"""Condense: data and a number in, that many synthetic samples with targets out."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.method import Made


class Condense(Protocol):
    """`n` rows of schema `condensed`; `parents` names every row that a sample was made from.

    `held_out` is data of the same kind that is used for measuring only.
    """

    def __call__(self, data: Dataset, held_out: Dataset, n: int, cfg: Any, *, seed: int = 0, device: str = "cpu") -> Made: ...


SIGNATURE = Condense
