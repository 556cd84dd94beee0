"""A real PostgreSQL for the length of a block: a cluster of its own, on a free port, in a folder that is thrown away."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows._server import free_port

PASSWORD = "p@ss/wörd"  # what an address must quote
QUOTED = "p%40ss%2Fw%C3%B6rd"


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs, the newest; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def cluster() -> Iterator[str]:
    """Gives `postgresql://retort:...@127.0.0.1:port/retort` of a user who may create databases and nothing else."""
    programs = binaries()
    assert programs
    place = Path(tempfile.mkdtemp(prefix="retort-postgres-"))
    as_other: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        as_other = ["runuser", "-u", "postgres", "--"]
        shutil.chown(place, "postgres", "postgres")

    def run(*words: str, text: str | None = None) -> None:
        done = subprocess.run([*as_other, *words], cwd="/", input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    port, data = free_port(), place / "data"
    run(str(programs / "initdb"), "-D", str(data), "-U", "owner", "-A", "scram-sha-256", "--auth-local=trust", "-E", "UTF8", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {place} -c fsync=off"
    run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(place / "log"), "-o", options, "start")
    try:
        psql = [str(programs / "psql"), "-h", str(place), "-p", str(port), "-U", "owner", "-d", "postgres", "-q", "-v", "ON_ERROR_STOP=1"]
        run(*psql, text=f"create role retort login createdb password '{PASSWORD}';")
        yield f"postgresql://retort:{QUOTED}@127.0.0.1:{port}/retort"
    finally:
        run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-m", "immediate", "stop")
        shutil.rmtree(place, ignore_errors=True)
