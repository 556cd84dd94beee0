"""Prompts and the words they are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tasks.core.denoise import prompt
from tasks.core.errors import UserError


class Vocabulary:
    """What a set of prompts is made of: each names one class once, and other words that may have others in their place.

    classes  class names in lower case, by label; each counts as one word
    frames   the distinct prompts that were given, as words
    groups   sets of words that may stand for each other: the classes first, then words that fill one gap between prompts otherwise alike
    """

    def __init__(self, classes: Sequence[str], prompts: Sequence[str], live: Sequence[int] | None = None) -> None:
        """`live`: the labels that prompts may name (default: all). Raises UserError where no prompt names exactly one of these."""
        self.classes = tuple(normal(name) for name in classes)
        self.live = tuple(self.classes[at] for at in (range(len(classes)) if live is None else live))
        names = sorted(set(self.classes), key=len, reverse=True)
        self._name = re.compile(r"(?<!\S)(" + "|".join(map(re.escape, names)) + r")(?![\w'-])")
        found = dict.fromkeys(words for text in prompts if (words := self.words(text)) and self.label(words) is not None)
        if not found:
            raise UserError("no prompt names exactly one class: give base rows labels, or captions with the class's name in them")
        self.frames: list[tuple[str, ...]] = list(found)
        self.groups = [tuple(dict.fromkeys(self.live)), *self._exchangeable()]
        self._group = {word: group for group in self.groups for word in group}

    def words(self, text: str) -> tuple[str, ...] | None:
        """A text as words; None where it names no class, or more than one, or one twice."""
        text = normal(text)
        places = list(self._name.finditer(text))
        if len(places) != 1:
            return None
        at = places[0]
        return (*text[: at.start()].split(), at[1], *text[at.end() :].split())

    def label(self, prompt: str | tuple[str, ...]) -> int | None:
        """The label that a prompt names; None where it names no live class."""
        words = self.words(prompt) if isinstance(prompt, str) else prompt
        named = [word for word in words or () if word in self.live]
        return self.classes.index(named[0]) if named else None

    def group(self, word: str) -> tuple[str, ...]:
        """The words that may stand in a word's place, with itself."""
        return self._group.get(word, (word,))

    def said(self, prompt: str) -> dict[int, int]:
        """Which word of which group a prompt has: position of the group -> position in it."""
        words = self.words(prompt) or ()
        return {at: group.index(word) for at, group in enumerate(self.groups) for word in words if word in group}

    def anything(self, rng: np.random.Generator) -> str:
        """A prompt at random: one that was given, each of its words replaced by any that may stand there."""
        frame = self.frames[rng.integers(len(self.frames))]
        return " ".join(str(rng.choice(self.group(word))) for word in frame)

    def even(self, n: int, rng: np.random.Generator) -> list[str]:
        """`n` prompts in which the words of each group come equally often, up to one."""
        frames = [self.frames[at] for at in np.resize(rng.permutation(len(self.frames)), n)]
        turns = [np.resize(rng.permutation(len(group)), n)[rng.permutation(n)] for group in self.groups]
        chosen = [{word: group[turn[at]] for group, turn in zip(self.groups, turns, strict=True) for word in group} for at in range(n)]
        return [" ".join(pick.get(word, word) for word in frame) for pick, frame in zip(chosen, frames, strict=True)]

    def _exchangeable(self) -> list[tuple[str, ...]]:
        gaps: dict[tuple[str, ...], list[str]] = {}
        for frame in self.frames:
            open_class = tuple("*" if word in self.live else word for word in frame)
            for at, word in enumerate(frame):
                if word not in self.live:
                    gaps.setdefault((*open_class[:at], "_", *open_class[at + 1 :]), []).append(word)
        root: dict[str, str] = {}

        def top(word: str) -> str:
            while root.setdefault(word, word) != word:
                word = root[word]
            return word

        for first, *others in gaps.values():
            for word in others:
                root[top(word)] = top(first)
        sets: dict[str, list[str]] = {}
        for word in root:
            sets.setdefault(top(word), []).append(word)
        return [tuple(sorted(group)) for group in sets.values() if len(group) > 1]


def told_of(label: int, caption: str, classes: Sequence[str]) -> str:
    """A row's prompt: its caption, which is put behind the class where it does not name it; "" where neither is known."""
    if label < 0:
        return caption
    name = prompt("", classes[label])
    if re.search(rf"(?<!\S){re.escape(normal(classes[label]))}(?![\w'-])", normal(caption)):
        return caption
    return f"{name} , {caption}" if caption else name


def framed(attributes: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    """Prompts that have one word of each group: `a <word> ... photo of a <class>`, enough of them for every word and every class."""
    plain = [group[0] for group in attributes]
    chosen = [[*plain[:at], word, *plain[at + 1 :]] for at, group in enumerate(attributes) for word in group]
    return [prompt(" ".join(words), name) for name in names for words in chosen]


def first_prompts(
    vocabulary: Vocabulary, given: Sequence[str], n: int, how: str, held_out: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """The first `n` prompts, none held out: given ones in random order, again and again, or (`how` "grid") every word equally often."""
    held = set(map(normal, held_out))
    if how == "grid":
        return [text for text in vocabulary.even(n + 4 * len(held), rng) if text not in held][:n]
    open_ones = [text for text in given if text not in held]
    if not open_ones:
        raise UserError("every prompt is held out: there is none to begin with")
    return [open_ones[at] for _ in range(-(-n // len(open_ones))) for at in rng.permutation(len(open_ones))][:n]


def of_class(vocabulary: Vocabulary, label: int, prompts: Sequence[str], n: int, rng: np.random.Generator) -> list[str]:
    """`n` prompts of a class: those of `prompts` in random order, again and again; where none names it, one that was given."""
    texts = [text for text in dict.fromkeys(map(normal, prompts)) if vocabulary.label(text) == label]
    texts = texts or [" ".join(frame) for frame in vocabulary.frames if vocabulary.classes[label] in frame][:1]
    order = rng.permutation(len(texts))
    return [texts[order[at % len(texts)]] for at in range(n)]


def normal(text: str) -> str:
    """A text in lower case with single blanks: what the duplicate check compares."""
    return " ".join(text.lower().split())
