"""How servers are started, watched and ended: Prefect's and MLflow's, for the length of one run or until `retort down`.

A child of a run dies with it, and is noted so that a later run ends what a killed one has left. A detached server outlives its starter.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tasks.core import files
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tasks.core.store import QUIET

HOST = "127.0.0.1"
START_SECONDS = 120
STOP_SECONDS = 15
HEALTH = {"prefect": "/api/ready", "mlflow": "/api/2.0/mlflow/experiments/search?max_results=1"}  # these ask the database too
MLFLOW_WORKERS = 2  # four by default: each is a process of 300 MB
LIVE: dict[int, subprocess.Popen[bytes]] = {}
_LIBC = ctypes.CDLL(None)  # loaded before any fork


def environment(settings: Settings) -> dict[str, str]:
    """What Prefect must find in the environment before it is imported."""
    url = os.environ.get("PREFECT_API_URL") or settings.server_url("prefect")
    return {
        **({"PREFECT_API_URL": url} if url else {}),
        "PREFECT_HOME": str(settings.prefect_home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
    }


def prefect_command(port: int, *, whole: bool = True) -> list[str]:
    """The command of a Prefect server. `whole`: with its pages and its services; without these no schedule ever starts anything."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return command if whole else [*command, "--no-services", "--no-ui"]


def prefect_environment(settings: Settings, port: int, database: str = "") -> dict[str, str]:
    """The environment of a Prefect server. `database`: an SQLAlchemy address; empty: a file in the project.

    It goes this way and not by the command line, which everybody on the machine can read.
    """
    kept = {key: value for key, value in {**os.environ, **environment(settings)}.items() if key != "PREFECT_API_URL"}
    kept["PREFECT_UI_API_URL"] = prefect_url(port)
    return {**kept, "PREFECT_SERVER_DATABASE_CONNECTION_URL": database} if database else kept


def mlflow_command(settings: Settings, port: int, artifacts: str = "") -> list[str]:
    """The command of an MLflow server; new experiments keep their files under `artifacts`, or else in the project.

    Clients read and write these themselves: the server does not carry them.
    """
    local = ["--host", HOST, "--port", str(port), "--workers", str(MLFLOW_WORKERS), "--uvicorn-opts", "--log-level warning"]
    return [
        *[sys.executable, "-m", "mlflow", "server", *local],
        *["--no-serve-artifacts", "--default-artifact-root", artifacts or settings.artifacts.as_uri()],
    ]


