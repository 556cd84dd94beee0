"""The Prefect and MLflow pages of a project, and its deployments, for as long as somebody wants them."""

from __future__ import annotations

import os
import sys
import time

from flows import _server
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tasks.core.store import prepare


def serve_pages(settings: Settings, prefect_port: int, mlflow_port: int) -> None:
    """Serve both pages on 127.0.0.1 until Ctrl-C. Raises UserError where a port is taken."""
    prepare(settings)
    settings.logs.mkdir(parents=True, exist_ok=True)
    log = settings.logs / "ui.log"
    if prefect_port == mlflow_port:
        raise UserError(f"both pages cannot have port {prefect_port}; choose another with --prefect-port or --mlflow-port")
    _server.clear_half_made(settings)
    env = {**os.environ, **_server.environment(settings)}
    local = ["--host", "127.0.0.1", "--port"]
    commands = {
        "Prefect": (prefect_port, "/api/health", [sys.executable, "-m", "prefect", "server", "start", *local, str(prefect_port)]),
        "MLflow": (
            mlflow_port,
            "/health",
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", settings.tracking_uri, *local, str(mlflow_port)],
        ),
    }
    children = []
    try:
        for name, (port, _, command) in commands.items():
            if not _server.is_free(port):
                flag = name.lower()
                raise UserError(f"port {port} is taken; choose another for the {name} page with --{flag}-port")
            env["PREFECT_UI_API_URL"] = f"http://127.0.0.1:{prefect_port}/api"
            children.append(_server.spawn(settings, command, env, log))
        for (name, (port, health, _)), child in zip(commands.items(), children, strict=True):
            _server.wait_for(f"http://127.0.0.1:{port}{health}", child, log)
            if name == "Prefect":
                _server.mark_made(settings)
            sys.stdout.write(f"{name:8} http://127.0.0.1:{port}\n")
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
            url = f"http://127.0.0.1:{port}/api"
            env = {**os.environ, **_server.environment(settings), "PREFECT_UI_API_URL": url}
            # unlike the server of a single run it has its services: without them no schedule ever starts anything
            command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
            child = _server.spawn(settings, command, env, log)
            _server.wait_for(f"{url}/health", child, log)
            _server.mark_made(settings)
            os.environ["PREFECT_API_URL"] = url
            sys.stdout.write(f"Prefect  http://127.0.0.1:{port}\n")
            sys.stdout.flush()
        from flows.deployments import serve_all

        serve_all()
    except KeyboardInterrupt:
        pass
    finally:
        if child is not None:
            _server.end(settings, child)
