"""The main job as a user meets it: through the command line, in a project of its own, every method at its smallest."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows._session import Session, use
from flows.evaluate import evaluate
from flows.promote import promote
from flows.train import train
from tasks.__main__ import run_stage
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tests import workspace
from tests.flows.asking import several
from tests.workspace import change

pytestmark = pytest.mark.timeout(400)
STEPS = ("pool", "filter", "condense", "generate", "train", "distill", "unlearn", "evaluate", "promote", "report")


def test_the_table_names_every_stage_and_nothing_else_is_on_the_screen(finished: Path) -> None:
    shown = (finished / "first-run.txt").read_text()
    for step in STEPS:
        assert step in shown
    assert "digits-student: versions 1 (champion)" in shown
    assert "digits-teacher: versions 1, 2 (champion)" in shown
    assert "pages:  retort ui" in shown
    assert shown.rstrip().splitlines()[-1].startswith("log: ")
    for noise in ("Traceback", "Warning", "warning", "INFO", "DEBUG", "Prefect"):
        assert noise not in shown


def test_nothing_changed_is_said_and_costs_no_server(finished: Path) -> None:
    ran = workspace.retort(finished, "run")
    assert ran.returncode == 0, ran.stdout
    assert "Everything was up to date" in ran.stdout
    assert " run " not in ran.stdout
    assert not list((finished / ".retort" / "children").glob("*"))


def test_the_report_is_one_file_that_needs_no_network(finished: Path) -> None:
    (said,) = [line for line in (finished / "first-run.txt").read_text().splitlines() if line.startswith("report: ")]
    page = finished / ".retort" / "reports" / Path(said).name
    text = page.read_text()
    assert 10_000 < len(text) < 5_000_000
    for outside in ('src="http', 'href="http', "@import", "url(http"):
        assert outside not in text


def test_data_and_figures_are_where_dvc_finds_them(finished: Path) -> None:
    for stage in ("pool", "filter", "condense", "generate"):
        assert json.loads((finished / "data" / "metrics" / f"{stage}.json").read_text())
    lock = yaml.safe_load((finished / "dvc.lock").read_text())
    from tasks.core.files import folder_md5

    outs = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    for name in ("pool", "filtered", "condensed", "generated"):
        assert outs[f"data/{name}"] == folder_md5(finished / "data" / name)
    assert any((finished / ".retort" / "remote").rglob("*")), "nothing was pushed to the remote"


def test_a_version_is_served_where_retort_is_not_installed(finished: Path, tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text(
        "import importlib.util, sys\n"
        "sys.path = [p for p in sys.path if p and 'editable' not in p]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "assert importlib.util.find_spec('tasks') is None, 'tasks can be imported'\n"
        "import mlflow, numpy as np\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/digits-student@champion')\n"
        "out = model.predict(np.zeros((3, 1, 8, 8), dtype=np.uint8))\n"
        "assert out.shape == (3, 10) and np.allclose(out.sum(1), 1), out\n"
        "assert 'tasks' not in sys.modules\n"
    )
    env = {**workspace.environment(), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, str(client), f"sqlite:///{finished}/.retort/mlflow.db"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_no_pickle_and_no_id_of_a_sample_lies_in_the_store(finished: Path) -> None:
    ids = {row["sample_id"] for row in rows(next((finished / ".retort" / "requests").glob("*.parquet")))}
    kept = [p for p in (finished / ".retort" / "artifacts").rglob("*") if p.is_file()]
    assert kept
    assert not [p for p in kept if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    database = (finished / ".retort" / "mlflow.db").read_bytes() + (finished / ".retort" / "prefect" / "prefect.db").read_bytes()
    logs = b"".join(p.read_bytes() for p in (finished / ".retort" / "logs").iterdir())
    assert len(ids) == 10
    assert not [i for i in ids if i.encode() in database or i.encode() in logs]


def rows(path: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def test_lineage_leads_from_the_champion_down_to_the_source(finished: Path) -> None:
    ran = workspace.retort(finished, "lineage", "digits-student@champion", "--json")
    assert ran.returncode == 0, ran.stderr
    tree = json.loads(ran.stdout)
    chain, node = [], tree
    while node:
        chain.append(node["name"].partition(" ")[0])
        node = node["inputs"][0] if node["inputs"] else None
    assert chain == ["digits-student@champion", "teacher", "data/filtered", "data/pool", "digits"]
    shown = workspace.retort(finished, "lineage", "digits-teacher@champion").stdout
    for name in ("unlearn.l1_sparse", "train.supervised", "generate.datadream", "data/generated", "digits"):
        assert name in shown
    assert "data/pool" in workspace.retort(finished, "lineage", "data/condensed").stdout


def test_a_worse_candidate_is_refused_and_the_champion_stays(copy: Path) -> None:
    change(copy, "registry", rules={"accuracy": {"min": 0.999}})
    change(copy, "distill", steps=1)
    ran = workspace.retort(copy, "run")
    assert ran.returncode == 0, ran.stdout
    assert "refused: accuracy" in " ".join(ran.stdout.split())
    assert "digits-student: versions 1 (champion), 2 (candidate)" in ran.stdout
    journal = [json.loads(line) for line in (copy / ".retort" / "journal.jsonl").read_text().splitlines()]
    assert journal[-1]["kind"] == "refused"
    again = workspace.retort(copy, "run")
    assert "Everything was up to date" in again.stdout


def test_only_what_a_change_reaches_is_run_again(copy: Path) -> None:
    change(copy, "condense", n=11)
    ran = workspace.retort(copy, "run")
    assert ran.returncode == 0, ran.stdout
    done = {line.split()[1] for line in ran.stdout.splitlines() if line.strip().startswith("done")}
    assert "condense" in done
    assert not done & {"pool", "filter", "generate"}
    assert "train" not in {line.split("│")[1].strip() for line in ran.stdout.splitlines() if "│ run" in line}


@pytest.mark.parametrize(
    ("section", "keys", "sentence"),
    [
        ("filter", {"keeep": 0.5}, "filter.dfn has no setting 'keeep'; did you mean 'keep'?"),
        ("filter", {"method": "dnf"}, "there is no method 'filter.dnf'; did you mean filter.dfn?"),
        ("pool", {"source": "parquet:nowhere.parquet"}, "nowhere.parquet"),
        ("train", {"method": "superwised"}, "did you mean train.supervised?"),
        ("recipe", {"stepps": 3}, "no setting 'stepps'; did you mean 'steps'?"),
    ],
)
def test_a_mistake_in_params_is_found_by_the_first_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, keys: dict, sentence: str
) -> None:
    folder = workspace.make(tmp_path / "project", workspace.smoke_params())
    change(folder, section, **keys)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=re.escape(sentence)):
        here = Session(Settings(folder))
        here.check()
        here.check_settings()
        run_stage("pool" if section == "pool" else here.method(section)[0])


@pytest.mark.parametrize(
    ("section", "keys", "sentence"),
    [
        ("condense", {"n": 0}, "'condense.n' must be a whole number of 1 or more, not 0"),
        ("unlearn", {"demonstration_rows": "many"}, "demonstration_rows"),
        ("references", {"finetun": {}}, "'references:' knows 'finetune:'"),
    ],
)
def test_a_mistake_in_params_gets_one_sentence_and_status_2(copy: Path, section: str, keys: dict, sentence: str) -> None:
    before = {name: (copy / "data" / name / "dataset.json").read_text() for name in ("pool", "filtered", "condensed", "generated")}
    change(copy, section, **keys)
    ran = workspace.retort(copy, "run")
    shown = " ".join(ran.stdout.split())
    assert ran.returncode == 2, shown
    assert sentence in shown
    assert "Traceback" not in shown
    assert before == {name: (copy / "data" / name / "dataset.json").read_text() for name in before}, "the last good version was touched"


def test_the_commands_run_alone(copy: Path) -> None:
    for words in (["curate"], ["train"], ["unlearn"]):
        ran = workspace.retort(copy, *words)
        assert ran.returncode == 0, (words, ran.stdout)
        assert "cached" in ran.stdout, words
    ran = workspace.retort(copy, "distill")  # the newest teacher is the unlearned one: a student of its own
    assert ran.returncode == 0, ran.stdout
    assert "version 2" in ran.stdout
    tree = json.loads(workspace.retort(copy, "lineage", "digits-student/2", "--json").stdout)
    assert tree["inputs"][0]["made_by"] == "unlearn.l1_sparse"
    command = [sys.executable, "-m", "flows.train"]
    alone = subprocess.run(command, cwd=copy, env=workspace.environment(), capture_output=True, text=True, check=False)
    assert alone.returncode == 0
    assert "train.supervised" in alone.stdout


def test_dvc_runs_the_stages_without_us(copy: Path) -> None:
    change(copy, "condense", n=12)
    dvc = [sys.executable, "-m", "dvc"]
    ran = subprocess.run([*dvc, "repro", "condense"], cwd=copy, env=workspace.environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    status = subprocess.run([*dvc, "status"], cwd=copy, env=workspace.environment(), capture_output=True, text=True, check=False)
    assert "up to date" in status.stdout


def test_a_seed_that_is_no_number_is_named(copy: Path) -> None:
    workspace.write_params(copy, {**yaml.safe_load((copy / "params.yaml").read_text()), "seed": "abc"})
    ran = workspace.retort(copy, "train")
    assert ran.returncode == 2
    assert "'seed' must be a whole number of 0 or more, not 'abc'" in " ".join(ran.stdout.split())


def test_a_section_that_nobody_knows_is_named(copy: Path) -> None:
    workspace.write_params(copy, {**yaml.safe_load((copy / "params.yaml").read_text()), "recipee": {}})
    ran = workspace.retort(copy, "run")
    assert ran.returncode == 2
    assert "there is no section 'recipee'" in " ".join(ran.stdout.split())


def test_a_model_whose_weights_are_gone_is_made_again(copy: Path) -> None:
    for weights in (copy / ".retort" / "artifacts").rglob("weights.safetensors"):
        weights.unlink()
    ran = workspace.retort(copy, "train")
    assert ran.returncode == 0, ran.stdout
    assert "done teacher" in ran.stdout


def test_a_lock_file_that_was_cut_short_is_mended(copy: Path) -> None:
    lock = copy / "dvc.lock"
    good = lock.read_text()
    lock.write_text("")
    (copy / ".dvc" / "tmp" / "rwlock").write_text("{")
    ran = workspace.retort(copy, "run")
    assert ran.returncode == 0, ran.stdout
    assert "Everything was up to date" in ran.stdout
    assert lock.read_text() == good


@pytest.mark.parametrize(
    ("flow", "arguments", "sentence"),
    [
        (promote, {"name": "o'brien"}, "there is no registered model"),
        (promote, {"name": "digits-student", "version": 7}, "digits-student has no version or alias 7; it has candidate, champion, 1"),
        (evaluate, {"names": ("digits-student@chmpion",)}, "digits-student has no version or alias 'chmpion'"),
        (train, {"data": ("data/nothing",)}, "data/nothing is not there"),
        (train, {"data": ("data/filtered@v9",)}, "revision 'v9' has no data at 'data/filtered'"),
    ],
)
def test_a_mistake_in_what_is_asked_of_a_flow_is_found_by_its_plan(finished: Path, flow: Any, arguments: dict, sentence: str) -> None:
    with use(Session(Settings(finished), planning=True)), pytest.raises(UserError, match=re.escape(sentence)):
        flow.fn(**arguments)


def test_a_mistake_on_the_command_line_gets_one_sentence_and_status_2(finished: Path) -> None:
    told = several(
        finished,
        ["lineage", "digits-student@9"],
        ["lineage", "what"],
        ["methods", "--family", "nothing"],
        ["run", "--source", "parquett:x"],
    )
    assert [one.status for one in told] == [2] * 4
    shown = [" ".join((one.out + one.err).split()) for one in told]
    assert "digits-student has no version or alias '9'" in shown[0]
    assert "neither a data folder nor NAME@alias" in shown[1]
    assert "there is no family 'nothing'" in shown[2]
    assert "source 'parquett:x' is of no known kind; did you mean 'parquet'?" in shown[3]
    ran = workspace.retort(finished, "promote", "nobody")
    assert ran.returncode == 2
    assert "there is no registered model 'nobody'; there are: digits-student, digits-teacher" in " ".join(ran.stdout.split())
    assert "Traceback" not in "".join([*shown, ran.stdout, ran.stderr])


def test_an_older_version_of_the_data_can_be_trained_on(copy: Path) -> None:
    subprocess.run(["git", "add", "-f", "dvc.lock"], cwd=copy, check=True)
    commit = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "data"]
    subprocess.run(commit, cwd=copy, check=True)
    subprocess.run(["git", "tag", "v1"], cwd=copy, check=True)
    change(copy, "filter", keep=0.3)
    assert workspace.retort(copy, "curate", "filter").returncode == 0
    ran = workspace.retort(copy, "train", "--data", "data/filtered@v1")
    assert ran.returncode == 0, ran.stdout
    tree = json.loads(workspace.retort(copy, "lineage", "digits-teacher/3", "--json").stdout)
    old = yaml.safe_load(subprocess.run(["git", "show", "v1:dvc.lock"], cwd=copy, capture_output=True, text=True, check=True).stdout)
    assert tree["inputs"][0]["id"] == old["stages"]["filter"]["outs"][0]["md5"]
    assert tree["inputs"][0]["made_by"] == "filter.dfn"


def test_outside_a_project_the_way_in_is_named(tmp_path: Path, finished: Path) -> None:
    env = {**workspace.environment(), "PYTHONPATH": str(finished)}
    ran = subprocess.run([sys.executable, "-m", "flows.cli", "run"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "is not inside a Retort project" in ran.stderr


def test_methods_are_listed_for_people_and_programs(finished: Path) -> None:
    listed = json.loads(workspace.retort(finished, "methods", "--json").stdout)
    assert {"name", "family", "paper", "arxiv", "claim", "path"} <= set(listed[0])
    assert {"filter.dfn", "condense.krr_st", "generate.datadream", "distill.ssld", "unlearn.l1_sparse"} <= {m["name"] for m in listed}
    assert all((finished / m["path"]).is_file() for m in listed)
    shown = workspace.retort(finished, "methods").stdout
    assert "filter.dfn" in shown


def test_two_runs_at_once_do_not_meet(finished: Path) -> None:
    from tasks.core.saga import project_lock
    from tasks.core.settings import Settings

    with project_lock(Settings(finished)):
        ran = workspace.retort(finished, "run")
    assert ran.returncode == 2
    assert f"process {os.getpid()}" in ran.stderr


def test_a_dry_run_moves_nothing_and_a_promotion_can_be_rolled_back(copy: Path) -> None:
    lenient = {"accuracy": {"min": 0.0, "min_delta": -1.0}}
    change(copy, "registry", mode="dry-run", rules=lenient)
    before = (copy / ".retort" / "journal.jsonl").read_bytes()
    dry = workspace.retort(copy, "promote", "digits-teacher", "--version", "1")
    assert dry.returncode == 0, dry.stdout
    assert "digits-teacher version 1 would be champion" in " ".join(dry.stdout.split())
    assert (copy / ".retort" / "journal.jsonl").read_bytes() == before

    change(copy, "registry", mode="enforce")
    assert "digits-teacher version 1 is champion" in " ".join(
        workspace.retort(copy, "promote", "digits-teacher", "--version", "1").stdout.split()
    )
    pages = list((copy / ".retort" / "artifacts").rglob("verdict-digits-teacher-1.html"))
    assert "accuracy within 1 of champion" in pages[-1].read_text()

    back = workspace.retort(copy, "rollback", "digits-teacher", "--reason", "complaints")
    assert back.returncode == 0, back.stderr
    assert back.stdout.startswith("version 2 of digits-teacher is champion again; it was left on ")
    told = json.loads(workspace.retort(copy, "history", "digits-teacher", "--json").stdout)
    assert [entry["kind"] for entry in told][-4:] == ["promoting", "promoted", "rolling-back", "rolled-back"]
    assert told[-1]["reason"] == "complaints"
    assert "nobody" in workspace.retort(copy, "history", "nobody").stderr


def test_a_champion_that_somebody_set_by_hand_is_not_used(copy: Path) -> None:
    with sqlite3.connect(copy / ".retort" / "mlflow.db") as database:
        database.execute("UPDATE registered_model_aliases SET version = 1 WHERE name = 'digits-teacher' AND alias = 'champion'")
    ran = workspace.retort(copy, "evaluate", "digits-teacher@champion")
    assert ran.returncode == 2, ran.stdout
    assert "somebody moved it past the gate; 'retort rollback digits-teacher' puts it back" in " ".join(ran.stdout.split())
    assert workspace.retort(copy, "rollback", "digits-teacher").stdout.startswith("version 2 of digits-teacher is champion again")


def test_an_unknown_mode_gets_one_sentence(copy: Path) -> None:
    change(copy, "registry", mode="sometimes")
    ran = workspace.retort(copy, "promote", "digits-student")
    assert ran.returncode == 2
    assert "'registry.mode' must be one of off, dry-run, enforce, not 'sometimes'" in " ".join(ran.stdout.split())
