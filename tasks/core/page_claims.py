"""The page of all claims, and the figure of each: effects with intervals, every seed a dot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tasks.core import page_charts as charts

Record = Mapping[str, Any]
# a figure that stands alone brings its own colours; on the page the style sheet has them
STYLE = """
text{font-family:system-ui,sans-serif}.t{fill:var(--soft);font-size:13px}.small{font-size:11.5px;fill:var(--muted)}.strong{fill:var(--ink);font-weight:600}
svg{--soft:#475067;--muted:#6a7386;--ink:#1b2130;--grid:#e2e4e9;--accent:#2d5bd1;--good:#187a4a;--bad:#b23a24;--part:#8a5a00}
@media(prefers-color-scheme:dark){
svg{--soft:#b6bfce;--muted:#8d97aa;--ink:#e8ebf1;--grid:#2a303c;--accent:#86a8ff;--good:#5ccb93;--bad:#ff8f78;--part:#f0be5c}}
.grid{stroke:var(--grid)}.axis{stroke:var(--muted)}.cut{stroke:var(--ink);stroke-dasharray:3 3}.seed{fill:var(--accent);fill-opacity:.35}
.good{--mark:var(--good)}.bad{--mark:var(--bad)}.part{--mark:var(--part)}.whisker{stroke:var(--mark);stroke-width:1.75}.dot{fill:var(--mark)}
"""
CLASS = {"holds": "good", "holds in part": "part", "does not hold here": "bad"}


def number(value: float | None, signed: bool = False) -> str:
    """A figure as people read it: three digits, a dash for none."""
    if value is None or not math.isfinite(value):
        return charts.DASH
    return f"{value:{'+' if signed else ''}.3g}".replace("-", "\u2212")


def effect_text(found: Record, condition: Record | None = None) -> str:
    """`+0.048 [0.031, 0.066]` of the headline or of another condition; relative effects as percent."""
    shown = condition or found.get("conditions", {}).get(found.get("headline"))
    if not shown or shown["effect"] is None:
        return charts.DASH
    scale, unit = (100, "%") if shown["relative"] else (1, "")
    mean, low, high = (None if shown[key] is None else scale * shown[key] for key in ("effect", "ci_low", "ci_high"))
    if low is None or high is None:
        return f"{number(mean, signed=True)}{unit} [no interval]"
    if max(abs(low), abs(high)) >= 1e6:
        return f"{number(mean, signed=True)}{unit} [{number(low)}, {number(high)}]"
    # two digits of what is uncertain: more would be noise
    digits = min(max(1 - math.floor(math.log10((high - low) / 2)), 0), 4) if high > low else 3
    digits = max(min(digits, 4 - math.floor(math.log10(max(abs(low), abs(high), 1)))), 0)  # and of a large effect five in all
    shown_as = f"{mean:+.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"
    return shown_as.replace("-", "\u2212")


def arms_text(found: Record) -> str:
    """The headline's metric with the mean of each arm, the best for the claim first."""
    headline = found["conditions"].get(found.get("headline"))
    if not headline:
        return charts.DASH
    arms = {arm: spread["mean"] for arm, spread in found["arms"][headline["metric"]].items() if spread["mean"] is not None}
    order = sorted(arms, key=arms.__getitem__, reverse=headline["better"] == "higher")
    return f"{headline['metric']}: " + ", ".join(f"{arm} {number(arms[arm])}" for arm in order)


def asked(condition: Record) -> str:
    """What a condition asks, in words: `accuracy of dfn above that of random, by 0.05 or more`."""
    way = "above" if condition["better"] == "higher" else "below"
    return f"{condition['metric']} of {condition['arm']} {way} that of {condition['against']}, {amount(condition)}"


def amount(condition: Record) -> str:
    """How much a condition asks for, in words."""
    by = abs(100 * condition["by"] if condition["relative"] else condition["by"])
    unit = "%" if condition["relative"] else ""
    if not by:
        return "by any amount"
    return f"by {number(by)}{unit} or more" if condition["by"] > 0 else f"or short of it by {number(by)}{unit} at most"


def differences(found: Record, condition: Record) -> list[float]:
    """The paired difference of each seed, NaN where there is none; positive where the claim is right."""
    arms = found["values"][condition["metric"]]
    sign = 1 if condition["better"] == "higher" else -1
    pairs = zip(arms[condition["arm"]], arms[condition["against"]], strict=True)
    known = [(math.nan if None in pair else sign * (pair[0] - pair[1]), pair[1]) for pair in pairs]
    return [d / abs(theirs) if theirs else math.nan for d, theirs in known] if condition["relative"] else [d for d, _ in known]


def forest(rows: Sequence[tuple[str, str, Record, Sequence[float]]], label: str, style: str = "", narrow: bool = False) -> Markup:
    """A line for each (name, text under it, condition, differences by seed): dots, mean and interval, 0 and what was asked for as marks.

    Each line has its own scale, since units differ: what can be compared between lines is on which side of 0 and of the mark they lie.
    `narrow`: the words above their lines, for a phone.
    """
    left, wide, right, step, top = (6, 268, 6, 112, 26) if narrow else (330, 400, 250, 46, 26)
    zero = left + wide * 0.3
    bottom = top + step * len(rows)
    parts: list[str] = [Markup("<style>{}</style>").format(Markup(style))] if style else []  # noqa: S704 (ours)
    parts.append(words_at(zero, top - 10, "no effect", "t small", "middle"))
    parts.extend([] if narrow else [charts.line(zero, top - 4, zero, bottom, "axis")])
    for at, (name, about, condition, seeds) in enumerate(rows):
        y = top + step * (at + (0.8 if narrow else 0.5))
        known = [
            v for v in (*(condition[key] for key in ("effect", "ci_low", "ci_high", "by")), *seeds) if v is not None and math.isfinite(v)
        ]
        rooms = [(wide * 0.7, max(known)), (wide * 0.3, -min(known))] if known else []
        scale = min((room / far for room, far in rooms if far > 0), default=1.0)

        def x(value: float, scale: float = scale) -> float:
            return zero + value * scale

        end_of_row = top + step * (at + 1)
        drawn: list[str] = [charts.line(0, end_of_row, left + wide + right, end_of_row, "grid")]
        failed = f", {condition['failed']} failed" if condition["failed"] else ""
        said = (effect_text({}, condition), condition["status"] + failed)
        if narrow:
            room = left + wide + right
            drawn.append(charts.line(zero, y - 18, zero, y + 16, "axis"))
            drawn.append(words_at(0, y - 71, charts.fit(name, room), "t strong", "start"))
            drawn.append(words_at(0, y - 56, charts.fit(about, room, 11.5, bold=False), "t small", "start"))
            drawn.append(words_at(0, y - 40, said[0], "t strong", "start"))
            drawn.append(words_at(0, y - 25, said[1], "t small", "start"))
        else:
            drawn.append(words_at(0, y - 2, charts.fit(charts.short(name, 46), zero - 60), "t strong", "start"))
            drawn.append(words_at(0, y + 14, charts.fit(charts.short(about, 56), zero - 30, 11.5, bold=False), "t small", "start"))
        if condition["by"]:
            drawn.append(charts.line(x(condition["by"]), y - 15, x(condition["by"]), y + 15, "cut"))
        drawn.extend(charts.tag("circle", cx=x(d), cy=float(y + 9), r=3, class_="seed") for d in seeds if math.isfinite(d))
        if condition["effect"] is not None:
            mean, low, high = (condition["effect"] if condition[key] is None else condition[key] for key in ("effect", "ci_low", "ci_high"))
            drawn.append(charts.line(x(low), y - 3, x(high), y - 3, "whisker"))
            drawn.extend(charts.line(x(end), y - 8, x(end), y + 2, "whisker") for end in (low, high))
            drawn.append(charts.tag("circle", cx=x(mean), cy=float(y - 3), r=5, class_="dot"))
        if not narrow:
            drawn.append(words_at(left + wide + 16, y - 2, said[0], "t strong", "start"))
            drawn.append(words_at(left + wide + 16, y + 14, said[1], "t small", "start"))
        parts.append(charts.tag("g", *drawn, class_=CLASS[condition["status"]]))
    told = "; ".join(f"{name}: {effect_text({}, condition)}, {condition['status']}" for name, _, condition, _ in rows)
    return charts.svg(left + wide + right, bottom + 8, f"{label}: {told}", *parts, class_="narrow" if narrow else "")


def words_at(x: float, y: float, text: str, class_: str, anchor: str) -> Markup:
    """A line of text that starts, ends or centres at x."""
    return charts.words(x, y, text, class_, text_anchor=anchor)


def figure(found: Record, alone: bool = False) -> Markup:
    """All conditions of one claim. `alone`: as a file of its own, with its colours and namespace."""
    rows = [(name, f"asked: {amount(c)}", c, differences(found, c)) for name, c in found["conditions"].items()]
    label = f"Claim of {found['method']}"
    if not alone:
        return forest(rows, label) + forest(rows, label, narrow=True)
    return Markup(str(forest(rows, label, STYLE)).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))  # noqa: S704


def render(records: Sequence[Record], cards: Mapping[str, Any], made_at: str, revision: str) -> str:
    """The page as HTML. records: as `retort claims --json` gives them; cards: the catalogue's, by method."""
    from tasks.core.page import environment

    done = [record for record in records if record["conditions"]]
    headlines = [(record, record["conditions"][record["headline"]]) for record in done]
    rows = [
        (r["method"], f"{c['metric']}: {c['arm']} v {c['against']}", {**c, "status": r["status"]}, differences(r, c)) for r, c in headlines
    ]
    label = "Headline effects of all claims"
    template = environment().get_template("page_claims.html.j2")
    text: str = template.render(
        records=records,
        cards=cards,
        made_at=made_at,
        revision=revision,
        forest=forest(rows, label) + forest(rows, label, narrow=True) if rows else "",
        figures={record["method"]: figure(record) for record in done},
        counts={status: sum(record["status"] == status for record in done) for status in CLASS},
        asked=asked,
        effect_text=effect_text,
        number=number,
        kind=CLASS,
    )
    return text
