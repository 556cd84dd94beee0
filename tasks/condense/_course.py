"""How condensed images came to be: a few of them at a few moments of the outer loop, for the report."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tasks.core.dataset import IMAGE, encode, image_column

SHOWN = 12  # images, evenly spread over all
MOMENTS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of the steps: most happens early
SCHEMA = pa.schema([("step", pa.int64()), ("sample_id", pa.string()), ("image", IMAGE)])


class Course:
    """Keeps copies of a few images while they are learned: call it at step 0 and after each step.

    mean, std  by which the images are standardised; as they are, black is 0 and white 1
    """

    def __init__(self, steps: int, mean: float = 0.0, std: float = 1.0) -> None:
        self.steps, self.mean, self.std = sorted({round(share * steps) for share in MOMENTS}), mean, std
        self._kept: dict[int, Tensor] = {}

    def __call__(self, step: int, images: Tensor) -> None:
        """images (n, C, H, W), whatever lies outside black and white is clipped."""
        if step in self.steps:
            chosen = torch.from_numpy(spread(len(images)))
            self._kept[step] = (images.detach().cpu()[chosen] * self.std + self.mean).clamp(0, 1)

    def rows(self, ids: list[str]) -> pa.Table | None:
        """One row for each image of each moment, the earliest first; `ids` are the names of all samples. None where nothing was learned."""
        if len(self._kept) < 2:
            return None
        names = [ids[at] for at in spread(len(ids))]
        tables = [
            pa.table(
                {
                    "step": pa.array([step] * len(names), pa.int64()),
                    "sample_id": names,
                    "image": image_column(encode(images.mul(255).round().to(torch.uint8).numpy())),
                },
                schema=SCHEMA,
            )
            for step, images in sorted(self._kept.items())
        ]
        return pa.concat_tables(tables)


def spread(n: int) -> npt.NDArray[np.int64]:
    """At most `SHOWN` of n positions, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, SHOWN)).round().astype(np.int64))
