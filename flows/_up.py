"""The servers of a project, until `retort down`: Prefect, MLflow, and the worker that runs what is scheduled.

They are written down in `.retort/servers.json`, which `Settings` reads: while they live, every command of the project uses them. The file
may hold a database's password, so only its owner can read it; no password is printed, logged or put on a command line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import psutil

from flows import _server
from tasks.core import files
from tasks.core.errors import UserError, without_secrets
from tasks.core.saga import Journal, project_lock
from tasks.core.settings import Settings, alive, born, read_servers
from tasks.core.store import EXPERIMENT, prepare

NAMES = ("prefect", "mlflow", "worker")
SHOWN = {"prefect": "Prefect", "mlflow": "MLflow", "worker": "worker"}
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
POLL_SECONDS = 60  # a worker asks for work every ten seconds; one that has been silent for so long hangs


@dataclass(frozen=True)
class Wish:
    """What is asked of the servers. None: as it was, or the default."""

    database: str | None = None
    artifacts: str | None = None
    prefect_port: int | None = None
    mlflow_port: int | None = None


@dataclass(frozen=True)
class Status:
    """How one server is."""

    name: str
    state: str  # up, down or unhealthy
    pid: int | None
    url: str
    since: str
    log: str


def up(settings: Settings, wish: Wish, say: Callable[[str], None]) -> None:
    """Start what is not running, and wait until all of it answers.

    Raises UserError where an option contradicts what runs, a port is taken, the database cannot be used, or a server does not come up: then
    those that were started with it are stopped.
    """
    with _turn(settings):
        note = read_servers(settings)
        wish = _settle(note, wish)
        _refuse_others(wish)
        lives = {name for name in NAMES if name in note["servers"] and alive(note["servers"][name])}
        if len(lives) == len(NAMES):
            say("already up")
        else:
            _start_missing(settings, wish, note, lives)
        for line in _lines(settings):
            say(line)
        for line in _reservations(settings):
            say(line)
        sick = [one for one in status(settings) if one.state != "up"]
    if sick:
        raise UserError(
            f"{SHOWN[sick[0].name]} runs but does not answer: read {sick[0].log}; 'retort down', then 'retort up' starts it anew"
        )


def down(settings: Settings, say: Callable[[str], None]) -> None:
    """End all servers, the worker first, and forget them."""
    with _turn(settings):
        note = read_servers(settings)
        if not settings.servers.exists():
            say("nothing to stop: no servers of this project are up")
            return
        for name in reversed(NAMES):
            if known := note["servers"].get(name):
                lived = alive(known)
                killed = _server.stop(known["pid"], born(known))
                say(f"{SHOWN[name]:8}{'had to be killed' if killed else 'stopped' if lived else 'was down'}")
        settings.servers.unlink()
        if note["database"]:
            say("commands of this project use .retort/mlflow.db and its Prefect file again, which have none of what is in PostgreSQL")


def status(settings: Settings) -> list[Status]:
    """How each server is."""
    note = read_servers(settings)
    return [_one(note, name) for name in NAMES]


def databases(database: str) -> tuple[str, str]:
    """Prefect's and MLflow's SQLAlchemy addresses: each has a table `alembic_version`, so each needs a database of its own.

    Raises UserError where it is not `postgresql://user:password@host:port/name`.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(database)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in ("postgresql", "postgres") or not url.database:
        raise UserError("--database takes postgresql://user:password@host:port/name")
    query = dict(url.query)
    asked = {**query, "ssl": query["sslmode"]} if "sslmode" in query else query  # the two drivers have two words for it
    prefect = url.set(
        drivername="postgresql+asyncpg", database=f"{url.database}_prefect", query={k: v for k, v in asked.items() if k != "sslmode"}
    )
    mlflow = url.set(drivername="postgresql+psycopg2", database=f"{url.database}_mlflow")
    return prefect.render_as_string(hide_password=False), mlflow.render_as_string(hide_password=False)


def make_databases(database: str) -> None:
    """Create both databases where they are missing. Raises UserError where PostgreSQL cannot be reached or does not allow it."""
    from sqlalchemy.engine import make_url

    try:
        import asyncpg  # noqa: F401
        import psycopg2
        from psycopg2 import errors, sql
    except ImportError:
        raise UserError("PostgreSQL needs its drivers: pip install 'retort[postgres]'") from None
    wanted = [str(make_url(one).database) for one in databases(database)]
    base = make_url(database).set(drivername="postgresql")

    def connect(name: str) -> Any:
        return psycopg2.connect(base.set(database=name).render_as_string(hide_password=False), connect_timeout=10)

    missing, connection, reason = [], None, ""
    for name in wanted:
        try:
            connect(name).close()
        except psycopg2.OperationalError:
            missing.append(name)
    if not missing:
        return
    for name in (str(base.database), "postgres"):
        try:
            connection = connect(name)
            break
        except psycopg2.OperationalError as error:
            reason = reason or str(error).strip().splitlines()[-1]
    if connection is None:
        raise UserError(f"PostgreSQL does not let us in ({without_secrets(reason)}); check the address given as --database")
    connection.autocommit = True
    with connection.cursor() as cursor:
        for name in missing:
            try:
                cursor.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
            except errors.DuplicateDatabase:
                raise UserError(f"{base.username or 'the user'} may not open the database {name}; grant it, or give another name") from None
            except errors.InsufficientPrivilege:
                raise UserError(
                    f"{base.username or 'the user'} may not create databases; have {' and '.join(wanted)} made for it"
                ) from None
    connection.close()


