"""`retort up --database` on a real PostgreSQL: a model is trained, measured and promoted, and all of it lies there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import _up
from tasks.core.errors import UserError
from tasks.core.saga import Journal
from tests import workspace
from tests.servers import postgres
from tests.servers.conftest import ports

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(postgres.binaries() is None, reason="needs PostgreSQL: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with postgres.cluster() as found:
        yield found


def rows(address: str, query: str) -> Any:
    import psycopg2

    with psycopg2.connect(address) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def test_databases_are_made_once_and_mistakes_say_what_to_do(address: str) -> None:
    _up.make_databases(f"{address}_made")
    _up.make_databases(f"{address}_made")
    names = {name for (name,) in rows(f"{address.rpartition('/')[0]}/postgres", "select datname from pg_database")}
    assert {"retort_made_prefect", "retort_made_mlflow"} <= names
    with pytest.raises(UserError, match="does not let us in") as caught:
        _up.make_databases(address.replace(postgres.QUOTED, "wrong-password"))
    assert "wrong-password" not in str(caught.value)


def test_a_model_is_trained_and_promoted_on_postgresql(address: str, project: Path) -> None:
    def retort(*words: str) -> str:
        ran = workspace.retort(project, *words)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    said = retort("up", "--database", address, *ports())
    note = project / ".retort" / "servers.json"
    assert note.stat().st_mode & 0o777 == 0o600
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    said += retort("train", "--data", "data/filtered") + retort("evaluate") + retort("promote", "digits-teacher")
    assert "version 1 is champion" in said.replace("\n", " ")
    said += retort("status", "--json") + retort("history", "digits-teacher")

    mlflow, prefect = f"{address}_mlflow", f"{address}_prefect"
    assert rows(mlflow, "select name, version from model_versions") == [("digits-teacher", 1)]
    assert ("champion", 1) in rows(mlflow, "select alias, version from registered_model_aliases")
    done = {
        name for (name,) in rows(prefect, "select f.name from flow_run r join flow f on f.id = r.flow_id where r.state_type = 'COMPLETED'")
    }
    assert {"train", "evaluate", "promote"} <= done
    assert rows(prefect, "select count(*) from flow_run where state_type = 'SCHEDULED'")[0][0] > 0
    assert not (project / ".retort" / "prefect" / "prefect.db").exists()
    assert [entry["kind"] for entry in Journal(project / ".retort" / "journal.jsonl").entries()][-1] == "promoted"

    code = (
        "from tasks.core.settings import project; from tasks.core.store import Store; store = Store(project());"
        "print(store.embedded, store.aliases('digits-teacher'))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=workspace.environment(), capture_output=True, text=True, check=True
    ).stdout
    assert shown.split(maxsplit=1)[0] == "True"
    assert "'champion': 1" in shown

    said += retort("down")
    assert not note.exists()
    kept = [path for path in (project / ".retort").rglob("*") if path.is_file()]
    for password in (postgres.PASSWORD, postgres.QUOTED):
        assert password not in said
        assert password not in listed
        assert not [path for path in kept if password.encode() in path.read_bytes()]
