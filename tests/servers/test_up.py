"""`retort up`, `status` and `down` on SQLite: what a user sees, what survives, and many flows at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from flows import _up
from flows._server import family
from tasks.core.errors import UserError
from tasks.core.settings import Settings, born, read_servers
from tests import workspace
from tests.benchmarks import load
from tests.servers.conftest import ports

FLOWS, STEPS = 8, 3
pytestmark = pytest.mark.timeout(400)


def states(folder: Path) -> tuple[int, dict[str, dict]]:
    ran = workspace.retort(folder, "status", "--json")
    return ran.returncode, {one["name"]: one for one in json.loads(ran.stdout)}


@pytest.fixture(scope="module")
def served(project: Path) -> Path:
    ran = workspace.retort(project, "up", *ports())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for line, name in zip(ran.stdout.splitlines(), ("Prefect", "MLflow", "worker"), strict=True):
        assert line.startswith(name)
        assert Path(line.split()[-1]).is_file()
    return project


def test_all_are_up_and_only_the_owner_reads_the_note(served: Path) -> None:
    code, found = states(served)
    assert code == 0
    assert {one["state"] for one in found.values()} == {"up"}
    assert Settings(served).servers.stat().st_mode & 0o777 == 0o600
    for one in found.values():
        assert psutil.pid_exists(one["pid"])
        for connection in psutil.Process(one["pid"]).net_connections("tcp"):
            assert connection.status != psutil.CONN_LISTEN or connection.laddr.ip == "127.0.0.1"


def test_up_again_leaves_everything_as_it_is(served: Path) -> None:
    before = Settings(served).servers.read_bytes()
    ran = workspace.retort(served, "up")
    assert ran.returncode == 0
    assert ran.stdout.startswith("already up")
    assert Settings(served).servers.read_bytes() == before
    other = workspace.retort(served, "up", *ports())
    assert other.returncode == 2
    assert "retort down" in other.stderr


def test_eight_flows_at_once_lose_nothing(served: Path) -> None:
    found = load.measure(served, FLOWS, STEPS, "eight")
    assert found["errors"] == []
    assert found["lost"] == {}
    logs = "".join((Settings(served).logs / f"{name}.log").read_text() for name in ("prefect", "mlflow"))
    assert "database is locked" not in logs
    for database in (served / ".retort" / "mlflow.db", served / ".retort" / "prefect" / "prefect.db"):
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as opened:
            assert opened.execute("pragma integrity_check").fetchone() == ("ok",)


def test_schedules_are_planned(served: Path) -> None:
    ask = urllib.request.Request(
        f"{read_servers(Settings(served))['servers']['prefect']['url']}/flow_runs/filter",
        data=json.dumps({"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    until = time.monotonic() + 30
    planned: list[dict] = []
    while not planned and time.monotonic() < until:
        with urllib.request.urlopen(ask, timeout=10) as answer:
            planned = json.load(answer)
        time.sleep(0.5)
    assert planned, "Prefect's scheduler has planned nothing"


def test_a_command_uses_them_and_a_killed_one_is_started_anew(served: Path) -> None:
    ran = workspace.retort(served, "train", "--data", "data/filtered")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    url = read_servers(Settings(served))["servers"]["prefect"]["url"]
    ask = urllib.request.Request(
        f"{url}/flow_runs/count",
        data=json.dumps({"flows": {"name": {"any_": ["train"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(ask, timeout=10) as answer:
        assert json.load(answer) == 1
    assert list((served / ".retort" / "artifacts" / "retort").rglob("weights.safetensors")), "files lie where they did without servers"

    before = states(served)[1]
    os.kill(before["mlflow"]["pid"], signal.SIGKILL)
    time.sleep(0.5)
    code, found = states(served)
    assert code == 1
    assert [found[name]["state"] for name in ("prefect", "mlflow", "worker")] == ["up", "down", "up"]
    alone = workspace.retort(served, "lineage", "digits-teacher/1")  # the same file, without the server
    assert alone.returncode == 0, alone.stderr
    ran = workspace.retort(served, "up")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    code, after = states(served)
    assert code == 0
    assert after["mlflow"]["url"] == before["mlflow"]["url"]
    assert {name for name in after if after[name]["pid"] != before[name]["pid"]} == {"mlflow"}


def ask(folder: Path, path: str, body: dict | None = None) -> Any:
    url = read_servers(Settings(folder))["servers"]["prefect"]["url"]
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"}), timeout=30) as answer:
        return json.load(answer)


def until(seconds: float, found: Callable[[], Any]) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.5)
    return value


def happened(folder: Path) -> str:
    """What a server's runs came to, and the last words of its processes: for a failure that is seldom seen."""
    lines = [
        f"{run['name']} of {run['flow_name']}: {run['state_name']}, {run['start_time']} to {run['end_time']}, {run['state']['message']}"
        for run in ask(folder, "/flow_runs/paginate", {"sort": "START_TIME_ASC", "limit": 100})["results"]
        if run["start_time"]
    ]
    lines += [f"{one['name']}: {one['active_slots']} slots held" for one in ask(folder, "/v2/concurrency_limits/filter", {})]
    for log in sorted(Settings(folder).logs.glob("*.log")):
        lines += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:]]
    return "\n".join(lines)


