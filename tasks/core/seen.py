"""What a model has seen, as a compact list of keys: 48 bits of a hash of each sample id, sorted.

A million ids take 4 MB. Two ids share a key with odds of one in 2**48, so that a look-up among a million is wrong once in 280 million. Keys
stay when ids go: a key says that a sample was seen to somebody who knows its id already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Keys = npt.NDArray[np.int64]
FILE = "seen.parquet"  # of a model's run: its rows, and what they were made from
FORGOT = "forgot.parquet"  # of the run that unlearned: what the model it began with had seen, and this one has not


def keys_of(ids: Iterable[str]) -> Keys:
    """Keys of ids (N,), sorted, each once."""
    digests = b"".join([hashlib.blake2b(name.encode(), digest_size=6).digest() + b"\0\0" for name in ids])
    return np.unique(np.frombuffer(digests, dtype="<i8").astype(np.int64))


def rows_and_parents(*columns: pa.ChunkedArray) -> Iterable[str]:
    """The distinct strings of columns of ids and of columns of lists of ids."""
    flat = [pc.list_flatten(column) if pa.types.is_list(column.type) else column for column in columns]
    return [
        name for name in pa.chunked_array([chunk for column in flat for chunk in column.chunks], pa.string()).unique().to_pylist() if name
    ]


def holds(keys: Keys, wanted: Keys) -> npt.NDArray[np.bool_]:
    """Which of the wanted keys (M,) are among sorted keys (N,); takes time with M, not with N."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=bool)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.asarray(keys[at] == wanted)


def digest(keys: Keys) -> str:
    """What a list of keys is known by."""
    return hashlib.sha256(np.ascontiguousarray(keys).tobytes()).hexdigest()[:32]


def write(path: Path, keys: Keys) -> None:
    """Write keys; the differences of sorted ones are small, so that they are stored as such."""
    pq.write_table(
        pa.table({"key": keys}),
        path,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"key": "DELTA_BINARY_PACKED"},
        write_statistics=False,
    )


def read(path: Path) -> Keys:
    """Read keys that `write` wrote."""
    return np.asarray(pq.read_table(path, columns=["key"])["key"].to_numpy(), dtype=np.int64)
