"""Condense: data and a number in, that many synthetic samples with targets out."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.method import Made
from tasks.core.settings import Settings


class Condense(Protocol):
    """`n` rows of schema `condensed`; `parents` names every row that a sample was made from.

    `held_out` is data of the same kind that is used for measuring only.
    """

    def __call__(self, data: Dataset, held_out: Dataset, n: int, cfg: Any, *, seed: int = 0, device: str = "cpu") -> Made: ...


SIGNATURE = Condense


def stage(settings: Settings, method: str) -> None:
    """Condense the kept rows of `data/filtered` into `data/condensed`; held-out loss is measured on the pool's validation rows."""
    from dataclasses import replace

    from tasks.core import catalog
    from tasks.core import stage as stages

    own, seed = stages.section(settings, "condense")
    own.pop("method", None)
    n = stages.number(own, "condense", "n")
    cfg = catalog.configure(f"condense.{method}", own)
    data = Dataset.open(settings.root / "data" / "filtered")
    held_out = Dataset.open(settings.root / "data" / "pool").split("validation")
    made = catalog.get(f"condense.{method}").entry(data, held_out, n, cfg, seed=seed)
    made_by = {"method": f"condense.{method}", "settings": cfg.model_dump(mode="json"), "seed": seed, "n": n}
    stages.write_made(settings, "condense", replace(data.info, schema="condensed", of=None, made_by=made_by), made)
