"""The facts of a certificate once more, as far as they can be seen from this copy of the project.

Nothing is believed and nothing is changed: rows, weights and stored objects are read again. What cannot be reached, such as a remote
without a connection, is said to be unseen and never taken to be gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from tasks.core.erasure import _versions
from tasks.core.erasure._facts import Check, Facts, Model, Samples
from tasks.core.errors import UserError
from tasks.core.refs import EvidenceRef, ModelRef
from tasks.core.settings import Settings
from tasks.core.store import EXPERIMENT, Store

IN_SERVICE = ("champion", "candidate")
NO_REGISTRY, NO_VERSION = "there is no registry here", "this registry has no such version"


def everything(settings: Settings, store: Store | None, facts: Facts, *, own: bool) -> list[Check]:
    """All checks. `own`: the certificate was signed with the key of this copy of the project, so that its registry is this one."""
    return [
        *_rows(settings, facts),
        _suppressed(settings, facts),
        *_models(settings, store, facts, own),
        *_data_versions(settings, facts.irreproducible),
        _journal(settings, facts, own),
    ]


# data


def carrying(folder: Path, samples: Samples) -> int:
    """How many rows of a data folder carry one of the samples: by id, by a parent, or by content. Read as a stream.

    Every Parquet file of the folder is read, shards or not. Raises UserError, OSError, ValueError where it cannot be.
    """
    import pyarrow.parquet as pq

    from tasks.core.dataset import decode, read_info
    from tasks.core.erased import image_digest, salted, text_digest

    salt, info = bytes.fromhex(samples.salt), read_info(folder)
    ids, contents = (frozenset(map(bytes.fromhex, hashes)) for hashes in (samples.ids, samples.contents))
    content = "caption" if info.schema == "text" else "image"
    found = 0
    for path in sorted(folder.rglob("*.parquet")):
        with pq.ParquetFile(path) as file:
            texts = [name for name in ("sample_id", "value") if name in file.schema_arrow.names]  # `value`: of a row in quarantine
            others = [name for name in ("parents", content) if name in file.schema_arrow.names]
            for batch in file.iter_batches(1024, columns=[*texts, *others]):
                hit = [False] * batch.num_rows
                for name in texts:
                    for at, text in enumerate(batch[name].to_pylist()):
                        hit[at] |= text is not None and salted(text.encode(), salt) in ids
                if "parents" in others:
                    for at, parents in enumerate(batch["parents"].to_pylist()):
                        hit[at] |= any(salted(parent.encode(), salt) in ids for parent in parents or ())
                if contents and content in others and content == "caption":
                    for at, text in enumerate(batch[content].to_pylist()):
                        hit[at] |= text is not None and salted(text_digest(text), salt) in contents
                elif contents and content in others:
                    blobs = [(at, blob) for at, blob in enumerate(batch["image"].field("bytes").to_pylist()) if blob is not None]
                    for (at, _), pixels in zip(blobs, decode([blob for _, blob in blobs], info.shape), strict=True):
                        hit[at] |= salted(image_digest(pixels), salt) in contents
                found += sum(hit)
    return found


def _rows(settings: Settings, facts: Facts) -> Iterator[Check]:
    folders = {f"data/{path.parent.name}" for path in (settings.root / "data").glob("*/dataset.json")}
    named = {data.path for data in facts.data if (settings.root / data.path).resolve().is_relative_to(settings.root.resolve())}
    for path in sorted(folders | named):
        what, folder = f"rows of {path}", settings.root / path
        if not (facts.samples.ids or facts.samples.contents):
            yield Check(what, None, "the certificate names no samples to look for")
        elif not (folder / "dataset.json").exists():
            yield Check(what, None, "this folder is not here")
        else:
            try:
                found = carrying(folder, facts.samples)
            except (UserError, OSError, ValueError) as error:  # pyarrow's and Pillow's own are among them
                yield Check(what, None, f"they cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            else:
                yield Check(what, not found, f"{found} of them carry the samples" if found else "none of them carries the samples")


def _suppressed(settings: Settings, facts: Facts) -> Check:
    from tasks.core.erased import FOLDER, LIST, Erased

    what, samples = "suppression list", facts.samples
    try:
        listed = Erased.read(settings.root / FOLDER)
    except UserError as error:
        return Check(what, False, str(error))
    wanted = len(samples.ids) + len(samples.contents)
    if not wanted:
        return Check(what, None, "the certificate names no samples to look for")
    if len(listed.ids) + len(listed.contents) == 0:
        return Check(what, False, f"{FOLDER} is empty or not there: the samples could come back with the next pool")
    if listed.salt.hex() != samples.salt:
        return _by_number(settings.root / FOLDER / LIST, facts.request, wanted)
    missing = sum(bytes.fromhex(value) not in listed.ids for value in samples.ids)
    missing += sum(bytes.fromhex(value) not in listed.contents for value in samples.contents)
    return Check(
        what, not missing, f"{missing} of {wanted} traces are not on it" if missing else "the samples cannot come back with a pool"
    )


def _by_number(path: Path, request: str, wanted: int) -> Check:
    """Where list and certificate have each a salt of their own, hashes cannot be compared: only how many there are of the request."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["request", "kind"]).to_pylist()
    own = sum(row["request"] == request and row["kind"] in ("id", "content", "image") for row in rows)
    if own >= wanted:
        return Check("suppression list", True, f"it holds {own} traces of this request, as many as the certificate has")
    why = f"it holds {own} of {wanted} traces of this request; whether the others came with another request cannot be seen from hashes"
    return Check("suppression list", None, why)


