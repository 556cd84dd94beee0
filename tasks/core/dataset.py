"""Datasets: folders of Parquet shards with a `dataset.json`, read as streams, seen through views that copy nothing.

A row has a `sample_id` and `parents`, the ids it was made from (none for originals). Columns that start with an underscore hold what is
known only for scoring, such as whether a caption is right: no method can read them. The identity of a dataset is the md5 that DVC gives
its folder.
"""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from tasks.core import files
from tasks.core.errors import UserError

Array = npt.NDArray[Any]

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_PARENTS = ("parents", pa.list_(pa.string()))
_IMAGE_COLUMNS = [
    ("sample_id", pa.string()),
    ("image", IMAGE),  # PNG
    ("label", pa.int64()),  # null: not known
    ("caption", pa.string()),
    ("split", pa.string()),  # train, reference, validation or test
    _PARENTS,
]
SCHEMAS: dict[str, pa.Schema] = {
    # `_clean`: is the caption right? null where nobody knows
    "image": pa.schema([*_IMAGE_COLUMNS, ("_clean", pa.bool_())]),
    # texts alone: `caption` is the text itself
    "text": pa.schema([*(column for column in _IMAGE_COLUMNS if column[0] != "image"), ("_clean", pa.bool_())]),
    # `pixels`: the exact learned values, C*H*W floats; `image` shows them clipped. `target`: what a network should give for them
    "condensed": pa.schema([*_IMAGE_COLUMNS, ("pixels", pa.list_(pa.float32())), ("target", pa.list_(pa.float32()))]),
    # one row for each row of the pool that a filter judged; the data itself stays where it is
    "verdicts": pa.schema([("sample_id", pa.string()), ("score", pa.float32()), ("kept", pa.bool_()), ("reason", pa.string())]),
}
QUARANTINE = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("column", pa.string()), ("value", pa.string()), ("reason", pa.string())]
)
SPLITS = ("train", "reference", "validation", "test")
ROWS_PER_SHARD = 4096
READERS = "most of filter, train.bert and distill.pretrained_distillation"
LONGEST_TEXT = 2048  # bytes of a text that networks are given; what stands behind is not read
CACHE_FROM_ROWS = 10_000  # fewer decode in well under a second


@dataclass(frozen=True)
class Info:
    """What `dataset.json` holds.

    schema   a key of `SCHEMAS`
    rows     number of rows in the shards
    classes  class names by label
    absent   those of them that have no train row and need none: erased as a whole, or allowed to be empty
    shape    channels, height, width of every image; zeros where there are none
    of       for verdicts: relative path and md5 of the pool that was judged
    made_by  method, its settings and seed
    """

    schema: str
    rows: int = 0
    classes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    shape: tuple[int, int, int] = (0, 0, 0)
    name: str = ""
    licence: str = ""
    source: str = ""
    of: Mapping[str, str] | None = None
    made_by: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        fields = {name: value for name, value in self.__dict__.items() if value or name != "absent"}
        return json.dumps(fields, indent=1, sort_keys=True, default=list) + "\n"

    @staticmethod
    def from_json(text: str) -> Info:
        fields = json.loads(text)
        fields["classes"], fields["absent"] = tuple(fields["classes"]), tuple(fields.get("absent", ()))
        fields["shape"] = tuple(fields["shape"])
        return Info(**fields)


