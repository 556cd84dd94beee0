from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core.dataset import Dataset, write_parquet
from tasks.core.erasure._artifacts import Artifacts
from tasks.core.erasure._stores import DvcStore
from tasks.core.erasure.purge import irreproducible, purge
from tasks.core.erasure.remains import search
from tasks.core.errors import UserError
from tasks.core.refs import DataRef, data_ref, open_data
from tests import planted, workspace
from tests.planted import ERASED, IDS, TRACES, Planted

STORES = ("project/.dvc/cache", "project/.retort/remote", "spare")


def do(past: Planted, **more: Any) -> dict[str, int]:
    return {one.place: one.objects for one in purge(past.settings, past.store, TRACES, models=[past.tainted], **more)}


def everything(past: Planted) -> dict[str, bytes]:
    """What a purge may change: DVC's stores and what lies in `.retort`, less databases and locks."""
    found = planted.contents(past.settings.root.parent, *STORES, "project/.retort", "project/data")
    return {path: content for path, content in found.items() if not path.endswith((".db", ".db-wal", ".db-shm", "lock"))}


def test_exactly_the_carriers_go(past: Planted) -> None:
    before = everything(past)
    marked = {one.path for one in search(past.settings, past.store, TRACES).found}
    assert do(past) == {
        "DVC cache": 5,  # an entry of the run cache, two manifests, two shards
        "DVC remote local": 5,
        "DVC remote spare": 5,
        "MLflow artifacts": 4,
        "Prefect results": 1,
        "caches": 2,
        "logs": 2,
        "model weights": 1,
        "reports": 1,
        "requests": 1,
        "temporary folders": 1,
    }
    after = everything(past)
    assert search(past.settings, past.store, TRACES).found == []
    gone = before.keys() - after.keys()
    kept = {path for path in before.keys() & after.keys() if before[path] != after[path]}
    assert all(any(path.endswith(one) for one in marked) for path in kept)
    manifests = {md5[:2] + "/" + md5[2:] for md5 in (past.pools["held"], past.generated["held"])}
    others = {path for path in gone if not any(path.endswith(one) for one in marked)}
    for path in others:  # what goes without being a carrier itself
        names_one = "/runs/" in path or any(path.endswith(one) for one in manifests) or past.pools["held"] in path
        assert names_one or path.endswith("weights.safetensors"), path
    assert after.keys() - before.keys() == set()


def test_the_present_data_and_versions_without_the_sample_stay_readable_and_others_do_not(past: Planted) -> None:
    do(past)
    settings = past.settings
    shutil.rmtree(settings.cache / "versions")
    assert Dataset.open(settings.root / "data" / "pool").ids() == [name for name in IDS if name != ERASED]
    assert open_data(settings, data_ref(settings, "data/pool@first")).ids() == [*IDS[:4], IDS[8]]
    assert len(open_data(settings, data_ref(settings, "data/generated@first"))) == 4
    for path, md5 in (("data/pool", past.pools["held"]), ("data/generated", past.generated["held"])):
        with pytest.raises(UserError, match="neither in the DVC cache nor in a remote"):
            open_data(settings, DataRef(path=path, md5=md5))
    assert irreproducible(settings) == sorted([past.pools["held"], past.generated["held"]])
    ran = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "-q"], cwd=settings.root, env=workspace.environment(), capture_output=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_dvc_can_push_and_check_out_afterwards(past: Planted) -> None:
    do(past)
    root = past.settings.root
    before = planted.contents(root, "data")
    shutil.rmtree(root / "data" / "pool")
    for words in (["push", "-q"], ["checkout", "-q"]):
        ran = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=root, env=workspace.environment(), capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr
    assert planted.contents(root, "data") == before


def test_nothing_was_irreproducible_before(past: Planted) -> None:
    assert irreproducible(past.settings) == []


