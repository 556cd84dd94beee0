"""`retort lineage` on a large project: a million samples, a hundred data versions, a thousand model versions.

Data versions and what models saw are written as lists of keys, which is what the first question to a real project leaves behind; the lock
files, the registry and the question itself are real.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import yaml

from tasks.core import seen
from tasks.core.refs import ModelRef
from tasks.core.settings import Settings
from tasks.core.store import Store

SAMPLES, DATA_VERSIONS, MODELS = 1_000_000, 100, 1_000


def fill(folder: Path) -> str:
    """Make the project; gives the id of a sample that all of it carries."""
    settings = Settings(folder)
    ids = [f"sample-{at:07d}" for at in range(SAMPLES)]
    keys = seen.keys_of(ids)
    rng, made = np.random.default_rng(0), []
    (settings.cache / "keys").mkdir(parents=True)
    wanted = seen.keys_of(ids[:1])
    for at in range(DATA_VERSIONS):
        part = np.union1d(keys[rng.random(len(keys)) < 0.9], wanted)
        md5 = f"{at:032x}.dir"
        np.save(settings.cache / "keys" / f"{md5}.npy", part, allow_pickle=False)
        digest = seen.digest(part)
        np.save(settings.cache / "keys" / f"{digest}.npy", part, allow_pickle=False)
        made.append(digest)
        lock = {"schema": "2.0", "stages": {"pool": {"cmd": "python -m tasks pool", "outs": [{"path": "data/pool", "md5": md5}]}}}
        (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
        for words in (["add", "-f", "dvc.lock"], ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", f"version {at}"]):
            subprocess.run(["git", *words], cwd=folder, check=True)
    store = Store(settings)
    client, experiment = store.client, store.experiment()
    client.create_registered_model("large-teacher")
    for at in range(MODELS):
        ref = {"model_id": f"m-{at:032x}", "sha256": f"{at:064x}"}
        tags = {
            "retort.role": "teacher", "retort.method": "train.supervised", "retort.seen": made[at % DATA_VERSIONS], "retort.done": "k",
            "retort.inputs": json.dumps({"data": [{"kind": "DataRef", "path": "data/pool", "md5": f"{at % DATA_VERSIONS:032x}.dir"}]}),
        }  # fmt: skip
        run = client.create_run(experiment, tags=tags).info.run_id
        model = ModelRef(run_id=run, **ref)
        client.set_tag(run, "retort.result", json.dumps({"model": model.model_dump()}))
        stamped = {"retort.model": model.model_id, "retort.run": run, "retort.sha256": model.sha256}
        client.create_model_version("large-teacher", source=f"{settings.artifacts.as_uri()}/none", run_id=run, tags=stamped)
    return ids[0]
