"""The planted project, made once; tests that change it work on a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import planted
from tests.planted import Planted


@pytest.fixture(scope="session")
def project_with_a_past(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted.make(tmp_path_factory.mktemp("planted") / "project")


@pytest.fixture
def past(project_with_a_past: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    """A copy of the planted project."""
    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    return planted.copied(project_with_a_past, tmp_path)
