"""The report of a run as one self-contained HTML page: plain values and arrays in, text out.

Nothing on it is loaded from elsewhere, no script runs, and whatever came from outside (captions, names) is escaped. It follows the
reader's light or dark setting and prints. No sample id is ever shown.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from tasks.core import page_charts as charts
from tasks.core import page_front, page_graph
from tasks.core.card import PERCENT, Card
from tasks.core.errors import without_secrets
from tasks.core.metrics import Figure
from tasks.core.page_front import Point

TEMPLATE = Path(__file__).with_name("page.html.j2")
LONGEST_CAPTION = 90
Figures = Mapping[str, Mapping[str, Figure]]
Images = tuple[npt.NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Picture:
    """An image (C, H, W) with its caption; `right` says whether the caption is right, None where nobody knows; `note` is a score."""

    image: npt.NDArray[np.uint8]
    caption: str = ""
    right: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures under a title. `what` names one of them for those who cannot see it; `small` ones take less room."""

    title: str
    text: str
    pictures: tuple[Picture, ...]
    what: str
    small: bool = False


@dataclass(frozen=True)
class ClassRow:
    """Real and generated images of one class."""

    name: str
    real: Images
    made: Images


@dataclass(frozen=True)
class Moment:
    """Images as they were after a number of steps."""

    step: int
    images: Images


@dataclass(frozen=True)
class Scores:
    """A filter's scores (N,), whether each row was kept, and where all of it is known whether its caption is right."""

    values: npt.NDArray[np.float64]
    kept: npt.NDArray[np.bool_]
    clean: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Stage:
    """A line of the stage table."""

    stage: str
    method: str
    paper: str
    cached: bool
    seconds: float
    figure: str


@dataclass(frozen=True)
class Data:
    """A version of a data folder, and the figures of the stage that made it."""

    path: str
    md5: str
    rows: int
    made_by: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Page:
    """All that the page shows.

    decisions   of promotions, as `flows.promote` gives them
    trees       of `core.lineage`; `titles` and `aliases` name registered models by model id
    figures     of the evidence on the models, and `details` of it; `about` says by name what each is
    promoted    names in the evidence whose confusion matrix is shown
    students    of a sweep, in order; with the budget that was stated, and the latency that it allows
    forgetting  figures, `forgetting_details` and the seconds of each method by model
    """

    name: str
    made_at: str
    revision: str = ""
    seed: int = 0
    decisions: Sequence[Mapping[str, Any]] = ()
    trees: Sequence[Mapping[str, Any]] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    stages: Sequence[Stage] = ()
    figures: Figures = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    promoted: Sequence[str] = ()
    forgetting: Figures = field(default_factory=dict)
    forgetting_details: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    request: str = ""
    scores: Scores | None = None
    galleries: Sequence[Gallery] = ()
    course: Sequence[Moment] = ()
    students: Sequence[Point] = ()
    budget: str = ""
    most_ms: float | None = None
    concepts: Mapping[str, float] = field(default_factory=dict)
    tail: Collection[str] = ()
    class_rows: Sequence[ClassRow] = ()
    class_rows_of: int = 0
    data: Sequence[Data] = ()
    evidence: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def _number(digits: int) -> Any:
    return lambda value: f"{value:,.{digits}f}" if math.isfinite(value) else charts.DASH


def size(value: float) -> str:
    """Bytes in the unit that reads best."""
    if not math.isfinite(value):
        return charts.DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


