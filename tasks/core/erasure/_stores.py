"""What may hold rows of a project, as items that can be opened: its folder, DVC's cache and remotes, what git has stored."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.errors import without_secrets
from tasks.core.settings import Settings

OBJECT = re.compile(r"(?:^|/)([0-9a-f]{2})/([0-9a-f]{30}(?:\.dir)?)$")
SMALL = 1 << 16  # bytes: no `dataset.json` is larger
TEMPORARY = re.compile(r"(^|/)(\.[^/]*\.(new|old)-|\.artifact\.uploading\.)|^\.retort/(tmp|\.looking-)")
WORK = ".looking-"  # folders in `.retort` for what is fetched and unpacked; whatever a dead search left in one is looked at and removed


class Item(NamedTuple):
    """Something that can be opened. `get` gives it as a local file, for the length of a `with` block."""

    place: str
    path: str
    size: int
    get: Callable[[], Any]


class Closed(NamedTuple):
    """Something that could not be opened, and why."""

    place: str
    path: str
    why: str


class DvcStore:
    """DVC's object cache or one of its remotes. Paths are relative to its root, with slashes."""

    def __init__(self, place: str, fs: Any, root: str, work: Path) -> None:
        self.place, self.fs, self.root, self._work = place, fs, root, work

    @property
    def local(self) -> Path | None:
        """Its folder, where it is one of this machine."""
        return Path(self.root).resolve() if self.fs.protocol == "local" else None

    def files(self) -> dict[str, int]:
        """Size of everything that it holds. Raises what its file system raises where it cannot be reached."""
        if self.local:
            return {path.relative_to(self.root).as_posix(): path.lstat().st_size for path in _walk(Path(self.root), strict=True)}
        plain = self.fs.fs
        plain.invalidate_cache()
        try:
            plain.ls(self.root)  # one that does not answer is an empty one to `find`
        except FileNotFoundError:
            return {}
        found = plain.find(self.root, detail=True, **({"on_error": "raise"} if _walks(plain) else {}))
        prefix = plain._strip_protocol(self.root).rstrip("/") + "/"
        return {name.removeprefix(prefix): int(facts.get("size") or 0) for name, facts in found.items()}

    def path(self, relative: str) -> str:
        return str(self.fs.join(self.root, *relative.split("/")))

    @contextmanager
    def get(self, relative: str) -> Iterator[Path]:
        """One of its files, as a local one."""
        if self.local:
            yield Path(self.root, relative)
            return
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            target = Path(folder, Path(relative).name)
            self.fs.get_file(self.path(relative), str(target))
            yield target

    def remove(self, relative: str) -> None:
        """Remove one of its files; it may be gone already."""
        try:
            self.fs.rm_file(self.path(relative))
        except FileNotFoundError:
            return


def _walks(fs: Any) -> bool:
    """Whether a file system finds files by walking its folders, where it passes over those that it cannot list."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    kind = type(fs)
    return kind._find is AsyncFileSystem._find if issubclass(kind, AsyncFileSystem) else kind.find is AbstractFileSystem.find


def oid_of(relative: str) -> str:
    """The md5 of the object at a path of a DVC store, with `.dir` for a manifest; empty for whatever else lies there."""
    found = None if relative.startswith("runs/") else OBJECT.search(relative)
    return found[1] + found[2] if found else ""


def dvc_stores(repo: Any, work: Path) -> tuple[list[DvcStore], list[Closed]]:
    """DVC's local cache, then every remote that is configured; and those that cannot be opened."""
    found = [DvcStore("DVC cache", repo.cache.legacy.fs, repo.cache.legacy.path, work)]
    closed = []
    for name in repo.config["remote"]:
        place = f"DVC remote {name}"
        try:
            remote = repo.cloud.get_remote(name)
            found.append(DvcStore(place, remote.fs, remote.path, work))
            if remote.fs.protocol in ("http", "https"):
                found.pop()
                closed.append(Closed(place, "", "a remote behind a web address does not say what it holds"))
            elif remote.worktree or remote.fs.version_aware:
                closed.append(Closed(place, "", "it keeps earlier versions of its objects, which only its owner can look at and remove"))
        except Exception as error:  # whatever a cloud's client may raise
            closed.append(Closed(place, "", reason(error)))
    return found, closed


