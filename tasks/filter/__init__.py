"""Filter: a pool and a small trusted reference set in, one verdict per row out. Never a copy of the data."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.method import Made


class Filter(Protocol):
    """Rows of schema `verdicts`, one for each row of `pool` and in its order. A method reads images and captions, never labels."""

    def __call__(self, pool: Dataset, reference: Dataset, cfg: Any, *, seed: int = 0, device: str = "cpu") -> Made: ...


SIGNATURE = Filter