# metric: heading, what it says, and how it is written
MODEL_COLUMNS: dict[str, tuple[str, str, Any]] = {
    "accuracy": ("Accuracy", "share of the test rows that are answered right", charts.percent),
    "worst_class_accuracy": ("Worst class", "accuracy within the class that fares worst", charts.percent),
    "ece": ("ECE", "expected calibration error: how far confidence is from accuracy, 0 is best", _number(3)),
    "nll": ("NLL", "negative log-likelihood of the label in nats, lower is better", _number(3)),
    "latency_ms_b1": ("Latency, 1", "milliseconds of one forward pass over 1 row", _number(2)),
    "latency_ms_b64": ("Latency, 64", "milliseconds of one forward pass over 64 rows", _number(2)),
    "parameters": ("Parameters", "learned numbers", _number(0)),
    "size_bytes": ("Size", "bytes of all weights and buffers", size),
}
FORGETTING_COLUMNS: dict[str, tuple[str, str, Any]] = {
    "ua": ("UA", "unlearning accuracy: error on the forgotten rows, in percent", _number(1)),
    "ra": ("RA", "accuracy on the retained rows, in percent", _number(1)),
    "ta": ("TA", "accuracy on the test rows, in percent", _number(1)),
    "mia": ("MIA", "share of the forgotten rows that a membership attack calls unseen, in percent", _number(1)),
    "avg_gap": ("Avg. gap", "mean distance to the retrained model over these four, in points: 0 is best", _number(1)),
    "avg_gap_spread": ("Their gap", "mean avg. gap between two retrained models: what is closer than that is as good", _number(1)),
    "zrf": ("ZRF", "likeness to a random network on the forgotten rows; to be read beside the retrained model's", _number(3)),
    "relearn": ("Relearn", "steps until it knows the forgotten rows again nearly as the original does; cut at a limit", _number(0)),
    "relearn_ratio": ("AIN", "these steps over the retrained model's: below 1, traces are left", _number(2)),
    "head": (
        "New head",
        "accuracy on the forgotten rows of a new last layer on its features, in percent; beside the retrained model's",
        _number(1),
    ),
    "head_test": ("New head, test", "the same on test rows of the forgotten class", _number(1)),
    "activation_distance": ("Distance", "from the retrained model's class probabilities, on the forgotten rows", _number(3)),
    "activation_distance_retained": ("Distance, kept", "the same on the retained rows", _number(3)),
    "ks": ("KS", "largest gap between its and the retrained model's distributions of confidence on the forgotten rows", _number(3)),
    "ks_p": ("KS p", "probability of such a gap or a larger one between samples of one distribution", _number(3)),
    "lira_auc": ("LiRA", "how well an attack with shadow networks tells forgotten rows from unseen ones: 0.5 is chance", _number(3)),
    "lira_members": (
        "LiRA members",
        "share of the forgotten rows that it calls members, where it calls 5% of unseen rows so, in percent",
        _number(1),
    ),
}
FORGETTING_ORDER = ("original", "unlearned", "finetune", "retrain")


def environment() -> Any:
    """What all pages are made with: the templates of this folder, everything escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    place = FileSystemLoader(TEMPLATE.parent)
    return Environment(loader=place, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(page: Page) -> str:
    """The page as HTML."""
    env = environment()
    env.filters.update(clean=clean, safe_text=without_secrets, uri=charts.data_uri, number=plain_number, truth=truth)
    env.filters.update(sentence=sentence, unbroken=unbroken, percent=charts.percent, size=size)
    title, lead = headline(page.decisions)
    text: str = env.get_template(TEMPLATE.name).render(
        page=page,
        title=title,
        lead=lead,
        verdicts=[verdict(decision) for decision in page.decisions],
        graph=page_graph.draw(page_graph.join(page.trees, page.titles, page.aliases)) if page.trees else "",
        models=table(page.figures, MODEL_COLUMNS, tuple(page.figures)),
        whiskers=_whiskers(page.figures),
        reliability=_reliability(page.details),
        confusions=_confusions(page.details, page.promoted),
        unlearning=table(page.forgetting, FORGETTING_COLUMNS, FORGETTING_ORDER),
        void=is_void(page.forgetting),
        times={name: run_time(name, page.seconds) for name in page.forgetting},
        scores=_scores(page.scores),
        scored=_scored(page.scores),
        front=page_front.front(page.students, page.most_ms) if page.students else "",
        states=page_front.STATES,
        concepts=charts.long_tail(page.concepts, page.tail, "Rows by the class that their caption names") if page.concepts else "",
        settings=without_secrets(page.settings),
    )
    return text


def render_verdict(name: str, version: int, found: Mapping[str, Any], data: Mapping[str, str], made_at: str) -> str:
    """One verdict as a page: every rule with both figures and its interval, and the data (role: md5) that all of it rests on."""
    env = environment()
    env.filters.update(number=plain_number, unbroken=unbroken)
    text: str = env.get_template("page_verdict.html.j2").render(
        name=name, version=version, verdicts=[_of_gate(found)], promote=found["promote"], basis=found["basis"], data=data, made_at=made_at
    )
    return text


def render_card(card: Card) -> str:
    """A model card as a page."""
    env = environment()
    env.filters.update(number=plain_number, unbroken=unbroken, clean=clean)
    found = table({card.name: card.figures}, MODEL_COLUMNS, ())
    text: str = env.get_template("page_card.html.j2").render(
        card=card,
        figures=[(sentence(head[0]), head[1], *cell) for head, cell in zip(found["heads"], found["rows"][0][1], strict=True)],
        beware=card.beware,
        verdicts=[_of_gate(card.verdict)] if card.verdict else [],
    )
    return text


def pictures(page: Page) -> int:
    """How many pictures of samples the page shows."""
    return (
        sum(len(g.pictures) for g in page.galleries)
        + sum(len(row.real) + len(row.made) for row in page.class_rows)
        + sum(len(moment.images) for moment in page.course)
    )


def headline(decisions: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What became of the candidates, in one line; and why, in one sentence."""
    if not decisions:
        return "Nothing was offered for promotion", "No candidate was put before the gate in this run."
    up = [_called(d) for d in decisions if d["promoted"]]
    down = [_called(d) for d in decisions if not d["promoted"]]
    said = []
    if up:
        said.append(f"{_listed(up)} {'is champion' if len(up) == 1 else 'are champions'}")
    if down:
        said.append(f"{_listed(down)} {'was' if len(down) == 1 else 'were'} refused")
    title = ", ".join(said) if up else f"Nothing was promoted: {said[0]}"
    why = [f"{_called(d)} is held back because {_failed(d)}." for d in decisions if not d["promoted"]]
    if up:
        why.insert(0, f"{'It' if len(up) == 1 and not down else 'What was promoted'} met every rule of the gate on the held-out test rows.")
    return title, " ".join(why)


