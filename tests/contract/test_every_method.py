"""One contract over every method that the catalogue finds. Adding a method adds its cases by itself."""

from __future__ import annotations

import inspect
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tasks.core import catalog, loop, networks, texts
from tasks.core.dataset import SCHEMAS, Dataset, Writer
from tasks.core.errors import UserError
from tasks.core.evidence import Evidence
from tasks.core.files import folder_md5
from tasks.core.method import Made, MethodConfig, Taught
from tasks.core.metrics import Figure
from tasks.core.networks import Net
from tasks.registry import Decision, Offer, Ranking

NAMES = sorted(catalog.cards())
SCRATCH = tempfile.TemporaryDirectory(prefix="retort-contract-")
HEAVY = ("diffusers", "transformers", "peft", "sklearn", "ray", "mlflow", "prefect", "matplotlib")


def small_net(data: Dataset, seed: int, shift: float = 0.0) -> Net:
    with loop.seeded(seed), torch.no_grad():
        net = networks.convnet(data.info.shape, len(data.info.classes), widths=(8, 8), hidden=16, mean=0.3, std=0.3)
        net.head.bias[0] += shift
    return net


def small_denoiser(data: Dataset, kind: str) -> Net:
    """A diffusion model that has learnt nothing."""
    classes = len(data.info.classes)
    arch = {"kind": kind, "shape": list(data.info.shape), "classes": classes, "mean": 0.0, "std": 1.0, "levels": 8, "one_step": None}
    own: dict[str, Any] = {"backbone": "mlp", "hidden": 16, "depth": 1, "betas": [0.01, 0.2]}
    if kind == "text_denoiser":
        prompts = [f"a photo of {name}" for name in data.info.classes]
        own = {"prompts": prompts, "words": [], "channels": 8, "spare": 4, "prediction": "v_prediction", "betas": "cosine"}
    with loop.seeded(1):
        return networks.build({**arch, **own}).eval()


def small_reader(data: Dataset, seed: int) -> Net:
    with loop.seeded(seed):
        own: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "words": 64, "longest": 16, "dropout": 0.0, "pooling": "mean"}
        return texts.fresh(len(data.info.classes), **own)


def texts_of(data: Dataset) -> Dataset:
    """The same rows, their captions in the place of their images."""
    folder = Path(SCRATCH.name, uuid.uuid4().hex)
    known = [name for name in SCHEMAS["text"].names if name != "_clean"]
    with Writer(folder, replace(data.info, schema="text", shape=(0, 0, 0))) as out:
        for batch in data.batches(known):
            out.write(pa.table([*batch.columns, pa.nulls(len(batch), pa.bool_())], names=[*known, "_clean"]))
    return Dataset.open(folder)


def condensed(data: Dataset) -> Dataset:
    """Condensed rows of the data, as the stage writes them."""
    method = catalog.get("condense.random")
    made = method.entry(data, data, 10, method.smoke)
    folder = Path(SCRATCH.name, uuid.uuid4().hex)
    with Writer(folder, replace(data.info, schema="condensed", made_by=None)) as out:
        out.write(made.rows)
    return Dataset.open(folder)


def evidence_for(data: Dataset) -> Evidence:
    from tasks.evaluate import classification

    test = data.split("test")
    models = {"candidate": small_net(data, 1), "champion": small_net(data, 2)}
    found = classification.classification(models, {"test": test}, classification.SMOKE)
    assert isinstance(found.figures["candidate"]["accuracy"], Figure)
    return found


def offer_for(data: Dataset) -> Offer:
    """Three versions that went on from one network, with all that a registry method may ask for."""
    nets = {f"digits-teacher/{at + 1}": small_net(data, 1, shift=0.1 * at) for at in range(3)}
    versions = {
        name: {"task": "digits", "sensor": "camera", "shape": [1, 8, 8], "weight_bytes": 20_000 * (at + 1), "activation_bytes": 8_000}
        for at, name in enumerate(nets)
    }
    devices = {"board": {"sensors": ["camera"], "flash_bytes": 50_000, "ram_bytes": 16_000}}
    rows = {"train": data.split("train"), "choose": data.split("validation"), "query": data.split("reference")}
    return Offer(
        nets,
        {**rows, **{name: data.split("train") for name in nets}},
        evidence_for(data),
        {"versions": versions, "devices": devices},
    )


