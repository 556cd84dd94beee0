"""Report: how the main job's result came to be, on one self-contained page.

Consumes  the evidence and verdicts of the main job, its data folders, params.yaml, and the lineage of the models
Produces  .retort/reports/<data set>-<key>.html, and the same file as an artifact of an MLflow run
Started   by `retort run`, or a schedule
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import _dvc, _students
from flows._session import NeedsRun, session, tell
from flows.distill import MEASURED
from tasks.core import catalog, files
from tasks.core.lineage import made_from
from tasks.core.page import TEMPLATE, Data, Gallery, Page, Stage, pictures, render
from tasks.core.refs import EvidenceRef, ModelRef, data_ref
from tasks.core.settings import read_params
from tasks.core.step import Done, read_evidence, revision

FOLDERS = {"pool": "data/pool", "filter": "data/filtered", "condense": "data/condensed", "generate": "data/generated"}
PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "scikit-learn", "diffusers", "peft", "transformers", "prefect", "mlflow", "dvc")
SHOWN = 16  # pictures of a gallery
CONDENSED = 60
OF_CLASS, CLASSES = 5, 20


@flow(name="report")
def report(evidence: Done, forgetting: Done | None, decisions: list[dict[str, Any]]) -> str:
    """Draw the page, or give the one that the same evidence, verdicts, data and settings made. Gives its path.

    evidence    of `evaluate`, on the models
    forgetting  of `evaluate_forgetting`; none of models of texts
    decisions   of `promote`
    """
    here = session()
    key = page_key(evidence, forgetting, decisions)
    path = here.settings.reports / f"{slug(data_name())}-{key[:12]}.html"
    stored = here.store.find(key) if path.exists() else None
    cached = stored is not None
    if stored is None:
        if here.planning:
            raise NeedsRun("report")
        tell(stage="report", state="start", method="page")
        stored = draw(key, path, evidence, forgetting, decisions)
        tell(stage="report", state="end", method="page", seconds=stored["seconds"])
    here.record("report", "page", cached, stored["seconds"], f"{stored['figures']['pictures']:.0f} pictures")
    return str(path)


def page_key(evidence: Done, forgetting: Done | None, decisions: list[dict[str, Any]]) -> str:
    """Changes with anything that the page is made from."""
    settings = session().settings
    what = {
        "evidence": [_run(done) for done in (evidence, forgetting) if done],
        "decisions": decisions,
        "data": {path: data_ref(settings, path).md5 for path in present()},
        "params": read_params(settings),
        "students": sweep_of(models_of(evidence)),
        "source": [
            catalog.source_digest("tasks.core.page", "tasks.core.page_pictures"),
            *(files.file_md5(path) for path in (*sorted(TEMPLATE.parent.glob("*.j2")), Path(__file__))),
        ],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


@task(name="report page", cache_policy=NO_CACHE, persist_result=False)
def draw(key: str, path: Path, evidence: Done, forgetting: Done | None, decisions: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw the page, write it and store it as an artifact of a run of its own. Gives the stored result."""
    here = session()
    store = here.store
    tags = {"retort.role": "report", "retort.method": "report", "retort.inputs": "{}", "retort.revision": revision(here.settings.root)}
    params = {name: _run(done) for name, done in (("evidence", evidence), ("forgetting", forgetting)) if done}
    run_id = store.start(key, "report", params=params, tags=tags, inputs=[])
    try:
        began = time.perf_counter()
        page = gather(evidence, forgetting, decisions)
        files.write_text(path, render(page))
        store.log_file(run_id, path)
        seconds = time.perf_counter() - began
    except BaseException:
        store.fail(run_id)
        raise
    result = {"report": path.name, "seconds": seconds, "figures": {"pictures": float(pictures(page))}}
    store.finish(run_id, key, result, {"seconds": seconds, "pictures": float(pictures(page))})
    return result


def gather(evidence: Done, forgetting: Done | None, decisions: list[dict[str, Any]]) -> Page:
    """All that the page shows."""
    here = session()
    models, tried = models_of(evidence), models_of(forgetting) if forgetting else {}
    titles, aliases, champions = registered(decisions)
    found = read_evidence(here.store, EvidenceRef(run_id=_run(evidence)))
    forgot = read_evidence(here.store, EvidenceRef(run_id=_run(forgetting))) if forgetting else None
    up = {f"{d['name']} {d['version']}" for d in decisions if d["promoted"]}
    runs = {name: here.store.client.get_run(ref.run_id).data.tags for name, ref in {**models, **tried}.items()}
    return Page(
        name=data_name(),
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        revision=revision(here.settings.root),
        seed=here.seed,
        decisions=decisions,
        trees=[made_from(here.settings, spec) for spec in [*specs(decisions), *champions, *present()]],
        titles=titles,
        aliases=aliases,
        stages=stages(),
        figures=found.figures,
        details=found.details,
        about={name: about(runs[name], titles.get(ref.model_id, "")) for name, ref in models.items()},
        promoted=[name for name, ref in models.items() if titles.get(ref.model_id) in up],
        forgetting=forgot.figures if forgot else {},
        forgetting_details=forgot.details if forgot else {},
        seconds={name: float(json.loads(runs[name].get("retort.result", "{}")).get("seconds", "nan")) for name in tried},
        request=next((runs[name]["retort.request"] for name in tried if "retort.request" in runs[name]), ""),
        data=data(),
        evidence={
            "evidence": _run(evidence),
            **({"forgetting": _run(forgetting)} if forgetting else {}),
            **{name: ref.model_id for name, ref in {**models, **tried}.items()},
        },
        settings=here.settings.params.read_text(encoding="utf-8"),
        versions=versions(),
        **students(models),
        **samples(),
    )