def test_rows_are_taken_out_of_the_figures_of_each_sample(past: Planted) -> None:
    do(past)
    for ref in (past.tainted, past.other):
        left = pq.read_table(past.store.artifact(ref.run_id, "per_sample.parquet"))
        assert left["sample_id"].to_pylist() == [name for name in IDS * 2 if name != ERASED]
        assert left.schema.names == ["model", "sample_id", "confidence"]
    assert json.loads(past.store.artifact(past.other.run_id, "chosen.json").read_text()) == {"chosen": [IDS[6]]}


def test_of_a_revoked_model_everything_but_the_weights_stays(past: Planted) -> None:
    do(past)
    assert not past.store.has_net(past.tainted)
    with pytest.raises(UserError):
        past.store.load_net(past.tainted)
    assert past.store.arch(past.tainted)["class_names"] == ["a", "b", "c"]
    assert past.store.version("tainted", 1).tags["retort.sha256"] == past.tainted.sha256
    assert past.store.client.get_run(past.tainted.run_id).data.metrics == {"accuracy": 1.0}
    assert past.store.load_net(past.other).state_dict()


def test_a_second_purge_has_nothing_to_do(past: Planted) -> None:
    do(past)
    before = everything(past)
    assert do(past) == {}
    assert everything(past) == before


def test_the_list_of_the_request_stays_while_it_is_asked_to(past: Planted) -> None:
    own = past.settings.home / "requests" / "r-held.parquet"
    assert "requests" not in do(past, keep=[own])
    assert [one.place for one in search(past.settings, past.store, TRACES).found] == ["requests"]
    assert do(past) == {"requests": 1}
    assert not own.exists()


def test_killed_after_every_single_deletion_it_ends_the_same(past: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    whole = planted.copied(past, tmp_path / "again")
    do(whole)
    wanted = everything(whole)
    left = 0

    def dying(act: Any) -> Any:
        def once(*words: Any) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            act(*words)

        return once

    from tasks.core.erasure import _caches

    kills = 0
    with monkeypatch.context() as dies:
        for owner, name in ((DvcStore, "remove"), (Artifacts, "remove"), (Artifacts, "put"), (_caches, "_remove"), (_caches, "_black_out")):
            dies.setattr(owner, name, dying(getattr(owner, name)))
        for _ in range(60):
            left = 1 if kills < 20 else 7  # writing over ids in logs has no end of its own: it is counted every time
            try:
                do(past)
                break
            except Killed:
                kills += 1
    do(past)
    assert kills > 15
    assert everything(past) == wanted
    assert search(past.settings, past.store, TRACES).found == []


def test_killed_for_good_between_two_shards_it_goes_on(past: Planted) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tasks.core.erasure._stores import DvcStore\n"
        "from tasks.core.erasure.purge import purge\n"
        "from tasks.core.settings import Settings\n"
        "from tests.planted import TRACES\n"
        "remove, done = DvcStore.remove, []\n"
        "def dying(place, relative):\n"
        "    remove(place, relative)\n"
        "    done.append(relative)\n"
        "    if len(done) == 10: os.kill(os.getpid(), 9)\n"
        "DvcStore.remove = dying\n"
        "purge(Settings(Path(sys.argv[1])), None, TRACES)\n"
    )
    root = past.settings.root
    ran = subprocess.run([sys.executable, "-c", script, str(root)], env={**workspace.environment(), "PYTHONPATH": "."}, check=False)
    assert ran.returncode == -9
    gone = do(past)
    assert gone["DVC cache"] + gone["DVC remote local"] + gone["DVC remote spare"] == 5
    assert search(past.settings, past.store, TRACES).found == []
    assert irreproducible(past.settings) == sorted([past.pools["held"], past.generated["held"]])


def test_present_data_that_carries_the_sample_is_refused_and_nothing_is_touched(past: Planted) -> None:
    planted.git(past.settings.root, "checkout", "-q", "held", "--", "dvc.lock")
    before = everything(past)
    with pytest.raises(UserError, match=r"dvc\.lock names still carries"):
        do(past)
    write_parquet(past.settings.root / "data" / "pool" / "more.parquet", pa.table({"sample_id": [ERASED]}))
    with pytest.raises(UserError, match="data/pool still carries"):
        do(past)
    (past.settings.root / "data" / "pool" / "more.parquet").unlink()
    assert everything(past) == before


