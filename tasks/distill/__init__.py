"""Distill: one or more teachers and data in, model out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.method import Taught
from tasks.core.networks import Net


class Distill(Protocol):
    """A student of the teachers, which are left as they were; fresh, or on from a copy of `start`. Rows of `data` may lack labels."""

    def __call__(
        self, teachers: Sequence[Net], data: Dataset, cfg: Any, *, start: Net | None = None, seed: int = 0, device: str = "cpu"
    ) -> Net | Taught: ...


SIGNATURE = Distill
