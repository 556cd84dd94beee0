"""Where a project keeps its things, and the one place that reads the environment.

A project is the folder with `dvc.yaml` and `params.yaml`. What Retort makes there besides data lies in `.retort/`.
"""

from __future__ import annotations

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
    def tracking_uri(self) -> str:
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.mlflow_db}"

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
