"""Model versions: served without this package, described, and judged by all the evidence that a gate may ask for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml

from flows import _promotion
from flows._server import free_port, wait_for
from tasks.core import loop, networks
from tasks.core.dataset import Dataset
from tasks.core.settings import Settings
from tasks.core.store import Store
from tests import workspace
from tests.workspace import change

pytestmark = pytest.mark.timeout(400)


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tasks", "flows"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def words(shown: str) -> str:
    """What is on the screen, tables and line breaks taken out."""
    return " ".join(shown.replace("│", " ").split())


def test_mlflow_serves_the_champion_to_a_client_with_real_images(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)  # what every process of the server runs first
    port = free_port()
    env = {**workspace.environment(), "PYTHONPATH": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{finished}/.retort/mlflow.db"}
    absent = subprocess.run([sys.executable, "-c", "import tasks"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "No module named 'tasks'" in absent.stderr
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits-student@champion", "--env-manager", "local"]
    log = tmp_path / "serve.log"
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--port", str(port)], cwd=tmp_path, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server, log)
        test = Dataset.open(finished / "data" / "pool").split("test")
        body = json.dumps({"inputs": test.images()[:20].tolist()}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            told = np.array(json.load(answer)["predictions"])
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    store = Store(Settings(finished))
    expected = loop.predict(store.load_net(store.version_ref("digits-student", "champion")), test.images()[:20]).softmax(1).numpy()
    assert np.allclose(told, expected, atol=1e-5)


def test_every_version_says_what_it_takes_and_where_its_data_is_from(finished: Path) -> None:
    store = Store(Settings(finished))
    for name in store.names():
        for version in store.versions(name):
            assert version.tags["retort.licence"] == "BSD-3-Clause (scikit-learn); CC BY 4.0 (data)"
            assert "load_digits" in version.tags["retort.source"]
            for heading in ("## What it is for", "## Data", "## Figures", "## Limits"):
                assert heading in version.description
            info = mlflow.models.get_model_info(f"models:/{name}/{version.version}")
            assert info.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
            assert info.saved_input_example_info is not None
            page = Path(workspace.retort(finished, "card", f"{name}/{version.version}").stdout.split()[-1])
            assert f"{name} version {version.version}" in page.read_text().replace("\u2011", "-").replace("\u00a0", " ")


def test_a_gate_may_ask_for_shifts_forgetting_and_compatible_embeddings(copy: Path) -> None:
    rules = {
        "accuracy": {"min": 0.0, "min_delta": -1.0},
        "shifted_accuracy": {"min": 0.0, "min_delta": -1.0},
        "accuracy_late": {"min": 0.0},
        "ua": {"max": 101},
        "avg_gap": {"max": 0.0},
    }
    change(copy, "registry", rules=rules, compatible_with="champion", compatible_margin=1.0)
    change(copy, "evaluate", shifts={"late": "data/pool:validation"})
    change(copy, "distill", steps=7)
    ran = workspace.retort(copy, "distill")
    assert ran.returncode == 0, ran.stdout
    student = workspace.retort(copy, "promote", "digits-student")
    assert "refused: ua was not measured; measured: " in words(student.stdout), student.stdout
    change(copy, "registry", rules={name: {**bounds, "optional": True} for name, bounds in rules.items()})
    assert "version 2 is champion" in words(workspace.retort(copy, "promote", "digits-student").stdout)
    reasons = verdict(copy, "digits-student", 2)["reason"]
    assert "shifted_accuracy not worse than the champion's by 1: gain" in reasons
    assert "its embeddings serve the champion's gallery" in reasons
    assert "accuracy_late" in reasons

    # version 2 of the teacher was unlearned: its gap to a retrained one is known, and on these few rows void
    assert "version 1 is champion" in words(workspace.retort(copy, "promote", "digits-teacher", "--version", "1").stdout)
    workspace.retort(copy, "promote", "digits-teacher", "--version", "2")
    found = {rule["rule"]: rule for rule in verdict(copy, "digits-teacher", 2)["rules"]}
    assert 0 <= found["ua at most 101"]["candidate"] <= 100
    assert found["avg_gap at most 0"]["reason"] == "avg_gap nan misses at most 0"


def test_a_champion_on_other_classes_is_not_compared(copy: Path) -> None:
    settings = Settings(copy)
    store = Store(settings)
    run = store.start("other", "train", params={}, tags={"retort.role": "student", "retort.method": "train.supervised"}, inputs=[])
    with loop.seeded(0):
        net = networks.convnet((1, 8, 8), 3, widths=(2,), hidden=4, mean=0.5, std=0.5)
    ref = store.log_net(run, net, name="net", classes=("zero", "one", "two"), tags={})
    store.finish(run, "other", {}, {})
    assert store.register("digits-student", ref, {}) == 2
    _promotion.move(settings, store, "digits-student", 2, 1, "promoting", "for a test")
    ran = workspace.retort(copy, "promote", "digits-student", "--version", "1")
    assert ran.returncode == 0, ran.stdout
    assert "refused: it knows other classes" in words(ran.stdout)
    judged = verdict(copy, "digits-student", 1)
    assert judged["promote"] is False
    assert judged["reason"].startswith(
        "it knows other classes than champion version 2 (zero, one, two, three and 6 more against zero, one, two)"
    )
    assert store.aliases("digits-student")["champion"] == 2


def test_refresh_does_the_work_once_and_again_only_when_the_data_is_another(copy: Path) -> None:
    first = workspace.retort(copy, "refresh")
    assert "the models follow this data already" in words(first.stdout)
    assert "Everything was up to date" in first.stdout
    change(copy, "distill", steps=3)  # settings alone are no reason to train at night
    assert "Everything was up to date" in workspace.retort(copy, "refresh").stdout
    change(copy, "filter", keep=0.5)
    after = workspace.retort(copy, "refresh")
    assert after.returncode == 0, after.stdout
    assert "digits-teacher version 3" in words(after.stdout)
    assert "Everything was up to date" in workspace.retort(copy, "refresh").stdout


def test_versions_that_went_on_from_one_start_can_be_averaged_and_others_not(copy: Path) -> None:
    for seed in (1, 2):
        params = yaml.safe_load((copy / "params.yaml").read_text())
        workspace.write_params(copy, {**params, "seed": seed, "recipe": {"steps": 10, "lr": 0.01}})
        ran = workspace.retort(copy, "train", "--data", "data/pool:reference", "--start", "digits-teacher/1")
        assert ran.returncode == 0, ran.stdout
    ran = workspace.retort(copy, "combine", "soups", "digits-teacher/3", "digits-teacher/4")
    assert ran.returncode == 0, ran.stdout
    assert "digits-teacher version 5" in words(ran.stdout)
    tree = json.loads(workspace.retort(copy, "lineage", "digits-teacher/5", "--json").stdout)
    assert [child["made_by"] for child in tree["inputs"] if child["kind"] == "model"] == ["train.supervised"] * 2
    other = workspace.retort(copy, "combine", "soups", "digits-teacher/3", "digits-student/1")
    assert other.returncode == 2
    none = workspace.retort(copy, "combine", "soups")
    assert "soups needs versions: name each as NAME@alias or NAME/version" in words(none.stdout)


def test_the_versions_that_fit_a_device_are_named_and_why_the_others_do_not(copy: Path) -> None:
    params = yaml.safe_load((copy / "params.yaml").read_text())
    none = workspace.retort(copy, "fit")
    assert none.returncode == 2
    assert "describes no device: add 'devices:'" in none.stderr
    small = {"flash": "1 MiB", "ram": "64 KiB", "sensors": ["camera"]}
    workspace.write_params(copy, {**params, "devices": {"board": small, "clock": {**small, "sensors": ["thermometer"]}}})
    found = json.loads(workspace.retort(copy, "fit", "--device", "board", "--json").stdout)
    assert {place["version"] for place in found["fit"]} == {"digits-student/1", "digits-teacher/1", "digits-teacher/2"}
    assert all("accuracy 0." in place["reason"] for place in found["fit"]), found
    found = json.loads(workspace.retort(copy, "fit", "--device", "clock", "--json").stdout)
    assert found["fit"] == []
    assert "sensor" in found["unfit"]["digits-student/1"][0]
    wrong = workspace.retort(copy, "fit", "--device", "watch")
    assert wrong.returncode == 2
    assert "board" in wrong.stderr


def test_versions_are_ranked_for_a_new_task_by_vectors_that_are_made_once(copy: Path) -> None:
    first = workspace.retort(copy, "find-model", "--data", "data/pool:reference", "--json")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "fitting the matcher" in first.stderr
    found = json.loads(first.stdout)
    assert {place["version"] for place in found} == {"digits-student/1", "digits-teacher/1", "digits-teacher/2"}
    assert [place["score"] for place in found] == sorted((place["score"] for place in found), reverse=True)
    again = workspace.retort(copy, "find-model", "--data", "data/pool:reference", "--json")
    assert again.stderr == ""
    assert json.loads(again.stdout) == found
    source = workspace.retort(copy, "find-model", "--data", "digits", "digits-student", "--json")
    assert [place["version"] for place in json.loads(source.stdout)] == ["digits-student/1"]
    wrong = workspace.retort(copy, "find-model", "--data", "data/nothing")
    assert wrong.returncode == 2
    assert "data/nothing is not there" in wrong.stderr
    workspace.change(copy, "find", zoom=7)
    unknown = workspace.retort(copy, "find-model", "--data", "data/pool:reference")
    assert (unknown.returncode, "no setting 'zoom'" in unknown.stderr) == (2, True)


def verdict(folder: Path, name: str, version: int) -> dict:
    found = Store(Settings(folder)).client.get_model_version(name, str(version))
    return json.loads(found.tags["retort.verdict"])
