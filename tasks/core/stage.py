"""What every data stage does around its method: read its section of `params.yaml`, write rows, figures and curve."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from tasks.core import files
from tasks.core.dataset import Info, Writer, write_parquet
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.core.settings import Settings, read_params

FOLDERS = {"pool": "pool", "filter": "filtered", "condense": "condensed", "generate": "generated"}


def section(settings: Settings, stage: str) -> tuple[dict[str, Any], int]:
    """A stage's own settings and the shared seed. Raises UserError where the section or the seed is not what it must be."""
    params = read_params(settings)
    found = params.get(stage)
    if not isinstance(found, dict):
        raise UserError(f"{settings.params} needs a section '{stage}:' with settings; it has {', '.join(params) or 'nothing'}")
    return dict(found), seed(settings)


def seed(settings: Settings) -> int:
    """The shared seed. Raises UserError where it is no whole number of 0 or more."""
    found = read_params(settings).get("seed")
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise UserError(f"{settings.params}: 'seed' must be a whole number of 0 or more, not {found!r}")
    return found


def number(settings: dict[str, Any], stage: str, key: str) -> int:
    """Take a whole number of 1 or more out of a stage's settings. Raises UserError that names the key."""
    if key not in settings:
        raise UserError(f"params.yaml: '{stage}' needs the key '{key}'")
    value = settings.pop(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"params.yaml: '{stage}.{key}' must be a whole number of 1 or more, not {value!r}")
    return value


def write_made(settings: Settings, stage: str, info: Info, made: Made, aside: pa.Table | None = None) -> None:
    """Write a method's rows as the stage's dataset, its figures and curve beside the others, and as files of it rows set aside and
    how rows came to be."""
    with Writer(settings.root / "data" / FOLDERS[stage], info) as out:
        out.write(made.rows)
        if aside is not None and aside.num_rows:
            write_parquet(out.temporary / "quarantine.parquet", aside)
        if made.course is not None:
            write_parquet(out.temporary / "course.parquet", made.course)
    write_figures(settings, stage, {"rows": made.rows.num_rows, **made.figures}, made.curve)


def write_figures(settings: Settings, stage: str, figures: Mapping[str, float], curve: tuple[dict[str, float], ...] = ()) -> None:
    """Write `data/metrics/<stage>.json` for `dvc metrics`, and where there is a curve `<stage>.csv` for `dvc plots`."""
    plain = {name: round(float(value), 6) for name, value in sorted(figures.items()) if math.isfinite(value)}
    files.write_text(settings.metrics / f"{stage}.json", json.dumps(plain, indent=1) + "\n")
    (settings.metrics / f"{stage}.csv").unlink(missing_ok=True)
    if curve:
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for row in curve for key in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(curve)
        files.write_text(settings.metrics / f"{stage}.csv", text.getvalue())
