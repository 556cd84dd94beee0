"""What methods of the family `registry` are handed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.core.dataset import Dataset
from tasks.core.evidence import Evidence
from tasks.core.networks import Net


@dataclass(frozen=True)
class Offer:
    """What a registry method looks at. It fills in what it says in its docstring that it needs; nothing here may be changed.

    nets      networks by version, such as `digits-student/3`, in the order that the user named them
    data      rows by role: `train`, `choose` (held out from training; never test rows), `query`, or a version's own training rows
    evidence  what was measured, with the models under the names `candidate` and, where there is one, `champion`
    facts     plain values: `versions` and `devices`, each by name
    """

    nets: Mapping[str, Net] = field(default_factory=dict)
    data: Mapping[str, Dataset] = field(default_factory=dict)
    evidence: Evidence | None = None
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