def manifest(store: DvcStore, relative: str) -> list[dict[str, str]]:
    """The entries of a folder's manifest: `md5` and `relpath`, each."""
    with store.get(relative) as path:
        return list(json.loads(path.read_bytes()))


def reason(error: BaseException) -> str:
    """An error in one line, without secrets."""
    said = str(error).splitlines()
    return without_secrets(f"{type(error).__name__}: {said[0] if said else ''}")


# the project's folder


def project_files(settings: Settings, without: Collection[Path]) -> Iterator[Item]:
    """Files of the project: its data, what git knows and does not ignore, `.dvc`, and `.retort`; none below `without`."""
    root, shut = settings.root, {path.resolve() for path in without}
    seen = set()
    for top, path in (
        *((settings.root / "data", path) for path in _walk(root / "data")),
        *((settings.home, path) for path in _walk(settings.home, shut)),
        *((root / ".dvc", path) for path in _walk(root / ".dvc", shut)),
        *((root, path) for path in _git_files(root)),
    ):
        relative = path.relative_to(root).as_posix()
        if relative not in seen:
            seen.add(relative)
            yield local(_place(top, relative, settings), relative, path)


def local(place: str, shown: str, path: Path) -> Item:
    """A file of this machine."""

    @contextmanager
    def get() -> Iterator[Path]:
        yield path

    return Item(place, shown, path.lstat().st_size if os.path.lexists(path) else 0, get)


def _place(top: Path, relative: str, settings: Settings) -> str:
    if TEMPORARY.search(relative):
        return "temporary folders"
    if top == settings.root:
        return "working copy"
    if top == settings.root / ".dvc":
        return "DVC's own files"
    if top == settings.root / "data":
        return "data"
    part = relative.split("/")[1]
    if part == "prefect":
        return "Prefect results" if "/storage/" in relative else "Prefect database"
    known = {"artifacts": "MLflow artifacts", "reports": "reports", "requests": "requests", "cache": "caches", "knowledge": "caches"}
    return known.get(part, "MLflow database" if part.startswith("mlflow.") else "logs and journals")


def _walk(top: Path, without: Collection[Path] = (), *, strict: bool = False) -> Iterator[Path]:
    """Files below a folder, and folders that may not be listed, so that opening them says why; with `strict` they raise OSError."""
    shut: list[Path] = []

    def closed(error: OSError) -> None:
        if strict and not isinstance(error, FileNotFoundError):
            raise error
        if Path(error.filename).exists():
            shut.append(Path(error.filename))

    for folder, folders, names in os.walk(top, onerror=closed):
        if without:
            folders[:] = [name for name in folders if Path(folder, name).resolve() not in without]
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_symlink() or path.is_file():
                yield path
        yield from (Path(folder, name) for name in folders if Path(folder, name).is_symlink())  # not followed; opening it says so
    yield from shut


def _git_files(root: Path) -> Iterator[Path]:
    listed = subprocess.run(  # noqa: S603
        ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard", "."],  # noqa: S607
        capture_output=True, check=False,
    )  # fmt: skip
    for name in listed.stdout.split(b"\0"):
        path = root / os.fsdecode(name)
        if name and path.is_file() and path.relative_to(root).parts[0] not in ("data", ".retort", ".dvc"):
            yield path


def git_objects(root: Path, work: Path) -> Iterator[Item]:
    """Every file that git has ever stored here: of branches, tags, stashes, experiments, and what none of them knows any more."""
    git = subprocess.Popen(  # noqa: S603
        ["git", "-C", str(root), "cat-file", "--batch-all-objects", "--batch", "--unordered"],  # noqa: S607
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert git.stdout is not None
    with git, tempfile.TemporaryDirectory(dir=work) as folder:
        target = Path(folder, "object")
        while head := git.stdout.readline().split():
            left = int(head[2])
            with target.open("wb") as out:
                while left > 0:
                    left -= out.write(git.stdout.read(min(left, 1 << 20)))
            git.stdout.read(1)
            yield local("git history", f"{head[1].decode()} {head[0].decode()}", target)
