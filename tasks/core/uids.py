"""Rows of a pool as DataComp names them: files of uids, so that a subset can be handed to other tools and taken from them.

A uid is 128 bits, written as 32 hexadecimal digits. A `.npy` file holds them as pairs of unsigned 64-bit numbers, high half first, in
ascending order (DataComp, 2023, arXiv 2304.14108); a text file has one a line. A `sample_id` that is no uid has the MD5 of its UTF-8 bytes
for one, so that any pool can be named so.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tasks.core.errors import UserError

UID = np.dtype("u8,u8")
Uids = npt.NDArray[np.void]
_HEX = re.compile(r"[0-9a-fA-F]{32}")


def uids(names: Iterable[str]) -> Uids:
    """The uid of each name (N,), in their order."""
    halves = [
        int(name, 16) if _HEX.fullmatch(name) else int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest(), "big")
        for name in names
    ]
    return np.array([(number >> 64, number & (2**64 - 1)) for number in halves], UID)


def among(some: Uids, listed: Uids) -> npt.NDArray[np.bool_]:
    """Which of `some` (N,) are in `listed` (M,), which is sorted."""
    if not len(listed):
        return np.zeros(len(some), dtype=bool)
    at = np.searchsorted(listed, some).clip(max=len(listed) - 1)
    return np.asarray(listed[at] == some)


def to_bytes(found: Uids) -> bytes:
    """A `.npy` file of these uids, sorted."""
    out = io.BytesIO()
    np.save(out, np.sort(found), allow_pickle=False)
    return out.getvalue()


def read(blob: bytes, name: str) -> Uids:
    """The uids of a file, sorted. Raises UserError where it is neither of the two kinds, or has none; `name` is how to call it."""
    if blob.startswith(b"\x93NUMPY"):
        try:
            found = np.load(io.BytesIO(blob), allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{name} is no list of uids: {error}") from None
        if found.dtype != UID or found.ndim != 1:
            raise UserError(f"{name} holds {found.dtype} of shape {found.shape}; a list of uids is one row of pairs of uint64 ('u8,u8')")
    else:
        try:
            lines = [line.strip() for line in blob.decode("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{name} is no list of uids: it is neither a .npy file nor text") from None
        found = uids(lines)
    if not len(found):
        raise UserError(f"{name} lists no uid")
    return np.sort(found)