def test_another_dvc_at_work_is_waited_for(past: Planted) -> None:
    locks = past.settings.root / ".dvc" / "tmp" / "rwlock"
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        locks.write_text(json.dumps({"write": {"/data/pool": {"pid": sleeper.pid, "cmd": "dvc repro pool"}}, "read": {}}))
        with pytest.raises(UserError, match=rf"another DVC is at work on this project \(process {sleeper.pid}: dvc repro pool\)"):
            do(past)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert do(past)["DVC cache"] == 5  # a dead holder holds nothing


def test_a_remote_that_does_not_answer_stops_the_purge(past: Planted) -> None:
    config = past.settings.root / ".dvc" / "config"
    config.write_text(config.read_text() + "['remote \"cloud\"']\n    url = http://127.0.0.1:9/nothing\n")
    before = everything(past)
    with pytest.raises(UserError, match="DVC remote cloud cannot be purged"):
        do(past)
    assert everything(past) == before


def test_a_store_that_keeps_what_it_was_told_to_remove_is_named(past: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = DvcStore.remove

    def keeps(self: DvcStore, relative: str) -> None:
        if self.place != "DVC remote spare":
            remove(self, relative)

    monkeypatch.setattr(DvcStore, "remove", keeps)
    with pytest.raises(UserError, match="DVC remote spare still holds"):
        do(past)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = pytest.importorskip("moto.server", reason="needs moto[server], boto3 and s3fs: pip install 'retort[dev]'")

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    address = "http://{}:{}".format(*running.get_host_and_port())
    names = {"AWS_ACCESS_KEY_ID": "retort", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**names, "MLFLOW_S3_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(name, value)
    account(address).create_bucket(Bucket="retort")
    yield address
    running.stop()


def account(address: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=address)


def keys(address: str) -> dict[str, bytes]:
    client = account(address)
    listed = client.list_objects_v2(Bucket="retort").get("Contents", [])
    return {one["Key"]: client.get_object(Bucket="retort", Key=one["Key"])["Body"].read() for one in listed}


def test_a_bucket_is_searched_and_purged_like_a_folder(past: Planted, bucket: str, tmp_path: Path) -> None:
    root, store = past.settings.root, past.store
    config = root / ".dvc" / "config"
    config.write_text(config.read_text() + f"['remote \"bucket\"']\n    url = s3://retort/dvc\n    endpointurl = {bucket}\n")
    for path, content in planted.contents(root.parent, "spare").items():  # what another copy of the project has pushed
        account(bucket).put_object(Bucket="retort", Key=path.replace("spare", "dvc", 1), Body=content)
    run = store.client.create_run(store.client.create_experiment("elsewhere", artifact_location="s3://retort/models")).info.run_id
    write_parquet(tmp_path / "per_sample.parquet", pa.table({"sample_id": IDS}))
    store.log_file(run, tmp_path / "per_sample.parquet")
    store.log_json(run, "evidence.json", {"accuracy": 1.0})
    before = keys(bucket)
    report = search(past.settings, store, TRACES)
    assert {one.what for one in report.found if one.place == "DVC remote bucket"} == {"id", "image", "parent"}
    assert [one.what for one in report.found if one.path.startswith("s3://")] == ["id"]
    assert report.unread == []
    assert do(past)["DVC remote bucket"] == 5
    after = keys(bucket)
    assert len(before) == len(after) + 5
    assert [key for key in after if after[key] != before[key]] == [f"models/{run}/artifacts/per_sample.parquet"]
    assert pq.read_table(store.artifact(run, "per_sample.parquet"))["sample_id"].to_pylist() == [name for name in IDS if name != ERASED]
    assert search(past.settings, store, TRACES).found == []
    assert do(past) == {}
