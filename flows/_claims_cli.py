"""`retort claims` and `retort report claims`: what was measured of each method's claim, and how to measure it again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

claims = typer.Typer(help="What was measured of each method's claim.", invoke_without_command=True)
report = typer.Typer(help="Write a page.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@claims.callback()
def table(context: typer.Context, as_json: Json = False) -> None:
    """What was measured of each method's claim: arms, effect with interval, status, and whether it still belongs to this code."""
    if context.invoked_subcommand:
        return
    from flows import _claims

    found = _claims.overview()
    if as_json:
        print(json.dumps(found, indent=1))  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Column, Table

    from tasks.core.page_claims import arms_text, effect_text

    widest = max((len(one["method"]) for one in found), default=0)
    columns = (Column("method", min_width=widest), "claim", "arms", "effect [95%]", "status", "s", "")
    shown = Table(*columns, title=f"{len(found)} claims", title_justify="left", show_lines=True)
    for one in found:
        paper = f"{one['paper']} (arXiv {one['arxiv']})" if one["arxiv"] else "a baseline"
        shown.add_row(
            f"{one['method']}\n[dim]{paper}[/dim]",
            one["claim"],
            arms_text(one),
            effect_text(one),
            one["status"] or "not measured",
            "" if one["seconds"] is None else f"{one['seconds']:.0f}",
            f"stale: {one['why']}" if one["stale"] else "fresh",
        )
    Console().print(shown)


@claims.command()
def run(
    method: Annotated[str, typer.Argument(help="Method whose claim is measured, such as filter.dfn.")],
    first_seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=0, help="Number of seeds; 0: as published.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Folder of other data of the same schema, in the place of the claim's first.")] = None,
    switched_off: Annotated[bool, typer.Option("--switched-off", help="Run the baseline's code in the method's place.")] = False,
    small: Annotated[bool, typer.Option("--small", help="The smallest sizes: that it runs, not what it finds.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Seeds at once; 0: one for each core.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write result and figure into this folder.")] = None,
    if_changed: Annotated[
        bool, typer.Option("--if-changed", help="Measure one seed first; where it gives what is published, keep the published result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a claim again. Nothing is written unless `--out` says where."""
    from flows import _claims, _measure
    from tasks.core.errors import UserError

    if out and (switched_off or small):
        raise UserError("a claim that is switched off or small is no result: leave out --out, --switched-off and --small")
    if if_changed and (switched_off or small or data or first_seed or seeds):
        raise UserError("--if-changed compares with the published result: leave out what makes the run another one")
    chosen = range(first_seed, first_seed + (seeds or _claims.load(method).CLAIM.seeds))

    def told(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    found = _measure.kept(method, told=told) if if_changed else None
    found = found or _measure.run(method, chosen, data=data, off=switched_off, small=small, jobs=jobs, told=told)
    if out:
        for path in _measure.write(found, out):
            print(path, file=sys.stderr)  # noqa: T201
    if as_json:
        print(json.dumps(found, indent=1))  # noqa: T201
    else:
        _show(found, switched_off)


def _show(found: dict[str, Any], off: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from tasks.core.page_claims import asked, differences, effect_text, number

    console = Console()
    console.print(f"{found['method']}{' with its idea switched off' if off else ''}: [bold]{found['status']}[/bold]\n{found['claim']}")
    shown = Table("condition", "effect [95%]", "by seed", "outcome")
    for name, condition in found["conditions"].items():
        mark = " (headline)" if name == found["headline"] else ""
        each = " ".join(number(d, signed=True) for d in differences(found, condition))
        shown.add_row(asked(condition) + mark, effect_text(found, condition), each, condition["status"])
    console.print(shown)
    arms = Table("metric", "arm: mean (sd)")
    for metric, of_arm in found["arms"].items():
        arms.add_row(metric, ", ".join(f"{arm} {number(s['mean'])} ({number(s['sd'])})" for arm, s in of_arm.items()))
    console.print(arms)
    for seed, reason in found["failures"].items():
        console.print(f"seed {seed} failed: {reason}")
    seeds = found["seeds"]
    console.print(f"seeds {seeds[0]} to {seeds[-1]}, {found['seconds']:.0f} s, data {', '.join(found['data']) or 'built in'}")


@report.command("claims")
def page(out: Annotated[Path | None, typer.Option(help="File to write; default: .retort/reports/claims.html.")] = None) -> None:
    """Write one page of all claims: a forest plot, and for each method its card, figure, arms and how to run it."""
    from flows import _claims
    from tasks.core import catalog, files
    from tasks.core.page_claims import render
    from tasks.core.settings import project
    from tasks.core.step import revision

    target = out or project().reports / "claims.html"
    text = render(_claims.overview(), catalog.cards(), time.strftime("%Y-%m-%d"), revision(catalog.ROOT))
    files.write_text(target, text)
    print(target)  # noqa: T201
