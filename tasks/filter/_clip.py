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

Inputs = tuple[Tensor, dict[str, Tensor]]


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

    def reader(self, shape: tuple[int, int, int]) -> Callable[[pa.RecordBatch], Inputs]:
        """What makes the network's inputs of a batch with the columns `image`, of this shape, and `caption`; too long a one is cut off."""

        def read(batch: pa.RecordBatch) -> Inputs:
            images = decode(batch.column("image").field("bytes").to_pylist(), shape)
            return self.inputs(images, [text or "" for text in batch.column("caption").to_pylist()])

        return read

    def inputs(self, images: npt.NDArray[np.uint8], captions: Sequence[str]) -> Inputs:
        """Of images (N, C, H, W) and N captions."""
        coloured = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
        seen = self.processor(images=list(coloured.transpose(0, 2, 3, 1)), return_tensors="pt")["pixel_values"]
        return seen, dict(self.processor(text=list(captions), return_tensors="pt", padding=True, truncation=True))

    @torch.no_grad()
    def score(self, inputs: Inputs) -> Scores:
        """Cosine (N,) of each image with its own caption."""
        seen, told = inputs
        dtype = next(self.model.parameters()).dtype
        layout = torch.channels_last if self.device != "cpu" else torch.contiguous_format
        image = _vector(self.model.get_image_features(pixel_values=seen.to(self.device, dtype, memory_format=layout)))
        text = _vector(self.model.get_text_features(**{key: value.to(self.device) for key, value in told.items()}))
        cosines = (F.normalize(image.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(1)
        return np.asarray(cosines.cpu().numpy(), dtype=np.float32)


def _vector(found: Any) -> Tensor:
    """The vectors (N, D), which come alone or as the pooled part of an output."""
    return found if isinstance(found, Tensor) else found.pooler_output
