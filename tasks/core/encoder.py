"""A transformer encoder of texts with a linear classifier, which a small dictionary describes.

Texts come as UTF-8 bytes (N, L) uint8, filled up with zeros (`Dataset.inputs`); the network cuts them into tokens itself. Self-contained as
`networks.py` is: a copy of both travels with registered models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tasks.core.networks import Net

Tokens = npt.NDArray[np.int64]

PAD, CLS, MASK, SPECIAL = 0, 1, 2, 3  # of hashed words: three tokens, then the words


class TextClassifier(Net):
    """A transformer encoder of Hugging Face's, the mean of its last states or the first of them, and a linear classifier.

    arch: `encoder`, the fields of the encoder's configuration with its `model_type`; `tokens`, how a text is cut: `{"kind": "hashed"}`,
    words in lower case by a hash into the vocabulary, which so knows no word of anybody's, or `{"kind": "file", "file": ..., "pad": ...,
    "mask": ...}`, the content of a `tokenizer.json`; `longest`, tokens of a text at most; `pooling`, `mean` or `first`; and `classes`.
    `shape` is zeros, as texts have none.
    """

    def __init__(self, arch: dict[str, Any]) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__(arch)
        given = dict(arch["encoder"])
        self.encoder: Any = AutoModel.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
        if hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None  # what it would give is not looked at
        self.head = nn.Linear(self.encoder.config.hidden_size, arch["classes"])
        self.cut = cutter(arch["tokens"], arch["longest"])
        self.pad = int(arch["tokens"].get("pad", PAD))

    def features(self, inputs: Tensor) -> Tensor:
        """Features (N, D) of texts, as bytes (N, L) uint8 or as tokens (N, T) int64."""
        tokens = inputs if inputs.dtype == torch.int64 else torch.from_numpy(self.tokens(inputs.cpu().numpy())).to(self.head.weight.device)
        there = tokens != self.pad
        states = self.encoder(input_ids=tokens, attention_mask=there.long()).last_hidden_state
        if self.arch["pooling"] == "first":
            first: Tensor = states[:, 0]
            return first
        mean: Tensor = (states * there[:, :, None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        return mean

    def tokens(self, inputs: npt.NDArray[np.uint8]) -> Tokens:
        """Tokens (N, T), filled up with the padding's, of texts as bytes (N, L)."""
        return self.fill(self.cut([bytes(row).rstrip(b"\0").decode("utf-8", "ignore") for row in inputs]))

    def fill(self, rows: list[list[int]]) -> Tokens:
        """Tokens (N, T) of rows of tokens, each filled up to the longest."""
        found = np.full((len(rows), max(map(len, rows), default=1) or 1), self.pad, np.int64)
        for at, row in enumerate(rows):
            found[at, : len(row)] = row
        return found


def cutter(how: dict[str, Any], longest: int) -> Callable[[list[str]], list[list[int]]]:
    """What gives the tokens of texts, at most `longest` of each. Raises ValueError for a kind that is not known."""
    if how["kind"] == "hashed":
        words, known = re.compile(r"\w+|[^\w\s]"), how["size"] - SPECIAL
        return lambda texts: [
            [CLS, *(SPECIAL + crc32(word.encode()) % known for word in words.findall(text.lower())[: longest - 1])] for text in texts
        ]
    if how["kind"] != "file":
        raise ValueError(f"tokens of kind {how['kind']!r} are not known; known: hashed, file")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(how["file"]))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return lambda texts: [one.ids for one in tokenizer.encode_batch(texts)]
