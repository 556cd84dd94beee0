"""Ids as they stand in text and in binary files: between characters that could not be part of them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from html import escape

WORD = re.compile(rb"[0-9A-Za-z_]+")
APART = bytes(c if WORD.match(bytes([c])) else 32 for c in range(256))  # all else becomes a space: faster than a search for words
SHORTEST = 5  # with a digit; without one an id is a word like any other
UNMISTAKABLE = 12  # so long that it is looked for between other letters, too: databases put one value right behind the other


class Words:
    """Finds any of many ids in bytes. `short` counts the ids that text cannot tell from other words, so that only columns are compared
    with them.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        ids = sorted(ids)
        plain = [name for name in ids if _telling(name)]
        self.short = len(ids) - len(plain)
        # as they are, as JSON writes them, as HTML does
        self._forms = sorted({form.encode() for name in plain for form in (name, json.dumps(name)[1:-1], escape(name))})
        self.longest = max((len(form) for form in self._forms), default=0)
        # one word of each id: a set of words is compared at once, and the whole id is looked for only where that word is
        self._by_word: dict[bytes, list[bytes]] = defaultdict(list)
        self._wordless: list[bytes] = []
        for form in self._forms:
            words = WORD.findall(form)
            if words:
                self._by_word[max(words, key=lambda word: (any(48 <= c < 58 for c in word), len(word)))].append(form)
            else:
                self._wordless.append(form)

    def found(self, text: bytes) -> bool:
        """Whether one of the ids stands in the text as a whole word."""
        return next(self.spans(text), None) is not None

    def spans(self, text: bytes) -> Iterator[tuple[int, int]]:
        """Where ids stand in the text as whole words, in no order."""
        if not self._forms:
            return
        for word in set(text.translate(APART).split()) & self._by_word.keys():
            for form in self._by_word[word]:
                yield from _whole(form, text)
        for form in self._wordless:
            yield from _whole(form, text)

    def packed(self, text: bytes) -> bool:
        """Whether an unmistakable id stands in the text, also right behind other words, as values do in the pages of a database."""
        for form in self._forms:
            if (
                len(form) >= UNMISTAKABLE
                and form in text
                and re.search(_edge(form[:1], "<!", letters=False) + re.escape(form) + _edge(form[-1:], "!"), text)
            ):
                return True
        return False


def _telling(name: str) -> bool:
    some = name.encode()
    return len(some) >= UNMISTAKABLE or (len(some) >= SHORTEST and any(c.isdigit() for c in name) and not name.isdigit())


def _whole(form: bytes, text: bytes) -> Iterator[tuple[int, int]]:
    before = rb"(?<![0-9A-Za-z_])" if WORD.match(form) else b""
    behind = rb"(?![0-9A-Za-z_])" if WORD.match(form[-1:]) else b""
    for match in re.finditer(before + re.escape(form) + behind, text):
        yield match.span()


def _edge(char: bytes, sign: str, *, letters: bool = True) -> bytes:
    kind = rb"[0-9]" if char.isdigit() else rb"[A-Za-z]" if letters and char.isalpha() else b""
    return b"(?" + sign.encode() + kind + b")" if kind else b""
