"""A folder of images, one folder for each class; optionally one for each split above them."""

from __future__ import annotations

from collections.abc import Iterator

from tasks.core.dataset import SPLITS
from tasks.core.errors import UserError, without_secrets
from tasks.pool._base import IMAGE_SUFFIXES, Files, Flaw, Raw, Source, in_batches, with_image


def read(files: Files) -> Source:
    """Look over a folder. Classes are its folders, sorted by name; if these are called as splits are, the folders one level below.

    Raises UserError where it is no folder, or has no class folder or no images.
    """
    if not files.is_folder:
        raise UserError(f"source {without_secrets(files.address)} is not a folder; give one that has a folder of images for each class")
    tops = _folders(files, files.root)
    by_split = bool(tops) and set(tops) <= set(SPLITS)
    classes = sorted({name for top in tops for name in _folders(files, f"{files.root}/{top}")} if by_split else tops)
    layout = f"{without_secrets(files.address)} has no class folders: put the images of each class in a folder of the class's name"
    if not classes:
        raise UserError(layout)
    files = files.only(*IMAGE_SUFFIXES)
    label_of = {name: label for label, name in enumerate(classes)}
    depth = 2 if by_split else 1

    def row(path: str) -> Raw:
        name = files.name(path)
        above = name.split("/")[:-1]
        # every file is a source file of its own, with one row
        raw = Raw(name, 0, place=name, split=above[0] if by_split and above else None)
        if len(above) < depth:
            return raw._replace(flaw=Flaw("label", name, "image is not in a class folder"))
        return with_image(files, path, raw._replace(label=label_of[above[depth - 1]]))

    def batches() -> Iterator[list[Raw]]:
        return in_batches(row(path) for path in files.paths)

    return Source(
        files.title,
        len(files.paths),
        batches,
        classes=tuple(classes),
        splits=frozenset(tops) if by_split else None,
        has_ids=False,
    )


def _folders(files: Files, path: str) -> list[str]:
    """Names of the folders in a folder, hidden ones left out."""
    names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in files.system.ls(path, detail=True) if entry["type"] == "directory"]
    return sorted(name for name in names if not name.startswith("."))
