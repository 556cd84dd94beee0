"""`retort verdicts`: what the filter said of the pool, how far combined filters agree, and the kept rows as a list of uids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows._look_cli import Json

MOST = 20  # reasons that are shown


def verdicts(
    out: Annotated[Path | None, typer.Option(help="Write the uids of the kept rows here: .npy as DataComp has them, or .txt.")] = None,
    as_json: Json = False,
) -> None:
    """Show how many rows the filter kept and why the others fell, and what its parts make of each other."""
    from tasks.core import files
    from tasks.core.errors import UserError
    from tasks.core.settings import project

    settings = project()
    found = gather(settings.root / "data" / "filtered", settings.metrics / "filter.json")
    if out is not None and out.suffix not in (".npy", ".txt"):
        raise UserError(f"{out} must end in .npy or .txt")
    if as_json:
        print(json.dumps({key: value for key, value in found.items() if key != "ids"}, indent=1))  # noqa: T201
    else:
        _show(found)
    if out is not None:
        from tasks.core import uids

        kept = uids.uids(found["ids"])
        text = "".join(f"{high:016x}{low:016x}\n" for high, low in sorted(kept.tolist()))
        files.write_bytes(out, uids.to_bytes(kept) if out.suffix == ".npy" else text.encode())
        if not as_json:
            print(out)  # noqa: T201


def gather(folder: Path, metrics: Path) -> dict[str, Any]:
    """Rows, reasons with their counts, the kept ids, and the figures of the parts and of their pairs. Raises UserError without verdicts."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from tasks.core.dataset import read_info
    from tasks.core.errors import UserError

    if read_info(folder).schema != "verdicts":
        raise UserError(f"{folder} holds no verdicts: run 'dvc repro filter'")
    table = pq.read_table(sorted(folder.glob("part-*.parquet")), columns=["sample_id", "kept", "reason"])
    fell = table.filter(pc.invert(table["kept"]))["reason"]
    counts = sorted(((one["counts"], one["values"]) for one in fell.value_counts().to_pylist()), reverse=True)
    figures: Mapping[str, float] = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}
    parts: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        name, slash, figure = key.rpartition("/")
        if slash and figure in ("seen", "kept", "alone", "overlap", "spearman"):
            parts.setdefault(name, {})[figure] = value
    return {
        "rows": table.num_rows,
        "kept": table.num_rows - len(fell),
        "reasons": {reason: count for count, reason in counts},
        "filters": {name: one for name, one in parts.items() if "kept" in one},
        "pairs": {name: one for name, one in parts.items() if "kept" not in one},
        "ids": table.filter(table["kept"])["sample_id"].to_pylist(),
    }


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{found['kept']} of {found['rows']} rows are kept", highlight=False)
    if found["reasons"]:
        reasons = Table("fell since", "rows")
        shown = list(found["reasons"].items())
        for reason, count in shown[:MOST]:
            reasons.add_row(reason, str(count))
        if len(shown) > MOST:
            reasons.add_row(f"{len(shown) - MOST} more reasons", str(sum(count for _, count in shown[MOST:])))
        console.print(reasons)
    if found["filters"]:
        parts = Table("filter", "rows seen", "kept", "dropped by it alone")
        for name, one in found["filters"].items():
            parts.add_row(name, *(f"{one[key]:.0f}" if key in one else "" for key in ("seen", "kept", "alone")))
        console.print(parts)
    if found["pairs"]:
        pairs = Table("filters", "overlap of what they keep", "rank correlation")
        for name, one in found["pairs"].items():
            pairs.add_row(name.replace("+", " and "), *(f"{one[key]:.3f}" if key in one else "" for key in ("overlap", "spearman")))
        console.print(pairs)
