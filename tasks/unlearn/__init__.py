"""Unlearn: a model, what it shall forget and what it shall keep in; a model out."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.networks import Net


class Unlearn(Protocol):
    """A new network of the same architecture; `model` is left as it was. `forget` and `retain` share no row."""

    def __call__(self, model: Net, forget: Dataset, retain: Dataset, cfg: Any, *, seed: int = 0, device: str = "cpu") -> Net: ...


SIGNATURE = Unlearn
