"""Deployments: one list behind `retort serve` and prefect.yaml, forms that refuse what does not fit, and what is tried again."""

from __future__ import annotations

import ast
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.exceptions
import pytest
import sqlalchemy.exc
import yaml
from prefect.exceptions import ParameterTypeError

from flows import _runs, deployments
from flows.evaluate import evaluate, evaluate_new
from flows.promote import promote
from flows.train import train
from tasks.core import catalog
from tasks.core.errors import UserError

WITHIN = {"report", "evaluate_forgetting"}  # they take what other flows give


def test_prefect_yaml_is_what_the_list_says() -> None:
    assert yaml.safe_load(deployments.FILE.read_text(encoding="utf-8")) == deployments.as_yaml(), "run `python -m flows.deployments`"


def test_both_ways_give_the_same_deployments() -> None:
    served = {(d.flow_name, d.name): d for d in deployments.deployments()}
    written = {(one.entry.name, one.name): entry for one, entry in zip(deployments.ALL, deployments.as_yaml()["deployments"], strict=True)}
    assert served.keys() == written.keys()
    for key, deployment in served.items():
        entry = written[key]
        assert (entry["description"], entry["tags"]) == (deployment.description, deployment.tags)
        assert entry["concurrency_limit"]["limit"] == deployment.concurrency_limit == 1
        assert [(s["cron"], s["slug"]) for s in entry.get("schedules", [])] == [
            (s.schedule.cron, s.slug) for s in deployment.schedules or []
        ]
        assert [(t["name"], set(t["expect"]), t["parameters"]) for t in entry.get("triggers", [])] == [
            (t.name, t.expect, t.parameters) for t in deployment.triggers
        ]
        path, _, name = entry["entrypoint"].partition(":")
        assert (catalog.ROOT / path).is_file()
        assert name == deployment.entrypoint.rpartition(":")[2].rpartition(".")[2]


def test_every_flow_can_be_started_by_hand_or_by_an_event() -> None:
    found = set()
    for path in (catalog.ROOT / "flows").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).startswith("flow(") for d in node.decorator_list):
                found.add(node.name)
    assert found - WITHIN == {one.entry.fn.__name__ for one in deployments.ALL}


def test_every_parameter_has_a_title_and_a_type_on_prefects_form() -> None:
    for one in deployments.ALL:
        for name, found in one.entry.parameters.properties.items():
            assert found.get("title"), f"{one.title}: {name}"
            assert {"type", "anyOf", "enum", "$ref", "allOf"} & found.keys(), f"{one.title}: {name} has no type"


@pytest.mark.parametrize(
    ("flow", "parameters"),
    [
        (promote, {"name": "", "version": 1}),
        (promote, {"name": "a", "version": -1}),
        (promote, {"name": "a", "version": "newest"}),
        (train, {"data": [""]}),
        (evaluate, {"data": ""}),
        (evaluate_new, {"name": ""}),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused_before_anything_starts(flow: Any, parameters: dict[str, Any]) -> None:
    with pytest.raises(ParameterTypeError, match="Flow run received invalid parameters"):
        flow.validate_parameters(parameters)


def failed(error: BaseException) -> Any:
    return SimpleNamespace(result=lambda raise_on_failure: error)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionRefusedError("no server"), True),
        (TimeoutError(), True),
        (sqlalchemy.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked")), True),
        (mlflow.exceptions.MlflowException("API request failed with exception Max retries exceeded"), True),
        (UserError("class 'a' has no labelled row"), False),
        (ValueError("shape"), False),
        (MemoryError(), False),
    ],
)
def test_only_a_fault_that_can_pass_is_tried_again(error: BaseException, again: bool) -> None:
    assert _runs.can_pass(None, None, failed(error)) is again


def test_a_notice_is_kept_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: None) -> None:
    from flows import notice

    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notice, "KEEP", 2)
    for version in (1, 2, 3):
        notice.notice(event=_runs.REFUSED, about=f"digits-student version {version}", reason="accuracy")
    lines = (tmp_path / ".retort" / "notices.jsonl").read_text().splitlines()
    assert [line.split("version ")[1][0] for line in lines] == ["2", "3"]