def run(name: str, data: Dataset, seed: int) -> Any:
    """Call a method as its family's signature says, at its smallest, on the tiny data set."""
    method = catalog.get(name)
    family, call, cfg = method.card.family, method.entry, method.smoke
    train, reference, test = data.split("train"), data.split("reference"), data.split("test")
    if family == "filter":
        return call(train, reference, cfg, seed=seed)
    if family == "condense":
        return call(train, data.split("validation"), 10, cfg, seed=seed)
    if family == "generate":
        return call(reference, train, 2, cfg, seed=seed)
    if family == "train":
        as_read = {catalog.CONDENSED: condensed, "text": texts_of}.get(method.reads, lambda rows: rows)
        return call(as_read(train), cfg, seed=seed)
    if family == "distill" and method.reads == "text":
        return call([small_reader(data, 1)], texts_of(train + reference.without_labels()), cfg, seed=seed)
    if family == "distill":
        given = [small_net(data, 1)], train + reference.without_labels(), cfg
        try:
            return call(*given, seed=seed)
        except UserError as refusal:  # some go on from a student only, and say how to name one
            if "--student" not in str(refusal):
                raise
            return call(*given, start=small_net(data, 4), seed=seed)
    if family == "unlearn" and method.takes != catalog.CLASSIFIER:
        fives = train.labels() == 5
        return call(small_denoiser(data, method.takes), train.where(fives), train.where(~fives), cfg, seed=seed)
    if family == "unlearn":
        return call(small_net(data, 1), train.take(np.arange(10)), train.take(np.arange(10, len(train))), cfg, seed=seed)
    if family == "evaluate":
        models = {"original": small_net(data, 1), "retrain": small_net(data, 2), "unlearned": small_net(data, 3)}
        rows = {"test": test, "forget": train.take(np.arange(10)), "retain": train.take(np.arange(10, len(train))), "gallery": reference}
        if method.takes != catalog.CLASSIFIER:
            models = {"judge": small_net(data, 1), "original": small_denoiser(data, "denoiser")}
            rows["forget"] = train.where(train.labels() == 5)
        return call(models, rows, cfg, seed=seed)
    if family == "registry":
        return call(offer_for(data), cfg, seed=seed)
    raise AssertionError(f"family {family} has no case here: add one that follows its signature")


RESULTS: dict[str, type | tuple[type, ...]] = {
    "filter": Made,
    "condense": Made,
    "generate": Made,
    "train": Net,
    "distill": (Net, Taught),
    "unlearn": Net,
    "evaluate": Evidence,
    "registry": (Decision, Net, Ranking),
}
SCHEMA_OF = {"filter": "verdicts", "condense": "condensed", "generate": "image"}


def as_bytes(result: Any) -> bytes:
    """A result as bytes that are equal where and only where the results are, timings left out."""
    if isinstance(result, Made):
        return repr((result.rows.to_pylist(), sorted(result.figures.items()), result.curve)).encode()
    if isinstance(result, Taught):
        return as_bytes(result.net) + repr(sorted(result.figures.items())).encode()
    if isinstance(result, Net):
        return b"".join(value.numpy().tobytes() for value in result.state_dict().values()) + repr(result.arch).encode()
    if isinstance(result, Evidence):
        kept = {m: {k: f for k, f in by.items() if "latency" not in k} for m, by in result.figures.items()}
        return repr((kept, result.data, result.per_sample.to_pylist() if result.per_sample is not None else None)).encode()
    return repr(result).encode()


@pytest.mark.parametrize("name", NAMES)
def test_a_class_that_was_erased_as_a_whole_is_missed_by_no_method(name: str, tiny: Dataset) -> None:
    left = replace(tiny.where(tiny.labels() != 3), info=replace(tiny.info, absent=("three",)))
    made = run(name, left, 0)
    if isinstance(made, Made) and "label" in made.rows.column_names:
        assert 3 not in made.rows["label"].to_pylist()