def _start_missing(settings: Settings, wish: Wish, note: dict[str, Any], lives: set[str]) -> None:
    ports = {"prefect": wish.prefect_port or PREFECT_PORT, "mlflow": wish.mlflow_port or MLFLOW_PORT}
    for name, known in note["servers"].items():
        if name not in lives:
            _server.stop(known["pid"], born(known))  # what it started may outlive it, and hold its port
    _server.check_ports({SHOWN[name]: ports[name] for name in ports if name not in lives})
    if ports["prefect"] == ports["mlflow"]:
        raise UserError(f"Prefect and MLflow cannot both have port {ports['mlflow']}; choose another with --mlflow-port")
    database, artifacts = wish.database or "", wish.artifacts or ""
    if artifacts:
        _check_artifacts(artifacts)
    prefect_database, mlflow_database = databases(database) if database else ("", f"sqlite:///{settings.mlflow_db}")
    if database:
        make_databases(database)
    settings.logs.mkdir(parents=True, exist_ok=True)
    note = {"database": database, "artifacts": artifacts, "servers": {name: note["servers"][name] for name in lives}}
    urls = {"prefect": _server.prefect_url(ports["prefect"]), "mlflow": f"http://{_server.HOST}:{ports['mlflow']}", "worker": ""}
    env = {key: value for key, value in os.environ.items() if key != "RETORT_DATABASE"}
    worker = {**env, "PREFECT_API_URL": urls["prefect"], "MLFLOW_TRACKING_URI": urls["mlflow"]}
    begun: dict[str, subprocess.Popen[bytes]] = {}

    def begin(name: str, command: list[str], environment: dict[str, str]) -> None:
        log = settings.logs / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".old.log"))
        child = begun[name] = _server.detach(settings, command, {k: v for k, v in environment.items() if k != "RETORT_DATABASE"}, log)
        birth = {"pid": child.pid, "created": psutil.Process(child.pid).create_time(), "boot": psutil.boot_time()}
        note["servers"][name] = {**birth, "started": time.time(), "url": urls[name], "log": str(log)}
        _write(settings, note)  # at once: whatever becomes of us, `retort down` knows what to end

    try:
        with _first_start(settings) if not database else nullcontext():
            if "prefect" not in lives:
                port = ports["prefect"]
                begin("prefect", _server.prefect_command(port), _server.prefect_environment(settings, port, prefect_database))
            if "mlflow" not in lives:
                if not database:
                    prepare(settings)
                begin("mlflow", _server.mlflow_command(settings, ports["mlflow"], artifacts), _server.mlflow_environment(mlflow_database))
            if "prefect" in begun:
                _wait(settings, "prefect", begun["prefect"], f"{urls['prefect'].removesuffix('/api')}{_server.HEALTH['prefect']}")
                if not database:
                    _server.mark_made(settings)
        if "worker" not in lives:
            begin("worker", [sys.executable, "-m", "flows.cli", "serve"], worker)
        if "mlflow" in begun:
            _wait(settings, "mlflow", begun["mlflow"], urls["mlflow"] + _server.HEALTH["mlflow"])
        if "worker" in begun:
            _wait_for_worker(settings, note["servers"]["worker"], urls["prefect"], begun["worker"])
    except BaseException:  # an interrupt too
        for name in reversed(list(begun)):
            known = note["servers"].pop(name)
            _server.stop(known["pid"], born(known))
        if note["servers"]:
            _write(settings, note)
        else:
            settings.servers.unlink(missing_ok=True)
        raise


def _settle(note: dict[str, Any], wish: Wish) -> Wish:
    """The wish, and for what it leaves open the note. Raises UserError where it contradicts what is running."""
    servers = note["servers"]
    if not servers:
        return wish
    ports = {
        f"{name}_port": int(servers[name]["url"].removesuffix("/api").rpartition(":")[2])
        for name in ("prefect", "mlflow")
        if name in servers
    }
    was = Wish(database=note["database"], artifacts=note["artifacts"], **ports)
    asked = {key: value for key, value in asdict(wish).items() if value is not None}
    changed = [key for key, value in asked.items() if getattr(was, key) is not None and value != getattr(was, key)]
    if changed and any(alive(known) for known in servers.values()):
        raise UserError(f"the servers are up with another --{changed[0].replace('_', '-')}; 'retort down' first")
    return replace(was, **asked)


def _refuse_others(wish: Wish) -> None:
    """Raises UserError where the environment names other servers: every command would use those, and never the ones started here."""
    for variable, url in (
        ("PREFECT_API_URL", _server.prefect_url(wish.prefect_port or PREFECT_PORT)),
        ("MLFLOW_TRACKING_URI", f"http://{_server.HOST}:{wish.mlflow_port or MLFLOW_PORT}"),
    ):
        if os.environ.get(variable, url).rstrip("/") != url:
            raise UserError(f"{variable} names another server, which every command would use in place of this one; unset it first")


