"""The scheduled run of all claims, on a real Prefect server, with claims of a few lines."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from flows import _claims, _measure
from flows import claims as module
from tasks.core import catalog
from tests import workspace
from tests.flows.test_claims import TOY


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the source whose claims are two toys, one of them published as it is."""
    root = workspace.make(tmp_path / "project", workspace.smoke_params())
    folder = root / "tests" / "claims"
    for path in folder.glob("*/*.py"):
        path.unlink()
    for name in ("filter/random.py", "unlearn/retrain.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TOY.format(data="()", seeds=5))
    monkeypatch.setattr(_claims, "FOLDER", folder)
    monkeypatch.setattr(_claims, "RESULTS", folder / "results")
    monkeypatch.setattr(catalog, "ROOT", root)
    _claims._load.cache_clear()
    for name in ("filter.random", "unlearn.retrain"):
        _measure.write(_measure.run(name, jobs=1), folder / "results")
    return root


def artifact(key: str) -> str:
    """The data of the newest artifact of a key."""
    from prefect.settings import PREFECT_API_URL

    with urllib.request.urlopen(f"{PREFECT_API_URL.value()}/artifacts/{key}/latest", timeout=10) as answer:
        return str(json.load(answer)["data"])


@pytest.mark.timeout(300)
def test_a_run_completes_where_nothing_changed_and_fails_with_a_notice_where_a_status_did(checkout: Path, server: None) -> None:
    same = module.claims(return_state=True)
    assert same.is_completed(), same.message
    assert same.message == "2 claims are what is published"
    before = (checkout / "tests/claims/results/filter.random.json").read_bytes()

    claim = checkout / "tests" / "claims" / "filter" / "random.py"
    claim.write_text(claim.read_text().replace("gain = 1.0 if", "gain = 0.0 if"))
    (checkout / "tests/claims/unlearn/retrain.py").write_text("CLAIM = 1")
    changed = module.claims(return_state=True)
    assert changed.is_failed()
    assert "filter.random: published as 'holds', now 'does not hold here'" in changed.message
    assert "unlearn.retrain: published as 'holds', now 'failed' (claim of unlearn.retrain" in changed.message
    assert "filter.random" in artifact("claims-notice")
    rows = {one["method"]: one for one in json.loads(artifact("claims"))}
    assert rows["filter.random"]["effect"] == pytest.approx(0.004)
    assert rows["unlearn.retrain"]["measured"] == "failed"
    assert (checkout / "tests/claims/results/filter.random.json").read_bytes() == before


def test_a_schedule_and_its_one_run_at_a_time_are_registered(server: None) -> None:
    from prefect.client.orchestration import get_client

    from flows.deployments import deployments

    [weekly] = [one for one in deployments() if (one.flow_name, one.name) == ("claims", "weekly")]
    weekly.apply()
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("claims/weekly")
    assert [schedule.schedule.cron for schedule in found.schedules] == ["0 3 * * 0"]
    assert found.global_concurrency_limit.limit == 1
    assert set(found.parameter_openapi_schema["properties"]) == {"methods", "first_seed", "seeds", "small"}


def test_where_there_are_no_claims_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: None) -> None:
    monkeypatch.setattr(_claims, "FOLDER", tmp_path)
    state = module.claims(return_state=True)
    assert state.is_failed()
    assert "there are no claims in" in state.message