@pytest.mark.parametrize("name", NAMES)
def test_card_docstring_and_config_are_complete(name: str) -> None:
    method = catalog.get(name)
    doc = inspect.getdoc(sys.modules[method.card.module]) or ""
    assert method.card.claim
    assert doc.splitlines()[0].strip().endswith((".", ":"))
    for heading in ("Paper", "Idea", "Small", "Limits"):
        assert any(line.startswith(heading) for line in doc.splitlines()), f"{name}: the docstring has no {heading}"
    assert issubclass(method.config, MethodConfig)
    assert isinstance(method.smoke, method.config)
    assert method.config.model_validate_json(method.smoke.model_dump_json()) == method.smoke
    with pytest.raises(ValueError, match="frozen"):
        setattr(method.smoke, next(iter(method.config.model_fields)), None)


@pytest.mark.parametrize("name", NAMES)
def test_entry_has_its_familys_signature(name: str) -> None:
    method = catalog.get(name)
    family = sys.modules[f"tasks.{method.card.family}"]
    wanted = [p for p in inspect.signature(family.SIGNATURE.__call__).parameters.values() if p.name != "self"]
    found = list(inspect.signature(method.entry).parameters.values())
    assert [(p.name, p.kind) for p in found] == [(p.name, p.kind) for p in wanted]


def test_each_module_imports_alone_and_light(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(
        "import os, sys, torch, numpy, pyarrow, pyarrow.parquet, pydantic, importlib\n"
        "bad = []\n"
        "for name in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        importlib.import_module(name)\n"
        f"        heavy = [h for h in {HEAVY!r} if h in sys.modules]\n"
        "        if heavy: print(name, 'imports', heavy, flush=True)\n"
        "        os._exit(1 if heavy else 0)\n"
        "    if os.waitpid(child, 0)[1]: bad.append(name)\n"
        "sys.exit(', '.join(bad) or 0)\n"
    )
    modules = [card.module for card in catalog.cards().values()]
    ran = subprocess.run(
        [sys.executable, str(script), *modules], capture_output=True, text=True, cwd=catalog.ROOT, env={**os.environ, "PYTHONPATH": "."}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", NAMES)
def test_smallest_run_keeps_the_contract(name: str, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a method must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    catalog.get(name)  # imports are not the method's time
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    where = (Path.cwd(), torch.get_default_dtype(), torch.get_num_threads(), folder_md5(tiny.parts[0].folder))
    began = time.process_time()
    first = run(name, tiny, seed=3)
    spent = time.process_time() - began
    after = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    assert before == after, "the global random state was moved"
    assert where == (Path.cwd(), torch.get_default_dtype(), torch.get_num_threads(), folder_md5(tiny.parts[0].folder))
    assert spent < 10 * torch.get_num_threads(), f"SMOKE took {spent:.1f} s of CPU"
    family = name.partition(".")[0]
    assert isinstance(first, RESULTS[family])
    if isinstance(first, Made):
        assert first.rows.schema.names == SCHEMAS[SCHEMA_OF[family]].names
        assert first.rows.schema.types == SCHEMAS[SCHEMA_OF[family]].types
    assert as_bytes(first) == as_bytes(run(name, tiny, seed=3)), "the same seed gave another result"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("distill.", "unlearn.", "evaluate.", "registry."))])
def test_models_that_come_in_are_left_as_they_were(name: str, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Net, bytes]] = []

    def remembering(build: Callable[..., Net]) -> Callable[..., Net]:
        def remembered(*args: Any, **kwargs: Any) -> Net:
            net = build(*args, **kwargs)
            made.append((net, as_bytes(net)))
            return net

        return remembered

    for build in (small_net, small_denoiser, small_reader):
        monkeypatch.setitem(globals(), build.__name__, remembering(build))
    result = run(name, tiny, seed=0)
    assert made
    for net, content in made:
        assert as_bytes(net) == content
        assert net is not result
        assert all(weights.requires_grad for weights in net.parameters())
