"""The planted project, made once; tests that change it work on a copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import planted
from tests.planted import Planted


@pytest.fixture(scope="session")
def project_with_a_past(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    before = dict(os.environ)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield planted.make(tmp_path_factory.mktemp("planted") / "project")
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def past(project_with_a_past: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    """A copy of the planted project."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_SITE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return planted.copied(project_with_a_past, tmp_path)
