"""Filter: a pool and a small trusted reference set in, one verdict per row out. Never a copy of the data."""

from __future__ import annotations

from typing import Any, Protocol

from tasks.core.dataset import Dataset
from tasks.core.method import Made
from tasks.core.settings import Settings


class Filter(Protocol):
    """Rows of schema `verdicts`, one for each row of `pool` and in its order. A method reads images and captions, never labels."""

    def __call__(self, pool: Dataset, reference: Dataset, cfg: Any, *, seed: int = 0, device: str = "cpu") -> Made: ...


SIGNATURE = Filter


def stage(settings: Settings, method: str) -> None:
    """Judge the train rows of `data/pool` into `data/filtered`, and score the judge where the truth about captions is known."""
    import numpy as np

    from tasks.core import catalog, files
    from tasks.core import stage as stages
    from tasks.core.dataset import Info

    own, seed = stages.section(settings, "filter")
    own.pop("method", None)
    cfg = catalog.configure(f"filter.{method}", own)
    folder = settings.root / "data" / "pool"
    whole = Dataset.open(folder)
    pool, reference = whole.split("train"), whole.split("reference")
    made = catalog.get(f"filter.{method}").entry(pool, reference, cfg, seed=seed)
    truth = pool.audit("_clean")
    clean, kept = np.asarray(truth.fill_null(False)), np.asarray(made.rows["kept"])
    if truth.null_count == 0 and 0 < clean.sum() < len(pool):
        from sklearn.metrics import roc_auc_score

        made.figures.update(
            pool_precision=float(clean.mean()),
            kept_precision=float(clean[kept].mean()) if kept.any() else float("nan"),
            auroc=float(roc_auc_score(clean, np.asarray(made.rows["score"]))),
        )
    info = Info(
        "verdicts",
        of={"path": "../pool", "md5": files.folder_md5(folder)},
        name=whole.info.name,
        made_by={"method": f"filter.{method}", "settings": cfg.model_dump(mode="json"), "seed": seed},
    )
    stages.write_made(settings, "filter", info, made)
