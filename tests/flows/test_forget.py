"""A deletion request from beginning to end, by real commands; what is left is looked for by a search that is not the project's."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows import _registry
from flows._promotion import history
from flows._session import Session, use
from tasks.core.erasure import requests
from tasks.core.errors import UserError
from tasks.core.settings import Settings
from tasks.core.store import Store
from tests import workspace
from tests.conftest import copied
from tests.flows.asking import (
    Told,
    aliases,
    certificates,
    chosen,
    dvc,
    listed,
    named_by,
    png,
    receive_only,
    retort,
    several,
    state,
    weights_of,
    words,
)
from tests.flows.remaining import Remain, places, pool_pictures, remains

pytestmark = pytest.mark.timeout(1800)


class Erased(NamedTuple):
    """A project after a deletion request, and what it was before."""

    folder: Path
    pictures: dict[str, np.ndarray]  # of the samples that were erased
    pool: dict[str, np.ndarray]  # as it was
    before: set[Remain]
    weights: dict[str, str]  # hash of the weights' file by `name/version`, as it was
    named: Told  # what `--dry-run` said
    ran: Told
    after: set[Remain]


@pytest.fixture(scope="module")
def erased(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Erased:
    """Ten rows of the champion's data are erased from a project with a past: an older version of its filtered data, that git names."""
    home = tmp_path_factory.mktemp("erased")
    folder = copied(finished, home / "project")
    for command in (["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first models"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    workspace.change(folder, "filter", keep=0.55)
    dvc(folder, "repro", "-q", "filter")
    shutil.rmtree(folder / ".retort" / "cache", ignore_errors=True)  # the dry run fetches the older version into it
    pool = pool_pictures(folder)
    pictures = {name: pool[name] for name in chosen(folder, pool)}
    asked = ("forget", "--samples", listed(home / "ids.txt", pictures))
    unchanged = state(folder)
    (named,) = several(folder, [*asked, "--dry-run"])
    assert state(folder) == unchanged
    before, weights = remains(folder, pictures), weights_of(folder)
    ran = retort(folder, *asked)
    return Erased(folder, pictures, pool, before, weights, named, ran, remains(folder, pictures))


@pytest.fixture(scope="module")
def waiting(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, np.ndarray]], Told]:
    """Two requests that came before anything was done for them, one by a condition and to be retrained, and a gate that lets nothing
    through.
    """
    home = tmp_path_factory.mktemp("waiting")
    folder = copied(finished, home / "project")
    workspace.change(folder, "registry", rules={"accuracy": {"min": 0.999}})
    pool = pool_pictures(folder)
    rows = pq.read_table(folder / "data" / "pool" / "part-00000.parquet").to_pylist()
    narrow = [row["sample_id"] for row in rows if row["label"] == 3 and row["split"] == "train" and row["caption"] != "a handwritten three"]
    ten = [name for name in chosen(folder, pool) if name not in narrow]
    parts = [{name: pool[name] for name in some} for some in (ten, narrow)]
    receive_only(folder, listed(home / "ids.txt", ten))
    condition = "class = 'three' AND split = 'train' AND caption <> 'a handwritten three'"
    (later,) = several(folder, ["forget", "--where", condition, "--policy", "retrain", "--later"])
    assert later.out.endswith(f"{len(narrow)} samples, received\n")
    return folder, parts, retort(folder, "forget")


def test_a_dry_run_names_what_carries_the_samples_and_what_would_be_done(erased: Erased) -> None:
    shown = words(erased.named.out)
    assert erased.named.status == 0
    assert "10 samples" in shown
    for text in ("data/pool", "data/filtered", "data/condensed", "data/generated", "older", "seconds to retrain", "Nothing was changed."):
        assert text in shown
    for model in ("digits-teacher/2 (champion) unlearned", "digits-teacher/1 revoked", "digits-student/1 (champion) distilled again"):
        assert re.search(rf"{re.escape(model)} \d+\.\d", shown)
    assert not any(name in erased.named.out for name in erased.pictures)


def test_the_samples_were_all_over_the_project_and_are_nowhere_now(erased: Erased) -> None:
    assert erased.ran.status == 0, erased.ran.out + erased.ran.err
    found = places(erased.before)
    for place in ("data/condensed", "data/filtered", "data/generated", ".retort/requests"):
        assert "id" in found[place], place
    for place in (".retort/reports", ".retort/artifacts"):
        assert "picture" in found[place], place
    for place in ("data/pool", ".dvc/cache", ".retort/remote"):
        assert found[place] >= {"id", "picture"}, place
    assert ".retort/cache" in found
    assert not erased.after
    kept = {hashlib.sha256(path.read_bytes()).hexdigest() for path in erased.folder.rglob("*") if path.is_file()}
    assert len(erased.weights) == 3
    assert not kept & set(erased.weights.values())
    assert not any(name in erased.ran.out + erased.ran.err for name in erased.pictures)


