"""What the methods that draw samples share: their rows, and their curves."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.core.dataset import SCHEMAS, encode, image_column
from tasks.core.method import MethodConfig

LOGGED_EVERY = 20


def rows(
    method: str,
    label: int,
    name: str,
    captions: Sequence[str],
    images: npt.NDArray[np.uint8],
    parents: Sequence[str],
    cfg: MethodConfig,
    seed: int,
) -> pa.Table:
    """Rows of schema `image` for the samples (N, C, H, W) of one class, each a child of all `parents`."""
    parents, n = list(dict.fromkeys(parents)), len(images)
    # an id stands for one content: other settings, another seed or other parents give other ids
    digest = hashlib.md5(json.dumps([cfg.model_dump(), seed, label, parents]).encode(), usedforsecurity=False).hexdigest()[:8]
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    offsets = pa.array(np.arange(n + 1) * len(parents), pa.int32())
    columns = {
        "sample_id": [f"{method}-{short}-{at:05d}-{digest}" for at in range(n)],
        "image": image_column(encode(images)),
        "label": pa.array([label] * n, pa.int64()),
        "caption": list(captions),
        "split": ["train"] * n,
        "parents": pa.ListArray.from_arrays(offsets, pa.concat_arrays([pa.array(parents, pa.string())] * n)),
        "_clean": pa.nulls(n, pa.bool_()),
    }
    return pa.table(columns, schema=SCHEMAS["image"])


def last(losses: Sequence[float]) -> float:
    """Mean of the last tenth."""
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def curve(losses: Sequence[float], start: float) -> list[dict[str, float]]:
    """Mean loss over every `LOGGED_EVERY` steps, counted on from `start`."""
    starts = range(0, len(losses), LOGGED_EVERY)
    return [{"step": start + min(at + LOGGED_EVERY, len(losses)), "loss": float(np.mean(losses[at : at + LOGGED_EVERY]))} for at in starts]
