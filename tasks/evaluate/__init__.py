"""Evaluate: models and data in, evidence out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.evidence import Evidence
from tasks.core.networks import Net


class Evaluate(Protocol):
    """Evidence on the named models, each measured on the same rows. `data` names the roles that the method needs, such as `test`."""

    def __call__(
        self, models: Mapping[str, Net], data: Mapping[str, Dataset], cfg: Any, *, seed: int = 0, device: str = "cpu"
    ) -> Evidence: ...


SIGNATURE = Evaluate
