"""The main job on labelled texts: training, distilling, measuring, promoting and serving models that read, and a deletion request."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows._session import Session, use
from flows.unlearn import unlearn
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tests import workspace
from tests.flows.asking import certificates, column, listed, retort, words

pytestmark = pytest.mark.timeout(900)

SAID = {
    "weather": ("rain", "sun", "storm", "cloud", "snow", "wind"),
    "money": ("bank", "coin", "loan", "stock", "price", "trade"),
}
COMMON = ("the", "of", "today", "again", "and", "more", "some", "with")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the main job has run on 240 texts of two classes."""
    base, draw = tmp_path_factory.mktemp("said"), random.Random(0)
    with (base / "said.csv").open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["sample_id", "text", "label"])
        for at in range(240):
            label = ("weather", "money")[at % 2]
            told = [*draw.choices(SAID[label], k=2), *draw.choices(COMMON, k=5)]
            draw.shuffle(told)
            table.writerow([f"said-{at:03d}", " ".join(told), label])
    params = workspace.smoke_params()
    params["pool"] = {"source": f"texts:{base / 'said.csv'}"}
    params["filter"] = {"method": "random", "keep": 0.8}
    small = {"layers": 1, "width": 32, "heads": 2, "words": 512, "longest": 16, "pretrain_steps": 20, "lr": 0.01}
    params["train"] = {"method": "bert", **small, "steps": 60}
    params["distill"] = {"method": "pretrained_distillation", **small, "width": 16, "steps": 60}
    params["recipe"] = {}
    folder = workspace.make(base / "project", params)
    ran = retort(folder, "run")
    assert ran.status == 0, ran.out + ran.err
    (folder / "first-run.txt").write_text(ran.out)
    return folder


def test_texts_become_a_promoted_student_that_tells_them_apart(project: Path) -> None:
    said = (project / "first-run.txt").read_text()
    assert not (project / "data" / "condensed").exists()
    assert not (project / "data" / "generated").exists()
    (page,) = (project / ".retort" / "reports").glob("said-*.html")
    assert "pretrained_distillation" in page.read_text()
    assert "#unlearning" not in page.read_text()
    shares = [float(word.rstrip("%,")) for word in words(said).replace("│", " ").split() if word.rstrip(",").endswith("%")]
    assert sum(share > 90 for share in shares) >= 2, (
        said
    )  # the teacher's and the student's accuracy: two words of a text give its class away


def test_nothing_is_done_twice(project: Path) -> None:
    ran = retort(project, "run")
    assert ran.status == 0, ran.out + ran.err
    assert "Everything was up to date" in ran.out


def test_a_version_takes_texts_where_retort_is_not_installed(project: Path, tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text(
        "import importlib.util, sys\n"
        "sys.path = [p for p in sys.path if p and 'editable' not in p]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "assert importlib.util.find_spec('tasks') is None, 'tasks can be imported'\n"
        "import mlflow, pandas\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/said-student/1')\n"
        "out = model.predict(pandas.DataFrame({'text': ['rain and snow today', 'the price of stock', '']}))\n"
        "assert out.shape == (3, 2) and abs(out.sum(1) - 1).max() < 1e-5, out\n"
        "assert out[0].argmax() != out[1].argmax(), out\n"
    )
    env = {**workspace.environment(), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, str(client), f"sqlite:///{project}/.retort/mlflow.db"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_card_says_that_it_reads(project: Path) -> None:
    ran = retort(project, "card", "said-student/1")
    assert ran.status == 0, ran.out + ran.err
    page = next((project / ".retort" / "reports").glob("card-said-student-1*.html")).read_text()
    assert "Tells 2 classes of texts apart" in page
    assert "images" not in page


def test_no_text_of_the_pool_is_in_a_model_or_its_example(project: Path) -> None:
    known = set(column(project, "pool", "caption"))
    for path in (project / ".retort" / "artifacts").rglob("*"):
        if path.is_file() and path.suffix in (".json", ".py", ".yaml", ""):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not any(one in text for one in known), path


def test_unlearning_a_model_of_texts_is_refused_and_says_what_does_it(project: Path) -> None:
    with use(Session(Settings(project), planning=True)), pytest.raises(UserError, match="'retort forget' does it"):
        unlearn.fn(model="said-teacher/1")


def test_a_method_for_images_says_what_reads_texts(project: Path) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    try:
        workspace.write_params(project, {**params, "train": {"method": "supervised"}})
        ran = retort(project, "train")
    finally:
        workspace.write_params(project, params)
    assert ran.status == 2
    assert "these rows are texts, and this method takes images" in words(ran.out + ran.err)
    assert "train.bert" in words(ran.out + ran.err)


def test_a_deletion_request_trains_models_of_texts_again(project: Path, tmp_path: Path) -> None:
    from tests.conftest import copied

    folder = copied(project, tmp_path / "project")
    gone = [
        name for name, split in zip(column(folder, "pool", "sample_id"), column(folder, "pool", "split"), strict=True) if split == "train"
    ]
    ran = retort(folder, "forget", "--samples", listed(tmp_path / "gone.txt", gone[:3]))
    assert ran.status == 0, ran.out + ran.err
    assert not set(gone[:3]) & set(column(folder, "pool", "sample_id"))
    (certificate,) = certificates(folder)
    done = {one["name"]: (one["action"], one["method"]) for one in certificate["models"] if one["action"] != "revoked"}
    assert done == {
        "said-teacher": ("retrained", "train.bert"),
        "said-student": ("distilled again", "distill.pretrained_distillation"),
    }
    assert json.dumps(certificate).count("said-0") == 0
