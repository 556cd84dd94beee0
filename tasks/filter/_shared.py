"""What the filters share: which rows survive, their verdicts as one compact table, and what makes scoring quick."""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
import zlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core.dataset import SCHEMAS, decode
from tasks.core.errors import UserError

Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_WORD = re.compile(r"\w+")


def survivors(rows: int, keep: float) -> int:
    """How many of `rows` a share `keep` leaves: int(rows * keep), where 100 rows at 0.29 are 29 and not 28.

    Raises UserError where the pool is empty or where nothing would be left.
    """
    if rows == 0:
        raise UserError("the pool has no rows to judge; give at least one")
    count = int(round(rows * keep, 6))
    if count == 0:
        raise UserError(f"keep={keep} leaves none of the pool's {rows} rows; valid: {1 / rows:.4g} or more")
    return count


def keep_top(scores: Scores, ids: pa.ChunkedArray, count: int) -> tuple[Mask, float]:
    """The `count` best rows as a mask (N,), and the threshold: the score at index `count` of the descending sort (DataComp's rule).

    Every row above the threshold survives and every row below it falls. Rows exactly at it would let too many through, so they fill the
    places that are left in ascending order of `sample_id` (then of position): neither row order nor sharding decides. Where all
    rows survive there is no such index, and the threshold is the next number below the lowest score.
    """
    if count >= len(scores):
        return np.ones(len(scores), dtype=bool), float(np.nextafter(scores.min(), np.float32(-np.inf)))
    at = len(scores) - 1 - count
    threshold = np.partition(scores, at)[at]
    kept = scores > threshold
    places = count - int(kept.sum())
    if places:
        tied = np.flatnonzero(scores == threshold)
        names = ids.take(pa.array(tied)).to_pylist()
        kept[[position for _, position in sorted(zip(names, tied.tolist(), strict=True))[:places]]] = True
    return kept, float(threshold)


def verdicts(ids: pa.ChunkedArray, scores: Scores, kept: Mask, reason: str | list[str]) -> pa.Table:
    """Table of schema `verdicts` (N rows, in the order given); rows that fell carry `reason`, or their own one, kept ones an empty text."""
    survived = pa.array(kept)
    given = pa.scalar(reason, pa.string()) if isinstance(reason, str) else pa.array(reason, pa.string())
    reasons = pc.if_else(survived, pa.scalar("", pa.string()), given)
    return pa.table([ids, pa.array(scores, pa.float32()), survived, reasons], schema=SCHEMAS["verdicts"])


def words(caption: str) -> list[str]:
    """Words of a caption in lower case, without punctuation."""
    return _WORD.findall(caption.lower())


def augment(images: Tensor, shift: int, noise: float, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each moved by up to `shift` pixels either way, its border repeated; then Gaussian noise is added."""
    count, _, height, width = images.shape
    if shift:
        padded = F.pad(images, (shift,) * 4, mode="replicate")
        down, right = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator).to(images.device)
        rows, columns = (move + torch.arange(side, device=images.device) for move, side in ((down, height), (right, width)))
        each = torch.arange(count, device=images.device)[:, None, None]
        images = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return images + noise * torch.randn(images.shape, generator=generator).to(images.device)


def pixels(blobs: list[bytes], shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """What `decode` gives, (N, C, H, W), in a third of its time for small images: opening each file costs it more than its pixels.

    Grey or RGB PNGs of 8 bits whose pixels are one chunk are written into one tall image by Pillow's own decoder; all other files, and
    those it finds damaged, are left to `decode`.
    """
    from PIL import Image

    channels, height, width = shape
    start = getattr(Image.core, "zip_decoder", None)
    if start is None or channels not in (1, 3) or not blobs:
        return decode(blobs, shape)
    mode, kind = ("L", 0) if channels == 1 else ("RGB", 2)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    tall = Image.new(mode, (width, height * len(blobs)))
    others = []
    for at, blob in enumerate(blobs):
        size = len(blob) - 57  # all but the header, the frame of the one chunk of pixels, and the end
        if blob.startswith(header) and blob[37:41] == b"IDAT" and int.from_bytes(blob[33:37], "big") == size and blob[-8:-4] == b"IEND":
            decoder = start(mode, mode, 0)
            decoder.setimage(tall.im, (0, at * height, width, (at + 1) * height))
            if decoder.decode(blob[41:-16]) == (-1, 0):  # it has all pixels, and no error
                continue
        others.append(at)
    out = np.array(tall).reshape(len(blobs), height, width, channels)
    if others:
        out[others] = decode([blobs[at] for at in others], shape).transpose(0, 2, 3, 1)
    return out.transpose(0, 3, 1, 2)


def staged(values: Tensor, device: str) -> Tensor:
    """Values on the CPU, where CUDA waits for them in memory that it can copy while it computes."""
    return values.pin_memory() if device.startswith("cuda") else values


def need_compiler() -> None:
    """Raises UserError where torch.compile would find no C++ compiler."""
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(wanted) is None:
        raise UserError(f"compile needs a C++ compiler and finds no {wanted}: install it, name another one in CXX, or set compile to false")


def compiled(*towers: nn.Module) -> None:
    """Have these compiled when they are called next, unless they are already; a copy sent to another process must be told again."""
    for tower in towers:
        if tower._compiled_call_impl is None:
            tower.compile()
