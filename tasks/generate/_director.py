"""Directors, who write new prompts: rules over a vocabulary, or a language model, whose text is data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tasks.core.errors import UserError
from tasks.generate._prompts import Vocabulary, normal

TRIES = 5  # answers of a language model, or draws of a rule, until one will do (paper's code)
LONGEST = 200  # characters of a prompt that a language model may write
LIST = re.compile(r'\[\s*"[^"\n]*"(?:\s*,\s*"[^"\n]*")*\s*\]')
QUOTED = re.compile(r'"([^"\n]*)"')
PLAIN = re.compile(r"[a-z0-9][a-z0-9 ,.'-]*")
CHOICE = re.compile(r"\(([AB])\) is better")


class Director(Protocol):
    """Writes new prompts: none of `known`, and only such as name one class."""

    def expand(self, prompt: str, n: int, known: set[str], rng: np.random.Generator) -> list[str]:
        """At most `n` variations of a prompt."""

    def mutate(self, prompt: str, known: set[str], rng: np.random.Generator) -> list[str]:
        """One prompt that has nothing to do with this one, or none."""


class Rules:
    """A director without a language model: other words of the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, replaced: int) -> None:
        self.vocabulary, self.replaced = vocabulary, replaced

    def expand(self, prompt: str, n: int, known: set[str], rng: np.random.Generator) -> list[str]:
        """Replace `replaced` words, as a noun is replaced by another kind of thing. Where nothing new is left: the prompt itself, again."""
        words = self.vocabulary.words(prompt) or ()
        places = [at for at, word in enumerate(words) if len(self.vocabulary.group(word)) > 1]
        found: list[str] = []
        for _ in range(TRIES * n if places else 0):
            other = list(words)
            for at in rng.permutation(places)[: self.replaced]:
                other[at] = str(rng.choice([word for word in self.vocabulary.group(words[at]) if word != words[at]]))
            text = " ".join(other)
            if text not in known and text not in found and len(found) < n:
                found.append(text)
        return found or [prompt]

    def mutate(self, prompt: str, known: set[str], rng: np.random.Generator) -> list[str]:
        """Of some prompts at random the one that shares the fewest words with this one."""
        mine = set(prompt.split())
        drawn = [self.vocabulary.anything(rng) for _ in range(2 * TRIES)]
        return sorted((text for text in drawn if text not in known), key=lambda text: len(mine & set(text.split())))[:1]


class Writes(Protocol):
    """What answers in text."""

    def answer(self, question: str) -> str:
        """The text that follows a question."""


class Written:
    """A director that is a language model. What it writes is data: read by patterns, never run, and refused where it does not fit."""

    def __init__(self, model: Writes, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary, self._names = model, vocabulary, ", ".join(vocabulary.live)

    def expand(self, prompt: str, n: int, known: set[str], rng: np.random.Generator) -> list[str]:  # noqa: ARG002
        """Ask until a list of `n` different prompts comes, at most five times; those that are new and name one class are taken."""
        asked = (
            f'Replace the nouns in the text description "{prompt}" by other kinds of objects, backgrounds or styles to make {n} new ones. '
        )
        asked += f'Each names one of: {self._names}. Write a list ["description 1", "description 2", ...] and no more.\n'
        return self._listed(asked, n, known)

    def mutate(self, prompt: str, known: set[str], rng: np.random.Generator) -> list[str]:  # noqa: ARG002
        """Ask until a list of one prompt comes, at most five times."""
        asked = f'Write one text description that has nothing to do with "{prompt}". '
        asked += f'It names one of: {self._names}. Write it as ["description"].\n'
        return self._listed(asked, 1, known)

    def verdict(self, prompt: str, first: float, second: float) -> str:
        """Which of two pictures is better, "A" or "B", by how well each fits the prompt; "" where five answers name neither, or both."""
        asked = f'Picture (A) fits the text description "{prompt}" by {first:.3f}, picture (B) by {second:.3f}; more is better. '
        asked += "Which one fits it better? You have two options: <(A) is better>, <(B) is better>. Choose one and no more.\n"
        return next((found for _ in range(TRIES) if (found := read_verdict(self.model.answer(asked)))), "")

    def _listed(self, asked: str, n: int, known: set[str]) -> list[str]:
        for _ in range(TRIES):
            texts = read_list(self.model.answer(asked), n)
            if texts:
                named = [words for text in texts if (words := self.vocabulary.words(text)) and self.vocabulary.label(words) is not None]
                return [text for text in map(" ".join, named) if text not in known]
        return []


class LanguageModel:
    """A causal language model of `transformers`, from a folder or the hub (safetensors only)."""

    def __init__(self, name: str, device: str = "cpu", longest: int = 160) -> None:
        """Raises UserError where the model cannot be loaded."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source, where = located(name, "language_model", "a causal language model")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, **where)
            model: Any = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **where)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"language_model: {name} holds no causal language model that can be loaded here ({reason})") from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.longest = longest

    @torch.no_grad()
    def answer(self, question: str) -> str:
        """What the model writes after a question, at temperature .2 (paper), from torch's global generator."""
        if self.tokenizer.chat_template:
            question = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        tokens = self.tokenizer(question, return_tensors="pt")["input_ids"].to(self.model.device)
        room = getattr(self.model.config, "max_position_embeddings", None) or tokens.shape[1] + self.longest
        tokens = tokens[:, -max(1, room - self.longest) :]
        longest = min(self.longest, room - tokens.shape[1])
        how = {"do_sample": True, "temperature": 0.2, "max_new_tokens": longest, "pad_token_id": self.tokenizer.eos_token_id}
        written = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
        return str(self.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))


def located(name: str, setting: str, what: str) -> tuple[str, dict[str, bool]]:
    """Where a model is, and how `from_pretrained` is to look for it. Raises UserError for a folder that is not there."""
    here = Path(name).expanduser()
    # a hub id is `name` or `owner/name`; everything else can only be a path
    if not here.is_dir() and (here.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(f"{setting}: there is no folder {name}; give a folder of {what} or a hub id like 'owner/name'")
    return (str(here), {"local_files_only": True}) if here.is_dir() else (name, {})


def read_list(text: str, n: int) -> list[str]:
    """The `n` different prompts of the first list of quoted texts; none where there is no such list or one text is not plain words."""
    found = LIST.search(text)
    texts = [normal(part) for part in QUOTED.findall(found[0])] if found else []
    plain = all(len(part) <= LONGEST and PLAIN.fullmatch(part) for part in texts)
    return texts if plain and len(texts) == len(set(texts)) == n else []


def read_verdict(text: str) -> str:
    """ "A" or "B" where a text says that one of them is better, and "" where it says neither, or both."""
    said = set(CHOICE.findall(text))
    return said.pop() if len(said) == 1 else ""
