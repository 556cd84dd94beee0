"""Texts for claims: published sets, and texts as the datasets that methods take."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import loop
from tasks.core.dataset import SCHEMAS, Dataset, Info, Writer, text_bytes
from tasks.core.errors import UserError
from tasks.core.networks import Net
from tests.claims.samples import _room


class Texts(NamedTuple):
    """Rows of a published set: texts (N,), labels (N,) and class names by label."""

    texts: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def take(self, at: npt.NDArray[Any]) -> Texts:
        """The rows at positions, or where a mask is true."""
        rows = np.flatnonzero(at) if at.dtype == bool else at
        return Texts(tuple(self.texts[i] for i in rows.tolist()), self.labels[rows], self.classes)


@cache
def texts(path: Path, split: str, *columns: str, label: str = "label") -> Texts:
    """Rows of one split, the file `SPLIT.parquet` of a folder with a column `label` and these of text, which are joined by '. '.

    Class names are those of the file's metadata: `class_names`, or `X_names` where the label is `X_label`. Raises UserError where the
    file, a column or the class names are missing.
    """
    file = path / f"{split}.parquet"
    if not file.is_file():
        raise UserError(f"{path} holds no {split}.parquet; give a folder with files of columns {label}, {', '.join(columns)}")
    schema = pq.read_schema(file)
    absent = [name for name in (label, *columns) if name not in schema.names]
    names = (schema.metadata or {}).get(f"{'class' if label == 'label' else label.removesuffix('_label')}_names".encode())
    if absent or names is None:
        raise UserError(f"{file} has no {f'column {absent[0]!r}' if absent else 'class names in its metadata'}, which this claim reads")
    table = pq.read_table(file, columns=[label, *columns])
    joined = tuple(". ".join(parts) for parts in zip(*(table[name].to_pylist() for name in columns), strict=True))
    return Texts(joined, table[label].to_numpy().astype(np.int64), tuple(json.loads(names)))


class Drawn(NamedTuple):
    """Rows for one seed: labelled ones, others whose label is not known, and those to measure on."""

    known: Dataset
    pool: Dataset
    test: Texts


def domains(path: Path, seed: int, labelled: int, others: int) -> Drawn:
    """Utterances of CLINC150 and their domain, one of ten; those out of scope are left out. Raises UserError where there are too few."""
    train, test = (texts(path, split, "text", label="domain_label") for split in ("train", "test"))
    train, test = (rows.take(rows.labels < 10)._replace(classes=rows.classes[:10]) for rows in (train, test))
    if len(train.labels) < labelled + others:
        raise UserError(f"this claim draws {labelled + others} train rows; the data has {len(train.labels)}")
    order = np.random.default_rng(seed).permutation(len(train.labels))
    known, pool = train.take(order[:labelled]), train.take(order[labelled : labelled + others])
    return Drawn(
        text_dataset(known.texts, known.labels, known.classes, prefix="known"),
        text_dataset(pool.texts, np.full(others, -1), pool.classes, prefix="pool"),
        test,
    )


def accuracy(net: Net, test: Texts) -> float:
    """Share of the texts whose class a network tells."""
    said = loop.predict(net, text_bytes(list(test.texts))).argmax(1).numpy()
    return float((said == test.labels).mean())


def text_dataset(rows: Sequence[str], labels: npt.ArrayLike, classes: Sequence[str], *, prefix: str = "r", split: str = "train") -> Dataset:
    """A dataset of these texts, as `dataset` makes one of images."""
    n, told = len(rows), np.asarray(labels)
    table = pa.table(
        {
            "sample_id": [f"{prefix}{at:06d}" for at in range(n)],
            "label": pa.array(told, pa.int64(), mask=told < 0),
            "caption": pa.array(rows, pa.string()),
            "split": [split] * n,
            "parents": pa.array([[]] * n, pa.list_(pa.string())),
            "_clean": pa.nulls(n, pa.bool_()),
        },
        schema=SCHEMAS["text"],
    )
    folder = Path(tempfile.mkdtemp(dir=_room())) / "data"
    with Writer(folder, Info("text", classes=tuple(classes))) as out:
        out.write(table)
    return Dataset.open(folder)