def mlflow_environment(database: str) -> dict[str, str]:
    """The environment of an MLflow server on an SQLAlchemy address, which may hold a password."""
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    # its jobs judge traces of language models; left on, they are five processes more
    return {**kept, **QUIET, "MLFLOW_BACKEND_STORE_URI": database, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def prefect_url(port: int) -> str:
    """The address of Prefect's API on a port of this machine."""
    return f"http://{HOST}:{port}/api"


def detach(settings: Settings, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that outlives this one and its terminal. Whoever calls notes it down."""
    return _start(settings, command, env, log, tied=False)


def spawn(settings: Settings, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a child in a group of its own, note the group, and have the kernel end it with us where it can."""
    child = _start(settings, command, env, log, tied=True)
    LIVE[child.pid] = child
    owner = psutil.Process()
    facts = {"pid": child.pid, "created": time.time(), "owner": owner.pid, "owner_created": owner.create_time()}
    files.write_text(settings.home / "children" / f"{child.pid}.json", json.dumps(facts))
    return child


def end_all(settings: Settings) -> None:
    """End every child of this process: for a run that is interrupted or has failed in another part."""
    for child in list(LIVE.values()):
        end(settings, child)


def end(settings: Settings, child: subprocess.Popen[bytes]) -> None:
    """End a child and all that it started."""
    _end_group(child.pid)
    child.wait()
    LIVE.pop(child.pid, None)
    (settings.home / "children" / f"{child.pid}.json").unlink(missing_ok=True)


def reap(settings: Settings) -> None:
    """End what an earlier run that was killed has left behind. For the holder of the project's lock."""
    for note in (settings.home / "children").glob("*.json"):
        left = json.loads(note.read_text(encoding="utf-8"))
        try:
            if abs(psutil.Process(left["owner"]).create_time() - left["owner_created"]) < 1:
                continue  # its owner lives: the pages that `retort ui` serves in another terminal
        except psutil.NoSuchProcess:
            pass
        for process in psutil.process_iter(["pid", "create_time"]):
            try:
                # the group outlives its leader, and a number that was given to another since has another age
                ours = os.getpgid(process.pid) == left["pid"] and process.create_time() >= left["created"] - 1
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
            if ours:
                process.kill()
        note.unlink()


def clear_half_made(settings: Settings) -> None:
    """Throw away a Prefect database whose first start was cut off: no later start could mend it."""
    settings.prefect_home.mkdir(parents=True, exist_ok=True)
    if not (settings.prefect_home / "initialised").exists():
        for left in settings.prefect_home.glob("prefect.db*"):
            left.unlink()


def mark_made(settings: Settings) -> None:
    """Note that the database is whole: its server has answered."""
    (settings.prefect_home / "initialised").touch()


class Server:
    """A local Prefect server. `start` returns at once; `ready` waits until it answers."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.settings, self.log = settings, log
        self.child: subprocess.Popen[bytes] | None = None
        self.url = environment(settings).get("PREFECT_API_URL", "")

    def start(self) -> None:
        if self.url:
            return
        clear_half_made(self.settings)
        port = free_port()
        self.url = prefect_url(port)
        command = prefect_command(port, whole=False)
        self.child = spawn(self.settings, command, prefect_environment(self.settings, port), self.log)

    def ready(self, beside: Future[Any] | None = None) -> None:
        """Wait for the server and name it in the environment. Raises UserError that names the log where it does not come.

        Where `beside`, some work that has begun without the server, fails first, its exception is raised at once.
        """
        if self.child is not None:
            wait_for(f"{self.url}/health", self.child, self.log, beside)
            mark_made(self.settings)
        os.environ["PREFECT_API_URL"] = self.url

    def stop(self) -> None:
        if self.child is not None:
            end(self.settings, self.child)
            os.environ.pop("PREFECT_API_URL", None)


@contextmanager
def server(settings: Settings, log: Path) -> Iterator[Server]:
    """A server for the length of a block; it is ended whatever happens in it."""
    running = Server(settings, log)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def wait_for(url: str, child: subprocess.Popen[bytes], log: Path, beside: Future[Any] | None = None) -> None:
    """Wait until a URL answers. Raises UserError where the process ends first or takes too long."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 (an address of ours)
                return
        except (urllib.error.URLError, OSError):
            pass
        if beside is not None and beside.done():
            beside.result()
        if child.poll() is not None:
            break
        time.sleep(0.1)
    raise UserError(f"the local server at {url} did not start; its words are in {log}")


def free_port() -> int:
    """A port on this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether nothing listens on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def check_ports(ports: Mapping[str, int]) -> None:
    """Raises UserError that names the option where a server's port is taken, or given twice."""
    for name, port in ports.items():
        option = f"choose another for {name} with --{name.lower()}-port"
        if list(ports.values()).count(port) > 1:
            raise UserError(f"{' and '.join(ports)} cannot both have port {port}; {option}")
        if not is_free(port):
            raise UserError(f"port {port} is taken; {option}")


def family(pid: int, created: float) -> list[psutil.Process]:
    """What lives of a detached process's session, and of what it started outside it. The session outlives its leader."""
    found = []
    for process in psutil.process_iter(["pid", "create_time"]):
        with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            # a number that was given to another process since has another age
            if os.getsid(process.pid) == pid and process.create_time() >= created - 1 and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
                found += process.children(recursive=True)
    return list(dict.fromkeys(found))


def stop(pid: int, created: float) -> bool:
    """End a detached process and all that it started: kindly, then not. Whether anything had to be killed."""
    left = family(pid, created)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    until = time.monotonic() + STOP_SECONDS
    while left and time.monotonic() < until:
        time.sleep(0.1)
        left = [process for process in {*left, *family(pid, created)} if _runs(process)]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)
    return bool(left)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start(settings: Settings, command: Sequence[str], env: Mapping[str, str], log: Path, *, tied: bool) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(  # noqa: S603
            command, cwd=settings.root, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True, preexec_fn=_die_with_parent if tied else None,
        )  # fmt: skip


def _end_group(group: int) -> None:
    for sign, patience in ((signal.SIGTERM, 0.5), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(group, sign)
        except ProcessLookupError:
            return
        time.sleep(patience)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
