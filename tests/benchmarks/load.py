"""One flow as many run at once: Prefect tasks, a run of the store in each, and a version of a registered model that all of them share.

`measure` starts a process for each flow, in a project whose servers are up, and counts what has arrived. The processes are forked from one
that has imported what they need: what is measured is the servers, and not how long imports take.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests import workspace

METRICS = 10
MODEL = "shared"


def measure(folder: Path, flows: int, steps: int, tag: str, timeout: float = 300) -> dict[str, Any]:
    """Run so many flows at once and compare what they wrote with what is there: seconds, errors, and what is lost."""
    path = os.pathsep.join([str(folder), str(workspace.catalog.ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**workspace.environment(), "PYTHONPATH": path}
    command = [sys.executable, __file__, str(flows), str(steps), tag]
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return {"flows": flows, **told, **_arrived(folder, flows, steps, tag)}


def _arrived(folder: Path, flows: int, steps: int, tag: str) -> dict[str, Any]:
    servers = json.loads((folder / ".retort" / "servers.json").read_text())["servers"]
    import mlflow

    client = mlflow.MlflowClient(servers["mlflow"]["url"], servers["mlflow"]["url"])
    experiment = client.get_experiment_by_name("retort")
    runs = client.search_runs([experiment.experiment_id], f"tags.load = '{tag}'", max_results=5000) if experiment else []
    done = [run for run in runs if run.info.status == "FINISHED" and "retort.done" in run.data.tags]
    metrics = sum(len(run.data.metrics) for run in runs)
    versions = [v for v in client.search_model_versions(f"name = '{MODEL}'", max_results=5000) if v.tags.get("load") == tag]
    time.sleep(1)  # Prefect writes the last states of tasks a moment after their flow's
    flow_runs = _completed(servers["prefect"]["url"], "flow_runs", {"flow_runs": {"name": {"like_": f"{tag}-"}}})
    task_runs = _completed(servers["prefect"]["url"], "task_runs", {"flow_runs": {"name": {"like_": f"{tag}-"}}})
    lost = {
        "runs": flows * steps - len(done),
        "metrics": flows * steps * METRICS - metrics,
        "versions": flows - len({v.version for v in versions}),
        "flow states": flows - flow_runs,
        "task states": flows * steps - task_runs,
    }
    return {"lost": {name: number for name, number in lost.items() if number}}


def _completed(url: str, what: str, where: dict[str, Any]) -> int:
    states = {"flow_runs": where["flow_runs"], what: {**where.get(what, {}), "state": {"type": {"any_": ["COMPLETED"]}}}}
    body = json.dumps(states).encode()
    ask = urllib.request.Request(f"{url}/{what}/count", data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(ask, timeout=30) as answer:
        return int(json.load(answer))


def run_one(name: str, tag: str, steps: int, errors: Any) -> None:
    """One flow, in a process of its own; what goes wrong is put into `errors`."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    from tasks.core.settings import project
    from tasks.core.store import Store

    @task(cache_policy=NO_CACHE, persist_result=False)
    def step(number: int) -> str:
        store = Store(project())
        key = f"{name}-{number}"
        run = store.start(key, "load", params={"number": number}, tags={"load": tag}, inputs=[])
        store.finish(run, key, {"number": number}, {f"metric-{i}": float(i) for i in range(METRICS)})
        return run

    @flow(flow_run_name=name)
    def load() -> None:
        run = [step(number) for number in range(steps)][-1]
        store = Store(project())
        made = store.client.create_logged_model(store.experiment(), MODEL, run)
        store.client.finalize_logged_model(made.model_id, "READY")
        if not store.known(MODEL):
            try:
                store.client.create_registered_model(MODEL)
            except Exception as error:
                if "RESOURCE_ALREADY_EXISTS" not in str(error):
                    raise
        store.client.create_model_version(MODEL, f"models:/{made.model_id}", run, tags={"load": tag}, model_id=made.model_id)

    try:
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            load()
    except Exception as error:
        errors.put(f"{type(error).__name__}: {str(error)[:300]}")


def main(flows: int, steps: int, tag: str) -> None:
    from flows import _server
    from tasks.core import store
    from tasks.core.settings import project

    os.environ.update({**_server.environment(project()), **store.environment(project())})
    import mlflow  # noqa: F401
    import prefect.concurrency.sync
    import prefect.flow_engine  # noqa: F401

    fork = multiprocessing.get_context("fork")
    errors = fork.SimpleQueue()
    children = [fork.Process(target=run_one, args=(f"{tag}-{number}", tag, steps, errors)) for number in range(flows)]
    began = time.perf_counter()
    for child in children:
        child.start()
    for child in children:
        child.join()
    seconds = time.perf_counter() - began
    found = [f"a flow ended with {child.exitcode}" for child in children if child.exitcode]
    while not errors.empty():
        found.append(errors.get())
    print(json.dumps({"seconds": seconds, "errors": found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
