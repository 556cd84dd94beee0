"""Asking the registry: which versions run on a device, and which know most about a new task."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows._registry import FACTS
from flows._session import session
from flows.train import DATA
from tasks.core import catalog, files
from tasks.core.dataset import Dataset, read_info
from tasks.core.errors import UserError
from tasks.core.refs import ModelRef, data_ref, open_data
from tasks.core.settings import read_params
from tasks.core.store import Store
from tasks.registry import Offer, Ranking

SOURCES = ("digits", "parquet", "folder", "pairs")
QUERY_ROWS = 500


def fit(device: str, task: str, names: tuple[str, ...]) -> tuple[Ranking, dict[str, list[str]]]:
    """The versions that run on a device of params.yaml, the best first; and of the others why not.

    Raises UserError where params.yaml describes no device, or not this one.
    """
    from tasks.registry import semantic_management as semantic

    versions, devices = described(names)
    cfg = semantic.Config(device=device, task=task)
    ranking = semantic.semantic_management(Offer(facts={"versions": versions, "devices": devices}), cfg)
    fits = {place.version for place in ranking.places}
    chosen = devices[semantic.one_device(devices, device)]
    others = {name: semantic.why_not(facts, chosen, task) for name, facts in versions.items() if name not in fits}
    return ranking, others


def described(names: tuple[str, ...]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The facts of the versions, and the devices of params.yaml. Raises UserError where there are none of either."""
    here = session()
    devices = read_params(here.settings).get("devices") or {}
    if not devices:
        raise UserError(f"{here.settings.params} describes no device: add 'devices:' with a name, its flash, ram and sensors each")
    return facts_of(here.store, names), devices


def find_model(data: str, names: tuple[str, ...]) -> Ranking:
    """Versions for the rows of `data`, those that seem to know most about them first; by knowledge vectors that are made once.

    data  a folder of the project (`data/pool:reference`), or a source as `retort run --source` takes it, of which some rows are read
    """
    from tasks.registry import know2vec

    here = session()
    versions = _versions(here.store, names)
    if not versions:
        raise UserError("there is no registered model to ask about: make one with 'retort run'")
    matcher, vectors = _index(versions)
    with _rows(data) as rows:
        known = {spec: vectors[ref.sha256] for spec, ref in versions.items() if len(vectors[ref.sha256])}
        return know2vec.rank(known, matcher.query(rows))


def _index(versions: dict[str, ModelRef]) -> tuple[Any, dict[str, Any]]:
    """The matcher and the vector of each version's weights, read from `.retort/knowledge`; what is missing there is made."""
    import numpy as np

    from tasks.core.networks import draws
    from tasks.registry import know2vec

    here = session()
    rows = tuple(data_ref(here.settings, spec) for spec in DATA)
    cfg = catalog.configure("registry.know2vec", dict(read_params(here.settings).get("find") or {}))
    key = {
        "source": catalog.source_digest("tasks.registry.know2vec"),
        "settings": cfg.model_dump(mode="json"),
        "data": [ref.md5 for ref in rows],
        "seed": here.seed,
    }
    place = here.settings.home / "knowledge" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    made = place / "matcher.npz"
    if not made.exists():
        say("fitting the matcher, once for this data")
        matcher = know2vec.fit_matcher(open_data(here.settings, *rows), cfg, seed=here.seed)
        _save(made, matcher.to_arrays())
    else:
        with np.load(made, allow_pickle=False) as stored:
            matcher = know2vec.Matcher.from_arrays(dict(stored))
    known: dict[str, Any] = {}
    if (place / "vectors.npz").exists():
        with np.load(place / "vectors.npz", allow_pickle=False) as stored:
            known = dict(stored)
    missing = {ref.sha256: ref for ref in versions.values() if ref.sha256 not in known}
    for at, (sha256, ref) in enumerate(missing.items(), 1):
        say(f"asking model {at} of {len(missing)} what it knows, once")
        net = here.store.load_net(ref)
        # one for images of another shape, or one that draws them, has no vector, and is never named
        fits = tuple(net.arch["shape"]) == matcher.shape and not draws(net.arch)
        known[sha256] = matcher.knowledge(net) if fits else np.zeros(0, np.float32)
    if missing:
        _save(place / "vectors.npz", known)
    return matcher, known


def _save(path: Path, arrays: dict[str, Any]) -> None:
    import io

    import numpy as np

    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    files.write_bytes(path, out.getvalue())


@contextmanager
def _rows(data: str) -> Iterator[Dataset]:
    """The rows of a folder of the project; of a source as many as show what it holds, brought to the pool's size and colours."""
    here = session()
    if data.partition(":")[0] not in SOURCES:
        yield open_data(here.settings, data_ref(here.settings, data))
        return
    from tasks.pool import read

    shape = read_info(here.settings.root / "data" / "pool").shape
    with tempfile.TemporaryDirectory(dir=here.settings.home) as place:
        size, mode = shape[1] if shape[1] == shape[2] else None, "grey" if shape[0] == 1 else "rgb"
        wanted = {"source": data, "limit": QUERY_ROWS, "size": size, "mode": mode, "test": 0.0, "validation": 0.0, "reference": 0.0}
        read.read_pool(read.configure(wanted | {"allow_empty_class": True}), Path(place, "rows"), seed=here.seed)
        yield Dataset.open(Path(place, "rows"))


def _versions(store: Store, names: tuple[str, ...]) -> dict[str, ModelRef]:
    """Every version that is not revoked."""
    tagged = _standing(store, names).items()
    return {spec: ModelRef(model_id=tags["retort.model"], run_id=tags["retort.run"], sha256=tags["retort.sha256"]) for spec, tags in tagged}


def _standing(store: Store, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The tags of every version that is not revoked, by `NAME/version`, in the order of names and numbers."""
    known = [one for one in store.all_versions() if one.tags.get("revoked", "false") == "false" and (not names or one.name in names)]
    return {f"{one.name}/{one.version}": one.tags for one in sorted(known, key=lambda one: (one.name, int(one.version)))}


def say(words: str) -> None:
    """Say on the screen what takes long."""
    sys.stderr.write(f"{words}\n")


def facts_of(store: Store, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What is known of every version that is not revoked, by `NAME/version`."""
    found = {spec: json.loads(tags[FACTS]) for spec, tags in _standing(store, names).items() if FACTS in tags}
    if not found:
        raise UserError("there is no registered model to ask about: make one with 'retort run'")
    return found
