"""Which data versions can still be had, from DVC's cache, its remotes, and the copies that Retort keeps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.core.errors import UserError
from tasks.core.settings import Settings

COPIES = "the project's own copies"


def held(settings: Settings, versions: Iterable[str]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Where each version can be had, as a whole; the places that were looked through; and those that could not be.

    versions  md5 of folders (ending in `.dir`) or of files
    A folder can be had where its list of files is there, and each of the files in one place or another.
    Raises UserError where this is no DVC project.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    site = {"core": {"site_cache_dir": str(settings.root / ".dvc" / "site")}}
    found: dict[str, list[str]] = {}
    try:
        with Repo(str(settings.root), config=site) as repo:
            places, unseen = _places(repo, settings.root)
            for version in versions:
                if where := _copies(settings, version) + _in(places, version):
                    found[version] = where
    except DvcException as error:
        raise UserError(f"DVC cannot read this project: {error}") from None
    return found, [COPIES, *(name for name, _ in places)], unseen


def _places(repo: Any, root: Path) -> tuple[list[tuple[str, Any]], list[str]]:
    """The stores that can be reached, each with its name, and the names of the others."""
    places: list[tuple[str, Any]] = [("the DVC cache", repo.cache.local)]
    unseen = []
    for name in repo.config["remote"]:
        called = f"the remote {name}"
        try:
            remote = repo.cloud.get_remote(name)
            # asked for a file, a store without connection says that it has none: so the place itself is asked for first
            inside = remote.fs.protocol == "local" and Path(remote.path).is_relative_to(root)
            reached = inside or remote.fs.exists(remote.path)
        except Exception:  # a missing extra, a refused login, no network
            reached = False
        if reached:
            places.append((called, remote.odb))
        else:
            unseen.append(called)
    return places, unseen


def _in(places: list[tuple[str, Any]], version: str) -> list[str]:
    return [name for name, store in places if store.exists(version) and _whole(places, store, version)]


def _whole(places: list[tuple[str, Any]], store: Any, version: str) -> bool:
    """Whether all the files of a folder's list are still to be had; a file is whole by itself."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    if not version.endswith(".dir"):
        return True
    try:
        objects = {digest.value for _, _, digest in Tree.load(store, HashInfo("md5", version))}
    except Exception:  # a list of files that is damaged leads to none
        return False
    return all(any(other.exists(digest) for _, other in places) for digest in objects)


def _copies(settings: Settings, version: str) -> list[str]:
    there = [settings.cache / "versions" / version, settings.cache / "decoded" / f"{version}.npy"]
    return [COPIES] if any(path.exists() for path in there) else []
