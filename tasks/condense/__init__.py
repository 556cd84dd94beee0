"""Condense: data and a number in, that many synthetic samples with targets out."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.method import Made
from tasks.core.settings import Settings


class Condense(Protocol):
    """`n` rows of schema `condensed`; `parents` names every row that a sample was made from.

    `held_out` is data of the same kind that is used for measuring only. `start` is what an earlier run made, of as many samples: a method
    that learns goes on from it, and `parents` then names also those of the start; others raise UserError.
    """

    def __call__(
        self, data: Dataset, held_out: Dataset, n: int, cfg: Any, *, start: Dataset | None = None, seed: int = 0, device: str = "cpu"
    ) -> Made: ...


SIGNATURE = Condense


def stage(settings: Settings, method: str) -> None:
    """Condense the kept rows of `data/filtered` into `data/condensed`; held-out loss is measured on the pool's validation rows.

    Goes on from an older version where the section names one as `start`, unless that descends from erased rows.
    """
    import sys
    from dataclasses import replace

    from tasks.condense import _start
    from tasks.core import catalog
    from tasks.core import stage as stages

    own, seed = stages.section(settings, "condense")
    own.pop("method", None)
    n, asked = stages.number(own, "condense", "n"), own.pop("start", None)
    cfg = catalog.configure(f"condense.{method}", own)
    data = Dataset.open(settings.root / "data" / "filtered")
    held_out = Dataset.open(settings.root / "data" / "pool").split("validation")
    made_by: dict[str, Any] = {
        "method": f"condense.{method}",
        "settings": cfg.model_dump(mode="json", exclude_none=True),
        "seed": seed,
        "n": n,
    }
    more: dict[str, Any] = {}
    if asked is not None:
        start, made_by["start"] = _start.find(settings, asked)
        if start is None:
            sys.stderr.write(f"note: {asked} is not started from, since {made_by['start']['not_used']}; condensing begins anew\n")
        else:
            more["start"] = start
    made = catalog.get(f"condense.{method}").entry(data, held_out, n, cfg, seed=seed, **more)
    if asked is not None:
        made = replace(made, figures={**made.figures, "started_from_scratch": float(not more)})
    stages.write_made(settings, "condense", replace(data.info, schema="condensed", of=None, made_by=made_by), made)
