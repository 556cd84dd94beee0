"""Names of classes in captions: which rows name which class, how often each name occurs, and which one is the most frequent."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.core.dataset import Dataset
from tasks.core.errors import UserError

_TOKEN = re.compile(r"[^\W_]+")
_QUOTES = re.compile("[\"'\u2019]")


def tokens(text: str) -> list[str]:
    """Words of a text as names are compared: lower case, quotes left out, hyphens and underscores as spaces (as the authors do)."""
    return _TOKEN.findall(_QUOTES.sub("", text.lower()))


def names_of(classes: Sequence[str], synonyms: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """All names of each class, its own first, none twice.

    Raises UserError for synonyms of something that is no class, one without letters or digits, and a class without any name that has some.
    """
    for key in synonyms:
        if key not in classes:
            raise UserError(f"synonyms: {key!r} is no class of the data; there are {', '.join(classes) or 'none'}")
    found = []
    for own in classes:
        told: dict[tuple[str, ...], str] = {tuple(tokens(own)): own}
        for name in synonyms.get(own, ()):
            if not tokens(name):
                raise UserError(f"synonyms: {name!r}, of {own!r}, has no letter or digit to be found by")
            told.setdefault(tuple(tokens(name)), name)
        told.pop((), None)
        if not told:
            raise UserError(f"class {own!r} has no letter or digit to be found by in captions: give it a name in 'synonyms'")
        found.append(list(told.values()))
    return found


class Finder:
    """Finds names in captions: whole words in order, wherever they stand. Names may overlap, and may belong to several classes."""

    def __init__(self, names: Sequence[Sequence[str]]) -> None:
        self.places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for label, several in enumerate(names):
            for at, name in enumerate(several):
                self.places[" ".join(tokens(name))].append((label, at))
        self.sizes = sorted({key.count(" ") + 1 for key in self.places})

    def __call__(self, caption: str) -> set[tuple[int, int]]:
        """Label and position of each name that the caption holds."""
        said = tokens(caption)
        spans = (" ".join(said[start : start + size]) for size in self.sizes for start in range(len(said) - size + 1))
        return {place for span in spans for place in self.places.get(span, ())}


@dataclass(frozen=True)
class Matches:
    """Which rows name which class, by text alone.

    at, labels  row and class of each match (M,), rows ascending; a row that names several classes has a match for each
    counts      for each class, how many rows hold each of its names; a row with two names of a class counts for both
    """

    at: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    counts: list[list[int]]

    def of_class(self) -> npt.NDArray[np.int64]:
        """How many rows name each class, each once for a class, whatever number of its names it holds (classes,)."""
        return np.bincount(self.labels, minlength=len(self.counts))


def match(data: Dataset, names: Sequence[Sequence[str]]) -> Matches:
    """Find the names in the captions of all rows; no image is read."""
    find, at = Finder(names), 0
    rows: list[int] = []
    labels: list[int] = []
    counts = [[0] * len(several) for several in names]
    for batch in data.batches(["caption"], 4096):
        for text in batch.column(0).to_pylist():
            hits = find(text or "")
            for label, which in hits:
                counts[label][which] += 1
            said = sorted({label for label, _ in hits})
            rows += [at] * len(said)
            labels += said
            at += 1
    return Matches(np.array(rows, dtype=np.int64), np.array(labels, dtype=np.int64), counts)


def most_frequent(names: Sequence[str], counts: Sequence[int]) -> str:
    """The name of a class that most captions hold; of equals the first. The class's own name comes first.

    A name that is only a part of the class's own, as Honda is of Honda Accord, is left out (the authors' rule): it finds other things too.
    """
    own = set(tokens(names[0]))
    whole = [at for at, name in enumerate(names) if at == 0 or not set(tokens(name)) < own]
    return names[max(whole, key=lambda at: (counts[at], -at))]


def tail(frequency: npt.NDArray[np.float64], share: float = 0.2) -> npt.NDArray[np.int64]:
    """Labels of the rarest classes, the rarest first: a share of them, one at least. Of equals those of lower label."""
    return np.argsort(frequency, kind="stable")[: max(1, round(share * len(frequency)))]
