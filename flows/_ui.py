"""The Prefect and MLflow pages of a project, and its deployments, for as long as a terminal is open. `flows._up` is what outlives it."""

from __future__ import annotations

import os
import sys
import time

from flows import _server
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tasks.core.store import prepare


def serve_pages(settings: Settings, prefect_port: int, mlflow_port: int) -> None:
    """Serve both pages on 127.0.0.1 until Ctrl-C. Raises UserError where a port is taken, or `retort up` has the pages."""
    if settings.server_url("prefect") or settings.server_url("mlflow"):
        raise UserError("'retort up' has started servers with both pages; 'retort status' says where they are")
    prepare(settings)
    settings.logs.mkdir(parents=True, exist_ok=True)
    log = settings.logs / "ui.log"
    _server.check_ports({"Prefect": prefect_port, "MLflow": mlflow_port})
    commands = {
        "Prefect": (prefect_port, _server.prefect_command(prefect_port), _server.prefect_environment(settings, prefect_port)),
        "MLflow": (mlflow_port, _server.mlflow_command(settings, mlflow_port), _server.mlflow_environment(settings.tracking_uri)),
    }
    _server.clear_half_made(settings)
    children = []
    try:
        for _, command, env in commands.values():
            children.append(_server.spawn(settings, command, env, log))
        for (name, (port, _, _)), child in zip(commands.items(), children, strict=True):
            _server.wait_for(f"http://{_server.HOST}:{port}{_server.HEALTH[name.lower()]}", child, log)
            if name == "Prefect":
                _server.mark_made(settings)
            sys.stdout.write(f"{name:8} http://{_server.HOST}:{port}\n")
        sys.stdout.write("Ctrl-C ends both.\n")
        sys.stdout.flush()
        while all(child.poll() is None for child in children):
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        for child in children:
            _server.end(settings, child)


def serve_deployments(settings: Settings, port: int) -> None:
    """Serve every deployment until Ctrl-C, from a Prefect server of our own where `PREFECT_API_URL` names none.

    Raises UserError where the port is taken.
    """
    settings.logs.mkdir(parents=True, exist_ok=True)
    log, child = settings.logs / "serve.log", None
    try:
        if not os.environ.get("PREFECT_API_URL"):
            if not _server.is_free(port):
                raise UserError(f"port {port} is taken; choose another with --port, or name the server in PREFECT_API_URL")
            _server.clear_half_made(settings)
            # unlike the server of a single run it has its services: without them no schedule ever starts anything
            child = _server.spawn(settings, _server.prefect_command(port), _server.prefect_environment(settings, port), log)
            _server.wait_for(f"{_server.prefect_url(port)}/health", child, log)
            _server.mark_made(settings)
            os.environ["PREFECT_API_URL"] = _server.prefect_url(port)
            sys.stdout.write(f"Prefect  http://{_server.HOST}:{port}\n")
            sys.stdout.flush()
        from flows.deployments import serve_all

        serve_all()
    except KeyboardInterrupt:
        pass
    finally:
        if child is not None:
            _server.end(settings, child)
