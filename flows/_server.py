"""A Prefect server for the length of one run, where no `PREFECT_API_URL` names another; and the processes that a run must not leave."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tasks.core import files
from tasks.core.errors import UserError
from tasks.core.settings import Settings

START_SECONDS = 120
LIVE: dict[int, subprocess.Popen[bytes]] = {}
_LIBC = ctypes.CDLL(None)  # loaded before any fork


def environment(settings: Settings) -> dict[str, str]:
    """What Prefect must find in the environment before it is imported."""
    return {
        "PREFECT_HOME": str(settings.prefect_home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
    }


def spawn(settings: Settings, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a child in a group of its own, note the group, and have the kernel end it with us where it can."""
    with log.open("ab") as out:
        child = subprocess.Popen(  # noqa: S603
            command, cwd=settings.root, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
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
        self.url = os.environ.get("PREFECT_API_URL", "")

    def start(self) -> None:
        if self.url:
            return
        clear_half_made(self.settings)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        command = [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--no-services",
            "--no-ui",
        ]
        self.child = spawn(self.settings, command, {**os.environ, **environment(self.settings)}, self.log)

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
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether nothing listens on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


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
