"""Prompts, directors by rules, and what a language model may say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.errors import UserError
from tasks.generate._director import TRIES, Rules, Written, read_list, read_verdict
from tasks.generate._prompts import Vocabulary, first_prompts, framed, of_class, told_of
from tasks.generate._teachers import by_language

PROMPTS = ["a bold cat left", "a thin cat left", "a bold dog left", "a thin dog right"]


@pytest.fixture
def words() -> Vocabulary:
    return Vocabulary(["Cat", "dog"], PROMPTS)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def flat(prompts: list[str], value: int) -> np.ndarray:
    return np.full((len(prompts), 1, 2, 2), value, dtype=np.uint8)


class Says:
    """A language model that answers from a list, and then with nothing."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), 0

    def answer(self, question: str) -> str:
        self.asked += 1
        return self.answers.pop(0) if self.answers else ""


def bright(prompts: list[str], images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).mean(1)


# prompts


def test_a_prompt_is_one_class_and_other_words_and_groups_are_words_that_fill_one_gap(words: Vocabulary) -> None:
    assert words.groups == [("cat", "dog"), ("bold", "thin"), ("left", "right")]
    assert words.words("A  bold CAT, left") == ("a", "bold", "cat", ",", "left")
    assert [words.label(text) for text in ("a dog", "a cat and a dog", "a catfish", "cat cat", "")] == [1, None, None, None, None]
    assert words.said("a thin dog left") == {0: 1, 1: 1, 2: 0}
    assert words.group("a") == ("a",)


def test_a_class_of_two_words_is_one_word() -> None:
    found = Vocabulary(["ankle boot", "boot"], ["an ankle boot", "a boot"])
    assert [found.label(text) for text in ("an ankle boot", "a boot")] == [0, 1]
    assert "ankle boot" in found.anything(rng()) or "boot" in found.anything(rng())


def test_even_prompts_have_each_word_equally_often(words: Vocabulary) -> None:
    texts = words.even(40, rng())
    assert sum("cat" in text for text in texts) == 20
    assert sum("bold" in text for text in texts) == 20


def test_a_rows_prompt_names_its_class() -> None:
    assert told_of(0, "", ["cat"]) == "a photo of a cat"
    assert told_of(0, "A cat, asleep", ["cat"]) == "A cat, asleep"
    assert told_of(0, "an animal", ["cat"]) == "a photo of a cat , an animal"
    assert told_of(-1, "", ["cat"]) == ""


def test_attributes_make_prompts_with_every_word() -> None:
    found = Vocabulary(["cat", "dog"], framed([["day", "night"], ["near", "far", "wide"]], ["cat", "dog"]))
    assert sorted(map(len, found.groups)) == [2, 2, 3]


def test_first_prompts_are_drawn_again_and_again_and_never_held_out(words: Vocabulary) -> None:
    held = ["a Bold cat  left"]
    for how in ("random", "grid"):
        texts = first_prompts(words, PROMPTS, 9, how, held, rng())
        assert len(texts) == 9
        assert "a bold cat left" not in texts
    with pytest.raises(UserError, match="every prompt is held out"):
        first_prompts(words, PROMPTS, 3, "random", PROMPTS, rng())


def test_prompts_of_a_class_are_taken_in_turn_and_where_there_are_none_a_given_one(words: Vocabulary) -> None:
    texts = of_class(words, 0, [*PROMPTS, "a bold dog"], 5, rng())
    assert sorted(map(texts.count, set(texts))) == [2, 3]
    assert of_class(words, 1, ["a bold cat"], 2, rng()) == ["a bold dog left"] * 2


@given(st.integers(0, 10**6), st.integers(1, 3))
def test_rules_never_write_what_is_known_and_change_as_many_words_as_they_are_told(seed: int, replaced: int) -> None:
    words = Vocabulary(["cat", "dog"], PROMPTS)
    known = {"a bold cat left", "a bold dog left"}
    found = Rules(words, replaced).expand("a bold cat left", 3, known, rng(seed))
    assert len(found) == len(set(found)) <= 3
    assert not set(found) & known
    assert all(words.label(text) is not None for text in found)
    for text in found:
        changed = sum(one != other for one, other in zip(text.split(), ["a", "bold", "cat", "left"], strict=True))
        assert changed == replaced


def test_where_nothing_is_new_a_hard_prompt_is_asked_for_again_and_nothing_unrelated_is_added(words: Vocabulary) -> None:
    every = {f"a {stroke} {name} {side}" for stroke in ("bold", "thin") for name in ("cat", "dog") for side in ("left", "right")}
    assert Rules(words, 1).expand("a bold cat left", 3, every, rng()) == ["a bold cat left"]
    assert Rules(words, 1).mutate("a bold cat left", every, rng()) == []
    [other] = Rules(words, 1).mutate("a bold cat left", set(), rng())
    assert len(set(other.split()) & {"bold", "cat", "left"}) <= 1


# a language model's text is data


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        '["a cat", __import__("os").getcwd()]',
        '["a cat", "__import__(\'os\')", "a dog"]',
        '["a cat", "a dog"]',
        '["a cat", "a cat", "a dog"]',
        '["a cat", "a dog", "a {cat}"]',
        '["a cat", "a dog", "' + "a" * 300 + '"]',
        "['a cat', 'a dog', 'a thin cat']",
        '["", "a cat", "a dog"]',
        "",
    ],
)
def test_text_that_is_no_list_of_three_plain_prompts_is_refused(text: str) -> None:
    assert read_list(text, 3) == []


def test_a_list_is_found_in_chatter() -> None:
    assert read_list('Sure! ["A cat", "a  dog","the cat\'s hat, red"] Bye', 3) == ["a cat", "a dog", "the cat's hat, red"]


@given(st.text(alphabet="[](),\"'_ab {}\\\n", max_size=60), st.integers(1, 3))
def test_whatever_is_written_only_plain_words_come_out(text: str, n: int) -> None:
    found = read_list(text, n)
    assert found == [] or len(found) == n
    assert all(set(part) <= set("ab '(),.-") - set("()") for part in found)


def test_a_verdict_names_one_picture() -> None:
    texts = ("<(A) is better>", "I think (B) is better.", "(A) is better or (B) is better", "A", "")
    assert [read_verdict(text) for text in texts] == ["A", "B", "", "", ""]


def test_a_written_director_takes_only_new_prompts_that_name_one_class_and_gives_up_after_five_tries(words: Vocabulary) -> None:
    model = Says("nonsense", '["a thin cat", "a cat and a dog", "a house"]')
    assert Written(model, words).expand("a bold cat", 3, set(), rng()) == ["a thin cat"]
    assert model.asked == 2
    assert Written(Says('["a thin cat"]'), words).mutate("a bold cat", {"a thin cat"}, rng()) == []
    silent = Says()
    assert Written(silent, words).expand("a bold cat", 3, set(), rng()) == []
    assert silent.asked == TRIES


def test_a_language_models_verdicts_are_asked_for_five_times_and_then_there_is_none(words: Vocabulary) -> None:
    model = Says("(B) is better", *["?"] * TRIES, "(A) is better")
    judge = by_language(bright, Written(model, words))
    assert judge(["a cat"] * 3, flat(["a"] * 3, 1), flat(["a"] * 3, 2)) == ["B", "", "A"]


def test_prompts_that_name_no_class_are_refused() -> None:
    with pytest.raises(UserError, match="no prompt names exactly one class"):
        Vocabulary(["cat"], ["a house"])
