"""Scorers of pairs by a pre-trained image-text network of `transformers`: CLIP, SigLIP and their kin, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core.dataset import decode
from tasks.core.errors import UserError
from tasks.filter._shared import Scores


class Pretrained(nn.Module):
    """An image-text network and what prepares its inputs. On an accelerator it runs in bfloat16 with channels last."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Raises UserError where `name` is no folder or hub id of such a network."""
        from transformers import AutoModel, AutoProcessor

        super().__init__()
        try:
            model = AutoModel.from_pretrained(name)
            self.processor: Any = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"filter.dfn cannot load {name!r} as an image-text network: {str(error).splitlines()[0]}") from None
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise UserError(f"{name!r} is a {type(model).__name__}, which does not put images and texts into one space; CLIP does")
        fast = device != "cpu"
        self.model: Any = model.to(device, torch.bfloat16 if fast else torch.float32)
        if fast:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.device = device
        self.eval().requires_grad_(False)

    def of_batch(self, shape: tuple[int, int, int]) -> Callable[[pa.RecordBatch], Scores]:
        """Scores of batches with the columns `image`, of this shape, and `caption`."""

        def of_batch(batch: pa.RecordBatch) -> Scores:
            images = decode(batch.column("image").field("bytes").to_pylist(), shape)
            return np.asarray(self(images, [text or "" for text in batch.column("caption").to_pylist()]).numpy(), dtype=np.float32)

        return of_batch

    @torch.no_grad()
    def forward(self, images: npt.NDArray[np.uint8], captions: Sequence[str]) -> Tensor:
        """Cosine (N,) of each image (C, H, W) with its own caption; what is too long of a caption is cut off."""
        coloured = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
        seen = self.processor(images=list(coloured.transpose(0, 2, 3, 1)), return_tensors="pt")["pixel_values"]
        told = self.processor(text=list(captions), return_tensors="pt", padding=True, truncation=True)
        dtype = next(self.model.parameters()).dtype
        image = _vector(self.model.get_image_features(pixel_values=seen.to(self.device, dtype)))
        text = _vector(self.model.get_text_features(**{key: value.to(self.device) for key, value in told.items()}))
        return (F.normalize(image.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(1).cpu()


def _vector(found: Any) -> Tensor:
    """The vectors (N, D), which come alone or as the pooled part of an output."""
    return found if isinstance(found, Tensor) else found.pooler_output