# models


def _models(settings: Settings, store: Store | None, facts: Facts, own: bool) -> Iterator[Check]:
    from mlflow.exceptions import MlflowException

    gone = [model for model in facts.models if model.action != "waiting"]
    copies = _weights(settings, {model.sha256 for model in gone})
    for model in facts.models:
        called = f"{model.name} version {model.version}"
        if model.action == "waiting":
            yield Check(called, None, "it still waited for its replacement when the certificate was signed")
            continue
        try:
            yield from _version(store, model, called, copies.get(model.sha256, []), own)
            if model.replaced_by is not None:
                yield _evidence(store, model.name, model.replaced_by, own)
        except (MlflowException, OSError) as error:
            yield Check(called, None, f"the registry cannot be reached: {str(error).splitlines()[0] if str(error) else 'no answer'}")


def _version(store: Store | None, model: Model, called: str, copies: list[str], own: bool) -> Iterator[Check]:
    weights = f"weights of {called}"
    if copies:
        yield Check(weights, False, f"they are in {', '.join(copies[:3])}{' and elsewhere' if len(copies) > 3 else ''}")
    found = store.version(model.name, model.version) if store else None
    if store is None or found is None:
        why = NO_REGISTRY if store is None else NO_VERSION
        yield Check(called, None, why)
        if not copies:
            yield Check(weights, None, f"{why}; no file of this project holds them")
        return
    if found.tags["retort.sha256"] != model.sha256:
        yield Check(called, False if own else None, "the registry has other weights under this number than the certificate speaks of")
        return
    revoked = found.tags.get("revoked", "false") != "false"
    yield Check(called, revoked, "it is revoked" if revoked else "it is no longer revoked")
    # the same weights under whatever name and number: a version that was copied stands for them as well
    same = store.client.search_model_versions(f"tags.`retort.sha256` = '{model.sha256}'")
    by_name = {version.name: store.aliases(version.name) for version in same}
    serving = [f"{alias} of {v.name}" for v in same for alias in IN_SERVICE if by_name[v.name].get(alias) == int(v.version)]
    why = f"it stands as {', '.join(serving)}" if serving else "it is neither champion nor candidate"
    yield Check(f"service of {called}", not serving, why)
    free = [f"{v.name} version {v.version}" for v in same if v.tags.get("revoked", "false") == "false"]
    if others := [copied for copied in free if copied != called]:
        yield Check(f"copies of {called}", False, f"not revoked, with its weights: {', '.join(others[:3])}")
    if not copies:
        there, why = _stored(store, ModelRef(model_id=found.tags["retort.model"], run_id=found.tags["retort.run"], sha256=model.sha256))
        yield Check(weights, None if there is None else not there, why)


