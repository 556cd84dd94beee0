"""The page of a certificate: for the person who asked first, for the one who checks it second.

It shows what the signed file says and nothing else; the file, not the page, is what is checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tasks.core.erasure._facts import Facts, Model
from tasks.core.metrics import Figure
from tasks.core.page import FORGETTING_COLUMNS, clean, environment, plain_number, sentence, size, table, unbroken

MOST_HASHES = 500  # shown; the file has them all
KINDS = {
    "samples": "Samples that were named one by one",
    "where": "All samples that meet a condition",
    "class": "All samples of a class",
    "concept": "All samples that show a concept",
}
POLICIES = {
    "unlearn": "Models are changed until they have forgotten the samples",
    "retrain": "Models are trained again without the samples",
    "auto": "Models are changed until they have forgotten the samples, or trained again where that is surer",
}
ACTIONS = {
    "unlearned": "changed until it had forgotten the samples",
    "retrained": "trained again without the samples",
    "distilled again": "taught again, by a model that does not know the samples",
    "revoked": "taken out of use for good",
    "waiting": "not replaced yet",
}
PROMISES = (
    "Copies that others made before the request, such as clones, exports, printouts or backups elsewhere, are out of reach.",
    "The signature shows who signed this and that nothing was changed since. It cannot show that the signer's machines told the truth.",
)
CHANGED = (
    "A model that was changed is not a model that never saw the samples. The figures say how near it comes; they are measurements on "
    "these samples with today's tests, and no proof against every future one."
)


def render_certificate(certificate: Mapping[str, Any]) -> str:
    """A signed certificate as a page. Raises pydantic's ValidationError where it is none."""
    facts = Facts.model_validate(certificate)
    waiting = [model for model in facts.models if model.action == "waiting"]
    figures = {_taker(model): {m: Figure.exact(_finite(v)) for m, v in model.figures.items()} for model in facts.models if model.figures}
    title, lead = headline(facts)
    env = environment()
    env.filters.update(number=plain_number, unbroken=unbroken, clean=clean, size=size, sentence=sentence, moment=_moment)
    text: str = env.get_template("page_certificate.html.j2").render(
        facts=facts,
        title=title,
        lead=lead,
        waiting=waiting,
        kinds=KINDS,
        policies=POLICIES,
        actions=ACTIONS,
        promises=[*facts.beyond, *([CHANGED] if any(m.action == "unlearned" for m in facts.models) else []), *PROMISES],
        taker=_taker,
        forgetting=table(figures, FORGETTING_COLUMNS, ()),
        void=any(model.void for model in facts.models),
        hashes=[("sample ids", facts.samples.ids), ("contents", facts.samples.contents)],
        most=MOST_HASHES,
        signature=certificate["signature"],
        public_key=certificate["public_key"],
    )
    return text


def headline(facts: Facts) -> tuple[str, str]:
    """What became of the request in one line, and in one sentence."""
    waiting = sum(model.action == "waiting" for model in facts.models)
    what = _counted(facts.samples.count, "sample")
    was = "was" if facts.samples.count == 1 else "were"
    folders = [data for data in facts.data if data.rows]
    done = [f"{what} {was} taken out of {_counted(len(folders), 'data folder')}"] if folders else [f"no data folder held the {what}"]
    if gone := len(facts.models) - waiting:
        done.append(f"{_counted(gone, 'model')} that had learned from them {'was' if gone == 1 else 'were'} taken out of use")
    looked = f"a search through {_counted(facts.search.files, 'file')} and {_counted(facts.search.rows, 'row')}"
    done.append(f"{looked} found {_counted(facts.search.found, 'remain') if facts.search.found else 'nothing of them'}")
    lead = sentence("; ".join(done)) + "."
    if facts.search.found:
        return "The deletion is not complete: something was still found", lead
    if waiting:
        return f"{what} {was} deleted from the data; {_counted(waiting, 'model')} still {'waits' if waiting == 1 else 'wait'}", lead
    return f"{what} {was} deleted", lead


def _taker(model: Model) -> str:
    """The version that stands in a version's place: its figures are those that were measured."""
    return f"{model.name} version {model.replaced_by or model.version}"


def _moment(text: str) -> str:
    found = datetime.fromisoformat(text)
    return f"{found.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if found.tzinfo else f"{found:%Y-%m-%d %H:%M}"


def _finite(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
