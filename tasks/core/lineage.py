"""What is this made of? Read from DVC's lock file and MLflow's runs alone, so that nothing of ours need be kept for it.

A node is a dictionary: `kind` (model, data, source), `name`, `id`, `made_by`, `inputs` (nodes).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from tasks.core import files
from tasks.core.erased import FOLDER as ERASED
from tasks.core.errors import UserError, without_secrets
from tasks.core.refs import DataRef, ModelRef
from tasks.core.settings import Settings
from tasks.core.store import Store

Node = dict[str, Any]


def made_from(settings: Settings, spec: str) -> Node:
    """The tree below `NAME@alias`, `NAME/version` or a data folder. Raises UserError where there is no such thing."""
    if spec and (settings.root / spec).is_dir():
        from tasks.core.refs import data_ref

        return _data_node(settings, data_ref(settings, spec))
    store = Store(settings)
    name, _, which = spec.partition("@") if "@" in spec else spec.partition("/")
    if not which:
        raise UserError(f"{spec!r} is neither a data folder nor NAME@alias nor NAME/version; models: {', '.join(store.names()) or 'none'}")
    ref = store.version_ref(name, which)
    return {**_model_node(settings, store, ref), "name": spec}


def print_tree(node: Node) -> None:
    """Draw the tree on standard output; what was shown once is only named again."""
    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    seen: set[str] = set()

    def grow(node: Node, parent: Tree | None) -> Tree:
        again = node["id"] in seen and node["inputs"]
        seen.add(node["id"])
        by = f"  [dim]by {node['made_by']}[/]" if node["made_by"] else ""
        label = f"{node['kind']} [bold]{escape(node['name'])}[/] [dim]{escape(node['id'][:14])}[/]{by}{' [dim](above)[/]' if again else ''}"
        branch = Tree(label, highlight=False) if parent is None else parent.add(label)
        if not again:
            for child in node["inputs"]:
                grow(child, branch)
        return branch

    Console().print(grow(node, None))


def _model_node(settings: Settings, store: Store, ref: ModelRef) -> Node:
    tags = store.client.get_run(ref.run_id).data.tags
    inputs: list[Node] = []
    for found in references(json.loads(tags["retort.inputs"])):
        if found["kind"] == "ModelRef":
            inputs.append(_model_node(settings, store, ModelRef(**{k: v for k, v in found.items() if k != "kind"})))
        elif found["kind"] == "DataRef":
            inputs.append(_data_node(settings, DataRef(**{k: v for k, v in found.items() if k != "kind"})))
    return {"kind": "model", "name": tags["retort.role"], "id": ref.model_id, "made_by": tags["retort.method"], "inputs": inputs}


def _data_node(settings: Settings, ref: DataRef) -> Node:
    view = [] if ref.kept else ["rejected rows"]
    view += [f"splits {', '.join(ref.splits)}"] * bool(ref.splits) + [f"only {ref.only}"] * bool(ref.only)
    view += [f"without {ref.without}"] * bool(ref.without)
    name = ref.path + (f" ({'; '.join(view)})" if view else "")
    node = _stage_node(settings, ref.path, ref.md5)
    return {**node, "name": name}


def _stage_node(settings: Settings, path: str, md5: str) -> Node:
    for lock in _locks(settings):
        for stage, found in lock.get("stages", {}).items():
            if not any(out["path"] == path and out["md5"] == md5 for out in found.get("outs", [])):
                continue
            # the suppression list says what must not come in: nothing is made from it
            deps = [dep for dep in found.get("deps", []) if dep["path"].startswith("data/") and dep["path"] != ERASED]
            inputs = [_stage_node(settings, dep["path"], dep["md5"]) for dep in deps]
            params = found.get("params", {}).get("params.yaml", {})
            if stage == "pool":
                source = without_secrets(str(params.get("pool", {}).get("source", "")))
                inputs.append({"kind": "source", "name": source, "id": source, "made_by": "", "inputs": []})
            made_by = found["cmd"].removeprefix("python -m tasks ").strip()
            return {"kind": "data", "name": path, "id": md5, "made_by": made_by, "inputs": inputs}
    return {"kind": "data", "name": path, "id": md5, "made_by": "not known: no dvc.lock has this version", "inputs": []}


def data_versions(settings: Settings) -> list[tuple[str, str, bool]]:
    """Every version of a data folder that DVC's lock files name, of any revision: path, md5, and whether it lies in the folder now."""
    found: dict[tuple[str, str], bool] = {}
    for lock in _locks(settings):
        for stage in lock.get("stages", {}).values():
            for out in stage.get("outs", []):
                if out["path"].startswith("data/") and str(out.get("md5", "")).endswith(".dir"):
                    found.setdefault((out["path"], out["md5"]), False)
    for path in {path for path, _ in found}:
        if (settings.root / path / "dataset.json").exists():
            found[(path, files.folder_md5(settings.root / path))] = True
    return [(path, md5, here) for (path, md5), here in found.items()]


def _locks(settings: Settings) -> Iterator[dict[str, Any]]:
    """The lock file as it is, then as it was in every revision, the newest first."""
    here = settings.root / "dvc.lock"
    if here.exists():
        yield _parse_lock(here.read_text(encoding="utf-8"))
    for text in _old_locks(settings):
        try:
            yield _parse_lock(text)
        except yaml.YAMLError:
            continue


def _old_locks(settings: Settings) -> Iterator[str]:
    """Each text that `dvc.lock` ever had in git, the newest first: of all branches, tags and experiments."""
    git = ["git", "-C", str(settings.root)]
    listed = subprocess.run([*git, "log", "--all", "--format=%H:./dvc.lock", "--", "dvc.lock"], capture_output=True, check=False)  # noqa: S603
    if listed.returncode or not listed.stdout:
        return
    # one process for all: a hundred revisions would take a second otherwise
    shown = subprocess.run([*git, "cat-file", "--batch"], input=listed.stdout, capture_output=True, check=False).stdout  # noqa: S603
    at, given = 0, set()
    while at < len(shown):
        head, at = shown[at : shown.index(b"\n", at)].split(), shown.index(b"\n", at) + 1
        if head[-1] == b"missing":
            continue
        size = int(head[2])
        if head[0] not in given:
            given.add(head[0])
            yield shown[at : at + size].decode("utf-8", "replace")
        at += size + 1


@cache
def _parse_lock(text: str) -> dict[str, Any]:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}  # noqa: S506 (a safe loader either way)


def references(value: Any) -> Iterator[dict[str, Any]]:
    """Every reference in plain values, in order, each once."""
    found: dict[str, dict[str, Any]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict) and "kind" in value:
            found[json.dumps(value, sort_keys=True)] = value
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(value)
    yield from found.values()
