"""Shared fixtures: one tiny real data set, and the folder of larger ones."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import pyarrow as pa
import pytest
from sklearn.datasets import load_digits

from tasks.core import files
from tasks.core.dataset import IMAGE, SCHEMAS, Dataset, Info, Writer, encode, image_column
from tasks.core.settings import shared_data
from tests import workspace

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
assert IMAGE in SCHEMAS["image"].types


def image_rows(images: np.ndarray, labels: np.ndarray, splits: list[str], captions: list[str] | None = None) -> pa.Table:
    """Rows of schema `image` from uint8 images (N, C, H, W)."""
    n = len(images)
    return pa.table(
        {
            "sample_id": [f"d{i:05d}" for i in range(n)],
            "image": image_column(encode(images)),
            "label": pa.array(labels, pa.int64()),
            "caption": captions or [f"a photo of the digit {NAMES[label]}" for label in labels],
            "split": splits,
            "parents": pa.array([[]] * n, pa.list_(pa.string())),
            "_clean": pa.array([True] * n, pa.bool_()),
        },
        schema=SCHEMAS["image"],
    )


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A store that was opened in this process tells its address to those that come after it; not to the next test."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """400 handwritten digits of 8x8 pixels: 200 train, 60 reference, 40 validation, 100 test."""
    source = load_digits()
    images = np.round(source.images[:400] * (255 / 16)).astype(np.uint8)[:, None]
    splits = ["train"] * 200 + ["reference"] * 60 + ["validation"] * 40 + ["test"] * 100
    folder = tmp_path_factory.mktemp("tiny") / "pool"
    with Writer(folder, Info("image", classes=NAMES, shape=(1, 8, 8), name="digits")) as out:
        out.write(image_rows(images, source.target[:400], splits))
    return Dataset.open(folder)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of larger data sets; the test is skipped where it is not there."""
    folder = shared_data()
    if not (folder / "fashion_mnist").is_dir():
        pytest.skip(f"needs the data sets of RETORT_DATA; {folder} has none")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A project in which the main job has run once, every method at its smallest. Tests that change it work on a copy.

    Of several test processes one makes it, and the others copy it.
    """
    own = tmp_path_factory.mktemp("finished") / "project"
    if worker_id == "master":
        return run_once(own)
    common = tmp_path_factory.getbasetemp().parent / "finished"
    with files.exclusive(common.with_suffix(".lock")):
        if not (common / "first-run.txt").exists():
            shutil.rmtree(common, ignore_errors=True)
            run_once(common)
    return copied(common, own)


def run_once(folder: Path) -> Path:
    """Make a project and run the main job in it."""
    workspace.make(folder, workspace.smoke_params())
    ran = workspace.retort(folder, "run")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (folder / "first-run.txt").write_text(ran.stdout)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, free to be broken."""
    return copied(finished, tmp_path / "project")


def copied(project: Path, target: Path) -> Path:
    """A copy of a project. MLflow's absolute paths are moved along."""
    shutil.copytree(project, target, symlinks=True)
    with sqlite3.connect(target / ".retort" / "mlflow.db") as database:
        old, new = str(project), str(target)
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
            ("model_versions", "storage_location"),
        ):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old, new))
    return target


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server for flows that a test calls itself."""
    os.environ.update(PREFECT_SERVER_ANALYTICS_ENABLED="false", PREFECT_LOGGING_TO_API_ENABLED="false")
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