def verdict(decision: Mapping[str, Any]) -> dict[str, Any]:
    """A decision as its card shows it."""
    found = decision.get("verdict") or {}
    basis = found.get("basis") or {}
    against = basis.get("against")
    promoted, rules = bool(decision["promoted"]), []
    for rule in found.get("rules") or []:
        low, high = rule.get("low"), rule.get("high")
        spans = low is not None and high is not None and low != high and not (math.isnan(low) or math.isnan(high))
        words = f"gain {low:+.3f} to {high:+.3f} (95%)" if rule.get("champion") is not None else f"95% interval {low:.3f} to {high:.3f}"
        rules.append({**rule, "interval": words if spans else ""})
    met = {0: "It stands as champion.", 1: "The one rule is met.", 2: "Both rules are met."}.get(
        len(rules), f"All {len(rules)} rules are met."
    )
    return {
        "name": _called(decision),
        "promoted": promoted,
        "outcome": "champion" if promoted else "refused",
        "reason": met if promoted else f"{sentence(_failed(decision))}.",
        "against": f"judged against champion version {against}" if against is not None else "there was no champion to beat",
        "gate": basis.get("gate", ""),
        "rules": rules,
        "compared": any(rule.get("champion") is not None for rule in rules),
    }


def _of_gate(found: Mapping[str, Any]) -> dict[str, Any]:
    """A stored verdict on a page of one version: the gate's word, which says nothing of what stands as champion today."""
    decision = {"name": "", "version": "", "promoted": found["promote"], "verdict": found}
    return {**verdict(decision), "name": "The gate", "outcome": "passed" if found["promote"] else "refused"}


