"""What `filter.cascade` asks of a single text: rules about its length, symbols, repetitions and lines, and its language.

The rules are those of Gopher (arXiv 2112.11446, appendix A.1), C4 (1910.10683), FineWeb (2406.17557) and DataComp (2304.14108); Yi's
cascade (2403.04652) has the same kinds without figures. Where a document's threshold would kill captions, a rule is looser or asks only
long texts; the comments say so.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from pydantic import Field

from tasks.core.errors import UserError
from tasks.core.method import MethodConfig

SHORT, LONG, BLOCKED, SYMBOLS, REPEATS, UNFINISHED = (
    "too short",
    "too long",
    "blocked words",
    "symbols",
    "repeats itself",
    "unfinished lines",
)
FULL_LENGTH = 50  # words: Gopher asks so many of a document; its shares of n-grams mean nothing in a shorter text
FULL_LINES = 5  # rules about how lines end ask texts of so many lines
READ = 200  # characters of a text that its language is told from: more cost time and tell no more
UNSPACED = 15  # characters a word: beyond it a script does without spaces, and its characters are the words

Blocked = Callable[[str, Sequence[str]], bool]

_WORD = re.compile(r"[^\s!-/:-@\[-`{-~¡¿«»·–—‘’“”„…、。《》「」『』！，：；？（）]+")  # noqa: RUF001
_PLAIN = re.compile(r"[\w\s.,;:!?'\"()\-¡¿«»·–—‘’“”„…、。《》「」『』！，：；？（）]+")  # noqa: RUF001
_END = re.compile(r"[.!?:;\"')\]»”’…。！？」]$")  # noqa: RUF001
_BULLET = re.compile(r"^\s*(?:[•‣▪◦●*·-]\s)")
_PARAGRAPH = re.compile(r"\n\s*\n")


class Rules(MethodConfig):
    """Thresholds of the rules. A default without a source was chosen so that captions pass."""

    min_words: int = Field(1, ge=0, description="fewer words are too short; 3 for captions of sentences")  # DataComp 3, Gopher 50
    min_chars: int = Field(2, ge=0, description="fewer characters are too short")  # DataComp 6
    max_words: int = Field(100_000, ge=1, description="more words are too long")  # Gopher
    blocked: tuple[str, ...] = Field(("lorem ipsum",), description="words and phrases that a text must not have, in any case")  # C4
    max_symbols: float = Field(0.2, ge=0, le=1, description="largest share of characters that are neither of words nor usual punctuation")
    min_letters: float = Field(0.5, ge=0, le=1, description="smallest share of words that have a letter")  # Gopher .8
    max_word: float = Field(15, gt=0, description="largest mean length of a word; scripts without spaces are not asked")  # Gopher 10
    min_distinct: float = Field(0.35, ge=0, le=1, description="smallest share of different words, in texts of 4 to 49 words")
    max_repeated: float = Field(0.15, ge=0, le=1, description="largest share of characters in repeated 5-grams; 50 words or more")  # Gopher
    max_top: tuple[float, float, float] = Field(
        (0.20, 0.18, 0.16), description="largest share of characters in the most frequent 2-, 3- and 4-gram; 50 words or more"
    )  # Gopher
    max_lines: float = Field(0.3, ge=0, le=1, description="largest share of repeated lines, and of repeated paragraphs")  # Gopher
    max_line_chars: float = Field(0.2, ge=0, le=1, description="largest share of characters in repeated lines or paragraphs")  # Gopher
    min_ended: float = Field(
        0.12, ge=0, le=1, description="smallest share of lines with an end mark; 5 lines or more"
    )  # FineWeb; broken ones count as one
    max_cut: float = Field(0.3, ge=0, le=1, description="largest share of lines that end in an ellipsis; 5 lines or more")  # Gopher
    max_bullets: float = Field(0.9, ge=0, le=1, description="largest share of lines that start with a bullet; 5 lines or more")  # Gopher


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; of a script without spaces its characters."""
    found = _WORD.findall(text.lower())
    if sum(map(len, found)) > UNSPACED * len(found) and not text.isascii():
        return [letter for word in found for letter in word]
    return found


