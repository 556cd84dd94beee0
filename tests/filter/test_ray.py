"""The same scores from a cluster: two nodes, one of which is killed in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tasks.core.dataset import Dataset, Info, Writer
from tasks.core.errors import UserError
from tasks.filter import _ray, _resume
from tasks.filter.dfn import SMOKE, dfn
from tests.conftest import image_rows

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'retort[ray]'")
pytestmark = pytest.mark.timeout(300)
ROWS, PIECE = 400, 8


@pytest.fixture
def pool(tiny: Dataset, tmp_path: Path) -> Dataset:
    """Some digits in a project, so that pieces can be kept."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    at = np.arange(ROWS) % len(tiny)
    with Writer(tmp_path / "data" / "pool", Info("image", classes=tiny.info.classes, shape=(1, 8, 8))) as out:
        out.write(image_rows(tiny.images()[at], tiny.labels()[at], ["train"] * ROWS))
    return Dataset.open(tmp_path / "data" / "pool")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A cluster of two nodes on this machine, each with one core."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    monkeypatch.setenv("RETORT_ENGINE", "ray")
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_cluster_that_loses_a_node_gives_the_same_verdicts(
    pool: Dataset, tiny: Dataset, tmp_path: Path, cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tiny.split("reference")
    monkeypatch.setattr(_resume, "PIECE", PIECE)
    with monkeypatch.context() as alone:
        alone.delenv("RETORT_ENGINE")
        expected = dfn(pool, reference, SMOKE, seed=1)
    gone: list[int] = []

    def kill_one() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until and not gone:
            kept = len(list((tmp_path / ".retort").rglob("scores/*/*.npy")))
            if kept and at_work(cluster.second):
                cluster.remove_node(cluster.second, allow_graceful=False)
                gone.append(kept)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = dfn(pool, reference, SMOKE, seed=1)
    killer.join()
    assert gone, "no node was killed"
    assert gone[0] < ROWS / PIECE, "it was killed in the middle"
    assert not cluster.second.any_processes_alive()
    assert found.rows.equals(expected.rows)
    assert found.figures == expected.figures


def test_an_actor_on_an_accelerator_has_a_gpu_of_its_own(pool: Dataset, cluster) -> None:
    def gpus(_: object) -> np.ndarray:
        return np.array([float(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])] * 8, dtype=np.float32)

    pieces = [(start, start + 8) for start in range(0, 48, 8)]
    how = {"columns": ["sample_id"], "prepare": lambda batch: batch, "score": gpus, "size": 8, "device": "cuda"}
    with pytest.raises(UserError, match="no machine of the cluster offers Ray a GPU"):
        list(_ray.scored(pool, pieces, **how))
    cluster.add_node(num_cpus=2, num_gpus=2)
    cluster.wait_for_nodes()
    found = dict(_ray.scored(pool, pieces, **how))
    assert sorted(found) == [start for start, _ in pieces]
    assert {float(scores[0]) for scores in found.values()} <= {0.0, 1.0}


def at_work(node) -> bool:
    """Whether an actor of Ray Data lives on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("MapWorker" in " ".join(child.cmdline()) for child in raylet.children(recursive=True))


def test_an_engine_that_there_is_not_is_named(pool: Dataset, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_ENGINE", "spark")
    with pytest.raises(UserError, match="'spark', but there are: local, ray"):
        dfn(pool, tiny.split("reference"), SMOKE)
