"""Registry: what is known of model versions in, a model version or a decision out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tasks.core.evidence import Evidence


@dataclass(frozen=True)
class Rule:
    """One rule of a gate: what it asks, the figures it compared, and whether it was met."""

    rule: str
    passed: bool
    candidate: float
    champion: float | None
    low: float
    high: float
    reason: str


@dataclass(frozen=True)
class Decision:
    """Whether the candidate may take the champion's place, and why."""

    promote: bool
    rules: tuple[Rule, ...]

    @property
    def reason(self) -> str:
        return "; ".join(rule.reason for rule in self.rules)


class Decide(Protocol):
    """Decide on the model called `candidate` in the evidence, against `champion` where the evidence has one."""

    def __call__(self, evidence: Evidence, cfg: Any, *, seed: int = 0) -> Decision: ...


SIGNATURE = Decide
