"""Train: data in, model out."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.networks import Net


class Train(Protocol):
    """A network trained on the labelled rows of `data`, from scratch or from `start`, which is left as it was."""

    def __call__(self, data: Dataset, cfg: Any, *, start: Net | None = None, seed: int = 0, device: str = "cpu") -> Net: ...


SIGNATURE = Train
