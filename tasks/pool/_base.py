"""What every kind of source gives: raw rows in small batches, and the facts about them that need no decoding."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from tasks.core.errors import UserError, without_secrets

BATCH = 1024  # rows that are read, decoded and written together
BATCH_BYTES = 32 << 20  # fewer rows where images are large
FILE_BYTES = 64 << 20  # one image, caption or JSON file; more is no image that a pool should hold
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp")
DEFAULT_COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image",),
    "label": ("label",),
    "caption": ("text", "caption"),
    "sample_id": ("sample_id",),
    "split": ("split",),
}


class Flaw(NamedTuple):
    """Why a row goes to quarantine: the column at fault, its value (shown shortened), and the reason."""

    column: str
    value: Any
    reason: str


class Raw(NamedTuple):
    """One row as the source has it. `row` counts from 0 in its file; `place` is the image's own name, where it has one."""

    file: str
    row: int
    id: str | None = None
    image: bytes | None = None
    place: str | None = None
    label: Any = None
    caption: str | None = None
    split: str | None = None
    clean: bool | None = None
    flaw: Flaw | None = None


@dataclass(frozen=True)
class Source:
    """A source, looked over: nothing is decoded yet.

    total    rows, good and bad
    batches  streams them, each time from the start
    classes  class names by label; `gathered` where they are the labels themselves, in the order of the alphabet
    splits   values of its own split column; None where it has none
    has_ids  without ids of its own, a row is named by its content
    columns  what the source calls `image`, `label`, `caption`, `sample_id` and `split`, for the quarantine
    """

    name: str
    total: int
    batches: Callable[[], Iterator[list[Raw]]]
    classes: tuple[str, ...] | None = None
    gathered: bool = False
    splits: frozenset[str] | None = None
    has_ids: bool = True
    columns: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    origin: str = ""

    def column(self, role: str) -> str:
        return self.columns.get(role, role)


MAX_NAMES = 1000  # more than so many labels are no names of classes


class Labels:
    """The labels of a source, gathered while it is looked over: where none of them is a number, they are the names of its classes."""

    def __init__(self) -> None:
        self._seen: set[str] | None = set()

    def add(self, values: Iterable[str | None]) -> None:
        """More of them."""
        if self._seen is None:
            return
        self._seen.update(value for value in values if value)
        if len(self._seen) > MAX_NAMES or any(is_number(value) for value in self._seen):
            self._seen = None

    def names(self) -> tuple[str, ...] | None:
        """The names, sorted; None where the labels are numbers, there are none, or too many."""
        return tuple(sorted(self._seen)) if self._seen else None


def is_number(label: str) -> bool:
    """Whether a label as text is a whole number."""
    return re.fullmatch(r"\s*-?[0-9]{1,18}\s*", label) is not None


@dataclass(frozen=True)
class Files:
    """Files of one address on any file system that fsspec knows."""

    address: str
    system: Any
    root: str
    paths: tuple[str, ...]
    is_folder: bool

    @property
    def is_local(self) -> bool:
        protocol = self.system.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    @property
    def title(self) -> str:
        """A name for the whole: the folder's, or the first file's."""
        return PurePosixPath(self.root).name if self.is_folder else PurePosixPath(without_secrets(self.paths[0])).stem

    def name(self, path: str) -> str:
        """A path relative to the root, so that a dataset is the same wherever its source lies."""
        return without_secrets(path)[len(self.root) :].lstrip("/")

    def only(self, *suffixes: str) -> Files:
        """The files with one of the suffixes. Raises UserError where there are none."""
        paths = tuple(p for p in self.paths if suffix(p) in suffixes)
        if not paths:
            raise UserError(f"{without_secrets(self.address)} has no file ending in {', '.join('.' + s for s in suffixes)}")
        return replace(self, paths=paths)

    def open(self, path: str) -> Any:
        return self.system.open(path, "rb")


def find(address: str) -> Files:
    """The files at a path, in a folder and below it, at a glob or at any fsspec URL, sorted; hidden ones are left out.

    Raises UserError where there is nothing, or where the file system is unknown or does not answer.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise UserError(f"source {without_secrets(address)} cannot be opened: {first_line(error)}") from None
    try:
        if system.isfile(path):
            return Files(address, system, without_secrets(path).rpartition("/")[0], (path,), False)
        if system.isdir(path):
            root = path.rstrip("/")
            return Files(address, system, root, _visible(system.find(path), root), True)
        if not glob.has_magic(path):
            raise UserError(f"source {without_secrets(address)} does not exist")
        root = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        found = _visible((p for p in system.glob(path) if system.isfile(p)), root)
    except OSError as error:
        raise UserError(f"source {without_secrets(address)} cannot be read: {first_line(error)}") from None
    if not found:
        raise UserError(f"source {without_secrets(address)} matches no file")
    return Files(address, system, root, found, False)


def with_image(files: Files, path: str, raw: Raw) -> Raw:
    """A row with the image of this file, or with the reason why there is none."""
    try:
        with files.open(path) as source:
            blob = source.read(FILE_BYTES + 1)
    except OSError:
        return raw._replace(flaw=Flaw("image", raw.place, "file cannot be read"))
    if len(blob) > FILE_BYTES:
        return raw._replace(flaw=Flaw("image", raw.place, f"file is larger than {FILE_BYTES >> 20} MiB"))
    return raw._replace(image=blob)


def in_batches(rows: Iterable[Raw]) -> Iterator[list[Raw]]:
    """Rows in batches of as many, or as many bytes of images, as are read together."""
    batch: list[Raw] = []
    size = 0
    for raw in rows:
        batch.append(raw)
        size += len(raw.image or b"")
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _visible(paths: Iterable[str], root: str) -> tuple[str, ...]:
    return tuple(sorted(p for p in paths if not any(part.startswith(".") for part in p[len(root) :].split("/"))))


def resolve(names: list[str], wanted: Mapping[str, str | None], needed: set[str], where: str) -> dict[str, str]:
    """Which of a file's columns plays which role: `wanted` first, then the defaults.

    An optional column that is not there is left out; but one whose name comes near is taken for a slip of the pen, since a misspelt
    `split` would mix test rows into the training rows. Raises UserError with the nearest name and all the names there are.
    """
    found: dict[str, str] = {}
    for role, defaults in DEFAULT_COLUMNS.items():
        choice = (wanted[role],) if role in wanted else defaults
        if choice == (None,):
            if role in needed - {"label"}:
                raise UserError(f"{where}: columns.{role} must name a column, not null; there are {', '.join(names)}")
            continue
        present = [name for name in choice if name in names]
        if present:
            found[role] = str(present[0])
            continue
        free = {name.lower(): name for name in names if name not in found.values()}
        near = [free[hit] for name in choice for hit in get_close_matches(str(name).lower(), free, n=1, cutoff=0.8)]
        if role in needed or role in wanted or near:
            hint = f"did you mean {near[0]!r}? " if near else ""
            way = f"set columns.{role} to the right one" + (", or to null" if role not in needed - {"label"} else "")
            raise UserError(f"{where} has no column {choice[0]!r}; {hint}it has {', '.join(names) or 'none'}: {way}")
    return found


def suffix(path: str) -> str:
    """How a file's name ends, in lower case: `parquet`, `jsonl`, `jsonl.gz`."""
    path = without_secrets(path).lower()
    return PurePosixPath(path.removesuffix(".gz")).suffix.lstrip(".") + (".gz" if path.endswith(".gz") else "")


def first_line(error: BaseException) -> str:
    return without_secrets((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."))