def _stored(store: Store, ref: ModelRef) -> tuple[bool | None, str]:
    """Whether a model's weights lie where MLflow keeps them, also where the model is marked as deleted; None where that is not seen."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        place = store.client.get_logged_model(ref.model_id).artifact_location
    except MlflowException:
        experiment = store.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return None, "the registry does not say where they were kept"
        place = f"{experiment.artifact_location.rstrip('/')}/models/{ref.model_id}/artifacts"
    address = urlparse(place)
    if address.scheme in ("", "file"):
        there = Path(url2pathname(address.path), "artifacts", "weights.safetensors").exists()
    else:
        try:
            listed = mlflow.artifacts.list_artifacts(artifact_uri=f"{place}/artifacts", tracking_uri=store.settings.tracking_uri)
        except Exception as error:  # whatever a store of any kind may say
            return None, f"their place cannot be reached: {type(error).__name__}"
        there = any(item.path.endswith("weights.safetensors") for item in listed)
    return there, "they lie where they lay" if there else "they are gone"


def _weights(settings: Settings, wanted: Iterable[str]) -> dict[str, list[str]]:
    """The files below `.retort` that hold weights of these sha256."""
    wanted, found = set(wanted), {}  # type: ignore[var-annotated]
    for path in sorted(settings.home.rglob("*.safetensors")) if wanted else ():
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if digest in wanted:
            found.setdefault(digest, []).append(str(path.relative_to(settings.root)))
    return found


def _evidence(store: Store | None, name: str, number: int, own: bool) -> Check:
    """Whether what was measured of the version that took a place can still be read."""
    from tasks.core.step import read_evidence

    what = f"evidence on {name} version {number}"
    found = store.version(name, number) if store else None
    if store is None or found is None:
        return Check(
            what, False if own and store else None, "there is no registry here" if store is None else "this registry has no such version"
        )
    tags = found.tags
    runs = [
        store.newest_run({"retort.about": tags["retort.sha256"]}),
        store.newest_run({"retort.role": "%evidence", "retort.inputs": f"%{tags['retort.model']}%"}, like=True),
    ]
    for run in filter(None, runs):
        try:
            figures = read_evidence(store, EvidenceRef(run_id=run)).figures
        except Exception as error:  # a store of any kind, or a file that is damaged
            return Check(what, False, f"it cannot be read: {type(error).__name__}")
        return Check(what, bool(figures), "it is there" if figures else "it holds no figures")
    return Check(what, False if own else None, "the registry holds none")


# the rest


def _data_versions(settings: Settings, versions: list[str]) -> Iterator[Check]:
    if not versions:
        return
    try:
        found, reached, unseen = _versions.held(settings, versions)
    except UserError as error:
        yield Check("old data versions", None, str(error))
        return
    for version in versions:
        what = f"data version {version[:12]}"
        if where := found.get(version):
            yield Check(what, False, f"it can be had again from {', '.join(where)}")
        else:
            yield Check(what, True, f"it cannot be had from {', '.join(reached)}")
    for name in unseen:
        yield Check(f"old data versions in {name}", None, "it cannot be reached from here, or it is empty")


def _journal(settings: Settings, facts: Facts, own: bool) -> Check:
    from tasks.core.saga import GENESIS, Journal

    what, path = "journal", settings.home / "journal.jsonl"
    if not path.exists():
        return Check(what, False if own and facts.journal != GENESIS else None, "there is no journal here")
    try:
        known = {GENESIS, *(entry["hash"] for entry in Journal(path).entries())}
    except UserError as error:
        return Check(what, False, str(error))
    there = facts.journal in known
    why = (
        "it is whole, and holds the entry that the certificate follows"
        if there
        else "it does not hold the entry that the certificate follows"
    )
    return Check(what, there or (False if own else None), why)
