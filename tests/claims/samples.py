"""Data for claims: published sets as arrays, and arrays as the datasets that methods take."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer, decode, encode, image_column
from tasks.core.errors import UserError


class Images(NamedTuple):
    """Rows of a published set: pixels (N, C, H, W) uint8, labels (N,), class names by label, and the other columns by name, (N,) each."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    columns: Mapping[str, list[Any]]

    def take(self, at: npt.NDArray[Any]) -> Images:
        """The rows at positions, or where a mask is true."""
        rows = np.flatnonzero(at) if at.dtype == bool else at
        columns = {name: [values[i] for i in rows.tolist()] for name, values in self.columns.items()}
        return Images(self.pixels[rows], self.labels[rows], self.classes, columns)


@cache
def images(path: Path, split: str, *columns: str) -> Images:
    """Rows of one split of a Parquet file or folder with `image`, `label` and `split`; `columns` are read besides. Do not write into it.

    Class names are those of the file's metadata (`class_names`), else the labels as text. All images must have the first one's shape.
    Raises UserError where the folder, a column or the split is missing.
    """
    shards = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not shards:
        raise UserError(f"{path} holds no Parquet files; give a folder of them with columns image, label and split")
    wanted = ["image", "label", "split", *columns]
    absent = [name for name in wanted if name not in pq.read_schema(shards[0]).names]
    if absent:
        raise UserError(f"{shards[0]} has no column {absent[0]!r}; this claim reads {', '.join(wanted)}")
    table = pa.concat_tables([pq.read_table(shard, columns=wanted, filters=pc.field("split") == split) for shard in shards])
    if len(table) == 0:
        raise UserError(f"{path} has no rows of split {split!r}")
    blobs = table["image"].combine_chunks().field("bytes").to_pylist()
    names = (pq.read_schema(shards[0]).metadata or {}).get(b"class_names")
    labels = table["label"].to_numpy().astype(np.int64)
    classes = tuple(json.loads(names)) if names else tuple(str(label) for label in range(labels.max() + 1))
    return Images(decode(blobs, _shape(blobs[0])), labels, classes, {name: table[name].to_pylist() for name in columns})


def _shape(blob: bytes) -> tuple[int, int, int]:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(blob)) as image:
        return (1 if image.mode in ("1", "L", "I;16") else 3, image.height, image.width)


def dataset(
    pixels: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    captions: Sequence[str] | None = None,
    *,
    prefix: str = "r",
    split: str = "train",
) -> Dataset:
    """A dataset of these images (N, C, H, W), in a temporary folder that goes with the process. Label -1 is an unknown one.

    Ids are the prefix and a count: give sets that a method sees together different prefixes.
    """
    n = len(pixels)
    rows = pa.table(
        {
            "sample_id": [f"{prefix}{at:06d}" for at in range(n)],
            "image": image_column(encode(pixels)),
            "label": pa.array(labels, pa.int64(), mask=np.asarray(labels) < 0),
            "caption": pa.nulls(n, pa.string()) if captions is None else pa.array(captions, pa.string()),
            "split": [split] * n,
            "parents": pa.array([[]] * n, pa.list_(pa.string())),
            "_clean": pa.nulls(n, pa.bool_()),
        },
        schema=SCHEMAS["image"],
    )
    folder = Path(tempfile.mkdtemp(dir=_room())) / "data"
    with Writer(folder, Info("image", classes=tuple(classes), shape=pixels.shape[1:])) as out:
        out.write(rows)
    return Dataset.open(folder)


@cache
def _room() -> Path:
    room = Path(tempfile.mkdtemp(prefix="retort-claim-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    return room
