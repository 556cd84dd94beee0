"""A project of its own for tests: a copy of this one in another folder, every method at its smallest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tasks.core import catalog

TREE = (
    *("tasks", "flows", "tests/claims", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"),
    *("data/.gitignore", "data/erased"),
)


def smoke_params() -> dict[str, Any]:
    """params.yaml with the `SMOKE` setting of every method that it names."""
    params: dict[str, Any] = yaml.safe_load((catalog.ROOT / "params.yaml").read_text(encoding="utf-8"))
    for family in ("filter", "condense", "generate", "distill", "unlearn"):
        smoke = catalog.get(f"{family}.{params[family]['method']}").smoke.model_dump(mode="json")
        params[family] = {
            **smoke,
            **{k: v for k, v in params[family].items() if k in ("method", "n", "shots", "base_rows", "demonstration_rows")},
        }
    params["filter"]["keep"] = 0.6
    params["condense"]["n"] = 10
    params["generate"].update(n=2, shots=2, base_rows=100)
    params["train"]["widths"] = [8, 16]
    params["recipe"] = {"steps": 60, "lr": 0.05}
    params["references"]["finetune"] = catalog.get("unlearn.finetune").smoke.model_dump(mode="json")
    params["find"] = catalog.get("registry.know2vec").smoke.model_dump(mode="json")
    params["erase"]["rules"] = {"accuracy": {"min_delta": -0.2}}
    params["registry"]["rules"] = {"accuracy": {"min": 0.05, "min_delta": -0.02}, "ece": {"max": 1.0}}
    return params


def make(folder: Path, params: dict[str, Any]) -> Path:
    """Make the project in `folder`, under git as every project is."""
    folder.mkdir(parents=True)
    for name in TREE:
        source, target = catalog.ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    write_params(folder, params)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def write_params(folder: Path, params: dict[str, Any]) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def change(folder: Path, section: str, **keys: object) -> None:
    """Set keys of a section of the project's params.yaml."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params.setdefault(section, {}).update(keys)
    write_params(folder, params)


def environment() -> dict[str, str]:
    """The environment of a fresh shell: nothing that this process set for its own project."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_", "DVC_", "RETORT_PROGRESS"))}
    return {**kept, "PATH": str(Path(sys.executable).parent) + os.pathsep + kept.get("PATH", "")}


def retort(folder: Path, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the `retort` command of the copy, as a user in that folder would."""
    command = [sys.executable, "-m", "flows.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
