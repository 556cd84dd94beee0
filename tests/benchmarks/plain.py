"""The main job without any of the machinery: the same method functions on the same data, called one after another in one process.

Run in a project folder; writes into the folder that is its argument. It is what the main job's orchestration is measured against.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml

from tasks.core import catalog, files
from tasks.core.dataset import Dataset, Info, Writer
from tasks.generate import pick_shots
from tasks.pool import read


def main(out: Path) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    seed = params["seed"]

    def method(family: str, *drop: str) -> tuple[object, object]:
        settings = {k: v for k, v in params[family].items() if k not in ("method", *drop)}
        if family == "train":
            settings = {**params["recipe"], **settings}
        name = f"{family}.{params[family]['method']}"
        return catalog.get(name).entry, catalog.configure(name, settings)

    read.read_pool(read.configure(params["pool"]), out / "pool", seed=seed)
    pool = Dataset.open(out / "pool")
    dfn, cfg = method("filter")
    verdicts = dfn(pool.split("train"), pool.split("reference"), cfg, seed=seed)
    with Writer(out / "filtered", Info("verdicts", of={"path": "../pool", "md5": files.folder_md5(out / "pool")})) as writer:
        writer.write(verdicts.rows)
    kept, rejected = Dataset.open(out / "filtered"), Dataset.open(out / "filtered", kept=False)
    condense, cfg = method("condense", "n")
    condense(kept, pool.split("validation"), params["condense"]["n"], cfg, seed=seed)
    generate, cfg = method("generate", "n", "shots", "base_rows")
    base = kept
    if len(base) > params["generate"]["base_rows"]:
        base = base.take(np.random.default_rng(seed).choice(len(base), params["generate"]["base_rows"], replace=False))
    shots = pick_shots(pool.split("reference"), base, params["generate"]["shots"], seed)
    made = generate(shots, base, params["generate"]["n"], cfg, seed=seed)
    with Writer(out / "generated", Info("image", classes=pool.info.classes, shape=pool.info.shape)) as writer:
        writer.write(made.rows)
    data = kept + pool.split("reference") + Dataset.open(out / "generated")
    train, cfg = method("train")
    teacher = train(data, cfg, seed=seed)
    distill, cfg = method("distill")
    unlabelled = rejected.without_contents_of(pool.split("validation", "test")).without_labels()
    student = distill([teacher], kept + pool.split("reference") + unlabelled, cfg, seed=seed)
    originals = np.flatnonzero(~data.synthetic() & (data.labels() >= 0))
    chosen = np.random.default_rng(seed).choice(originals, params["unlearn"]["demonstration_rows"], replace=False)
    forget = data.take(chosen)
    retain = data.without_descendants(forget.ids())
    unlearn, cfg = method("unlearn", "demonstration_rows")
    unlearned = unlearn(teacher, forget, retain, cfg, seed=seed)
    others = {}
    for name, settings in {"retrain": params["recipe"], "finetune": params["references"]["finetune"]}.items():
        entry = catalog.get(f"unlearn.{name}").entry
        others[name] = entry(teacher, forget, retain, catalog.configure(f"unlearn.{name}", settings), seed=seed)
    evaluate, cfg = method("evaluate")
    test = {"test": pool.split("test")}
    evaluate({"teacher": teacher, "student": student, "unlearned": unlearned}, test, cfg, seed=seed)
    forgetting = catalog.get("evaluate.forgetting")
    models = {"original": teacher, "unlearned": unlearned, **others}
    forgetting.entry(models, {**test, "forget": forget, "retain": retain}, forgetting.config(), seed=seed)
    evaluate({"candidate": student}, test, cfg, seed=seed)
    evaluate({"candidate": unlearned}, test, cfg, seed=seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
