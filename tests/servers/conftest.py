"""A project whose pool is read and filtered, and the commands that start and stop its servers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows._server import free_port
from tests import workspace

Up = Callable[..., Path]


@pytest.fixture(scope="session")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workspace.make(tmp_path_factory.mktemp("filtered") / "project", workspace.smoke_params())
    command = [sys.executable, "-m", "dvc", "repro", "-q", "filter"]
    ran = subprocess.run(command, cwd=folder, env=workspace.environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def project(filtered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy for one file of tests; whatever it started is stopped in the end."""
    folder = tmp_path_factory.mktemp("servers") / "project"
    shutil.copytree(filtered, folder, symlinks=True, ignore=shutil.ignore_patterns("servers.json"))
    yield folder
    workspace.retort(folder, "down")


def ports() -> list[str]:
    """Options that give the servers ports of their own."""
    return ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