def table(figures: Figures, columns: Mapping[str, tuple[str, str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """Headings with what they say, and rows of (name, cells); a cell is its text and its interval, both may be empty.

    Metrics that `columns` does not know come last, but for the flag `void`.
    """
    known = [metric for metric in columns if any(metric in by for by in figures.values())]
    more = list(dict.fromkeys(m for by in figures.values() for m in by if m not in columns and m != "void"))
    how = {**columns, **{m: (m.replace("_", " "), "", _writer(m)) for m in more}}
    names = [name for name in order if name in figures] + [name for name in figures if name not in order]
    heads = [(how[m][0], how[m][1]) for m in [*known, *more]]
    rows = [(name, [_cell(figures[name].get(m), how[m][2]) for m in [*known, *more]]) for name in names]
    return {"heads": heads, "rows": rows}


def is_void(figures: Figures) -> bool:
    """Whether the comparison says nothing: the forgotten rows cannot tell a retrained model from the original one."""
    return any(by["void"].value > 0 for by in figures.values() if "void" in by)


def run_time(name: str, seconds: Mapping[str, float]) -> tuple[str, str]:
    """The seconds of a method, and its share of retraining."""
    if name not in seconds:
        return charts.DASH, ""
    whole = seconds.get("retrain", 0.0)
    if name == "original":
        share = "to train it"
    elif name == "retrain" or whole <= 0:
        share = ""
    else:
        share = f"{seconds[name] / whole:.0%} of retraining"
    return f"{seconds[name]:.1f} s", share


def clean(text: str, most: int = LONGEST_CAPTION) -> str:
    """Text from outside, fit to be shown: one line, no control or direction characters, cut to `most` characters."""
    kept = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text[: 8 * most])
    return charts.short(" ".join(kept.split()), most)


def sentence(text: str) -> str:
    """The text with a capital at its start."""
    return text[:1].upper() + text[1:]


def unbroken(text: str) -> str:
    """The text, its names and numbers kept on one line each, but for names that no phone could hold."""
    kept = " ".join(word.replace("-", "\u2011") if len(word) <= 24 else word for word in text.split(" "))
    return kept.replace(" version ", " version\u00a0")


def plain_number(value: float | None) -> str:
    """A number in at most four places, without an exponent where it can be; a dash for none."""
    if value is None or not math.isfinite(value):
        return charts.DASH
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 0.0001 else f"{value:.2e}"


def truth(picture: Picture) -> str:
    """Whether a caption is right, in words; empty where nobody knows."""
    return "" if picture.right is None else "caption is right" if picture.right else "caption is wrong"


def _called(decision: Mapping[str, Any]) -> str:
    return f"{decision['name']} version {decision['version']}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _failed(decision: Mapping[str, Any]) -> str:
    found = decision.get("verdict") or {}
    reasons = [str(rule["reason"]) for rule in found.get("rules") or [] if not rule["passed"]]
    return "; ".join(reasons) or str(found.get("reason") or "no reason was stored")


def _writer(metric: str) -> Any:
    return charts.percent if metric in PERCENT or metric.startswith("accuracy_") else plain_number


def _cell(figure: Figure | None, write: Any) -> tuple[str, str]:
    if figure is None:
        return charts.DASH, ""
    spans = figure.low != figure.high and not math.isnan(figure.low)
    return write(figure.value), f"{write(figure.low)} {charts.DASH} {write(figure.high)}" if spans else ""


def _whiskers(figures: Figures) -> Markup:
    found = {name: by["accuracy"] for name, by in figures.items() if "accuracy" in by}
    said = "Accuracy on the test rows"
    return charts.whiskers(found, said) + charts.whiskers(found, said, narrow=True) if found else Markup("")


def _reliability(details: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    return [(name, charts.reliability(bins, name)) for name, bins in (details.get("reliability") or {}).items() if bins]


def _confusions(details: Mapping[str, Any], promoted: Sequence[str]) -> list[tuple[str, Markup]]:
    found = details.get("confusion") or {}
    names = details.get("classes") or [str(k) for k in range(len(next(iter(found.values()), [])))]
    names = [clean(str(name)) for name in names]
    return [(name, charts.confusion(found[name], names, name)) for name in promoted if name in found]


def _scores(scores: Scores | None) -> Markup:
    if scores is None or len(scores.values) == 0:
        return Markup("")
    split, names = (scores.kept, ("kept", "rejected")) if scores.clean is None else (scores.clean, ("right", "wrong"))
    # a line only where a score parts the kept from the rejected
    cut = float(scores.values[scores.kept].min()) if scores.kept.any() else None
    if cut is not None and not scores.kept.all() and float(scores.values[~scores.kept].max()) > cut:
        cut = None
    return charts.histogram(scores.values[split], scores.values[~split], names, cut)


def _scored(scores: Scores | None) -> str:
    """What the filter did to the share of right captions, in a sentence."""
    if scores is None or scores.clean is None or not scores.kept.any():
        return ""
    before, after = float(scores.clean.mean()), float(scores.clean[scores.kept].mean())
    return f"{charts.percent(before)} of the captions in the pool are right, and {charts.percent(after)} of those kept."
