"""An erasure is killed again and again, at random moments, and ends as if nothing had happened: one certificate, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows._promotion import history
from tasks.core.erasure.requests import STATES
from tasks.core.settings import Settings
from tests import workspace
from tests.conftest import copied
from tests.flows.asking import aliases, certificates, chosen, listed, named_by, several, weights_of
from tests.flows.remaining import pool_pictures, remains

pytestmark = [pytest.mark.faults, pytest.mark.long, pytest.mark.timeout(14400)]
KILLS = 20
NAMES = ("digits-teacher", "digits-student")


def killed_after(folder: Path, asked: list[str], seconds: float, *, state: str = "", children: bool = True) -> bool:
    """Start the command, kill its process group after that time; False where it ended by itself before.

    state     count the time from where a request has come to this state, or is past it
    children  kill those too that lead groups of their own; else they are left behind, for the next command to clear away
    """
    said = folder.parent / f"{folder.name}.log"
    with said.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "forget", *asked],
            cwd=folder, env=workspace.environment(), stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    until = 0.0 if state else time.monotonic() + seconds
    while child.poll() is None:
        if not until and any(STATES.index(one) >= STATES.index(state) for one in progress(folder)):
            until = time.monotonic() + seconds
        if until and time.monotonic() > until:
            below = psutil.Process(child.pid).children(recursive=True) if children else []
            os.killpg(child.pid, signal.SIGKILL)
            for one in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            child.wait()
            return True
        time.sleep(0.05)
    assert child.returncode == 0, said.read_text()
    return False


def check_whole(folder: Path, before: dict[str, Any]) -> None:
    """Nothing half-made may be seen, whenever one looks: a certificate only when all is done, and until then a champion that serves."""
    signed = certificates(folder)
    assert len(signed) <= 1
    champions, weights = aliases(folder), weights_of(folder)
    assert champions.keys() == set(NAMES)
    assert all(f"{name}/{version}" in weights for name, version in champions.items())
    assert history(Settings(folder), NAMES[0])[: len(before["history"])] == before["history"]
    if signed:
        assert not {one["sha256"] for one in signed[0]["models"]} & shas(folder, weights)


def shas(folder: Path, versions: Any) -> set[str]:
    """What the registry says that the weights of these versions hash to."""
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        found = database.execute("SELECT name, version, value FROM model_version_tags WHERE key = 'retort.sha256'").fetchall()
    return {value for name, version, value in found if f"{name}/{version}" in versions}


def outcome(folder: Path) -> dict[str, Any]:
    """What an erasure is for: the data's identity, the champions' weights, the revoked versions; and what the certificate says of it."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    outs = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        revoked = database.execute("SELECT name, version FROM model_version_tags WHERE key = 'revoked' AND value = 'true'").fetchall()
    (signed,) = certificates(folder)
    said = {key: [one[key] for one in signed["models"]] for key in ("name", "version", "action", "method", "replaced_by", "sha256", "gate")}
    return {
        "data": {path: md5 for path, md5 in outs.items() if not path.endswith((".json", ".csv"))},
        "champions": shas(folder, {f"{name}/{version}" for name, version in aliases(folder).items()}),
        "revoked": sorted(revoked),
        "models": said,
        "versions": signed["data"],
        "lost": signed["irreproducible"],
    }


def test_twenty_kills_of_an_erasure_change_nothing(finished: Path, tmp_path: Path) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    pool = pool_pictures(finished)
    pictures = {name: pool[name] for name in chosen(finished, pool)}
    asked = ["--samples", listed(tmp_path / "ids.txt", pictures)]

    calm = copied(finished, tmp_path / "calm")
    began = time.monotonic()
    assert not killed_after(calm, asked, 1800)
    whole = time.monotonic() - began

    kills, rounds = 0, 0
    while kills < KILLS:
        folder = copied(finished, tmp_path / f"project-{rounds}")
        before = {"history": history(Settings(folder), NAMES[0])}
        again, killed = asked, True
        while killed and kills < KILLS:
            # half of the moments are drawn from the whole time, half from what follows one of the states: the later ones take little of it
            state = rng.choice(["", rng.choice(STATES[:-1])])
            killed = killed_after(
                folder, again, rng.uniform(0.02, 0.06 if state else 0.9) * whole, state=state, children=rng.random() < 0.5
            )
            kills += killed
            check_whole(folder, before)
            if killed:
                print(f"kill {kills} in round {rounds}, after {state or 'a time'}: {progress(folder)}")
            if progress(folder):
                again = rng.choice([asked, []])  # asked again, or told to go on
        rounds += 1
        assert not killed_after(folder, [] if progress(folder) else asked, 1800)
        check_end(folder, calm, pictures)


def progress(folder: Path) -> list[str]:
    """How far the requests have come."""
    with sqlite3.connect(folder / ".retort" / "mlflow.db") as database:
        return [state for (state,) in database.execute("SELECT value FROM tags WHERE key = 'retort.state'")]


def check_end(folder: Path, calm: Path, pictures: dict[str, Any]) -> None:
    """The same end as without a kill, once."""
    assert progress(folder) == ["certified"]
    assert outcome(folder) == outcome(calm)
    (signed,) = certificates(folder)
    assert named_by(signed, pictures) == pictures.keys()
    entries = history(Settings(folder), NAMES[0])
    assert [entry["kind"] for entry in entries].count("erased") == 1
    assert not remains(folder, pictures)
    assert not set(weights_of(folder)) & {f"{one['name']}/{one['version']}" for one in signed["models"]}
    (verified,) = several(folder, ["certificate", "verify", f".retort/certificates/{signed['request']}.json", "--json"])
    assert verified.status == 0, json.loads(verified.out)
    left = [one for one in psutil.process_iter(["cwd", "cmdline"]) if one.info["cwd"] and str(folder) in one.info["cwd"]]
    assert not left, f"processes left behind: {[one.info['cmdline'] for one in left]}"
    assert not [path for path in (folder / "data").iterdir() if ".new-" in path.name or ".old-" in path.name]