def _check_artifacts(artifacts: str) -> None:
    if not artifacts.startswith("s3://") or not artifacts.removeprefix("s3://").strip("/"):
        raise UserError("--artifacts takes s3://bucket/prefix; without it, files are kept in .retort/artifacts")
    try:
        import boto3  # noqa: F401
    except ImportError:
        raise UserError("S3 needs its client: pip install 'retort[s3]'") from None


def _wait(settings: Settings, name: str, child: subprocess.Popen[bytes], url: str) -> None:
    try:
        _server.wait_for(url, child, settings.logs / f"{name}.log")
    except UserError:
        raise UserError(
            f"{SHOWN[name]} did not come up, so nothing was left running; its words are in {settings.logs / f'{name}.log'}"
        ) from None


def _wait_for_worker(settings: Settings, known: dict[str, Any], prefect: str, child: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _server.START_SECONDS
    while time.monotonic() < until and child.poll() is None:
        if _polled(prefect) >= known["started"]:
            return
        time.sleep(0.2)
    log = settings.logs / "worker.log"
    raise UserError(f"the worker did not come up, so nothing was left running; its words are in {log}")


def _polled(prefect: str) -> float:
    """When a worker last asked this Prefect server for work, as seconds since 1970; 0 for never."""
    ask = urllib.request.Request(f"{prefect}/deployments/filter", data=b"{}", headers={"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(ask, timeout=5) as answer:  # noqa: S310 (an address of ours)
            found = [one["last_polled"] for one in json.load(answer) if one["last_polled"]]
    except (urllib.error.URLError, OSError, ValueError):
        return 0.0
    return max((datetime.fromisoformat(moment).timestamp() for moment in found), default=0.0)


def _healthy(note: dict[str, Any], name: str) -> bool:
    if name == "worker":
        return _polled(note["servers"]["prefect"]["url"]) > time.time() - POLL_SECONDS if "prefect" in note["servers"] else False
    try:
        with urllib.request.urlopen(note["servers"][name]["url"].removesuffix("/api") + _server.HEALTH[name], timeout=5):  # noqa: S310
            return True
    except (urllib.error.URLError, OSError):
        return False


def _one(note: dict[str, Any], name: str) -> Status:
    known = note["servers"].get(name)
    if known is None:
        return Status(name, "down", None, "", "", "")
    shown = known["url"].removesuffix("/api")
    if not alive(known):
        return Status(name, "down", None, shown, "", known["log"])
    since = datetime.fromtimestamp(known["started"], UTC).isoformat(timespec="seconds")
    return Status(name, "up" if _healthy(note, name) else "unhealthy", known["pid"], shown, since, known["log"])


def _lines(settings: Settings) -> Iterator[str]:
    servers = read_servers(settings)["servers"]
    for name in NAMES:
        where = servers[name]["url"].removesuffix("/api") or f"process {servers[name]['pid']}"
        yield f"{SHOWN[name]:8}{where:24}{servers[name]['log']}"


def _reservations(settings: Settings) -> Iterator[str]:
    """What a user would otherwise learn late: what does not move along to another database or bucket."""
    note = read_servers(settings)
    base = note["servers"]["mlflow"]["url"] + "/api/2.0/mlflow"
    if note["artifacts"]:
        found = _get(f"{base}/experiments/get-by-name?experiment_name={EXPERIMENT}")
        place = found.get("experiment", {}).get("artifact_location", "")
        if place and not place.startswith(note["artifacts"].rstrip("/")):
            yield f"note: experiment {EXPERIMENT!r} keeps its files where it began, {without_secrets(place)}; none of them go to the bucket"
    champions = {entry["name"] for entry in Journal(settings.home / "journal.jsonl").entries() if entry.get("kind") == "promoted"}
    missing = sorted(name for name in champions if not _get(f"{base}/registered-models/get?name={name}"))
    if missing:
        yield (
            f"note: this registry has no {', '.join(missing)}, of which the journal knows champions: models do not move along to another "
            "database; for a fresh start move .retort/journal.jsonl aside"
        )


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 (an address of ours)
            found: dict[str, Any] = json.load(answer)
            return found
    except (urllib.error.URLError, OSError, ValueError):
        return {}


def _write(settings: Settings, note: dict[str, Any]) -> None:
    before = os.umask(0o077)  # it may hold a password
    try:
        files.write_text(settings.servers, json.dumps(note, indent=1))
    finally:
        os.umask(before)


@contextmanager
def _first_start(settings: Settings) -> Iterator[None]:
    """Hold the project while Prefect's file is made: a run that starts at the same moment would take it for a half-made one."""
    if (settings.prefect_home / "initialised").exists():
        yield
        return
    with project_lock(settings):
        _server.clear_half_made(settings)
        yield


@contextmanager
def _turn(settings: Settings) -> Iterator[None]:
    """One `up` or `down` at a time; a second waits."""
    with files.exclusive(settings.home / "servers.lock"):
        yield
