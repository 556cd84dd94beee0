"""Reads a source of images or of texts into a dataset, row by row, and sets the bad rows aside with the reason.

A source is scikit-learn's digits (captioned as a web crawl would), Parquet files, a folder of images by class, image-caption pairs,
tables of paths, or texts as Parquet files, tables or lines of JSON.
It is streamed: memory does not grow with its size, but for 8 bytes a row. Splits are drawn from a hash of each row's id and from nothing
else, so that no row changes sides when others come or go.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tasks.core import uids
from tasks.core.dataset import Info, Writer
from tasks.core.erased import Erased
from tasks.core.errors import UserError, without_secrets
from tasks.core.method import MethodConfig, configured
from tasks.pool import _tables
from tasks.pool._base import Files, Source, find, suffix
from tasks.pool._check import NOTHING_ERASED, Classes, checked, first_image
from tasks.pool._intake import Intake, Quarantine

KINDS = ("digits", "parquet", "folder", "pairs", "paths", "texts")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
Role = Literal["image", "label", "caption", "sample_id", "split"]


class Config(MethodConfig):
    """What the pool is made of."""

    source: str = Field("digits", description="digits, or parquet:, folder:, pairs:, paths:, texts: before a PATH, a glob or an fsspec URL")
    columns: dict[Role, str | None] = Field({}, description="the source's names for image, label, caption, sample_id, split; null: none")
    prefix_ids: bool = Field(False, description="put the file's name before each id, where files repeat each other's ids")
    size: int | None = Field(None, ge=1, le=1024, description="resize to this many pixels square; without it all must be of one size")
    mode: Literal["auto", "grey", "rgb"] = Field("auto", description="auto: as the first image is")
    test: float = Field(0.2, ge=0, lt=1, description="share of all rows, where the source has no test split")
    validation: float = Field(0.1, ge=0, lt=1, description="share of the train rows, where the source has no validation split")
    reference: float = Field(0.1, ge=0, lt=1, description="share of the train rows that make the small trusted set")
    reference_rows: int = Field(2000, ge=0, description="at most this many of them")
    reference_source: str | None = Field(None, description="take the trusted set from here instead, all of its rows")
    digits_noise: float = Field(0.3, ge=0, le=1, description="digits: share of the train rows whose caption is spoiled")
    digits_unrelated: float = Field(0.3, ge=0, le=1, description="digits: share of the spoiled captions about something else")
    max_bad: float = Field(0.01, ge=0, le=1, description="share of bad rows past which the stage fails")
    only: str | None = Field(None, description="a file of uids, as DataComp has them: no other rows of the source are read into the pool")
    limit: int | None = Field(None, ge=1, description="read at most this many rows of each source, a sample that is always the same")
    allow_empty_class: bool = Field(False, description="accept a class without train rows")


def configure(settings: Mapping[str, Any]) -> Config:
    """Make the `Config` from plain settings. Raises UserError that names the bad key and the valid ones."""
    return configured(Config, "pool", settings)


def fingerprint(cfg: Config) -> str:
    """Changes when a file of the source comes, goes or is written again; reads none of them. Raises UserError where it is not there."""
    facts: list[tuple[str, ...]] = []
    addresses = [parse_source(text)[1] for text in (cfg.source, cfg.reference_source) if text]
    for address in filter(None, (*addresses, cfg.only)):
        files = find(address)
        for path in files.paths:
            info = files.system.info(path)
            facts.append((files.name(path), *(str(info.get(key, "")) for key in ("size", "mtime", "ETag", "etag", "LastModified"))))
    return hashlib.md5(json.dumps(facts).encode(), usedforsecurity=False).hexdigest()


def read_pool(cfg: Config, out: Path, *, seed: int = 0, erased: Erased = NOTHING_ERASED) -> dict[str, float]:
    """Write the source as a dataset of schema `image` or `text` with `quarantine.parquet` beside its shards, all of it or nothing.

    Rows that `erased` names, by id or by content, are left out. Splits depend on ids alone; `seed` moves the wording of made captions
    and the digits' noise. Gives the number of `rows`, of `rows_<split>`, of `quarantined` and, where there are some, of `erased` and of
    `unlisted` ones, and `share_clean`, the share of the train rows whose caption is right, where that is known.

    Raises UserError where the source cannot be read, has too many bad rows, no train rows or an empty class, or where the disk is full.
    The folder `out` is then what it was.
    """
    out, name = Path(out), without_secrets(cfg.source)
    pool, trusted = open_source(cfg.source, cfg, out, seed), None
    if cfg.reference_source:
        # none of its captions is spoiled, and its own splits do not matter
        trusted = replace(open_source(cfg.reference_source, cfg.model_copy(update={"digits_noise": 0.0}), out, seed), splits=None)
    classes = common_classes(pool, trusted, name, without_secrets(cfg.reference_source or ""))
    listed = read_uids(cfg.only) if cfg.only else None
    texts = {parse_source(text)[0] == "texts" for text in (cfg.source, cfg.reference_source) if text}
    if len(texts) > 1:
        raise UserError("source and reference_source must both be texts, or both images")
    want = None if texts == {True} else first_image(pool, size=cfg.size, mode=cfg.mode, name=name)
    info = Info(
        "text" if want is None else "image",
        shape=(0, 0, 0) if want is None else (1 if want.mode == "L" else 3, want.height, want.width),
        name=pool.name,
        licence=pool.licence,
        source=pool.origin,
        made_by={"method": "pool.read", "settings": plain_settings(cfg), "seed": seed},
    )
    writer = Writer(out, info)
    try:
        with writer, Quarantine(writer.temporary / "quarantine.parquet") as aside:
            intake = Intake(writer, aside, classes, reference_rows=cfg.reference_rows, seed=seed)
            none = {"test": 0.0, "validation": 0.0, "reference": 0.0}
            # the trusted set first: a row that is in both must not be trained on
            for source, shares, into in ((trusted, none, "reference"), (pool, shares_to_draw(pool, cfg), "")):
                if source:
                    where = without_secrets(cfg.reference_source or "") if into else name
                    rows = checked(source, want, classes, limit=cfg.limit, name=where, erased=erased)
                    total = min(source.total, cfg.limit or source.total)
                    only = None if into else listed
                    intake.take(source, rows, shares, into=into, max_bad=cfg.max_bad, total=total, name=where, only=only)
            intake.finish(allow_empty_class=cfg.allow_empty_class, erased=erased, name=name)
        return intake.figures()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        for left in out.parent.glob(f".{out.name}.new-*"):
            shutil.rmtree(left, ignore_errors=True)
        raise UserError(f"no space left for {out}: free some on its disk and run again; the last good version is untouched") from None


def open_source(text: str, cfg: Config, out: Path, seed: int) -> Source:
    """Look a source over. Raises UserError where its kind is unknown, it is not there or has no rows, or `out` is part of it."""
    kind, address = parse_source(text)
    if kind == "digits":
        from tasks.pool import _digits

        return _digits.read(
            noise=cfg.digits_noise,
            unrelated=cfg.digits_unrelated,
            test=cfg.test,
            validation=cfg.validation,
            reference=0.0 if cfg.reference_source else cfg.reference,
            reference_rows=cfg.reference_rows,
            limit=cfg.limit,
            seed=seed,
        )
    files = find(address)
    check_apart(files, out)
    columns: dict[str, str | None] = {str(role): name for role, name in cfg.columns.items()}
    if kind == "folder":
        from tasks.pool import _folder

        source = _folder.read(files)
    elif kind == "paths" or (kind == "texts" and not is_parquet(files)):
        source = _tables.read(files, columns, prefix_ids=cfg.prefix_ids, texts=kind == "texts")
    elif kind == "pairs" and is_tar(files):
        from tasks.pool import _tar

        source = _tar.read(files, columns, prefix_ids=cfg.prefix_ids)
    else:
        from tasks.pool import _parquet

        needs = {"parquet": ("image", "label"), "pairs": ("image", "caption"), "texts": ("caption",)}[kind]
        source = _parquet.read(files, columns, prefix_ids=cfg.prefix_ids, needs=needs)
    if not source.total:
        raise UserError(f"source {without_secrets(text)} is empty: it has no rows")
    return source


def read_uids(address: str) -> uids.Uids:
    """The uids in a file. Raises UserError where it is not there, or is no such list."""
    files = find(address)
    with files.open(files.paths[0]) as source:
        return uids.read(source.read(), f"the list of uids {without_secrets(address)}")


def parse_source(text: str) -> tuple[str, str]:
    """Kind and address. A path that ends in .parquet needs no kind. Raises UserError for anything else."""
    kind, colon, address = text.partition(":")
    if text == "digits":
        return "digits", ""
    if colon and address and kind in KINDS[1:]:
        return kind, address
    if text.endswith(".parquet") and not get_close_matches(kind, KINDS, n=1, cutoff=0.8):
        return "parquet", text
    near = get_close_matches(kind, KINDS, n=1)
    hint = f"did you mean {near[0]!r}? " if near and near[0] != kind else ""
    raise UserError(
        f"source {without_secrets(text)!r} is of no known kind; {hint}valid: digits, "
        "parquet:PATH, folder:PATH, pairs:PATH, paths:PATH, texts:PATH"
    )


def is_tar(files: Files) -> bool:
    """Whether pairs come as tar shards. Raises UserError where there are neither shards nor Parquet files, or both."""
    kinds = {suffix(path) for path in files.only("parquet", "tar").paths}
    if len(kinds) > 1:
        raise UserError(f"{without_secrets(files.address)} has both Parquet files and tar shards; name one kind with a glob such as *.tar")
    return kinds == {"tar"}


def is_parquet(files: Files) -> bool:
    """Whether texts come as Parquet files. Raises UserError where there are these and tables, or neither."""
    kinds = {suffix(path) == "parquet" for path in files.only("parquet", *_tables.SUFFIXES).paths}
    if len(kinds) > 1:
        raise UserError(f"{without_secrets(files.address)} has both Parquet files and tables; name one kind with a glob such as *.jsonl")
    return kinds == {True}


def shares_to_draw(pool: Source, cfg: Config) -> dict[str, float]:
    """What share of the train rows goes to each split that the source does not have."""
    own = set(pool.splits or ()) | ({"reference"} if cfg.reference_source or not cfg.reference_rows else set())
    wanted = {"test": cfg.test, "validation": cfg.validation, "reference": cfg.reference}
    return {split: 0.0 if split in own else share for split, share in wanted.items()}


def common_classes(pool: Source, trusted: Source | None, name: str, other: str) -> Classes:
    """The class names of the pool and of the trusted set. Raises UserError where they differ."""
    known = [source for source in (pool, trusted) if source and source.classes]
    given = {source.classes for source in known if not source.gathered}
    if len(given) > 1:
        raise UserError(f"reference_source {other} has other class names than {name}; they must be the same, in the same order")
    if given:
        return given.pop()
    return tuple(sorted({label for source in known for label in source.classes or ()})) or None


def check_apart(files: Files, out: Path) -> None:
    """Raises UserError where this run or the next would read what it writes."""
    folder = out.resolve()
    inside = files.is_local and any(Path(path).resolve().is_relative_to(folder) for path in files.paths[:1])
    around = files.is_local and files.is_folder and folder.is_relative_to(Path(files.root).resolve())
    if inside or around:
        raise UserError(f"source {files.address} and the pool's folder {out} must lie apart, or the pool would read itself")


def plain_settings(cfg: Config) -> dict[str, Any]:
    """Settings as plain values, without the secrets that an address may hold."""
    settings = cfg.model_dump(mode="json")
    return settings | {key: without_secrets(settings[key]) for key in ("source", "reference_source", "only") if settings[key]}
