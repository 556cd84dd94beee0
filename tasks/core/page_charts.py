"""Pictures of the report as inline SVG: sharp at any size, coloured by the page's own style in light and dark, escaped throughout.

Every function gives one `<svg>` with a label for those who cannot see it. Colours are classes: the page's style sheet names them.
"""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from tasks.core.metrics import Figure

LARGEST = 80  # pixels; larger images are shown smaller
DASH = "\u2013"
NARROW = " !'(),-./:;I[]fijlrt|\u2011\u00b7"
LOSSLESS = 40  # up to this size an image is shown pixel by pixel


def tag(name: str, *inside: str, **attributes: object) -> Markup:
    """An element. `class_` is `class`, `_` in a name is `-`; text and values are escaped, numbers rounded to a tenth of a pixel."""
    shown = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), round(value, 1) if isinstance(value, float) else value)
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), shown, Markup("").join(inside))  # noqa: S704 (names are ours)


def words(x: float, y: float, text: str, class_: str = "t", **attributes: object) -> Markup:
    """A line of text."""
    return tag("text", text, x=float(x), y=float(y), class_=class_, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str = "rule") -> Markup:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def svg(width: float, height: float, label: str, *inside: str, class_: str = "") -> Markup:
    """A picture of the given size with its label."""
    box = f"0 0 {math.ceil(width)} {math.ceil(height)}"
    size = {"width": math.ceil(width), "height": math.ceil(height)}
    return tag("svg", tag("title", label), *inside, viewBox=box, role="img", aria_label=label, class_=class_ or None, **size)