def test_nobody_else_is_gone(erased: Erased) -> None:
    now = pool_pictures(erased.folder)
    assert now.keys() == erased.pool.keys() - erased.pictures.keys()
    assert all(np.array_equal(image, erased.pool[name]) for name, image in now.items())
    neighbours = {name: now[name] for name in list(now)[:5]}
    assert {"data/pool", ".dvc/cache", ".retort/remote"} <= places(remains(erased.folder, neighbours)).keys()


def test_the_certificate_holds_here_and_names_the_samples_to_those_who_know_them(erased: Erased) -> None:
    (certificate,) = certificates(erased.folder)
    assert certificate["samples"]["count"] == 10
    assert named_by(certificate, erased.pool) == erased.pictures.keys()
    assert certificate["search"]["found"] == 0
    assert {one["place"] for one in certificate["purged"] if one["objects"]} >= {"DVC cache", "model weights", "reports", "requests"}
    assert {f"{one['name']}/{one['version']}" for one in certificate["models"]} == erased.weights.keys()
    path = f".retort/certificates/{certificate['request']}.json"
    (verified,) = several(erased.folder, ["certificate", "verify", path, "--json"])
    assert verified.status == 0
    assert all(check["ok"] for check in json.loads(verified.out)["checks"])


def test_new_champions_serve_and_owe_nothing_to_the_old_ones(erased: Erased) -> None:
    settings = Settings(erased.folder)
    store = Store(settings)
    revoked = {}
    for name in store.names():
        for version in store.versions(name):
            revoked[f"{name}/{version.version}"] = version.tags.get("revoked", "false") != "false"
    assert {name for name, gone in revoked.items() if gone} == erased.weights.keys()
    assert aliases(erased.folder) == {"digits-teacher": 3, "digits-student": 2}
    images = np.stack(list(erased.pool.values())[:4])
    for name in aliases(erased.folder):
        assert store.load_net(store.version_ref(name, "champion")) is not None
        assert images.shape[1:] == tuple(store.arch(store.version_ref(name, "champion"))["shape"])
    # the student learned again, and not from a teacher that had seen the samples
    run = store.client.get_run(store.version_ref("digits-student", "champion").run_id)
    (teacher,) = json.loads(run.data.tags["retort.inputs"])["teachers"]
    assert teacher["sha256"] == store.version_ref("digits-teacher", 3).sha256
    (certificate,) = certificates(erased.folder)
    assert teacher["sha256"] not in {one["sha256"] for one in certificate["models"]}


def test_what_was_made_from_the_samples_is_gone_or_revoked(erased: Erased) -> None:
    asked = [part for name in erased.pictures for part in ("--sample", name)]
    (told,) = several(erased.folder, ["lineage", *asked, "--json"])
    found = json.loads(told.out)
    assert not [one for one in found["data"] if one["here"]]
    assert {model["role"] for model in found["models"]} >= {"teacher", "student"}  # that there were such models stays known
    assert all(model["revoked"] for model in found["models"] if model["versions"])


def test_a_revoked_version_is_never_used_silently(erased: Erased) -> None:
    with use(Session(Settings(erased.folder))) as here:
        for spec in erased.weights:
            with pytest.raises(UserError, match=r"is revoked \(erasure, request r-[0-9a-f]{16}\)"):
                _registry.find_model(spec)
            assert here.store.version_ref(*_parted(spec)).sha256 == _registry.find_model(spec, revoked=True).sha256
        assert _registry.find_model("digits-teacher") == here.store.version_ref("digits-teacher", 3)
    back, _ = several(erased.folder, ["rollback", "digits-student"], ["rollback", "digits-teacher"])
    assert back.status == 2
    assert "no earlier champion" in back.err
    promoted = retort(erased.folder, "promote", "digits-student", "--version", "1")
    assert promoted.status == 2
    assert "digits-student/1 is revoked" in words(promoted.out)
    assert aliases(erased.folder) == {"digits-teacher": 3, "digits-student": 2}


def _parted(spec: str) -> tuple[str, int]:
    name, _, number = spec.partition("/")
    return name, int(number)


