"""What a method is: one file with a docstring, a frozen `Config`, a `SMOKE` setting and one `@method` entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

F = TypeVar("F", bound=Callable[..., Any])


class MethodConfig(BaseModel):
    """Base of every method's `Config`: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Made:
    """What a data-stage method made: its rows, and what it measured while making them.

    rows     table in the family's schema (see `core.dataset.SCHEMAS`)
    figures  named numbers for `dvc metrics`
    curve    one mapping per logged step for `dvc plots`; every row has a `step`
    """

    rows: pa.Table
    figures: dict[str, float] = field(default_factory=dict)
    curve: tuple[dict[str, float], ...] = ()


def method(*, paper: str, claim: str, arxiv: str = "") -> Callable[[F], F]:
    """Mark a function as its module's method. The arguments must be literals: the catalogue reads them unimported.

    Raises TypeError where the function is not named as its file is.
    """

    def mark(entry: F) -> F:
        if entry.__name__ != entry.__module__.rpartition(".")[2]:
            raise TypeError(f"{entry.__module__}: the entry must be named as the file is, not {entry.__name__}")
        entry.card = {"paper": paper, "arxiv": arxiv, "claim": claim}  # type: ignore[attr-defined]
        return entry

    return mark
