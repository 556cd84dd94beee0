"""MLflow's files, wherever they lie: trees of artifacts that can be read and changed, and where there are any."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from tasks.core.store import Store


class Artifacts:
    """A tree of artifacts, read and changed through MLflow's artifact repository."""

    def __init__(self, store: Store, uri: str, work: Path) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self.uri, self.work = uri, work
        self.repository = get_artifact_repository(uri, tracking_uri=store.settings.tracking_uri)

    def files(self, below: str | None = None) -> Iterator[tuple[str, int]]:
        """Path and size of each file."""
        for found in self.repository.list_artifacts(below):
            if found.is_dir:
                yield from self.files(found.path)
            else:
                yield found.path, int(found.file_size or 0)

    @contextmanager
    def get(self, path: str) -> Iterator[Path]:
        """One of the files, as a local one."""
        if (folder := local_folder(self.uri)) is not None:
            yield folder / path
            return
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            yield Path(self.repository.download_artifacts(path, place))

    def remove(self, path: str) -> None:
        """Remove one file."""
        self.repository.delete_artifacts(path)

    def put(self, path: str, source: Path) -> None:
        """Put a file of the same name in the place of one."""
        self.repository.log_artifact(str(source), path.rpartition("/")[0] or None)


def local_folder(uri: str) -> Path | None:
    """The folder behind a `file:` address or a plain path."""
    place = urlparse(uri)
    if place.scheme in ("", "file"):
        return Path(url2pathname(place.path) if place.scheme else uri)
    return None


def artifact_homes(store: Store) -> list[str]:
    """Where artifacts lie: of experiments, and of those runs and models that have theirs elsewhere. In a registry that others share too,
    of the runs of this copy of the project alone.
    """
    from mlflow.entities import ViewType

    homes: list[str] = []
    ours = "" if store.embedded else f"tags.`retort.project` = '{store.project}'"
    for found in _pages(lambda token: store.client.search_experiments(view_type=ViewType.ALL, page_token=token)):
        runs = runs_of(store, found.experiment_id, ours)
        models = models_of(store, found.experiment_id)
        if not store.embedded:
            known = {run.info.run_id for run in runs}
            models = [model for model in models if model.source_run_id in known]
        homes += [run.info.artifact_uri for run in runs] + [model.artifact_location for model in models]
        if store.embedded and (runs or models) and found.artifact_location:
            homes.append(found.artifact_location)  # what no run knows any more included
    every = {home.rstrip("/") for home in homes}
    return sorted(home for home in every if not any(home[:at] in every for at, char in enumerate(home) if char == "/"))


def runs_of(store: Store, experiment: str, wanted: str = "") -> list[Any]:
    """Runs of an experiment, deleted ones too."""
    from mlflow.entities import ViewType

    return _pages(lambda token: store.client.search_runs([experiment], wanted, run_view_type=ViewType.ALL, page_token=token))


def models_of(store: Store, experiment: str, wanted: str | None = None) -> list[Any]:
    """Logged models of an experiment."""
    return _pages(lambda token: store.client.search_logged_models([experiment], filter_string=wanted, page_token=token))


def _pages(ask: Callable[[str | None], Any]) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = ask(token)
        found.extend(page)
        if not (token := page.token):
            return found
