"""Parquet files of images or of texts, as Hugging Face lays them out: streamed, however large."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.errors import UserError, without_secrets
from tasks.pool._base import BATCH, BATCH_BYTES, Files, Labels, Raw, Source, first_line, resolve


def read(files: Files, columns: Mapping[str, str | None], *, prefix_ids: bool, needs: Collection[str] = ("image", "label")) -> Source:
    """Look over Parquet files: columns, types, row counts, class names and splits. `needs`: the roles that a column must play; where an
    image is none of them, none is read.

    Raises UserError that names the file and the column.
    """
    files, classes = _shards(files)
    found: dict[str, str] = {}
    first, facts, total = "", {"licence": "", "source": ""}, 0
    splits: set[str] = set()
    labels = Labels()
    for path in files.paths:
        where = (
            f"{without_secrets(files.address)}, file {files.name(path)}"
            if files.is_folder or len(files.paths) > 1
            else without_secrets(files.address)
        )
        with _opened(files, path) as parquet:
            schema, total = parquet.schema_arrow, total + parquet.metadata.num_rows
            here = resolve(schema.names, columns if "image" in needs else {**columns, "image": None}, set(needs), where)
            for role, name in here.items():
                _check_type(role, name, schema.field(name).type, where)
            metadata = {key.decode(): value.decode("utf-8", "replace") for key, value in (schema.metadata or {}).items()}
            names = _class_names(metadata, here.get("label", ""), where)
            if not first:
                first, found, classes = where, here, classes or names
                facts = {key: metadata.get(key, "") for key in facts}
            elif here != found:
                raise UserError(f"{where} has other columns than {first}: {_listed(here)} against {_listed(found)}; they must agree")
            elif names and names != classes:
                raise UserError(f"{where} has other class names than {first}; read such files as pools of their own")
            if "split" in found:
                for batch in parquet.iter_batches(65_536, columns=[found["split"]]):
                    splits.update(value for value in set(_texts(batch.column(0))) if value is not None)
            if not classes and "label" in found and _is_text(schema.field(found["label"]).type):
                for batch in parquet.iter_batches(65_536, columns=[found["label"]]):
                    labels.add(set(_texts(batch.column(0))))

    def batches() -> Iterator[list[Raw]]:
        for path in files.paths:
            with _opened(files, path) as parquet:
                yield from _rows(parquet, found, files.name(path), f"{PurePosixPath(files.name(path)).stem}-" if prefix_ids else "")

    return Source(
        files.title,
        total,
        batches,
        classes=classes or labels.names(),
        gathered=not classes,
        splits=frozenset(splits) if "split" in found else None,
        has_ids="sample_id" in found,
        columns=found,
        licence=facts["licence"],
        origin=facts["source"],
    )


def _shards(files: Files) -> tuple[Files, tuple[str, ...] | None]:
    """The Parquet files; of a folder that is a dataset of ours, the shards alone, with its class names."""
    if not files.is_folder:
        return files, None
    described = [p for p in files.paths if files.name(p) == "dataset.json"]
    files = files.only("parquet")
    if not described:
        return files, None
    with files.open(described[0]) as source:
        classes = tuple(json.load(source).get("classes", ()))
    return replace(files, paths=tuple(p for p in files.paths if files.name(p).startswith("part-"))), classes or None


@contextmanager
def _opened(files: Files, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; what goes wrong with it, here or while it is read, names it."""
    try:
        # these two stream a column chunk instead of loading all of it: one row group may be the whole file
        handle = nullcontext(path) if files.is_local else files.open(path)
        with handle as source, pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{without_secrets(path)} cannot be read as Parquet, it may be damaged or cut short: {first_line(error)}") from None


def _rows(parquet: pq.ParquetFile, found: Mapping[str, str], file: str, prefix: str) -> Iterator[list[Raw]]:
    groups = [parquet.metadata.row_group(g) for g in range(parquet.num_row_groups)]
    widest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    size, at = min(BATCH, max(1, BATCH_BYTES // max(widest, 1))), 0
    for batch in parquet.iter_batches(size, columns=list(found.values())):
        nothing = [None] * batch.num_rows
        image = batch.column(found["image"]) if "image" in found else None
        if image is None:
            blobs, places = nothing, nothing
        elif pa.types.is_struct(image.type):
            # flatten, unlike field, keeps the null rows of the struct null
            parts = dict(zip([field.name for field in image.type], image.flatten(), strict=True))
            blobs = parts["bytes"].to_pylist()
            places = _texts(parts["path"]) if "path" in parts and _is_text(parts["path"].type) else nothing
        else:
            blobs, places = image.to_pylist(), nothing
        label = batch.column(found["label"]) if "label" in found else None
        labels = nothing if label is None else _texts(label) if _is_text(label.type) else label.to_pylist()
        captions, ids, splits = (_texts(batch.column(found[r])) if r in found else nothing for r in ("caption", "sample_id", "split"))
        if prefix:
            ids = [prefix + i if i else i for i in ids]
        yield [
            Raw(file, row, *values) for row, values in enumerate(zip(ids, blobs, places, labels, captions, splits, strict=True), start=at)
        ]
        at += batch.num_rows


def _texts(column: pa.Array) -> list[Any]:
    """Strings, whatever the column is; what is not UTF-8 is patched, since one bad letter is no reason to stop."""
    try:
        return [value if value is None or isinstance(value, str) else str(value) for value in column.to_pylist()]
    except UnicodeDecodeError:
        plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        return [value if value is None else value.decode("utf-8", "replace") for value in plain.cast(pa.large_binary()).to_pylist()]


def _check_type(role: str, name: str, kind: pa.DataType, where: str) -> None:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    text, whole = _is_text(plain), pa.types.is_integer(plain)
    if role == "image":
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        valid, right = pa.types.is_binary(inner) or pa.types.is_large_binary(inner), "struct<bytes: binary, path: string> or binary"
    elif role == "label":
        valid, right = text or whole or pa.types.is_floating(plain), "an integer, or a string with the class name"
    elif role == "sample_id":
        valid, right = text or whole, "a string or an integer"
    else:
        valid, right = text, "a string"
    if not valid and not pa.types.is_null(plain):
        raise UserError(f"{where}: column {name!r} is {kind}, but the {role.replace('sample_', '')} must be {right}")


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain))


def _class_names(metadata: Mapping[str, str], label: str, where: str) -> tuple[str, ...] | None:
    """Class names from the key `class_names`, or from the ClassLabel feature that `datasets` writes."""
    try:
        names = json.loads(metadata.get("class_names", "null"))
        if names is None:
            features = json.loads(metadata.get("huggingface", "{}")).get("info", {}).get("features", {})
            names = (features.get(label) or {}).get("names")
        if names is None:
            return None
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise ValueError("no list of strings")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}: class_names in the schema metadata must be a JSON list of strings ({first_line(error)})") from None
    return tuple(names)


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(sorted(found.values()))
