"""The rules of the house, read off the source: who imports whom, what DVC is told, what the project says of itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from tasks.core import catalog

ROOT = catalog.ROOT
FILES = sorted([*ROOT.glob("tasks/**/*.py"), *ROOT.glob("flows/**/*.py")])


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things come from"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts
    for name in imports(path):
        parts = name.split(".")
        if parts[0] not in ("tasks", "flows") or len(parts) < 2:
            continue
        if room[0] == "tasks":
            assert parts[0] != "flows", f"{path} imports the flow {name}"
            if room[1] == "core":
                assert parts[1] == "core", f"{path}: core imports {name}"
            elif room[1] not in ("__main__.py", "__init__.py"):
                assert parts[1] in ("core", room[1]), f"{path}: family {room[1]} imports {name}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("flows/*.py")), ids=lambda p: p.name)
def test_flows_do_no_maths(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(path)} & {"torch", "sklearn", "diffusers", "peft", "transformers"}


def stages() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def methods_of(stage: str) -> list[str]:
    if stage == "pool":
        return ["tasks.pool.read"]
    return [card.module for card in catalog.cards().values() if card.family == stage]


@pytest.mark.parametrize("stage", sorted(stages()))
def test_each_stage_lists_every_module_it_runs_on(stage: str) -> None:
    every: set[str] = set()
    for module in methods_of(stage):
        deps = {dep.replace(f"${{{stage}.method}}", module.rpartition(".")[2]) for dep in stages()[stage]["deps"]}
        needed = {str(p.relative_to(ROOT)) for p in catalog.closure("tasks.__main__", f"tasks.{stage}", module)}
        covered = {name for name in needed if name in deps or any(name.startswith(dep + "/") for dep in deps)}
        assert needed == covered, f"{stage} runs on {sorted(needed - covered)}, which dvc.yaml does not list"
        every |= needed
    listed = {dep for dep in stages()[stage]["deps"] if dep.startswith("tasks/") and dep.endswith(".py") and "$" not in dep}
    assert listed <= every, f"{stage} lists {sorted(listed - every)}, which no method of it runs on"


@pytest.mark.parametrize("stage", sorted(stages()))
def test_each_stage_lists_its_own_section_and_keeps_its_last_good_output(stage: str) -> None:
    found = stages()[stage]
    assert found["params"] == ["seed", stage]
    assert all(next(iter(out.values()))["persist"] for out in found["outs"])


def test_params_yaml_has_only_keys_that_somebody_knows() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    own = {
        "condense": {"n"},
        "generate": {"n", "shots", "base_rows", "copies"},
        "train": {"pretrain"},
        "unlearn": {"demonstration_rows"},
        "registry": {"mode"},
    }
    for family in ("filter", "condense", "generate", "train", "distill", "unlearn", "evaluate", "registry"):
        section = dict(params[family])
        name = f"{family}.{section.pop('method')}"
        recipe = params["recipe"] if family == "train" else {}
        catalog.configure(name, {**recipe, **{k: v for k, v in section.items() if k not in own.get(family, set())}})
    catalog.configure("unlearn.retrain", params["recipe"])
    catalog.configure("unlearn.finetune", params["references"]["finetune"])
    from tasks.pool import read

    read.configure(params["pool"])


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    for path in [*FILES, ROOT / "README.md", ROOT / "params.yaml", ROOT / "dvc.yaml", ROOT / "constraints.txt"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(root|home|Users)/", text), path
        assert str(ROOT) not in text, path
