"""Two filters of different kinds, by the mean of their ranks, tell right captions from wrong ones better than either of them.

Claim   the AUROC of the combined score against what is known of the captions is above that of `filter.dfn` and of `filter.perplexity`; it
        asks for no margin, since nobody has published one for filters of these kinds. Intersections are DataComp's way to its best
        subset: of the rows that both keep more are right than of as many that dfn alone keeps
Arms    combined: both filters, `how: all`; dfn, perplexity: each alone, with the same settings; at equal number: the best rows of dfn, as
        many as the intersection has
Equal   pool, reference, seeds and settings of the filters; rows kept, for `precision`
Pairs   Fashion-MNIST, class names, of which 40% are those of another class; 500 right pairs are the reference
Tuned   nothing: settings are those of the filters' own claims or defaults, and shares to keep were fixed beforehand
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from tasks.core.claim import Beats, Claim, Row
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Made
from tasks.filter import dfn, perplexity
from tasks.filter._shared import keep_top
from tasks.filter.combined import Config
from tests.claims.samples import dataset, images

CLAIM = Claim(
    text="the mean of two filters' ranks tells right captions from wrong ones better than either, and what both keep is right more often",
    data=("fashion_mnist",),
    headline=Beats("combined", "dfn", "auroc"),
    also=(Beats("combined", "perplexity", "auroc"), Beats("combined", "dfn", "precision")),
)
POOL, CLEAN, RIGHT, KEEP = 2_000, 500, 0.6, 0.5


def measure(method: Callable[..., Made], seed: int, data: Sequence[Path], small: bool = False) -> list[Row]:
    """The combined filter and each of its parts for one seed."""
    pool_rows, clean_rows, steps = (100, 40, 4) if small else (POOL, CLEAN, 400)
    train, rng = images(data[0], "train"), np.random.default_rng(seed)
    if len(train.labels) < pool_rows + clean_rows or len(train.classes) < 2:
        raise UserError(f"this claim needs {pool_rows + clean_rows} training images of two classes or more")
    order, classes = rng.permutation(len(train.labels)), len(train.classes)
    judged, trusted = train.take(order[:pool_rows]), train.take(order[pool_rows : pool_rows + clean_rows])
    right = rng.random(pool_rows) < RIGHT
    told = np.where(right, judged.labels, (judged.labels + rng.integers(1, classes, pool_rows)) % classes)
    sets = [
        dataset(rows.pixels, rows.labels, rows.classes, captions=[f"a photo of {rows.classes[label]}" for label in labels], prefix=prefix)
        for rows, labels, prefix in ((judged, told, "p"), (trusted, trusted.labels, "c"))
    ]
    width = {"width": 4} if small else {}
    parts = ({"method": "dfn", "steps": steps, "mask_same": True, **width}, {"method": "perplexity", "steps": steps, "width": 32})
    made = method(*sets, Config(filters=tuple({**part, "keep": KEEP} for part in parts)), seed=seed)
    own = {
        "dfn": dfn.dfn(*sets, dfn.Config(keep=KEEP, steps=steps, mask_same=True, **width), seed=seed).rows,  # type: ignore[arg-type]
        "perplexity": perplexity.perplexity(*sets, perplexity.Config(keep=KEEP, steps=steps, width=32), seed=seed).rows,
    }
    found = [
        Row(arm, "auroc", float(roc_auc_score(right, np.asarray(rows["score"])))) for arm, rows in {"combined": made.rows, **own}.items()
    ]
    kept = np.asarray(made.rows["kept"])
    found += [Row("combined", "kept", float(kept.mean())), Row("combined", "precision", float(right[kept].mean()))]
    for arm, rows in own.items():
        best, _ = keep_top(np.asarray(rows["score"]), rows["sample_id"], int(kept.sum()))
        found.append(Row(arm, "precision", float(right[best].mean())))
    return found


def switched_off(pool: Dataset, reference: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """The first of the filters alone."""
    own = {key: value for key, value in cfg.filters[0].items() if key != "method"}
    return dfn.dfn(pool, reference, dfn.Config(**own), seed=seed, device=device)
