"""Networks that draw images: trained, served, unlearned and erased as the others are, and taken for a classifier by nobody."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flows._session import Session
from tasks.core import networks
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tasks.core.store import Store
from tests import workspace
from tests.flows.asking import certificates, retort, several, words

pytestmark = pytest.mark.timeout(900)
GENERATOR = {"method": "diffusion", "steps": 20, "batch": 16, "hidden": 16, "depth": 1, "levels": 25}
SERVED = """
import sys
sys.modules["tasks"] = None
import mlflow, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
labels = np.array([1, 7, 7])
first, again, other = (model.predict(labels, params={"seed": seed}) for seed in (1, 1, 2))
assert first.shape == (3, 1, 8, 8) and first.dtype == np.uint8, first
assert (first == again).all() and (first != other).any()
print("served")
"""


@pytest.fixture(scope="module")
def drawing(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a generator, and with that generator after it forgot a class."""
    from tests.conftest import copied

    folder = copied(finished, tmp_path_factory.mktemp("drawing") / "project")
    forget = {"method": "sfd", "distil_steps": 2, "forget_steps": 2, "batch": 8}
    workspace.change(folder, "generator", **GENERATOR, unlearn=forget)
    for command in (["train", "--generator"], ["unlearn", "--model", "digits-generator", "--class", "five"], ["evaluate"]):
        ran = retort(folder, *command)
        assert ran.status == 0, ran.out + ran.err
    return folder


def test_a_generator_is_registered_says_what_it_is_and_is_served_without_this_package(drawing: Path) -> None:
    store = Store(Settings(drawing))
    first, second = store.versions("digits-generator")
    assert [one.tags["retort.method"] for one in (first, second)] == ["train.diffusion", "unlearn.sfd"]
    assert "Draws grey images of 8x8 pixels, of 10 classes" in first.description
    assert "retort.facts" not in first.tags
    assert all(figure in second.description for figure in ("class accuracy: ", "frechet: ", "ua: "))
    assert store.load_net(store.version_ref("digits-generator", 2)).arch["one_step"] is not None
    for version in (1, 2):
        store.set_alias("digits-generator", "looked-at", version)
        store.smoke_check("digits-generator", "looked-at")
        command = [sys.executable, "-c", SERVED, f"models:/digits-generator/{version}"]
        env = {**workspace.environment(), "MLFLOW_TRACKING_URI": f"sqlite:///{drawing}/.retort/mlflow.db"}
        ran = subprocess.run(command, cwd=drawing.parent, env=env, capture_output=True, text=True, check=False)
        assert ran.stdout == "served\n", ran.stderr


def test_nobody_takes_it_for_a_classifier(drawing: Path) -> None:
    for command, sentence in (
        (["distill", "--teacher", "digits-generator/1"], "digits-generator/1 is a diffusion model, which draws images"),
        (["unlearn", "--model", "digits-generator", "--class", "zebra"], "there is no class 'zebra'"),
        (["train", "--generator", "--start", "digits-teacher/1"], "the model to start from is a classifier"),
    ):
        ran = retort(drawing, *command)
        assert (ran.status, sentence in words(ran.out)) == (2, True), ran.out


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"method": "supervised"}, "train.supervised makes a classifier, no generator"),
        ({**GENERATOR, "stepps": 3}, "no setting 'stepps'"),
        ({**GENERATOR, "unlearn": {"lr": 1}}, "'generator.unlearn' must name its 'method:'"),
    ],
)
def test_a_mistake_in_its_section_gets_one_sentence(tmp_path: Path, keys: dict[str, object], sentence: str) -> None:
    folder = workspace.make(tmp_path / "project", workspace.smoke_params())
    workspace.change(folder, "generator", **keys)
    with pytest.raises(UserError, match=re.escape(sentence)):
        Session(Settings(folder)).check_settings()


def test_without_its_section_it_says_what_to_add(finished: Path) -> None:
    ran = retort(finished, "train", "--generator")
    assert ran.status == 2
    assert "describes no generator: add 'generator: {method: diffusion}'" in words(ran.out)


def test_a_class_is_erased_from_generator_and_classifiers_and_all_go_on_without_it(drawing: Path) -> None:
    (named,) = several(drawing, ["forget", "--class", "three", "--dry-run"])
    assert re.search(r"digits-generator/2 retrained \d", words(named.out))  # it draws in one step, and cannot be distilled again
    assert re.search(r"digits-generator/1 revoked", words(named.out))
    ran = retort(drawing, "forget", "--class", "three")
    assert ran.status == 0, ran.out + ran.err
    (certificate,) = certificates(drawing)
    done = {f"{one['name']}/{one['version']}": one["action"] for one in certificate["models"]}
    assert done["digits-generator/2"] == "retrained"
    assert done["digits-teacher/2"] in ("unlearned", "retrained")
    assert certificate["kind"] == "class"
    from tasks.core.dataset import Dataset

    for name in ("pool", "filtered", "generated"):
        data = Dataset.open(drawing / "data" / name)
        assert data.info.absent == ("three",)
        assert len(data.info.classes) == 10
        assert not np.any(data.labels() == 3)
    store = Store(Settings(drawing))
    for name in ("digits-teacher", "digits-student"):
        net = store.load_net(store.version_ref(name, "champion"))
        assert net.arch["classes"] == 10
        assert not networks.draws(net.arch)
    again = retort(drawing, "run")
    assert again.status == 0, again.out + again.err