def test_asked_again_it_says_so_and_a_mistake_costs_a_sentence(erased: Erased, tmp_path: Path) -> None:
    unchanged = state(erased.folder)
    again = listed(tmp_path / "again.txt", list(erased.pictures)[::-1])
    known = next(name for name in erased.pool if name not in erased.pictures)
    some = listed(tmp_path / "some.txt", [known, "nobody-1"])
    empty = listed(tmp_path / "empty.txt", [])
    inside = listed(erased.folder / "inside.txt", [known])
    told = several(
        erased.folder,
        ["forget", "--samples", again],
        ["forget", "--samples", some],
        ["forget", "--samples", empty],
        ["forget", "--samples", inside],
        ["forget", "--samples", str(tmp_path / "none.txt")],
        ["forget", "--samples", some, "--class", "zero"],
        ["forget", "--where", "label ="],
        ["forget", "--where", "sample_id = 'digits-0001'"],
        ["forget", "--where", "1 = 1) UNION SELECT 1 --"],
        ["forget", "--class", "zebra"],
        ["forget", "--concept", "a purple dinosaur"],
        ["forget", "--class", "zero", "--policy", "soon"],
        ["forget", "--dry-run"],
    )
    Path(inside).unlink()
    (certificate,) = certificates(erased.folder)
    assert told[0].status == 0
    assert f"erased already: request {certificate['request']}" in told[0].out
    said = (
        "1 of 2 ids are not known here, the first is 'nobody-1'", "names no sample", "lies in the project", "cannot be read", "in one way",
        "is no condition",
        "may not name ids", "is no condition", "there is no class 'zebra'; there are: zero", "no caption speaks of",
        "--policy must be one of", "name its samples with",
    )  # fmt: skip
    for one, text in zip(told[1:], said, strict=True):
        assert one.status == 2
        assert text in one.err
        assert one.err.startswith("error: ")
        assert one.err.count("\n") == 1
    assert state(erased.folder) == unchanged


def test_conditions_classes_and_concepts_select_what_they_say(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path / "project")
    unchanged = state(folder)
    table = pq.read_table(folder / "data" / "pool" / "part-00000.parquet").to_pylist()
    threes = [row for row in table if row["label"] == 3]
    spoken = [row for row in table if row["caption"] == "a handwritten eight"]
    narrow = [row for row in threes if row["split"] == "train" and row["caption"] != "a handwritten three"]
    condition = "class = 'three' AND split = 'train' AND caption <> 'a handwritten three' AND source LIKE '%load_digits%'"
    told = several(
        folder,
        ["forget", "--class", "three", "--dry-run"],
        ["forget", "--concept", "Handwritten  Eight!", "--dry-run"],
        ["forget", "--where", condition, "--dry-run", "--policy", "retrain"],
    )
    assert [one.status for one in told] == [0, 0, 0], told
    counts = [int(one.out.split()[0]) for one in told]
    assert 0 < len(narrow) < len(threes) != len(spoken) > 0
    assert counts == [len(threes), len(spoken), len(narrow)]
    assert "digits-teacher/2 (champion) retrained" in words(told[2].out)
    assert state(folder) == unchanged


def test_work_that_was_cut_off_when_even_the_list_of_samples_was_gone_goes_on(erased: Erased, tmp_path: Path) -> None:
    folder = copied(erased.folder, tmp_path / "project")
    signed = certificates(folder)
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        assert database.execute("UPDATE tags SET value = 'purged' WHERE key = 'retort.state'").rowcount == 1
    before = history(Settings(folder), "digits-teacher")
    ran = retort(folder, "forget", "--samples", listed(tmp_path / "ids.txt", erased.pictures))
    assert ran.status == 0, ran.out + ran.err
    assert f"request {signed[0]['request']}: 10 samples, purged" in ran.out
    assert certificates(folder) == signed
    assert history(Settings(folder), "digits-teacher") == before
    assert not requests.unfinished(Store(Settings(folder)))


def test_the_next_run_does_not_bring_them_back(erased: Erased, tmp_path: Path) -> None:
    folder = copied(erased.folder, tmp_path / "project")
    (fresh,) = several(folder, ["lineage", "digits-student@champion", "--json"])
    assert fresh.status == 0
    refreshed = retort(folder, "refresh")
    assert "Everything was up to date" in refreshed.out, refreshed.out
    ran = retort(folder, "run")
    assert ran.status == 0, ran.out + ran.err
    assert not remains(folder, erased.pictures)
    assert pool_pictures(folder).keys() == erased.pool.keys() - erased.pictures.keys()
    (verified,) = several(folder, ["certificate", "verify", f".retort/certificates/{certificates(folder)[0]['request']}.json"])
    assert verified.status == 0, verified.out


