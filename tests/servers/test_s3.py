"""An S3-compatible store, on this machine, as DVC remote and as the place of MLflow's files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import workspace
from tests.servers.conftest import ports

pytest.importorskip("moto.server", reason="needs moto[server], boto3 and s3fs: pip install 'retort[dev]'")
pytestmark = pytest.mark.timeout(300)
BUCKET = "retort"

CLIENT = """
from flows import _promotion
from tasks.core import networks
from tasks.core.settings import project
from tasks.core.store import Store

store = Store(project())
run = store.start("s3", "s3", params={}, tags={}, inputs=[])
net = networks.convnet((1, 8, 8), 3, widths=(4,), hidden=8, mean=0.0, std=1.0)
ref = store.log_net(run, net, name="model", classes=["a", "b", "c"], tags={})
store.log_json(run, "evidence.json", {"accuracy": 1.0})
store.finish(run, "s3", {}, {"accuracy": 1.0})
version = store.register("bucketed", ref, {})
assert store.has_net(ref)
for a, b in zip(net.state_dict().values(), store.load_net(ref).state_dict().values(), strict=True):
    assert (a == b).all()
_promotion.move(project(), store, "bucketed", version, None, "promoting", "for the test")
assert store.embedded and store.aliases("bucketed") == {"champion": version}
_promotion.check(project(), store, "bucketed")
print(store.client.get_logged_model(ref.model_id).artifact_location)
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> dict[str, str]:
    """The bucket, and the environment of somebody who may write to it."""
    names = {
        "AWS_ACCESS_KEY_ID": "retort", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": endpoint,
    }  # fmt: skip
    account(endpoint).create_bucket(Bucket=BUCKET)
    return names


def account(endpoint: str) -> Any:
    import boto3

    names = {"aws_access_key_id": "retort", "aws_secret_access_key": "not-a-secret", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=endpoint, **names)


def keys(endpoint: str, prefix: str) -> list[str]:
    return [one["Key"] for one in account(endpoint).list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]


def run(folder: Path, variables: dict[str, str], *words: str) -> str:
    ran = subprocess.run(
        [sys.executable, *words], cwd=folder, env={**workspace.environment(), **variables}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_data_goes_to_a_bucket_and_comes_back(project: Path, endpoint: str, bucket: dict[str, str]) -> None:
    dvc = ("-m", "dvc")
    run(project, bucket, *dvc, "remote", "add", "-f", "-d", "bucket", f"s3://{BUCKET}/dvc")
    run(project, bucket, *dvc, "remote", "modify", "bucket", "endpointurl", endpoint)
    before = {path.name: path.read_bytes() for path in (project / "data" / "pool").iterdir()}
    run(project, bucket, *dvc, "push", "-q", "pool")
    assert keys(endpoint, "dvc/")
    shutil.rmtree(project / ".dvc" / "cache")
    shutil.rmtree(project / "data" / "pool")
    run(project, bucket, *dvc, "pull", "-q", "pool")
    assert {path.name: path.read_bytes() for path in (project / "data" / "pool").iterdir()} == before


def test_models_live_in_a_bucket_and_are_promoted_from_there(project: Path, endpoint: str, bucket: dict[str, str]) -> None:
    run(project, bucket, "-m", "flows.cli", "up", "--artifacts", f"s3://{BUCKET}/models", *ports())
    try:
        place = run(project, bucket, "-c", CLIENT).strip().splitlines()[-1]
        assert place.startswith(f"s3://{BUCKET}/models/")
        assert [key for key in keys(endpoint, "models/") if key.endswith("weights.safetensors")]
        assert not list((project / ".retort").rglob("weights.safetensors"))
    finally:
        run(project, bucket, "-m", "flows.cli", "down")