def normalised(text: str) -> str:
    """What two texts must share to be the same: NFKC, case folded, runs of white space as one space. Punctuation stays."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def block_list(blocked: Sequence[str]) -> Blocked | None:
    """Whether a text with these words has one of the words or phrases, as whole words in any case. None for an empty list."""
    spoken = [some for some in map(words, blocked) if some]
    if not spoken:
        return None
    heads = frozenset(some[0] for some in spoken)  # most texts have none of them, and need no search
    phrases = "|".join(r"\W+".join(map(re.escape, some)) for some in spoken)
    found = re.compile(rf"(?<!\w)(?:{phrases})(?!\w)").search
    return lambda text, tokens: not heads.isdisjoint(tokens) and found(text.lower()) is not None


def fault(text: str, tokens: Sequence[str], rules: Rules, blocked: Blocked | None) -> str:
    """The first rule that a text breaks, by its reason; empty where it breaks none. `tokens` are the text's `words`."""
    count, text = len(tokens), text.strip()
    if count < rules.min_words or len(text) < rules.min_chars:
        return SHORT
    if count > rules.max_words:
        return LONG
    if blocked is not None and blocked(text, tokens):
        return BLOCKED
    if symbols(text) > rules.max_symbols or not _worded(tokens, rules):
        return SYMBOLS
    if count < FULL_LENGTH:
        if count >= 4 and len(set(tokens)) < rules.min_distinct * count:
            return REPEATS
    elif _top_gram(tokens, rules.max_top) or repeated_grams(tokens) > rules.max_repeated:
        return REPEATS
    if "\n" in text:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        for pieces in (lines, [piece.strip() for piece in _PARAGRAPH.split(text)]):
            again, characters = repeats(pieces)
            if again > rules.max_lines or characters > rules.max_line_chars:
                return REPEATS
        if len(lines) >= FULL_LINES and len(lines := unwrapped(lines)) >= FULL_LINES and _unfinished(lines, rules):
            return UNFINISHED
    return ""


def symbols(text: str) -> float:
    """Share of characters that are neither letters, digits, marks, white space nor usual punctuation."""
    odd = _PLAIN.sub("", text)
    return sum(not unicodedata.category(sign).startswith("M") for sign in odd) / len(text) if odd else 0.0


def repeats(pieces: Sequence[str]) -> tuple[float, float]:
    """Share of the pieces that were there before, and their share of the characters."""
    seen: set[str] = set()
    again = [piece for piece in pieces if piece in seen or seen.add(piece)]  # type: ignore[func-returns-value]
    return len(again) / max(len(pieces), 1), sum(map(len, again)) / max(sum(map(len, pieces)), 1)


def repeated_grams(tokens: Sequence[str], size: int = 5) -> float:
    """Share of the characters that stand in an n-gram which was there before; each is counted once."""
    grams = list(zip(*(tokens[at:] for at in range(size)), strict=False))
    if len(set(grams)) == len(grams):
        return 0.0
    seen: set[tuple[str, ...]] = set()
    covered = until = 0
    for at, gram in enumerate(grams):
        if gram in seen:
            covered += sum(map(len, tokens[max(at, until) : at + size]))
            until = at + size
        seen.add(gram)
    return covered / sum(map(len, tokens))


def _top_gram(tokens: Sequence[str], most: Sequence[float]) -> bool:
    total = sum(map(len, tokens))
    for size, share in enumerate(most, start=2):
        counts = Counter(zip(*(tokens[at:] for at in range(size)), strict=False))
        times = max(counts.values())
        if times == 1:  # then no longer one repeats either
            return False
        longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == times)
        if times * longest > share * total:
            return True
    return False


def _worded(tokens: Sequence[str], rules: Rules) -> bool:
    if not tokens:
        return True
    if sum(map(len, tokens)) > rules.max_word * len(tokens):
        return False
    least = rules.min_letters * len(tokens)
    return sum(map(str.isalpha, tokens)) >= least or sum(any(map(str.isalpha, token)) for token in tokens) >= least


def unwrapped(lines: Sequence[str]) -> list[str]:
    """Lines in which one that goes on in lower case is one with the next: how text of a fixed width is broken."""
    found: list[str] = []
    for line in lines:
        if found and line[:1].islower():
            found[-1] = f"{found[-1]} {line}"
        else:
            found.append(line)
    return found


def _unfinished(lines: Sequence[str], rules: Rules) -> bool:
    ended = sum(_END.search(line) is not None for line in lines)
    cut = sum(line.endswith(("...", "…")) for line in lines)
    bullets = sum(_BULLET.match(line) is not None for line in lines)
    count = len(lines)
    return ended < rules.min_ended * count or cut > rules.max_cut * count or bullets > rules.max_bullets * count


def languages_of(wanted: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text is in one of the languages (ISO 639-1), by py3langid's naive Bayes over byte n-grams.

    Raises UserError where a language is not one that it knows.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    judge = LanguageIdentifier.from_model_file(MODEL_FILE)
    known = judge.labels
    for name in wanted:
        if name not in known:
            raise UserError(f"languages: {name!r} is not known; valid: {', '.join(sorted(known))}")
    spoken = frozenset(wanted)
    return lambda text: judge.classify(text[:READ])[0] in spoken
