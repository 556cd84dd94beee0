"""Continual inference: a network that answers whole clips, and streams frame by frame with the same weights and the same answers.

An image (C, H, W) is a clip of H frames (C, W): its rows, from top to bottom. Convolutions over time and width, without padding in time,
make one token of every few frames; transformer blocks attend to the tokens of a window, and the newest token's output is the answer.
`forward` does this for a clip, `step` for the window that ends at a new frame, from what it kept of the frames before.

Self-contained as `networks.py` is: a copy of both travels with registered models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core.networks import Net

TRUST = 1e-6  # share of a row's largest sum, below which what is left after subtractions is computed anew


class TimeConv(nn.Module):
    """Convolution of `kernel` frames by three places, then ReLU. Where shapes allow, its input is added, delayed to the kernel's middle."""

    def __init__(self, given: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, out, (kernel, 3), (1, stride), (0, 1))
        self.delay = kernel // 2 if given == out and stride == 1 else 0

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (B, C, T, W) to (B, D, T - kernel + 1, V)."""
        found = F.relu(self.conv(frames))
        return found + frames[:, :, self.delay : -self.delay] if self.delay else found


class Block(nn.Module):
    """A block of a transformer's encoder, normalised behind its sums as torch's own; it can compute the newest token's output alone."""

    def __init__(self, size: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.wide, self.narrow = nn.Linear(size, wide), nn.Linear(wide, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Outputs (B, n, E) of all tokens (B, n, E)."""
        query, key, value = self.project(tokens)
        return self.close(tokens, attend(query, key, value))

    def newest(self, tokens: Tensor) -> Tensor:
        """Output (B, 1, E) of the last of the tokens (B, n, E), which attends to all of them."""
        size = tokens.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        last = tokens[:, -1:]
        [query] = self._heads(F.linear(last, weight[:size], bias[:size]), 1)
        key, value = self._heads(F.linear(tokens, weight[size:], bias[size:]), 2)
        return self.close(last, attend(query * query.shape[3] ** -0.5, key, value))

    def project(self, tokens: Tensor) -> list[Tensor]:
        """Scaled queries, keys and values (B, heads, n, E / heads) of tokens (B, n, E)."""
        query, key, value = self._heads(self.qkv(tokens), 3)
        return [query * query.shape[3] ** -0.5, key, value]

    def close(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention of tokens (B, n, E), from what they attended to (B, heads, n, E / heads)."""
        tokens = self.norm1(tokens + self.out(attended.transpose(1, 2).flatten(2)))
        closed: Tensor = self.norm2(tokens + self.narrow(F.relu(self.wide(tokens))))
        return closed

    def _heads(self, projected: Tensor, parts: int) -> list[Tensor]:
        return list(projected.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of m scaled queries (B, heads, m, d) to n keys and values (B, heads, n, d)."""
    return (query @ key.transpose(2, 3)).softmax(3) @ value


class Window:
    """What a block keeps of the last n tokens: keys and values; the first block of several also the tokens and their queries. Oldest first.

    rows: retroactively, of each row of the attention the sum of its weights (B, heads, n, 1), the weights times the values (B, heads, n,
    d), the score that the weights are relative to, and the largest sum that there was; `afresh`: how often all were computed anew.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.rows: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.afresh = 0


class Stream:
    """Where B streams side by side stand: the frames that each convolution still needs, the window, and how many tokens there were."""

    def __init__(self, convolutions: int) -> None:
        self.frames: list[Tensor | None] = [None] * convolutions
        self.window = Window()
        self.tokens = 0


class Continual(Net):
    """Convolutions over time, then transformer blocks over the window of tokens, of which the newest answers.

    arch besides `shape` and `classes`: `widths` (channels of the convolutions; each halves the width of its frames where that is 4 or
    more), `deep` (further convolutions of the last width, with their input added), `kernel` (frames that each sees; odd), `hidden` (size
    of a token), `heads`, `wide` (size of a block's inner layer), `blocks`. With one block a step attends by the newest token only; with
    more, the first one's outputs of all tokens are updated (retroactively), and the others work on these anew.

    Raises ValueError where a clip has too few frames for so many convolutions, the kernel is even, or heads do not divide a token.
    """

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__(arch)
        channels, height, width = arch["shape"]
        kernel, size = arch["kernel"], arch["hidden"]
        outs = [*arch["widths"], *[arch["widths"][-1]] * arch["deep"]]
        self.size = height - len(outs) * (kernel - 1)
        if self.size < 2 or kernel % 2 == 0 or kernel < 3:
            raise ValueError(
                f"{len(outs)} convolutions of {kernel} frames leave {self.size} of {height}; the kernel is odd, and 2 must be left"
            )
        if size % arch["heads"]:
            raise ValueError(f"a token of {size} values cannot be split over {arch['heads']} heads")
        layers = []
        for at, out in enumerate(outs):
            stride = 2 if at < len(arch["widths"]) and width >= 4 else 1
            layers.append(TimeConv(channels, out, kernel, stride))
            channels, width = out, -(-width // stride)
        self.layers = nn.ModuleList(layers)
        self.embed = nn.Linear(channels * width, size)
        # of so many, used in turn, no two tokens of a window have one, and each place in a window tells what was before
        self.positions = nn.Parameter(torch.randn(2 * self.size - 1, size) * 0.1)
        self.blocks = nn.ModuleList([Block(size, arch["heads"], arch["wide"]) for _ in range(arch["blocks"])])
        self.head = nn.Linear(size, arch["classes"])

    def features(self, images: Tensor, offset: int | Tensor | None = None) -> Tensor:
        """Features (N, E) of clips (N, C, H, W) whose first token has the position `offset`, one or (N,).

        None: 0, as at the start of a stream; in training any, drawn for each row from torch's global generator.
        """
        frames = (images - self.mean) / self.std
        for layer in self.layers:
            frames = layer(frames)
        tokens: Tensor = self.embed(frames.transpose(1, 2).flatten(2))
        total = len(self.positions)
        if offset is None:
            offset = torch.randint(total, (len(images),), device=images.device) if self.training else 0
        at = torch.as_tensor(offset, device=images.device).reshape(-1, 1) + torch.arange(self.size, device=images.device)
        tokens = tokens + self.positions[at % total]
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        newest: Tensor = self.blocks[-1].newest(tokens)[:, 0]  # type: ignore[operator]
        return newest

    def forward(self, images: Tensor, offset: int | Tensor | None = None) -> Tensor:
        """Logits (N, classes) of clips (N, C, H, W) in [0, 1]; `offset` as in `features`."""
        logits: Tensor = self.head(self.features(images, offset))
        return logits

    def start_stream(self) -> Stream:
        """The state before the first frame."""
        return Stream(len(self.layers))

    @torch.no_grad()
    def step(self, stream: Stream, frame: Tensor) -> Tensor | None:
        """Logits (B, classes) of the window that ends at this frame (B, C, W) in [0, 1], of B streams; None until a window is full.

        The state moves on in place. After t frames the answer is `forward` of the last H of them with offset t - H. Raises ValueError for
        a frame of another shape.
        """
        channels, _, width = self.arch["shape"]
        if frame.ndim != 3 or tuple(frame.shape[1:]) != (channels, width):
            raise ValueError(f"a frame of a stream is (streams, {channels}, {width}), got {tuple(frame.shape)}")
        kernel = self.arch["kernel"]
        frames = ((frame - self.mean) / self.std).unsqueeze(2)
        for at, layer in enumerate(self.layers):
            before = stream.frames[at]
            frames = frames if before is None else torch.cat([before, frames], 2)
            stream.frames[at] = frames[:, :, -(kernel - 1) :]
            if frames.shape[2] < kernel:
                return None
            frames = layer(frames)
        token = self.embed(frames.transpose(1, 2).flatten(2)) + self.positions[stream.tokens % len(self.positions)]
        stream.tokens += 1
        first: Block = self.blocks[0]  # type: ignore[assignment]
        if len(self.blocks) == 1:
            newest = single_output(first, stream.window, token, self.size)
        else:
            tokens = retroactive(first, stream.window, token, self.size)
            if tokens is None:
                return None
            for block in self.blocks[1:-1]:
                tokens = block(tokens)
            newest = self.blocks[-1].newest(tokens)  # type: ignore[operator]
        if newest is None:
            return None
        logits: Tensor = self.head(newest[:, 0])
        return logits


def single_output(block: Block, window: Window, token: Tensor, n: int) -> Tensor | None:
    """A block's output (B, 1, E) of the newest token (B, 1, E), from the kept keys and values of the last n; None until there are n.

    Continual Transformers (2022), single-output attention.
    """
    query, key, value = block.project(token)
    window.key, window.value = _on(window.key, key, n), _on(window.value, value, n)
    if window.key.shape[2] < n:
        return None
    return block.close(token, attend(query, window.key, window.value))


def retroactive(block: Block, window: Window, token: Tensor, n: int) -> Tensor | None:
    """A block's outputs (B, n, E) of the last n tokens, of which (B, 1, E) is the newest; None until there are n.

    Each row of the attention loses the oldest key and gains the newest: O(n d), not O(n^2 d). Continual Transformers (2022). Sums are
    kept as float64 and relative to the largest score that a row began with; where too little of a sum is left to be trusted, or it is
    beyond all numbers, all rows are computed anew.
    """
    query, key, value = (part.double() for part in block.project(token))
    left = None if window.rows is None else (window.key[:, :, :1], window.value[:, :, :1])  # type: ignore[index]
    window.tokens = token if window.tokens is None else torch.cat([window.tokens, token], 1)[:, -n:]
    window.query, window.key, window.value = _on(window.query, query, n), _on(window.key, key, n), _on(window.value, value, n)
    if window.key.shape[2] < n:
        return None
    rows = None
    if window.rows is not None and left is not None:
        total, weighted, top, peak = (part[:, :, 1:] for part in window.rows)
        others = window.query[:, :, :-1]
        gone = (others @ left[0].transpose(2, 3) - top).exp()
        come = (others @ key.transpose(2, 3) - top).exp()
        total = total - gone + come
        updated = (total, weighted - gone @ left[1] + come @ value, top, torch.maximum(peak, total))
        newest = _sums(query, window.key, window.value)
        total, weighted, top, peak = (torch.cat(parts, 2) for parts in zip(updated, newest, strict=True))
        # false also where a comparison meets what is no number
        if bool((total >= TRUST * peak).all() and total.isfinite().all() and weighted.isfinite().all()):
            rows = total, weighted, top, peak
    if rows is None:
        rows = _sums(window.query, window.key, window.value)
        window.afresh += 1
    window.rows = rows
    return block.close(window.tokens, (rows[1] / rows[0]).to(token.dtype))


def _sums(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of a `Window` for queries (B, heads, m, d), from nothing."""
    scores = query @ key.transpose(2, 3)
    top = scores.amax(3, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(3, keepdim=True)
    return total, weights @ value, top, total


def _on(kept: Tensor | None, new: Tensor, n: int) -> Tensor:
    """The last n of what was kept and what is new, along axis 2."""
    return new if kept is None else torch.cat([kept, new], 2)[:, :, -n:]