@dataclass(frozen=True)
class Part:
    """Rows of one folder: all of them, or those at the sorted positions `rows`. `labelled=False` hides their labels."""

    folder: Path
    rows: Array | None
    total: int
    labelled: bool = True

    def __len__(self) -> int:
        return self.total if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class Dataset:
    """Rows of one or more folders of the same shape and classes, in a fixed order."""

    parts: tuple[Part, ...]
    info: Info

    @staticmethod
    def open(folder: Path | str, *, kept: bool = True) -> Dataset:
        """Open a dataset. A folder of verdicts opens as a view of its pool: the kept rows, or with `kept=False` the rejected ones.

        Raises UserError where there is no dataset, or where the pool is not the one that was judged.
        """
        folder = Path(folder)
        info = read_info(folder)
        if info.schema != "verdicts":
            return Dataset((Part(folder, None, info.rows),), info)
        assert info.of is not None
        pool_folder = (folder / info.of["path"]).resolve()
        if files.folder_md5(pool_folder) != info.of["md5"]:
            raise UserError(f"{folder} judges another version of {pool_folder}: run 'dvc repro filter' to bring it up to date")
        pool = Dataset.open(pool_folder)
        verdicts = pq.read_table(_shards(folder), columns=["sample_id", "kept"])
        chosen = verdicts.filter(pa.compute.equal(verdicts["kept"], kept))["sample_id"]
        mask = pa.compute.is_in(pool.column("sample_id"), value_set=chosen.combine_chunks())
        return pool.where(np.asarray(mask))

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __add__(self, other: Dataset) -> Dataset:
        if self.info.shape != other.info.shape:
            raise UserError(f"datasets of different image shapes cannot be joined: {self.info.shape} and {other.info.shape}")
        return replace(self, parts=self.parts + other.parts)

    def where(self, mask: Array) -> Dataset:
        """The rows at which the boolean `mask` (N,) is true."""
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != (len(self),):
            raise ValueError(f"a mask of shape {mask.shape} does not fit {len(self)} rows")
        parts, at = [], 0
        for part in self.parts:
            piece = mask[at : at + len(part)]
            at += len(part)
            if piece.all():
                parts.append(part)
            elif piece.any():
                rows = np.flatnonzero(piece) if part.rows is None else part.rows[piece]
                parts.append(replace(part, rows=rows))
        return replace(self, parts=tuple(parts))

    def take(self, positions: Array) -> Dataset:
        """The rows at the given positions, in the dataset's own order."""
        mask = np.zeros(len(self), dtype=bool)
        mask[np.asarray(positions, dtype=np.int64)] = True
        return self.where(mask)

    def split(self, *names: str) -> Dataset:
        """The rows of the named splits."""
        return self.where(np.asarray(pa.compute.is_in(self.column("split"), value_set=pa.array(names, pa.string()))))

    def with_ids(self, ids: Iterable[str]) -> Dataset:
        """The rows with the given ids."""
        wanted = pa.array(list(ids), type=pa.string())
        return self.where(np.asarray(pa.compute.is_in(self.column("sample_id"), value_set=wanted)))

    def without_descendants(self, ids: Iterable[str]) -> Dataset:
        """The rows that are none of the given ids and were made from none of them. A class that loses all its labelled rows is absent."""
        erased = pa.array(list(ids), type=pa.string())
        carries = np.asarray(pa.compute.is_in(self.column("sample_id"), value_set=erased)).copy()
        parents = self.column("parents").combine_chunks()
        from_erased = np.asarray(pa.compute.is_in(parents.flatten(), value_set=erased))
        carries[np.asarray(pa.compute.list_parent_indices(parents))[from_erased]] = True
        labels = self.labels()
        gone = np.setdiff1d(labels[carries], labels[~carries])
        absent = dict.fromkeys([*self.info.absent, *(self.info.classes[label] for label in gone if 0 <= label < len(self.info.classes))])
        return replace(self.where(~carries), info=replace(self.info, absent=tuple(absent)))

    def without_contents_of(self, other: Dataset) -> Dataset:
        """The rows whose decoded image, or whose text, is none of the other's."""

        def contents(rows: Dataset) -> list[Any]:
            return rows.captions() if rows.reads else [image.tobytes() for image in rows.images()]

        theirs = set(contents(other))
        return self.where(np.array([content not in theirs for content in contents(self)], dtype=bool))

    def without_labels(self) -> Dataset:
        """The same rows, with every label hidden."""
        return replace(self, parts=tuple(replace(part, labelled=False) for part in self.parts))

    def batches(self, columns: Iterable[str], size: int = 1024) -> Iterator[pa.RecordBatch]:
        """Stream the named columns in batches of at most `size` rows. Raises UserError for a column that is hidden or not there."""
        columns = list(columns)
        hidden = [name for name in columns if name.startswith("_")]
        if hidden:
            raise UserError(f"column {hidden[0]!r} holds the truth for scoring; no method may read it")
        yield from self._batches(columns, size)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column, whole."""
        chunks = [batch.column(0) for batch in self.batches([name], size=ROWS_PER_SHARD)]
        return pa.chunked_array(chunks, type=SCHEMAS[self.info.schema].field(name).type)

    def audit(self, name: str) -> pa.ChunkedArray:
        """One hidden column, whole: for the stage runner and reports, which score methods; never for methods."""
        chunks = [batch.column(0) for batch in self._batches([name], ROWS_PER_SHARD)]
        return pa.chunked_array(chunks, type=SCHEMAS[self.info.schema].field(name).type)

    def ids(self) -> list[str]:
        """Sample ids (N,)."""
        return list(self.column("sample_id").to_pylist())

    def captions(self) -> list[str]:
        """Captions (N,), empty where there is none."""
        return [text or "" for text in self.column("caption").to_pylist()]

    def labels(self) -> npt.NDArray[np.int64]:
        """Labels (N,), -1 where not known."""
        return self.column("label").fill_null(-1).to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    def synthetic(self) -> npt.NDArray[np.bool_]:
        """Which rows (N,) were made from others."""
        lengths = pa.compute.list_value_length(self.column("parents")).fill_null(0)
        return lengths.to_numpy() > 0  # type: ignore[no-any-return]

    @property
    def reads(self) -> bool:
        """Whether the rows are texts alone."""
        return self.info.schema == "text"

    @property
    def holds(self) -> str:
        """What the rows hold, in words: texts, or images and their shape."""
        return "texts" if self.reads else f"images {tuple(self.info.shape)}"

    def inputs(self) -> npt.NDArray[np.uint8]:
        """What networks take: decoded images (N, C, H, W), or of texts their UTF-8 bytes (N, L), filled up with zeros."""
        return text_bytes(self.captions()) if self.reads else self.images()

    def images(self) -> npt.NDArray[np.uint8]:
        """Decoded images (N, C, H, W), uint8. For many rows the whole folder is decoded once into a memory-mapped file, and mapped."""
        self._check(["image"])
        pieces = []
        for part in self.parts:
            cache = _cache(part.folder) if len(part) >= CACHE_FROM_ROWS else None
            if cache:
                whole = decoded(part.folder, self.info.shape, cache)
                pieces.append(whole if part.rows is None else whole[part.rows])
            else:
                pieces.extend(images for _, images in replace(self, parts=(part,)).image_batches())
        if not pieces:
            return np.zeros((0, *self.info.shape), dtype=np.uint8)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def image_batches(self, size: int = 1024) -> Iterator[tuple[list[str], npt.NDArray[np.uint8]]]:
        """Stream ids and decoded images (n, C, H, W), n <= size: for pools that do not fit in memory."""
        for batch in self.batches(["sample_id", "image"], size):
            yield batch.column(0).to_pylist(), decode(batch.column(1).field("bytes").to_pylist(), self.info.shape)

    @cached_property
    def md5(self) -> str:
        """Identity of these very rows: the folders' md5 with the positions taken."""
        import hashlib

        total = hashlib.md5(usedforsecurity=False)
        for part in self.parts:
            total.update(files.folder_md5(part.folder).encode() + (b"" if part.rows is None else part.rows.tobytes()))
            total.update(bytes([part.labelled]))
        return total.hexdigest()

    def _batches(self, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
        self._check(columns)
        for part in self.parts:
            at = 0
            for shard in _shards(part.folder):
                with pq.ParquetFile(shard) as parquet:
                    rows = parquet.metadata.num_rows
                    if part.rows is not None and not _overlaps(part.rows, at, at + rows):
                        at += rows
                        continue
                    for batch in parquet.iter_batches(batch_size=size, columns=columns):
                        chosen = _chosen(batch.select(columns), part.rows, at)
                        at += batch.num_rows
                        if chosen.num_rows:
                            yield chosen if part.labelled else _hide_labels(chosen)

    def _check(self, columns: list[str]) -> None:
        schema = SCHEMAS[self.info.schema]
        unknown = [name for name in columns if name not in schema.names]
        if unknown == ["image"] and self.reads:
            raise UserError(f"these rows are texts, and this method takes images; texts are taken by {READERS}")
        if unknown:
            raise UserError(f"a dataset of schema {self.info.schema!r} has no column {unknown[0]!r}; it has {', '.join(schema.names)}")


class Writer:
    """Writes a dataset: `with Writer(folder, info) as out: out.write(table)`. The folder changes when the block ends well, or never."""

    def __init__(self, folder: Path, info: Info) -> None:
        self.folder, self.info = folder, info
        self.schema = SCHEMAS[info.schema].with_metadata(_huggingface(info.schema))
        self.rows = 0
        self._shard = 0
        self._waiting: list[pa.Table] = []
        self._swap = files.replacing_folder(folder)

    def __enter__(self) -> Writer:
        self.temporary = self._swap.__enter__()
        return self

    def write(self, rows: pa.Table) -> None:
        """Add rows; they must have the schema's columns and types. Dictionary columns are written plain."""
        self._waiting.append(rows.select(self.schema.names).cast(pa.schema(list(self.schema))))
        self.rows += rows.num_rows
        while sum(table.num_rows for table in self._waiting) >= ROWS_PER_SHARD:
            table = pa.concat_tables(self._waiting)
            self._write_shard(table.slice(0, ROWS_PER_SHARD))
            self._waiting = [table.slice(ROWS_PER_SHARD)]

    def set_info(self, **changes: Any) -> None:
        """Change the facts that `dataset.json` will hold, where they are known only after reading the rows."""
        self.info = replace(self.info, **changes)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self._close()
        except BaseException as error:
            self._swap.__exit__(type(error), error, error.__traceback__)
            raise
        self._swap.__exit__(kind, value, trace)

    def _close(self) -> None:
        rest = pa.concat_tables(self._waiting) if self._waiting else self.schema.empty_table()
        if rest.num_rows or self._shard == 0:
            self._write_shard(rest)
        (self.temporary / "dataset.json").write_text(replace(self.info, rows=self.rows).to_json(), encoding="utf-8")

    def _write_shard(self, table: pa.Table) -> None:
        write_parquet(self.temporary / f"part-{self._shard:05d}.parquet", table.replace_schema_metadata(self.schema.metadata))
        self._shard += 1


def write_parquet(path: Path | io.BytesIO, table: pa.Table) -> None:
    """Write a table so that equal values give equal bytes: zstd, no pandas metadata, no page statistics."""
    pq.write_table(table, path, compression="zstd", write_statistics=False)


def read_info(folder: Path) -> Info:
    """Read `dataset.json`. Raises UserError where the folder is no dataset."""
    try:
        return Info.from_json((folder / "dataset.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a dataset: it has no dataset.json; make it with 'dvc repro'") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'dataset.json'} is damaged ({error}); get it back with 'dvc checkout'") from None


def decode(blobs: list[bytes], shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Decode image files to (N, C, H, W) uint8. Grey for one channel, RGB for three."""
    from PIL import Image

    channels, height, width = shape
    out = np.empty((len(blobs), height, width, channels), dtype=np.uint8)
    mode = "L" if channels == 1 else "RGB"
    for at, blob in enumerate(blobs):
        with Image.open(io.BytesIO(blob)) as image:
            out[at] = np.asarray(image if image.mode == mode else image.convert(mode)).reshape(height, width, channels)
    return out.transpose(0, 3, 1, 2)


def encode(images: Array) -> list[bytes]:
    """Encode (N, C, H, W) uint8 images as PNG."""
    from PIL import Image

    blobs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG")
        blobs.append(buffer.getvalue())
    return blobs


def text_bytes(texts: list[str]) -> npt.NDArray[np.uint8]:
    """UTF-8 bytes (N, L) of texts, filled up with zeros; at most `LONGEST_TEXT` of each."""
    blobs = [text.encode("utf-8", "replace")[:LONGEST_TEXT] for text in texts]
    width = max(map(len, blobs), default=0) or 1
    return np.array(blobs, dtype=f"S{width}").view(np.uint8).reshape(len(blobs), width)


def image_column(blobs: list[bytes]) -> pa.Array:
    """PNG bytes as a column of type `IMAGE`."""
    return pa.StructArray.from_arrays([pa.array(blobs, pa.binary()), pa.nulls(len(blobs), pa.string())], fields=list(IMAGE))


def _cache(folder: Path) -> Path | None:
    """Where decoded images of a folder are kept: in its project. None where it lies in no project."""
    from tasks.core.settings import project

    try:
        return project(folder).cache / "decoded"
    except UserError:
        return None


def decoded(folder: Path, shape: tuple[int, int, int], cache: Path) -> npt.NDArray[np.uint8]:
    """All images of a folder as one memory-mapped array (N, C, H, W), made in the folder `cache` on first use."""
    path = cache / f"{files.folder_md5(folder)}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        whole = Dataset.open(folder)
        fresh = path.with_name(f".{path.stem}.{os.getpid()}.npy")
        array = np.lib.format.open_memmap(fresh, mode="w+", dtype=np.uint8, shape=(len(whole), *shape))
        at = 0
        with ThreadPoolExecutor(2) as pool:
            waiting: deque[Future[npt.NDArray[np.uint8]]] = deque()
            for batch in chain(whole.batches(["image"], 2048), [None, None, None]):
                if len(waiting) == 3 or (batch is None and waiting):  # few in flight: `pool.map` would read the whole folder ahead
                    images = waiting.popleft().result()
                    array[at : at + len(images)] = images
                    at += len(images)
                if batch is not None:
                    waiting.append(pool.submit(decode, batch.column(0).field("bytes").to_pylist(), shape))
        array.flush()
        fresh.replace(path)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _overlaps(rows: Array, start: int, stop: int) -> bool:
    return bool(np.searchsorted(rows, start) < np.searchsorted(rows, stop))


def _chosen(batch: pa.RecordBatch, rows: Array | None, at: int) -> pa.RecordBatch:
    if rows is None:
        return batch
    low, high = np.searchsorted(rows, [at, at + batch.num_rows])
    return batch.take(pa.array(rows[low:high] - at))


def _hide_labels(batch: pa.RecordBatch) -> pa.RecordBatch:
    if "label" not in batch.schema.names:
        return batch
    return batch.set_column(batch.schema.names.index("label"), "label", pa.nulls(batch.num_rows, pa.int64()))


def _huggingface(schema: str) -> dict[str, str] | None:
    if "image" not in SCHEMAS[schema].names:
        return None
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