def models_of(done: Done) -> dict[str, ModelRef]:
    """The models that evidence was measured on, by their names in it."""
    tags = session().store.client.get_run(_run(done)).data.tags
    found = json.loads(tags["retort.inputs"])["models"]
    return {name: ModelRef(**{k: v for k, v in ref.items() if k != "kind"}) for name, ref in found.items()}


def registered(decisions: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, list[str]], list[str]]:
    """Of the models that were offered: the title of each version and the alias of the champion, both by model id; and the champions."""
    store = session().store
    titles: dict[str, str] = {}
    aliases: dict[str, list[str]] = {}
    champions = []
    for name in sorted({str(d["name"]) for d in decisions}):
        champion = store.aliases(name).get("champion")
        for found in store.versions(name):
            titles[found.tags["retort.model"]] = f"{name} {found.version}"
            if int(found.version) == champion:
                aliases[found.tags["retort.model"]] = [f"{name}@champion"]
                champions.append(f"{name}@champion")
    return titles, aliases, champions


def students(models: dict[str, ModelRef]) -> dict[str, Any]:
    """The students of the sweep that made the student, where one did."""
    run = sweep_of(models)
    if not run:
        return {}
    points, budget = _students.from_json(json.loads(session().store.artifact(run, _students.PICTURE).read_text(encoding="utf-8")))
    return {"students": points, "budget": budget, "most_ms": _students.bounds(budget).get(_students.LATENCY, {}).get("max")}


def sweep_of(models: dict[str, ModelRef]) -> str:
    """The run that measured the sweep which made the student; empty where there was none."""
    if "student" not in models:
        return ""
    wanted = {"retort.role": MEASURED, "retort.inputs": f"%{models['student'].model_id}%"}
    return session().store.newest_run(wanted, like=True) or ""


def specs(decisions: list[dict[str, Any]]) -> list[str]:
    """The versions that were offered, as `NAME/version`."""
    return [f"{d['name']}/{d['version']}" for d in decisions]


def about(tags: dict[str, str], title: str) -> str:
    """What a model is, in a few words."""
    return ", ".join(part for part in (title, tags.get("retort.method", "")) if part)


def stages() -> list[Stage]:
    """The closing table so far, each line with its method's full name and paper."""
    found = []
    for row in session().rows:
        card = catalog.cards().get(row.method if "." in row.method else f"{row.stage}.{row.method}")
        method, paper = (card.name, card.paper.removeprefix("none: ")) if card else (row.method, "")
        if card and card.arxiv:
            paper += f", arXiv {card.arxiv}"
        found.append(Stage(row.stage, method, paper, row.cached, row.seconds, row.figure))
    return found


def data() -> list[Data]:
    """The data folders that there are, as they are now."""
    from tasks.core.dataset import read_info

    here = session()
    found = []
    for stage, path in FOLDERS.items():
        if path in present():
            info = read_info(here.settings.root / path)
            by = str((info.made_by or {}).get("method", ""))
            # what is counted of each class is drawn, and not listed
            figures = {name: value for name, value in _dvc.figures(here.settings, stage).items() if ": " not in name}
            found.append(Data(path, data_ref(here.settings, path).md5, info.rows, by, figures))
    return found


def samples() -> dict[str, Any]:
    """Galleries, scores and generated images, as far as the folders are there and hold images."""
    from tasks.core import page_pictures as rows
    from tasks.core.dataset import Dataset

    root, there = session().settings.root, present()
    pool = Dataset.open(root / "data/pool")
    if pool.info.schema != "image":
        return {}
    galleries: list[Gallery] = [rows.from_pool(pool, SHOWN)]
    found: dict[str, Any] = {"galleries": galleries}
    if "data/filtered" in there:
        judged, found["scores"] = rows.judged(root / "data/pool", root / "data/filtered")
        galleries.extend(rows.extremes(judged, found["scores"], SHOWN))
        counted = _dvc.figures(session().settings, "filter")
        for what, kind in (("concepts", "frequency: "), ("tail", "tail: ")):
            found[what] = {name.removeprefix(kind): value for name, value in counted.items() if name.startswith(kind)}
    if "data/condensed" in there:
        galleries.append(rows.condensed(Dataset.open(root / "data/condensed"), CONDENSED))
        found["course"] = rows.course(root / "data/condensed")
    if "data/generated" in there:
        trusted = pool.split("reference")
        made = Dataset.open(root / "data/generated")
        found["class_rows"] = rows.by_class(trusted, made, OF_CLASS, CLASSES)
        found["class_rows_of"] = len(made.info.classes)
    return found


def present() -> list[str]:
    """The data folders that are there."""
    root = session().settings.root
    return [path for path in FOLDERS.values() if (root / path / "dataset.json").exists()]


def data_name() -> str:
    """Name of the data set."""
    from tasks.core.dataset import read_info

    return read_info(session().settings.root / "data" / "pool").name or "pool"


def slug(name: str) -> str:
    """The name, fit for a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "pool"


def versions() -> dict[str, str]:
    """Versions of what the numbers hang on."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _run(done: Done) -> str:
    assert isinstance(done.ref, EvidenceRef)
    return done.ref.run_id
