"""`retort lineage --sample`: everything that was made from given samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tasks.core.descent import Carriers, carriers
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tasks.core.store import Store


def show(settings: Settings, ids: Sequence[str], as_json: bool) -> None:
    """Print the data versions and models that carry the samples. Raises UserError where nothing does."""
    found = carriers(settings, Store(settings), ids)
    if as_json:
        print(json.dumps(plain(found), indent=1))  # noqa: T201
        return
    if not found.data and not found.models:
        raise UserError(f"nothing here was made from {', '.join(map(repr, ids[:3]))}{' and others' * (len(ids) > 3)}")
    from rich.console import Console

    Console().print(*tables(found), sep="\n")


def plain(found: Carriers) -> dict[str, Any]:
    """The carriers as plain values."""
    models = [{**model._asdict(), "ref": model.ref.model_dump()} for model in found.models]
    return {"data": [data._asdict() for data in found.data], "models": models, "unknown": list(found.unknown)}


def tables(found: Carriers) -> list[object]:
    """The carriers as tables for a screen: data versions, models, and what can no longer be read."""
    from rich.markup import escape
    from rich.table import Table

    data = Table("data version", "md5", "samples", "")
    for carrier in found.data:
        data.add_row(carrier.path, carrier.md5[:12], str(carrier.samples), "in the project now" if carrier.here else "older")
    models = Table("model", "role", "made by", "why")
    for model in found.models:
        names = ", ".join(f"{name}/{version}" for name, version in model.versions) or f"not registered ({model.ref.model_id[:12]})"
        models.add_row(escape(names) + (" (revoked)" if model.revoked else ""), model.role, model.method, model.how)
    lost = [f"{path} {md5[:12]} can no longer be read: nobody can tell whether it held the samples" for path, md5 in found.unknown]
    return [data, models, *lost]
