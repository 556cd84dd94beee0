"""Registry: model versions and what is known of them in; a model, a ranking or a decision out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tasks.core.networks import Net
from tasks.core.offer import Offer

__all__ = ["SIGNATURE", "Decision", "Offer", "Place", "Ranking", "Registry", "Rule"]


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
        """What was not met; where all was met, what was."""
        missed = [rule.reason for rule in self.rules if not rule.passed]
        return "; ".join(missed or [rule.reason for rule in self.rules])


@dataclass(frozen=True)
class Place:
    """One version's place in a ranking: its score (higher is better) and why it stands there."""

    version: str
    score: float
    reason: str


@dataclass(frozen=True)
class Ranking:
    """Versions that will do, the best first."""

    places: tuple[Place, ...]


class Registry(Protocol):
    """Look at what is offered. A method that makes a model leaves those that it was given as they were."""

    def __call__(self, offer: Offer, cfg: Any, *, seed: int = 0, device: str = "cpu") -> Net | Ranking | Decision: ...


SIGNATURE = Registry
