"""Evidence: what was measured of some models, on which data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from tasks.core.metrics import Figure


@dataclass(frozen=True)
class Evidence:
    """Figures by model and metric, on data of a known identity.

    figures     {model: {metric: Figure}}
    data        md5 of the rows that were used, by role
    details     what pictures are drawn from: plain JSON values, by name
    per_sample  one row for each test sample and model, for paired comparison: model, sample_id, label, predicted, confidence
    """

    figures: dict[str, dict[str, Figure]]
    data: dict[str, str]
    details: dict[str, Any] = field(default_factory=dict)
    per_sample: pa.Table | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `per_sample` is kept apart, as Parquet."""
        figures = {m: {k: asdict(f) for k, f in by.items()} for m, by in self.figures.items()}
        return {"figures": figures, "data": self.data, "details": self.details}

    @staticmethod
    def from_json(values: dict[str, Any], per_sample: pa.Table | None = None) -> Evidence:
        figures = {m: {k: Figure(**f) for k, f in by.items()} for m, by in values["figures"].items()}
        return Evidence(figures, values["data"], values["details"], per_sample)