def test_a_deployment_runs_in_the_project_and_its_page_leads_to_mlflow_and_back(served: Path) -> None:
    deployment = ask(served, "/deployments/name/train/by-hand")["id"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(served, f"/deployments/{deployment}/create_flow_run", {"parameters": {"data": [""]}})
    assert refused.value.code in (409, 422)
    run = ask(served, f"/deployments/{deployment}/create_flow_run", {"parameters": {"data": ["data/filtered", "data/pool:reference"]}})[
        "id"
    ]
    done = until(120, lambda: (now := ask(served, f"/flow_runs/{run}"))["state_type"] in ("COMPLETED", "FAILED", "CRASHED") and now)
    assert done, "the worker did not bring the run to an end"
    assert done["state_type"] == "COMPLETED", done["state"]
    artifacts = {one["key"]: one for one in ask(served, "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})}
    assert artifacts.keys() == {"progress", "stages", "mlflow"}
    assert artifacts["progress"]["data"] == 100
    assert json.loads(artifacts["stages"]["data"])[0]["method"] == "train.supervised"
    mlflow = read_servers(Settings(served))["servers"]["mlflow"]["url"]
    assert f"({mlflow}/#/experiments/" in artifacts["mlflow"]["data"]
    with sqlite3.connect(f"file:{served}/.retort/mlflow.db?mode=ro", uri=True) as opened:
        pages = [row[0] for row in opened.execute("SELECT value FROM model_version_tags WHERE key = 'retort.flow_run'")]
    prefect = read_servers(Settings(served))["servers"]["prefect"]["url"].removesuffix("/api")
    assert f"{prefect}/runs/flow-run/{run}" in pages


def test_an_automation_answers_a_refusal_with_a_notice(served: Path) -> None:
    code = (
        "from prefect.events import emit_event; from flows import _runs\n"
        "facts = {'name': 'm', 'version': 3, 'reason': 'ece'}\n"
        "emit_event(_runs.REFUSED, resource={'prefect.resource.id': 'retort.model.m'}, payload=facts)\n"
        "from prefect.events.worker import EventsWorker\n"
        "EventsWorker.instance().drain()\n"
    )
    url = read_servers(Settings(served))["servers"]["prefect"]["url"]
    env = {**workspace.environment(), "PREFECT_API_URL": url}
    ran = subprocess.run([sys.executable, "-c", code], cwd=served, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    notices = served / ".retort" / "notices.jsonl"
    assert until(90, notices.exists), "no automation reacted"
    told = json.loads(notices.read_text().splitlines()[-1])
    assert (told["event"], told["about"], told["reason"]) == ("retort.gate.refused", "m version 3", "ece")


def test_a_deletion_request_starts_the_work_on_the_server_and_ends_with_a_certificate(served: Path) -> None:
    pool = [served / "data" / "pool" / "part-00000.parquet"]
    spoken = [row["sample_id"] for row in pq.read_table(pool).to_pylist() if "handwritten eight" in row["caption"]]
    ran = workspace.retort(served, "forget", "--concept", "handwritten eight", "--later")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(spoken)} samples, received" in ran.stdout
    folder = served / ".retort" / "certificates"
    assert until(240, lambda: list(folder.glob("*.json"))), f"the request's event started nothing that came to an end:\n{happened(served)}"
    (path,) = folder.glob("*.json")
    told = json.loads(path.read_text())
    assert told["samples"]["count"] == len(spoken) > 10
    assert not any("handwritten eight" in row["caption"] for row in pq.read_table(pool).to_pylist())
    checked = workspace.retort(served, "certificate", "verify", str(path))
    assert checked.returncode == 0, checked.stdout


def test_down_ends_every_process_and_the_files_remain(served: Path) -> None:
    known = read_servers(Settings(served))["servers"]
    ran = workspace.retort(served, "down")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("stopped") == 3, ran.stdout
    for one in known.values():
        assert family(one["pid"], born(one)) == []
    assert states(served)[0] == 1
    assert "nothing to stop" in workspace.retort(served, "down").stdout
    alone = workspace.retort(served, "lineage", "data/filtered")
    assert alone.returncode == 0, alone.stderr


def test_a_taken_port_is_named_with_its_option(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path / "project", workspace.smoke_params())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ran = workspace.retort(folder, "up", ports()[0], ports()[1], "--mlflow-port", port)
    assert ran.returncode == 2
    assert port in ran.stderr
    assert "--mlflow-port" in ran.stderr
    assert not Settings(folder).servers.exists()


def test_a_server_that_does_not_come_up_takes_the_others_with_it(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path / "project", workspace.smoke_params())
    (folder / ".retort").mkdir()
    (folder / ".retort" / "mlflow.db").write_text("this is no database\n" * 100)
    options = ports()
    ran = workspace.retort(folder, "up", *options)
    assert ran.returncode == 2
    assert "mlflow.log" in ran.stderr
    assert not Settings(folder).servers.exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(options[1]))) != 0, "Prefect was left running"


def note(folder: Path, **other: object) -> Settings:
    settings = Settings(folder)
    me = psutil.Process()
    known = {"pid": me.pid, "created": me.create_time(), "boot": psutil.boot_time(), "log": "", **other}
    servers = {"mlflow": {**known, "url": "http://127.0.0.1:5000"}, "prefect": {**known, "url": "http://127.0.0.1:4200/api"}}
    settings.home.mkdir(exist_ok=True)
    settings.servers.write_text(json.dumps({"database": "", "artifacts": "", "servers": servers}))
    return settings


def test_addresses_come_from_the_environment_then_from_what_is_up_then_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = note(tmp_path)
    assert settings.tracking_uri == "http://127.0.0.1:5000"
    assert settings.server_url("prefect") == "http://127.0.0.1:4200/api"
    assert settings.owns_store
    assert settings.artifact_root == settings.artifacts.as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")  # as a command of ours sets it for those that it starts
    assert settings.owns_store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert settings.tracking_uri == "https://mlflow.example.org"
    assert not settings.owns_store
    assert settings.artifact_root is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    settings = note(tmp_path, created=1.0)  # the number has been given to another process
    assert settings.tracking_uri == f"sqlite:///{settings.mlflow_db}"
    assert settings.server_url("prefect") is None


def test_a_lost_server_on_postgresql_is_not_replaced_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = note(tmp_path, created=1.0)
    settings.servers.write_text(settings.servers.read_text().replace('"database": ""', '"database": "postgresql://u:secret@h/d"'))
    with pytest.raises(UserError, match="retort up") as caught:
        _ = settings.tracking_uri
    assert "secret" not in str(caught.value)


def test_another_server_in_the_environment_wins_and_up_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example.org/api")
    with pytest.raises(UserError, match="PREFECT_API_URL"):
        _up.up(Settings(tmp_path), _up.Wish(), print)


@pytest.mark.parametrize("address", ["mysql://u:secret@h/d", "postgresql://u:secret@h", "postgresql://u:secret@h:x/d", "secret"])
def test_an_address_that_is_none_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(UserError, match="--database takes") as caught:
        _up.databases(address)
    assert "secret" not in str(caught.value)


def test_each_server_gets_a_database_of_its_own() -> None:
    prefect, mlflow = _up.databases("postgresql://u:p%40@h:5433/d?sslmode=require")
    assert prefect == "postgresql+asyncpg://u:p%40@h:5433/d_prefect?ssl=require"
    assert mlflow == "postgresql+psycopg2://u:p%40@h:5433/d_mlflow?sslmode=require"