def short(text: str, most: int) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def fit(text: str, room: float, size: float = 13.0, bold: bool = True) -> str:
    """The text, cut so that it keeps within `room` pixels also in wide fonts: those of the reader are not known here."""

    def wide(c: str) -> float:
        if unicodedata.combining(c):
            return 0.0
        return size * (
            1.08 if c in "mwMW%@" or unicodedata.east_asian_width(c) in "WF" else 0.43 if c in NARROW else 0.78 if c.isupper() else 0.64
        )

    left = room / (1.12 if bold else 1.0)
    if sum(map(wide, text)) <= left:
        return text
    left -= size
    for at, c in enumerate(text):
        left -= wide(c)
        if left < 0:
            return text[:at].rstrip() + "…"
    return text


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span [low, high]: about so many. Raises ValueError where low is not below high."""
    if not low < high:
        raise ValueError(f"an axis needs low < high, not {low} and {high}")
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def percent(value: float, digits: int = 1) -> str:
    """A share as percent; a dash for NaN."""
    return DASH if not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def whiskers(figures: Mapping[str, Figure], what: str, narrow: bool = False) -> Markup:
    """A dot with its 95% interval for each name: shares in [0, 1]. `narrow`: names above their lines, for a phone."""
    left, wide, right, step, top = (22, 240, 22, 56, 4) if narrow else (180, 686, 190, 38, 12)
    found = [f for f in figures.values() if not math.isnan(f.value)]
    low, high = min((f.low for f in found), default=0.0), max((f.high for f in found), default=1.0)
    pad = max((high - low) * 0.1, 0.005)
    marks = ticks(max(0.0, low - pad), min(1.0, high + pad), 3 if narrow else 5)
    bottom = top + step * len(figures)

    def x(value: float) -> float:
        return left + wide * (value - marks[0]) / (marks[-1] - marks[0])

    parts: list[str] = []
    for mark in marks:
        parts.append(line(x(mark), top, x(mark), bottom, "grid"))
        parts.append(words(x(mark), bottom + 18, f"{100 * mark:.4g}%", "t small", text_anchor="middle"))
    for at, (name, figure) in enumerate(figures.items()):
        y = top + step * (at + (0.72 if narrow else 0.5))
        known = not math.isnan(figure.value)
        if narrow:
            parts.append(words(0, y - 16, fit(name, 120), "t strong"))
            value = f"{percent(figure.value)} ({100 * figure.low:.1f} {DASH} {100 * figure.high:.1f})" if known else "not measured"
            parts.append(words(left + wide + right, y - 16, value, text_anchor="end"))
        else:
            parts.append(words(left - 16, y + 4, fit(name, left - 16), "t strong", text_anchor="end"))
        if not known:
            parts.extend([] if narrow else [words(left + wide + 18, y + 4, "not measured")])
            continue
        parts.append(line(x(figure.low), y, x(figure.high), y, "whisker"))
        parts.extend(line(x(end), y - 5, x(end), y + 5, "whisker") for end in (figure.low, figure.high))
        parts.append(tag("circle", cx=x(figure.value), cy=float(y), r=5.5, class_="dot"))
        if not narrow:
            parts.append(words(left + wide + 18, y + 4, percent(figure.value), "t strong"))
            parts.append(words(left + wide + 76, y + 4, f"{100 * figure.low:.1f} {DASH} {100 * figure.high:.1f}"))
    said = "; ".join(f"{name} {percent(f.value)} ({percent(f.low)} to {percent(f.high)})" for name, f in figures.items())
    return svg(left + wide + right, bottom + 30, f"{what} with 95% intervals: {said}", *parts, class_="narrow" if narrow else "")


def reliability(bins: Sequence[Mapping[str, float]], name: str) -> Markup:
    """Accuracy by confidence, one bar for each bin of `core.metrics.reliability`, with the share of the samples below."""
    left, top, size, strip = 38, 8, 200, 34
    total = max(sum(b["count"] for b in bins), 1.0)
    most = max((b["count"] for b in bins), default=1.0)

    def y(value: float) -> float:
        return top + size * (1 - value)

    parts: list[str] = []
    for mark in (0.0, 0.5, 1.0):
        parts.append(line(left, y(mark), left + size, y(mark), "grid"))
        parts.append(words(left - 7, y(mark) + 4, f"{100 * mark:.0f}%", "t small", text_anchor="end"))
        parts.append(words(left + size * mark, top + size + strip + 22, f"{100 * mark:.0f}%", "t small", text_anchor="middle"))
    base = top + size + 6 + strip
    for b in bins:
        x, wide = left + size * b["low"], size * (b["high"] - b["low"]) - 1.5
        said = f"confidence {percent(b['confidence'])}, accuracy {percent(b['accuracy'])}, {b['count']:.0f} samples"
        low, high = sorted((b["accuracy"], b["confidence"]))
        bar = tag("rect", x=x, y=y(low), width=wide, height=max(size * low, 0.5), class_="bar")
        off = "over" if b["confidence"] > b["accuracy"] else "under"
        miss = tag("rect", x=x, y=y(high), width=wide, height=max(size * (high - low), 0.5), class_=off)
        tall = max(strip * b["count"] / most, 1.0)
        count = tag("rect", x=x, y=base - tall, width=wide, height=tall, class_="count")
        parts.append(tag("g", tag("title", said), bar, miss, count))
    parts.append(line(left, y(0), left + size, y(1), "diagonal"))
    said = ", ".join(f"{percent(b['confidence'], 0)}: {percent(b['accuracy'], 0)}" for b in bins)
    label = f"Reliability of {name} on {total:.0f} samples, accuracy at mean confidence {said}"
    return svg(left + size + 22, base + 22, label, *parts)


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], name: str) -> Markup:
    """Counts by true class (rows) and predicted class (columns), shaded by their share of the row."""
    matrix = np.asarray(counts, dtype=np.int64)
    n = len(matrix)
    cell = float(np.clip(380 / max(n, 1), 3, 36))
    named = n <= 30
    names = [fit(c, 90, 11.5, bold=False) for c in classes] if named else []
    margin = 22 + 7 * max((len(c) for c in names), default=0)
    left, top = margin + 8, 12 + margin * 0.72
    whole = np.maximum(matrix.sum(1, keepdims=True), 1)
    parts: list[str] = [tag("rect", x=left, y=top, width=cell * n, height=cell * n, class_="frame")]
    for i, text in enumerate(names):
        parts.append(words(left - 7, top + cell * (i + 0.5) + 4, text, "t small", text_anchor="end"))
        x, y = left + cell * (i + 0.5), top - 7
        parts.append(words(x, y, text, "t small", transform=f"rotate(-45 {x:.1f} {y:.1f})"))
    for i, j in zip(*np.nonzero(matrix), strict=True):
        share, count = float((matrix / whole)[i, j]), int(matrix[i, j])
        x, y = left + cell * float(j), top + cell * float(i)
        mark = "hit" if i == j else "miss"
        shade = 0.15 + 0.85 * share if i == j else min(1.0, 0.25 + 2.5 * share)
        full = shade > 0.7  # no shade in between: on it neither light nor dark figures could be read
        opacity = f"{0.88 + 0.4 * (shade - 0.7) if full else 0.77 * shade:.2f}"
        box = tag("rect", x=x + 0.5, y=y + 0.5, width=cell - 1, height=cell - 1, class_=mark, fill_opacity=opacity)
        title = [tag("title", f"{classes[i]} taken for {classes[j]}: {count} ({percent(share)})")] if named else []
        look = ("on" if full else "t strong") + (" tight" if count > 999 else "")
        said = [words(x + cell / 2, y + cell / 2 + 4, str(count), look, text_anchor="middle")]
        parts.append(tag("g", *title, box, *(said if cell >= 20 and count < 10_000 else [])))
    wrong = int(matrix.sum() - np.trace(matrix))
    label = f"Confusion matrix of {name}: {int(matrix.sum())} samples, {wrong} of them wrong; rows are true classes, columns predicted ones"
    return svg(left + cell * n + margin * 0.6, top + cell * n + 8, label, *parts)


def histogram(
    above: npt.NDArray[np.floating], below: npt.NDArray[np.floating], names: tuple[str, str], cut: float | None, bins: int = 40
) -> Markup:
    """Two sets of scores, one drawn upwards and one downwards on the same scale, with the score from which rows were kept."""
    left, top, wide, half = 52, 36, 880, 104
    both = np.concatenate([above, below]).astype(np.float64)
    low, high = float(both.min()), float(both.max())
    marks = ticks(low, high if high > low else low + 1, 6)
    edges = np.linspace(marks[0], marks[-1], bins + 1)
    up, down = np.histogram(above, edges)[0], np.histogram(below, edges)[0]
    most = max(int(up.max()), int(down.max()), 1)
    middle = top + half

    def x(value: float) -> float:
        return left + wide * (value - marks[0]) / (marks[-1] - marks[0])

    parts: list[str] = []
    for mark in marks:
        parts.append(line(x(mark), top, x(mark), top + 2 * half, "grid"))
        parts.append(words(x(mark), top + 2 * half + 18, f"{mark:.4g}", "t small", text_anchor="middle"))
    for counts, sign, look in ((up, -1, "first"), (down, 1, "second")):
        for at in np.flatnonzero(counts):
            tall = half * float(counts[at]) / most
            y = middle + (0.75 if sign > 0 else -0.75 - tall)
            title = tag("title", f"{counts[at]} {names[sign > 0]} rows with a score of {edges[at]:.3g} to {edges[at + 1]:.3g}")
            start = x(float(edges[at]))
            parts.append(tag("rect", title, x=start, y=y, width=wide / bins - 1, height=max(tall, 0.5), class_=look))
    for end in (-half, half):
        parts.append(words(left - 8, middle + end + 4, f"{most:,}", "t small", text_anchor="end"))
    parts.append(words(left - 8, middle + 4, "0 rows", "t small", text_anchor="end"))
    parts.append(line(left, middle, left + wide, middle, "axis"))
    said = ""
    if cut is not None:
        parts.append(line(x(cut), top - 24, x(cut), top + 2 * half, "cut"))
        late = x(cut) > left + wide * 0.75
        parts.append(words(x(cut) + (-7 if late else 7), top - 14, f"kept from {cut:.3g}", "t strong", text_anchor="end" if late else None))
        kept = [int((some >= cut).sum()) for some in (above, below)]
        said = f"; from {cut:.3g} up {kept[0]} of {len(above)} {names[0]} and {kept[1]} of {len(below)} {names[1]} rows are kept"
    parts.append(words(left + wide + 14, middle - half / 2, f"{names[0]} ({len(above):,})", "t first-t"))
    parts.append(words(left + wide + 14, middle + half / 2, f"{names[1]} ({len(below):,})", "t second-t"))
    return svg(left + wide + 130, top + 2 * half + 26, f"Scores of {names[0]} rows and of {names[1]} rows{said}", *parts)


def long_tail(counts: Mapping[str, float], tail: Collection[str], what: str) -> Markup:
    """How often each name occurs, the most frequent first; those of the tail in another colour. Names stand below where there is room."""
    left, top, wide, tall = 64, 12, 920, 150
    found = sorted(counts.items(), key=lambda pair: -pair[1])
    most = max(max(counts.values(), default=0.0), 1.0)
    each = wide / max(len(found), 1)
    parts: list[str] = []
    for mark in ticks(0, most, 4):
        y = top + tall * (1 - mark / most)
        if y >= 0:
            parts.append(line(left, y, left + wide, y, "grid"))
            parts.append(words(left - 8, y + 4, f"{mark:,.4g}", "t small", text_anchor="end"))
    for at, (name, count) in enumerate(found):
        height, x = max(tall * count / most, 0.5), left + each * at
        title = tag("title", f"{name}: {count:,.0f}{', of the tail' if name in tail else ''}")
        width = max(each - (2 if each > 6 else 0), 0.5)
        parts.append(
            tag("rect", title, x=x, y=top + tall - height, width=width, height=height, class_="second" if name in tail else "first")
        )
        if len(found) <= 30:
            middle = x + each / 2
            at_foot = f"rotate(-35 {middle:.1f} {top + tall + 14:.1f})"
            parts.append(words(middle, top + tall + 14, fit(name, 110, 11.5, bold=False), "t small", text_anchor="end", transform=at_foot))
    parts.append(line(left, top + tall, left + wide, top + tall, "axis"))
    label = f"{what}: from {found[0][1]:,.0f} of {found[0][0]} down to {found[-1][1]:,.0f} of {found[-1][0]}" if found else what
    foot = 26 + 4 * min(max(map(len, counts), default=0), 16) if len(found) <= 30 else 12
    return svg(left + wide + 12, top + tall + foot, label, *parts)


def data_uri(image: npt.NDArray[np.uint8]) -> str:
    """An image (C, H, W) as the address that holds it: small ones exactly, larger ones as a preview of at most `LARGEST` pixels."""
    from PIL import Image

    picture = Image.fromarray(image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    buffer, kind = io.BytesIO(), "png"
    if max(image.shape[1:]) > LOSSLESS:
        picture.thumbnail((LARGEST, LARGEST))
        kind = "jpeg"
        picture.save(buffer, format="JPEG", quality=82)
    else:
        picture.save(buffer, format="PNG")
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mean(values: Iterable[float]) -> float:
    """Mean of some numbers. Raises ZeroDivisionError for none."""
    found = list(values)
    return sum(found) / len(found)
