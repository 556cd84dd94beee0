"""Where a project keeps its things, and the one place that reads the environment.

A project is the folder with `dvc.yaml` and `params.yaml`. What Retort makes there besides data lies in `.retort/`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Paths and addresses of one project."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / ".retort"

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def reports(self) -> Path:
        return self.home / "reports"

    @property
    def metrics(self) -> Path:
        return self.root / "data" / "metrics"

    @property
    def mlflow_db(self) -> Path:
        return self.home / "mlflow.db"

    @property
    def servers(self) -> Path:
        """What `retort up` has started: addresses, processes, and the database that they stand on."""
        return self.home / "servers.json"

    @property
    def tracking_uri(self) -> str:
        """The address of MLflow: the environment's, else of the server that `retort up` started, else of the embedded file.

        Raises UserError where that server is gone and the embedded file is not what it served.
        """
        if own := os.environ.get("MLFLOW_TRACKING_URI"):
            return own
        if url := self.server_url("mlflow"):
            return url
        if read_servers(self)["database"]:
            raise UserError(
                "the MLflow server of this project is down; 'retort up' starts it, 'retort down' goes back to .retort/mlflow.db"
            )
        return f"sqlite:///{self.mlflow_db}"

    @property
    def owns_store(self) -> bool:
        """Whether the registry is this project's alone: its file, or the server that `retort up` started."""
        uri = self.tracking_uri
        return uri.startswith("sqlite") or uri == read_servers(self)["servers"].get("mlflow", {}).get("url")

    @property
    def artifact_root(self) -> str | None:
        """Where a new experiment keeps its files; None where its server decides."""
        if not self.owns_store or (read_servers(self)["artifacts"] and not self.tracking_uri.startswith("sqlite")):
            return None
        return self.artifacts.as_uri()

    def server_url(self, name: str) -> str | None:
        """The address of a server that `retort up` started, while its process lives."""
        known = read_servers(self)["servers"].get(name)
        return known["url"] if known and alive(known) else None

    @property
    def signing_key(self) -> tuple[Path, bool]:
        """The private key that certificates are signed with, and whether the user named it, in `RETORT_SIGNING_KEY`."""
        named = os.environ.get("RETORT_SIGNING_KEY")
        return (Path(named), True) if named else (self.home / "signing.key", False)

    @property
    def artifacts(self) -> Path:
        return self.home / "artifacts"

    @property
    def prefect_home(self) -> Path:
        return self.home / "prefect"  # never a home of the user's own: a half-made database in here is thrown away


# Networks this small gain nothing from a second thread, and lose ten times over where another process wants the core. It also makes
# figures the same on machines with other numbers of cores. Read when torch is imported; a user's own value stands.
THREADS = {"OMP_NUM_THREADS": "1"}


def project(start: Path | None = None) -> Settings:
    """The project around `start` (default: the working folder). Raises UserError where there is none."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return Settings(folder)
    raise UserError(f"{here} is not inside a Retort project: no folder above it has dvc.yaml and params.yaml; change into one")


def read_servers(settings: Settings) -> dict[str, Any]:
    """The note of `retort up`: `database`, `artifacts` and, by name, `servers`; all empty where there is none.

    Raises UserError where it cannot be read.
    """
    nothing: dict[str, Any] = {"database": "", "artifacts": "", "servers": {}}
    try:
        return {**nothing, **json.loads(settings.servers.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError):
        raise UserError(f"{settings.servers} cannot be read; end the servers that it should name, and delete it") from None


def alive(known: dict[str, Any]) -> bool:
    """Whether the process of a note still runs: its number, and its birth, since numbers are given again."""
    import psutil

    try:
        process = psutil.Process(known["pid"])
        return abs(process.create_time() - born(known)) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def born(known: dict[str, Any]) -> float:
    """When the process of a note began, by the clock as it goes now: the system counts from its start, which moves with the clock."""
    import psutil

    return float(known["created"] - known["boot"] + psutil.boot_time())


def shared_data() -> Path:
    """The folder of larger data sets for tests, claims and examples: `RETORT_DATA`, default `../shared/data` beside the code."""
    return Path(os.environ.get("RETORT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def read_params(settings: Settings) -> dict[str, Any]:
    """`params.yaml` as a dictionary. Raises UserError where it is no mapping or no YAML."""
    import yaml

    try:
        params = yaml.safe_load(settings.params.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{settings.params} is not valid YAML in UTF-8: {str(error).splitlines()[0]}") from None
    if not isinstance(params, dict):
        raise UserError(f"{settings.params} must be a mapping of sections such as 'pool:' and 'filter:'")
    return params