def test_a_later_crawl_that_has_them_again_is_stopped_by_id_and_by_content(erased: Erased, tmp_path: Path) -> None:
    folder = copied(erased.folder, tmp_path / "project")
    gone, others = list(erased.pictures), [name for name in erased.pool if name not in erased.pictures][:300]
    stranger = np.random.default_rng(0).integers(0, 256, (1, 8, 8), dtype=np.uint8)
    rows = [(name, erased.pool[name]) for name in others]
    rows[10:10] = [(gone[0], stranger), (gone[1], erased.pictures[gone[1]])]
    rows[90:90] = [(f"crawl-{number}", erased.pictures[name]) for number, name in enumerate(gone[2:5])]
    rows += [("crawl-new", 255 - stranger)]
    source = tmp_path / "crawl.parquet"
    table = pa.table(
        {
            "sample_id": [name for name, _ in rows],
            "image": [{"bytes": png(image), "path": f"{name}.png"} for name, image in rows],
            "label": [number % 10 for number in range(len(rows))],
        }
    )
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps([str(digit) for digit in range(10)])}), source)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    workspace.write_params(folder, {**params, "pool": {"source": f"parquet:{source}"}})
    dvc(folder, "repro", "-q", "pool")
    assert pool_pictures(folder).keys() == {*others, "crawl-new"}
    assert pq.read_metadata(folder / "data" / "pool" / "quarantine.parquet").num_rows == 0
    assert json.loads((folder / "data" / "metrics" / "pool.json").read_text())["erased"] == 5
    assert not remains(folder, erased.pictures)


def test_a_gate_that_refuses_leaves_all_as_it_is_and_says_what_waits(
    finished: Path, waiting: tuple[Path, list[dict[str, np.ndarray]], Told]
) -> None:
    folder, parts, ran = waiting
    assert ran.status == 0, ran.out + ran.err
    assert "waits: the gate refuses digits-teacher" in words(ran.out)
    assert "run 'retort forget' again" in words(ran.out)
    assert aliases(folder) == aliases(finished) == {"digits-teacher": 2, "digits-student": 1}
    store = Store(Settings(folder))
    assert not [version for name in store.names() for version in store.versions(name) if version.tags.get("revoked", "false") != "false"]
    assert weights_of(finished).items() <= weights_of(folder).items()
    assert not certificates(folder)
    for part in parts:
        assert {".dvc/cache", ".retort/remote"} <= places(remains(folder, part)).keys()
    waits = requests.unfinished(store)
    assert [one.state for one in waits] == ["rebuilt", "rebuilt"]
    assert all("accuracy" in one.waiting and "digits-teacher" in one.waiting for one in waits)
    assert not set().union(*parts) & pool_pictures(folder).keys()  # the data is without them all the same


def test_requests_that_waited_together_are_done_together_and_certified_each_for_its_own(
    waiting: tuple[Path, list[dict[str, np.ndarray]], Told], tmp_path: Path
) -> None:
    folder = copied(waiting[0], tmp_path / "project")
    parts = waiting[1]
    workspace.change(folder, "registry", rules={"accuracy": {"min": 0.01}})
    old = {"digits-teacher/1", "digits-teacher/2", "digits-student/1"}
    assert old < weights_of(folder).keys()
    ran = retort(folder, "forget")
    assert ran.status == 0, ran.out + ran.err
    signed = certificates(folder)
    assert len(signed) == 2
    owned = [named_by(one, {**parts[0], **parts[1]}) for one in signed]
    assert sorted(map(sorted, owned)) == sorted(map(sorted, parts))
    assert signed[0]["models"] == signed[1]["models"]  # one pass over the models for both, by the strictest policy
    assert {one["action"] for one in signed[0]["models"] if one["champion"]} == {"retrained", "distilled again"}
    assert {f"{one['name']}/{one['version']}" for one in signed[0]["models"]} == old
    assert not old & weights_of(folder).keys()
    assert [entry["kind"] for entry in history(Settings(folder), "digits-teacher")].count("erased") == 2
    checks = several(folder, *(["certificate", "verify", f".retort/certificates/{one['request']}.json"] for one in signed))
    assert [one.status for one in checks] == [0, 0], checks
    assert not remains(folder, {**parts[0], **parts[1]})
    assert set(aliases(folder)) == {"digits-teacher", "digits-student"}


def test_where_a_refusal_revokes_nobody_serves(waiting: tuple[Path, list[dict[str, np.ndarray]], Told], tmp_path: Path) -> None:
    folder = copied(waiting[0], tmp_path / "project")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    workspace.write_params(folder, {**params, "erase": {"on_refusal": "revoke"}})
    ran = retort(folder, "forget")
    assert ran.status == 0, ran.out + ran.err
    assert aliases(folder) == {}
    with use(Session(Settings(folder))), pytest.raises(UserError, match="champion"):
        _registry.find_model("digits-student@champion")
    signed = certificates(folder)
    assert {one["gate"].partition(":")[0] for one in signed[0]["models"] if one["champion"]} == {"refused"}
    assert len(signed) == 2
    assert not remains(folder, {**waiting[1][0], **waiting[1][1]})
