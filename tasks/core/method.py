"""What a method is: one file with a docstring, a frozen `Config`, a `SMOKE` setting and one `@method` entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.core.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


class MethodConfig(BaseModel):
    """Base of every method's `Config`: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=MethodConfig)


def configured(config: type[C], name: str, settings: Mapping[str, Any]) -> C:
    """Make a config from plain settings. Raises UserError that names the bad key and the valid ones."""
    try:
        return config(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] == "extra_forbidden":
            valid = ", ".join(config.model_fields) or "none"
            near = get_close_matches(key, config.model_fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{name} has no setting {key!r}; {hint}valid: {valid}") from None
        raise UserError(f"{name}: setting {key!r} is {first.get('input')!r}, but: {first['msg']}") from None


@dataclass(frozen=True)
class Made:
    """What a data-stage method made: its rows, and what it measured while making them.

    rows     table in the family's schema (see `core.dataset.SCHEMAS`)
    figures  named numbers for `dvc metrics`
    curve    one mapping per logged step for `dvc plots`; every row has a `step`
    course   how rows came to be, where that can be shown: columns `step`, `sample_id` and `image`
    """

    rows: pa.Table
    figures: dict[str, float] = field(default_factory=dict)
    curve: tuple[dict[str, float], ...] = ()
    course: pa.Table | None = None


@dataclass(frozen=True)
class Taught:
    """A network, with named numbers that are known only to the method that made it, such as how often it asked its teacher."""

    net: Any
    figures: dict[str, float] = field(default_factory=dict)


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
