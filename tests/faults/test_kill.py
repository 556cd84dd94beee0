"""The main job is killed again and again, at random moments, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests import workspace

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
KILLS = int(os.environ.get("RETORT_KILLS", "8"))  # `make faults` makes it twenty


def outcome(folder: Path) -> dict[str, object]:
    """What a run is for: the data's identity, the champions' weights, and the aliases."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    outs = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        versions = database.execute(
            "SELECT t.name, t.value FROM registered_model_aliases a JOIN model_version_tags t ON t.name = a.name AND t.version = a.version "
            "WHERE a.alias = 'champion' AND t.key = 'retort.sha256' ORDER BY t.name"
        ).fetchall()
    return {"data": {k: v for k, v in outs.items() if not k.endswith((".json", ".csv"))}, "champions": versions}


def check_whole(folder: Path) -> None:
    """Nothing half-made may be seen, whenever one looks."""
    for dataset in (folder / "data").glob("[!.]*/dataset.json"):
        rows = json.loads(dataset.read_text())["rows"]
        import pyarrow.parquet as pq

        assert sum(pq.read_metadata(p).num_rows for p in dataset.parent.glob("part-*.parquet")) == rows
    if (folder / ".retort" / "mlflow.db").exists():
        with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
            for (where,) in database.execute("SELECT storage_location FROM model_versions"):
                weights = Path(where.removeprefix("file://")) / "artifacts" / "weights.safetensors"
                assert weights.stat().st_size > 1000, f"a registered version has no weights at {weights}"


def killed_after(folder: Path, seconds: float) -> bool:
    """Start the job, kill it after that time; False where it ended by itself before."""
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run"],
        cwd=folder, env=workspace.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        shown, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        return True
    assert child.returncode == 0, shown
    return False


def test_kills_change_nothing(finished: Path, tmp_path: Path) -> None:
    rng = random.Random(time.time_ns())
    folder = workspace.make(tmp_path / "project", workspace.smoke_params())
    kills, whole = 0, 0
    while kills < KILLS:
        killed = killed_after(folder, rng.uniform(0.5, 11))
        kills += killed
        check_whole(folder)
        if not killed:  # done: take away one part of what was made, so that there is work again
            whole += 1
            params = workspace.smoke_params()
            params["condense"]["n"] = 10 + whole
            params["recipe"]["steps"] = 60 + whole
            workspace.write_params(folder, params)
    workspace.write_params(folder, workspace.smoke_params())
    last = workspace.retort(folder, "run")
    assert last.returncode == 0, last.stdout
    check_whole(folder)
    if whole == 0:
        assert outcome(folder) == outcome(finished)
    else:  # other champions may stand from the changed runs; the data is what it must be
        assert outcome(folder)["data"] == outcome(finished)["data"]
    assert "Everything was up to date" in workspace.retort(folder, "run").stdout
    left = [p for p in psutil.process_iter(["cwd", "cmdline"]) if p.info["cwd"] and str(folder) in p.info["cwd"]]
    assert not left, f"processes left behind: {[p.info['cmdline'] for p in left]}"
    assert not [p for p in (folder / "data").iterdir() if ".new-" in p.name or ".old-" in p.name]
