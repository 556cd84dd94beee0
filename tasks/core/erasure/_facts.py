"""What a certificate says, field by field, and how it is read from text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, AliasChoices, BaseModel, Field, ValidationError

from tasks.core.errors import UserError


class Check(NamedTuple):
    """What was looked at, whether it is so (None: it cannot be seen from here), and why."""

    what: str
    ok: bool | None
    why: str


def _time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Time = Annotated[str, AfterValidator(_time)]
Count = Annotated[int, Field(ge=0)]
Request = Annotated[str, Field(pattern=r"^r-[0-9a-f]{16}$")]


class _Part(BaseModel, frozen=True, extra="allow", strict=True):
    """Unknown fields are kept and signed: later versions may say more."""


class Samples(_Part):
    """The samples of the request: blake2b hashes of 16 bytes, in hex, keyed with `salt`."""

    count: Count
    salt: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){0,64}$")]
    ids: list[Hash]
    contents: list[Hash] = Field(validation_alias=AliasChoices("contents", "images"))  # images: before there were texts


class Data(_Part):
    """A data folder: md5 before and after (None: it is gone), and how many rows carried the samples."""

    path: str
    before: str | None
    after: str | None
    rows: Count


class Model(_Part):
    """A version that carried the samples, and what became of it.

    sha256     of its weights
    figures    of the version that replaced it; None where one is no number
    reference  sha256 of the weights of the network that was retrained without the samples
    void       whether the comparison with that network says nothing
    champion   whether it was in service when the request came
    """

    name: str
    version: Annotated[int, Field(ge=1)]
    action: Literal["unlearned", "retrained", "distilled again", "revoked", "waiting"]
    sha256: str
    role: str = ""
    method: str | None = None
    replaced_by: int | None = None
    figures: dict[str, float | None] = Field(default_factory=dict)
    reference: str | None = None
    void: bool | None = None
    gate: str | None = None
    champion: bool = False


class Purged(_Part):
    """What was removed from a place for good."""

    place: str
    objects: Count
    bytes: Count


class Search(_Part):
    """The search for remains: where, through how many files and rows, and how many were found."""

    places: list[str]
    files: Count
    rows: Count
    found: Count


class Facts(_Part):
    """All that a certificate says."""

    version: Literal[1]
    request: Request
    kind: Literal["samples", "where", "class", "concept"]
    reason: str
    policy: Literal["unlearn", "retrain", "auto"]
    asked_at: Time
    finished_at: Time
    samples: Samples
    data: list[Data]
    models: list[Model]
    purged: list[Purged]
    search: Search
    irreproducible: list[str]
    beyond: list[str]
    tools: dict[str, str]
    journal: str


def parse(text: str | bytes) -> dict[str, Any]:
    """A certificate out of a file's text. Raises UserError where it is cut off, or no JSON object, or names something twice."""
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_never)
    except (ValueError, RecursionError):
        raise UserError("this is no certificate, or only a part of one: get the whole .json file again") from None
    if not isinstance(found, dict):
        raise UserError("this is no certificate: it must be a JSON object")
    return found


def faults(found: Mapping[str, Any]) -> str:
    """What is missing or of the wrong kind, in words; nothing where all is well. Values are never repeated."""
    try:
        Facts.model_validate(found)
    except ValidationError as error:
        wrong: dict[str, list[str]] = {}
        for fault in error.errors(include_url=False, include_context=False, include_input=False):
            said = "missing" if fault["type"] == "missing" else "not as it must be"
            wrong.setdefault(said, []).append(".".join(map(str, fault["loc"])))
        return "; ".join(f"{said}: {', '.join(where[:5])}" for said, where in wrong.items())
    return ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")  # two readers could each take another
    return found


def _never(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
