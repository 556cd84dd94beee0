"""Pages to look at: made-up results as the flows leave them, plain ones and awkward ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tasks.condense._course import Course
from tasks.core import metrics, page_claims, page_pictures
from tasks.core.card import Card, Source
from tasks.core.dataset import SCHEMAS, Dataset, Writer, encode, image_column, write_parquet
from tasks.core.dataset import Info as DataInfo
from tasks.core.files import folder_md5
from tasks.core.metrics import Figure
from tasks.core.page import ClassRow, Data, Gallery, Page, Picture, Scores, Stage
from tasks.core.page_front import Point

EVIL = "<script>alert(1)</script> \"quoted\" & 'more' \u202egnp.exe\x00\nnext line"
SHARES = {"teacher": 0.972, "student": 0.955, "unlearned": 0.966}
REQUEST = "r-5b0e6c1d2f3a4b5c"


def project(tiny: Dataset, folder: Path) -> Path:
    """Data folders as the stages leave them, made of the tiny pool: a third of the train captions is wrong, one of them is hostile."""
    rng = np.random.default_rng(0)
    names, labels, images = tiny.info.classes, tiny.labels(), tiny.images()
    splits = tiny.column("split").to_pylist()
    clean = np.array([s != "train" or rng.random() > 0.33 for s in splits])
    said = [names[k] if good else names[(k + 3) % 10] for k, good in zip(labels, clean, strict=True)]
    captions = [f"a photo of the digit {name}" for name in said]
    wrong = np.flatnonzero(~clean)
    captions[wrong[0]] = EVIL
    rows = {
        "sample_id": tiny.ids(),
        "image": image_column(encode(images)),
        "label": labels,
        "caption": captions,
        "split": splits,
        "parents": pa.array([[]] * len(labels), pa.list_(pa.string())),
        "_clean": clean,
    }
    with Writer(folder / "pool", replace(tiny.info, made_by={"method": "pool.read"})) as out:
        out.write(pa.table(rows, SCHEMAS["image"]))
    train = np.flatnonzero(np.array(splits) == "train")
    scores = np.where(clean[train], 0.45, 0.1) + rng.normal(0, 0.12, len(train))
    scores[train == wrong[0]] = -0.9
    kept = scores > np.quantile(scores, 0.4)
    order = rng.permutation(len(train))  # verdicts need not stand in the pool's order
    judged = {"sample_id": [tiny.ids()[i] for i in train[order]], "score": scores[order], "kept": kept[order], "reason": [""] * len(train)}
    info = DataInfo("verdicts", of={"path": "../pool", "md5": folder_md5(folder / "pool")}, name="digits", made_by={"method": "filter.dfn"})
    with Writer(folder / "filtered", info) as out:
        out.write(pa.table(judged, SCHEMAS["verdicts"]))
    few = np.sort(train[:50])
    learned = {
        "sample_id": [f"condensed-{i}" for i in range(50)],
        "image": image_column(encode(images[few])),
        "label": labels[few],
        "caption": [None] * 50,
        "split": ["train"] * 50,
        "parents": [["d00001"]] * 50,
        "pixels": [[0.0]] * 50,
        "target": [[0.0]] * 50,
    }
    with Writer(folder / "condensed", replace(tiny.info, schema="condensed", made_by={"method": "condense.krr_st"})) as out:
        out.write(pa.table(learned, SCHEMAS["condensed"]))
        course, drift = Course(8), torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
        for step in range(9):
            course(step, torch.from_numpy(images[few] / 255) + step * drift / 8)
        write_parquet(out.temporary / "course.parquet", course.rows(learned["sample_id"]))
    made = np.concatenate([np.flatnonzero(labels == k)[:6] for k in range(10)])
    noise = rng.integers(-40, 40, (60, 1, 8, 8))
    generated = {
        **{name: [values[i] for i in made] for name, values in rows.items() if name not in ("image", "sample_id")},
        "sample_id": [f"generated-{i}" for i in range(60)],
        "image": image_column(encode(np.clip(images[made] + noise, 0, 255).astype(np.uint8))),
        "parents": [["d00002"]] * 60,
        "_clean": [None] * 60,
    }
    with Writer(folder / "generated", replace(tiny.info, made_by={"method": "generate.datadream"})) as out:
        out.write(pa.table(generated, SCHEMAS["image"]))
    return folder


def evidence(n: int = 360) -> tuple[dict[str, dict[str, Figure]], dict[str, Any]]:
    rng = np.random.default_rng(1)
    figures: dict[str, dict[str, Figure]] = {}
    details: dict[str, Any] = {"classes": [f"digit {k}" for k in range(10)], "rows": n}
    details.update(confusion={}, reliability={})
    labels = rng.integers(0, 10, n)
    for at, (name, share) in enumerate(SHARES.items()):
        hits = rng.random(n) < share
        predicted = np.where(hits, labels, (labels + rng.integers(1, 10, n)) % 10)
        confidence = np.clip(np.where(hits, rng.beta(9, 1, n), rng.beta(4, 3, n)), 0.1, 1)
        figures[name] = {
            "accuracy": metrics.share(hits),
            "worst_class_accuracy": metrics.share(hits[labels == 8]),
            "ece": metrics.calibration_error(confidence, hits, draws=50),
            "nll": metrics.mean(-np.log(np.where(hits, confidence, 1 - confidence + 1e-3)), draws=50),
            "latency_ms_b1": Figure.exact(0.21 + at / 10),
            "latency_ms_b64": Figure.exact(1.7 + at),
            "parameters": Figure.exact([26122, 6890, 26122][at]),
            "size_bytes": Figure.exact([104976, 27560, 104976][at]),
        }
        details["confusion"][name] = metrics.confusion(labels, predicted, 10).tolist()
        details["reliability"][name] = metrics.reliability(confidence, hits)
    return figures, details


def forgetting(void: bool = False) -> tuple[dict[str, dict[str, Figure]], dict[str, Any]]:
    values = {
        "original": (0.0, 99.8, 97.2, 0.0, 7.7, 0.52),
        "unlearned": (10.0, 99.1, 96.6, 10.0, 2.4, 0.55),
        "retrain": (20.0, 99.8, 97.0, 10.0, 0.0, 0.57),
        "finetune": (0.0, 99.9, 97.3, 0.0, 7.6, 0.52),
    }
    figures = {
        name: {
            **{k: Figure(v, max(0.0, v - 3), min(100.0, v + 3)) for k, v in zip(("ua", "ra", "ta", "mia"), row, strict=False)},
            "avg_gap": Figure.exact(row[4]),
            "zrf": Figure(row[5], row[5] - 0.02, row[5] + 0.02),
            "void": Figure.exact(float(void)),
        }
        for name, row in values.items()
    }
    said = "retraining moves UA by 20.0 points on 10 rows, 18.0 are needed: the comparison is meaningful"
    return figures, {"rows": {"forget": 10, "retain": 1161, "test": 360}, "void": said}


def trees() -> list[dict[str, Any]]:
    def node(kind: str, name: str, id_: str, by: str, *inputs: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "name": name, "id": id_, "made_by": by, "inputs": list(inputs)}

    pool = node("data", "data/pool", "7f3a90cc.dir", "pool", node("source", "digits", "digits", ""))
    filtered = node("data", "data/filtered", "a81be02f.dir", "filter.dfn", pool)
    rejected = {**filtered, "name": "data/filtered (rejected rows)"}
    generated = node("data", "data/generated", "0c44d1e9.dir", "generate.datadream", pool, filtered)
    condensed = node("data", "data/condensed", "5f6e7d8c.dir", "condense.krr_st", pool, filtered)
    teacher = node("model", "teacher", "m-teacher1", "train.supervised", filtered, generated)
    student = node("model", "digits-student/1", "m-student1", "distill.ssld", teacher, filtered, rejected)
    view = {"name": f"data/filtered (only {REQUEST})"}, {"name": f"data/filtered (without {REQUEST})"}
    unlearned = node("model", "digits-teacher/2", "m-teacher2", "unlearn.l1_sparse", teacher, *({**filtered, **v} for v in view), generated)
    return [student, unlearned, condensed]


def decisions(*, student: bool = True) -> list[dict[str, Any]]:
    def rule(
        name: str, passed: bool, value: float, reason: str, champion: float | None = None, low: float = 0, high: float = 0
    ) -> dict[str, Any]:
        low, high = (low, high) if champion is not None else (value, value)
        return {"rule": name, "passed": passed, "candidate": value, "champion": champion, "low": low, "high": high, "reason": reason}

    first = [
        rule(
            "accuracy at least 0.5",
            student,
            0.955 if student else 0.41,
            "accuracy misses at least 0.5" if not student else "accuracy is met",
        ),
        rule("ece at most 0.2", True, 0.031, "ece 0.0310 meets at most 0.2"),
    ]
    second = [*first[1:], rule("accuracy within 0.02 of champion", True, 0.966, "not worse than the champion", 0.972, -0.0167, 0.0056)]

    def verdict(rules: list[dict[str, Any]], against: int | None) -> dict[str, Any]:
        met = all(r["passed"] for r in rules)
        basis = {"evidence": "e1", "gate": "registry.gate", "settings": {}, "against": against}
        return {"promote": met, "reason": "; ".join(r["reason"] for r in rules), "rules": rules, "basis": basis}

    return [
        {"name": "digits-student", "version": 1, "promoted": student, "verdict": verdict(first, None)},
        {"name": "digits-teacher", "version": 2, "promoted": True, "verdict": verdict(second, 1)},
    ]


def example(folder: Path, **changes: Any) -> Page:
    """A page of made-up evidence on the data folders of `project`."""
    figures, details = evidence()
    forgot, forgot_details = forgetting()
    pool = Dataset.open(folder / "pool")
    rows, scores = page_pictures.judged(folder / "pool", folder / "filtered")
    made = Dataset.open(folder / "generated")
    stage = [
        Stage("pool", "digits", "", False, 1.4, "1,797 rows, 0 set aside"),
        Stage("filter", "dfn", "Data Filtering Networks (2023), arXiv 2309.17425", False, 9.1, "60% kept, 95.8% clean (pool 70.0%)"),
        Stage("train", "train.supervised", "", True, 6.2, "version 1, 26,122 parameters"),
    ]
    whole = Page(
        name="digits",
        made_at="2026-10-30 12:00 UTC",
        revision="9c2bb04f1a2b+",
        decisions=decisions(),
        trees=trees(),
        titles={"m-teacher1": "digits-teacher 1", "m-teacher2": "digits-teacher 2", "m-student1": "digits-student 1"},
        aliases={"m-student1": ["digits-student@champion"], "m-teacher2": ["digits-teacher@champion"]},
        stages=stage,
        figures=figures,
        details=details,
        about={"student": "digits-student 1, distill.ssld"},
        promoted=["student", "unlearned"],
        forgetting=forgot,
        forgetting_details=forgot_details,
        seconds={"original": 6.2, "unlearned": 1.1, "finetune": 2.4, "retrain": 6.0},
        request=REQUEST,
        scores=scores,
        galleries=[
            page_pictures.from_pool(pool, 16),
            *page_pictures.extremes(rows, scores, 16),
            page_pictures.condensed(Dataset.open(folder / "condensed"), 60),
        ],
        course=page_pictures.course(folder / "condensed"),
        students=[
            Point("widths 4 hidden 8", Figure(0.91, 0.90, 0.92), 0.06, 3000, "front"),
            Point("widths 8-16 hidden 24 lr 0.01", Figure(0.14, 0.1, 0.2), 0.08, 12_000, "stopped", "widths 4 hidden 8 is more accurate"),
            Point("widths 16-32 hidden 48", Figure(0.905, 0.89, 0.92), 0.13, 45_000, "behind"),
            Point("widths 64-64 hidden 256", Figure(0.97, 0.96, 0.98), 0.18, 414_000, "chosen"),
            Point("widths 128-128 hidden 512", Figure(0.98, 0.97, 0.985), 0.4, 1e6, "front", "latency_ms_b1 0.4 is above 0.2"),
        ],
        budget="latency_ms <= 0.2",
        most_ms=0.2,
        concepts={name: 400 / (at + 1) ** 1.5 for at, name in enumerate(pool.info.classes)},
        tail=pool.info.classes[-2:],
        class_rows=page_pictures.by_class(pool.split("reference"), made, 5, 20),
        class_rows_of=10,
        data=[
            Data("data/pool", "7f3a90cc41d5e6f708192a3b4c5d6e7f.dir", 1797, "pool.read", {"rows": 1797.0, "quarantined": 0.0}),
            Data("data/filtered", "a81be02f41d5e6f708192a3b4c5d6e7f.dir", 1294, "filter.dfn", {"auroc": 0.9534, "kept_precision": 0.9582}),
        ],
        evidence={"evidence": "0a1b2c3d4e5f", "student": "m-student1"},
        settings="# What the project is set to.\nseed: 0\npool:\n  source: parquet:https://me:secret@host/x.parquet?sig=abc\n",
        versions={"Python": "3.11.2", "torch": "2.13.0"},
    )
    return replace(whole, **changes)


# what a crawl, a careless hand and a long day bring

LONG = "resnet-with-a-name-that-somebody-made-up-over-many-words-and-never-once-looked-at-again"
UNBROKEN = "0123456789abcdef" * 8
ARABIC = "صورة لقط أسود ينام على نافذة مفتوحة في ظهيرة صيف طويلة"
CHINESE = "一只黑猫在夏日漫长的午后睡在敞开的窗台上旁边放着一盆快要枯萎的天竺葵"
MARKUP = "<b onclick=alert(1)>bold</b><img src=https://example.org/x.png> & <script>alert(1)</script>"
CLASSES = (LONG, ARABIC, CHINESE, MARKUP, UNBROKEN, "", *(f"class {k}" for k in range(54)))
NAN = Figure(math.nan, math.nan, math.nan)


def hard(folder: Path, classes: tuple[str, ...] = CLASSES) -> Page:
    """The page of `example` with many classes, names without end, pictures of what not, and figures that are not there."""
    page, rng, n = example(folder), np.random.default_rng(2), len(classes)
    image = rng.integers(0, 256, (3, 40, 8), dtype=np.uint8)
    said = (LONG, ARABIC, CHINESE, MARKUP, UNBROKEN, EVIL, "", "ok")
    names = [LONG, UNBROKEN[:60], MARKUP, ARABIC, CHINESE]
    figures = {name: dict(found) for name, found in zip(names, (*page.figures.values(), *page.figures.values()), strict=False)}
    figures[ARABIC]["accuracy"] = NAN
    figures[CHINESE] = {"accuracy": Figure(1.0, 1.0, 1.0), "a_metric_that_nobody_has_heard_of": NAN, "parameters": Figure.exact(1.5e12)}
    forgot = {name: dict.fromkeys(found, NAN) for name, found in page.forgetting.items()} | {LONG: page.forgetting["unlearned"]}
    kinds = {"m-teacher1": f"{LONG} 1", "m-teacher2": f"{CHINESE} 12345", "m-student1": f"{ARABIC} 2"}
    bad = [{**d, "name": name, "version": 12345} for d, name in zip(decisions(student=False), (LONG, MARKUP), strict=True)]
    rules = [
        {**r, "rule": f"{LONG} at least 0.5", "reason": f"{UNBROKEN} misses", "candidate": math.nan} for r in bad[0]["verdict"]["rules"]
    ]
    bad[0] = {**bad[0], "verdict": {**bad[0]["verdict"], "rules": rules}}
    bad.append({"name": CHINESE, "version": 1, "promoted": False, "verdict": {}})
    return replace(
        page,
        name=LONG,
        revision=UNBROKEN[:40],
        decisions=bad,
        titles=kinds,
        aliases={"m-student1": [f"{LONG}@champion", f"{LONG}@{LONG}"]},
        stages=[Stage(LONG, f"distill.{LONG}", f"{UNBROKEN} {CHINESE}", True, 1e6, f"{UNBROKEN} {ARABIC}"), *page.stages],
        figures=figures,
        details={
            "classes": classes,
            "rows": 10**9,
            "confusion": {LONG: np.diag(rng.integers(0, 10**6, n)).tolist(), MARKUP: rng.integers(0, 99_999, (n, n)).tolist()},
            "reliability": {name: next(iter(page.details["reliability"].values())) for name in names},
        },
        about=dict.fromkeys(names, f"{LONG} 12345, {UNBROKEN}"),
        promoted=[LONG, MARKUP],
        forgetting=forgot,
        seconds={"retrain": 1e7, LONG: 1e7},
        request=UNBROKEN,
        scores=Scores(rng.normal(0, 1e-9, 500), np.arange(500) % 2 == 0, None),
        galleries=[
            Gallery(
                LONG, f"{UNBROKEN} {ARABIC}", tuple(Picture(image, text, k % 2 == 0, UNBROKEN[:20]) for k, text in enumerate(said)), "x"
            ),
            Gallery("Condensed", "", tuple(Picture(image[:1, :8], text) for text in said), "sample", small=True),
            Gallery("Nothing", "", (), "nothing"),
        ],
        class_rows=tuple(ClassRow(name, (image,) * 5, (image,) * 5) for name in classes[:20]),
        class_rows_of=n,
        data=[Data(f"data/{LONG}", UNBROKEN, 10**12, LONG, {LONG: math.nan, **{f"figure_{k}": 0.1 * k for k in range(12)}})],
        evidence={LONG: UNBROKEN, "student": "m-student1"},
        settings=f"{LONG}: {UNBROKEN}\n{CHINESE}: {ARABIC} # {MARKUP}\n",
        versions={LONG: f"1.0+{UNBROKEN}"},
    )


def bare() -> Page:
    """A page of figures that nobody took."""
    figures = {"student": {"accuracy": NAN, "ece": NAN}}
    return Page(name="empty", made_at="2026-10-30 12:00 UTC", figures=figures, forgetting={"original": {"ua": NAN}}, trees=trees()[:1])


def card(**changes: Any) -> Card:
    """A model card with all there is to say."""
    figures = {
        "accuracy": Figure(0.966, 0.942, 0.981),
        "worst_class_accuracy": Figure(0.914, 0.791, 0.967),
        "ece": Figure(0.0312, 0.021, 0.044),
        "nll": Figure(0.124, 0.09, 0.17),
        "latency_ms_b1": Figure.exact(0.213),
        "parameters": Figure.exact(11_482),
        "size_bytes": Figure.exact(47_016),
    }
    whole = Card(
        name="digits-student",
        version=1,
        made_at="2026-10-30 12:00 UTC",
        role="student",
        method="distill.ssld",
        paper="Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative (SSLD, 2021)",
        arxiv="2103.05959",
        summary="A small network learns a larger one's answers on labelled and mined unlabelled images.",
        limits="The student is only as right as the teacher where no label speaks against it.",
        shape=(1, 8, 8),
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        parameters=11_482,
        seed=0,
        revision="9c2bb04f1a2b+",
        aliases=("champion",),
        revoked=False,
        settings={"batch": 64, "lr": 0.05, "steps": 400, "mined": 600, "temperature": 1.0, "widths": "[8, 16, 32]", "weight_decay": 0.0001},
        data={"data/filtered": "a81be02f41d5e6f708192a3b4c5d6e7f.dir", "data/pool": "7f3a90cc41d5e6f708192a3b4c5d6e7f.dir"},
        sources=(
            Source(
                "digits", "BSD-3-Clause (scikit-learn); CC BY 4.0 (data)", "scikit-learn load_digits: UCI, handwritten digits, test part"
            ),
        ),
        parents=("teacher (train.supervised, m-0a1b2c3d4e5f60718293a4b5c6d7e8f9)",),
        figures=figures,
        measured_on={"test": "7f3a90cc41d5e6f708192a3b4c5d6e7f.dir"},
        verdict=decisions()[0]["verdict"],
    )
    return replace(whole, **changes)


def hard_card() -> Card:
    """A card on which nothing is short."""
    shifts = {f"accuracy_{LONG}_{k}": Figure(0.5, 0.4, 0.6) for k in range(3)}
    return card(
        name=LONG,
        version=12345,
        revoked=True,
        aliases=("champion", LONG),
        role=LONG,
        method=f"distill.{LONG}",
        summary=f"{UNBROKEN} {MARKUP} {ARABIC}",
        limits=f"{CHINESE} {UNBROKEN}",
        classes=CLASSES,
        settings={LONG: UNBROKEN, "none": None, "nested": {"a": [1, 2, {"b": UNBROKEN}]}, MARKUP: ARABIC},
        data={f"data/{LONG}": UNBROKEN, CHINESE: ARABIC},
        sources=(Source(LONG, UNBROKEN, f"https://example.org/{UNBROKEN}"), Source("", "", ""), Source(ARABIC, CHINESE, MARKUP)),
        parents=(f"{LONG} ({LONG}, m-{UNBROKEN})",),
        request=UNBROKEN,
        flow_run=f"http://127.0.0.1:4200/runs/flow-run/{UNBROKEN}",
        figures={**shifts, "accuracy": NAN, "ece": Figure(0.1, math.nan, math.nan), "latency_ms_b1": Figure.exact(math.inf)},
        measured_on={LONG: UNBROKEN},
    )


def claim(name: str, **changes: Any) -> dict[str, Any]:
    """A result as `retort claims --json` gives it."""
    shared = {"arm": "ours", "against": "theirs", "metric": "accuracy", "better": "higher", "relative": False, "failed": 0}
    conditions = {
        "better": {**shared, "by": 0.01, "effect": 0.05, "ci_low": 0.03, "ci_high": 0.07, "status": "holds"},
        "cheaper": {
            **shared,
            "by": -0.1,
            "effect": -0.02,
            "ci_low": -0.3,
            "ci_high": 0.1,
            "status": "does not hold here",
            "relative": True,
        },
    }
    values = {"accuracy": {"ours": [0.9, 0.91, 0.93], "theirs": [0.85, 0.88, 0.86]}}
    return {
        **{
            "method": name,
            "claim": "it beats the baseline at equal steps",
            "status": "holds",
            "headline": "better",
            "conditions": conditions,
        },
        **{"values": values, "seeds": [0, 1, 2], "data": {"fashion_mnist": "7f3a90cc41d5e6f7"}, "failures": {}, "seconds": 12.3},
        "arms": {metric: {arm: {"mean": 0.9, "sd": 0.01} for arm in arms} for metric, arms in values.items()},
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        **{"paper": "A Paper (2024)", "arxiv": "2401.00001", "stale": False, "why": "", **changes},
    }


def claims(records: list[dict[str, Any]], cards: Mapping[str, Any] | None = None) -> str:
    """The page of some claims."""
    known = cards or {r["method"]: SimpleNamespace(summary="One sentence on what it does.") for r in records}
    return page_claims.render(records, known, "2026-10-30", "9c2bb04f1a2b")


def hard_claims() -> list[dict[str, Any]]:
    """Claims that failed, were never measured, or cannot stop talking."""
    lost = {"effect": None, "ci_low": None, "ci_high": None, "failed": 3, "status": "does not hold here"}
    long = claim(LONG)["conditions"]["better"]
    arms = {metric: {arm: {"mean": None, "sd": None} for arm in (LONG, ARABIC, MARKUP)} for metric in (LONG, "accuracy")}
    none = dict.fromkeys(("status", "effect", "ci_low", "ci_high", "headline", "seconds"))
    return [
        claim(
            f"filter.{LONG}",
            claim=f"{CHINESE} {UNBROKEN}",
            paper=f"{LONG} {MARKUP}",
            conditions={
                "better": {**long, "arm": LONG, "against": ARABIC, "metric": UNBROKEN, "effect": -1e9, "ci_low": -2e9, "ci_high": -1e8},
                UNBROKEN: {**long, **lost, "arm": LONG, "against": MARKUP},
            },
            status="holds in part",
            values={UNBROKEN: {LONG: [1e9, 2e9], ARABIC: [3e9, 1e-9]}, "accuracy": {LONG: [None, None], MARKUP: [0.1, None]}},
            arms=arms,
            data={LONG: UNBROKEN, "b": UNBROKEN},
            failures={"0": f"{UNBROKEN} {ARABIC}", "1": MARKUP},
            stale=True,
            why=f"tasks/filter/{LONG}.py changed",
        ),
        claim("filter.dfn"),
        {**claim("train.never"), **none, "seeds": [], "data": {}, "arms": {}, "conditions": {}, "stale": True, "why": "never measured"},
    ]


def certificate(**changes: Any) -> dict[str, Any]:
    """A signed certificate of a request that went well: two models, one of them a student."""
    md5 = [f"{k}{'a81be02f41d5e6f708192a3b4c5d6e7'}.dir" for k in range(9)]
    teacher = {
        "name": "digits-teacher",
        "version": 2,
        "role": "teacher",
        "sha256": "4f" * 32,
        "action": "unlearned",
        "method": "unlearn.l1_sparse",
        "replaced_by": 3,
        "figures": {"ua": 4.2, "ra": 99.1, "ta": 96.4, "mia": 31.0, "avg_gap": 1.3},
        "reference": "7b" * 32,
        "void": False,
        "gate": "passed",
        "champion": True,
    }
    student = {**teacher, "name": "digits-student", "version": 1, "role": "student", "sha256": "c3" * 32, "action": "distilled again"}
    return {
        "version": 1,
        "request": REQUEST,
        "kind": "samples",
        "reason": "erasure under article 17",
        "policy": "unlearn",
        "asked_at": "2026-10-30T12:00:00+00:00",
        "finished_at": "2026-10-30T12:41:07+00:00",
        "samples": {
            "count": 12,
            "salt": "0f" * 16,
            "ids": [f"{k:032x}" for k in range(12)],
            "contents": [f"{k:032x}" for k in range(50, 62)],
        },
        "data": [
            {"path": "data/pool", "before": md5[0], "after": md5[1], "rows": 12},
            {"path": "data/filtered", "before": md5[2], "after": md5[3], "rows": 9},
            {"path": "data/generated", "before": md5[4], "after": md5[5], "rows": 40},
        ],
        "models": [teacher, {**student, "method": "distill.ssld", "replaced_by": 2, "figures": {}, "reference": None, "void": None}],
        "purged": [
            {"place": "DVC cache", "objects": 14, "bytes": 1_893_442},
            {"place": "the remote local", "objects": 11, "bytes": 900_112},
        ],
        "search": {"places": ["the project's folder", "DVC cache", "MLflow's files"], "files": 1204, "rows": 15_310, "found": 0},
        "irreproducible": [md5[0], md5[2], md5[4]],
        "beyond": ["Clones of this repository that were made before the request keep the old suppression list until they pull."],
        "tools": {"retort": "0.1.0", "torch": "2.13.0", "dvc": "3.67.1", "mlflow": "3.17.2"},
        "journal": "9e" * 32,
        "public_key": "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=",
        "signature": "7Qx0" * 22,
        **changes,
    }


def waiting_certificate() -> dict[str, Any]:
    """A certificate of which a model waits, and whose comparison is void."""
    first, second = certificate()["models"]
    late = {**second, "action": "waiting", "replaced_by": None, "gate": "refused: accuracy not worse than the champion's by 0.02 misses it"}
    return certificate(models=[{**first, "void": True, "figures": {"ua": 0.0, "avg_gap": None}}, late], policy="auto", kind="class")


def empty_certificate() -> dict[str, Any]:
    """A request for samples that nobody had."""
    nothing = {"count": 0, "salt": "", "ids": [], "contents": []}
    search = {"places": [], "files": 0, "rows": 0, "found": 0}
    lists: dict[str, Any] = {name: [] for name in ("data", "models", "purged", "irreproducible", "beyond")}
    return certificate(kind="concept", reason="", samples=nothing, search=search, tools={}, **lists)


def hard_certificate() -> dict[str, Any]:
    """A certificate on which nothing is short, and a remain was found."""
    many = [f"{k:032x}" for k in range(3000)]
    one = certificate()["models"][0]
    models = [
        {
            **one,
            "name": LONG,
            "version": 12345,
            "replaced_by": 123456,
            "role": LONG,
            "method": f"unlearn.{LONG}",
            "gate": UNBROKEN,
            "void": True,
        },
        {**one, "name": CHINESE, "role": MARKUP, "action": "retrained", "figures": {LONG: 0.5, "ua": None}, "gate": f"{ARABIC} {MARKUP}"},
        {**one, "name": ARABIC, "role": "", "action": "revoked", "replaced_by": None, "method": None, "gate": None, "champion": False},
    ]
    return certificate(
        reason=f"{MARKUP} {UNBROKEN} {ARABIC}",
        samples={"count": 1_234_567, "salt": "ab" * 64, "ids": many, "contents": many},
        data=[
            {"path": f"data/{LONG}", "before": UNBROKEN, "after": None, "rows": 10**9},
            {"path": CHINESE, "before": None, "after": ARABIC, "rows": 0},
        ],
        models=models,
        purged=[{"place": UNBROKEN, "objects": 10**7, "bytes": 10**14}, {"place": MARKUP, "objects": 0, "bytes": 0}],
        search={"places": [UNBROKEN, MARKUP, LONG], "files": 10**6, "rows": 10**9, "found": 1},
        irreproducible=[UNBROKEN],
        beyond=[UNBROKEN, f"{CHINESE} {MARKUP}"],
        tools={LONG: UNBROKEN},
    )
