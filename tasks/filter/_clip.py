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

from tasks.core.errors import UserError
from tasks.filter._shared import Scores, compiled, pixels, staged

Inputs = tuple[Tensor, dict[str, Tensor]]
TOWERS = ("vision_model", "text_model")
RESAMPLINGS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Pretrained(nn.Module):
    """An image-text network and what prepares its inputs.

    On an accelerator it runs in bfloat16 with channels last, and images are copied there as they are and resized there, where the
    network's own processor does nothing else with them. It moves there, and is compiled, when it scores first.
    """

    def __init__(self, name: str, device: str = "cpu", fast: bool = False) -> None:
        """`fast`: with compiled towers. Raises UserError where `name` is no folder or hub id of such a network."""
        from transformers import AutoModel, AutoProcessor

        super().__init__()
        try:
            model = AutoModel.from_pretrained(name)
            self.processor: Any = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"filter.dfn cannot load {name!r} as an image-text network: {str(error).splitlines()[0]}") from None
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise UserError(f"{name!r} is a {type(model).__name__}, which does not put images and texts into one space; CLIP does")
        if fast and not all(hasattr(model, tower) for tower in TOWERS):
            raise UserError(f"{name!r} is a {type(model).__name__}, whose towers are not known: set compile to false")
        self.model: Any = model if device == "cpu" else model.to(torch.bfloat16).to(memory_format=torch.channels_last)
        self.device, self.fast = device, fast
        self.eval().requires_grad_(False)

    def reader(self, shape: tuple[int, int, int]) -> Callable[[pa.RecordBatch], Inputs]:
        """What makes the network's inputs of a batch with the columns `image`, of this shape, and `caption`; too long a one is cut off."""
        raw = self.device != "cpu" and resizing(self.processor, shape) is not None

        def read(batch: pa.RecordBatch) -> Inputs:
            images = pixels(batch.column("image").field("bytes").to_pylist(), shape)
            seen, told = self.inputs(images, [text or "" for text in batch.column("caption").to_pylist()], raw)
            return staged(seen, self.device), {key: staged(value, self.device) for key, value in told.items()}

        return read

    def inputs(self, images: npt.NDArray[np.uint8], captions: Sequence[str], raw: bool = False) -> Inputs:
        """Of images (N, C, H, W) and N captions, each different one read once; `raw` images are for `resized`."""
        of = {text: at for at, text in enumerate(dict.fromkeys(captions))}
        read = self.processor(text=list(of), return_tensors="pt", padding=True, truncation=True)
        at = torch.tensor([of[text] for text in captions])
        told = {key: value[at] for key, value in read.items()}
        if raw:
            return torch.from_numpy(np.array(images, order="C")), told
        coloured = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
        return self.processor(images=list(coloured.transpose(0, 2, 3, 1)), return_tensors="pt")["pixel_values"], told

    @torch.no_grad()
    def score(self, inputs: Inputs) -> Scores:
        """Cosine (N,) of each image with its own caption."""
        self.model.to(self.device)
        if self.fast:
            compiled(*(getattr(self.model, tower) for tower in TOWERS))
        seen, told = inputs[0].to(self.device, non_blocking=True), inputs[1]
        if seen.dtype == torch.uint8:
            seen = self.resized(seen)
        layout = torch.channels_last if self.device != "cpu" else torch.contiguous_format
        image = _vector(self.model.get_image_features(pixel_values=seen.to(self.model.dtype, memory_format=layout)))
        read = {key: value.to(self.device, non_blocking=True) for key, value in told.items()}
        text = _vector(self.model.get_text_features(**read))
        return np.asarray((F.normalize(image.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(1).cpu().numpy(), dtype=np.float32)

    def resized(self, images: Tensor) -> Tensor:
        """What the processor makes of uint8 images (N, C, H, W), but for roundings: resized, cut, and standardised, where they lie."""
        how = resizing(self.processor, (images.shape[1], images.shape[2], images.shape[3]))
        assert how is not None
        size, (height, width), mode = how
        fine = images.float()
        for reached in ((images.shape[2], size[1]), size):  # sideways first, rounded and clipped in between, as Pillow does
            fine = F.interpolate(fine, reached, mode=mode, antialias=True).round_().clamp_(0, 255)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        look = self.processor.image_processor
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (look.image_mean, look.image_std))
        return (fine[:, :, top : top + height, left : left + width] * look.rescale_factor - mean) / std


def resizing(processor: Any, shape: tuple[int, int, int]) -> tuple[tuple[int, int], tuple[int, int], str] | None:
    """Height and width that a processor resizes images of this shape to, those that it then cuts from the middle, and how it resamples.

    None where it does anything else with them.
    """
    look = processor.image_processor
    steps = {name for name, value in vars(look).items() if name.startswith("do_") and value is True} - {"do_convert_rgb"}
    mode, size = RESAMPLINGS.get(int(look.resample or -1)), look.size or {}
    if mode is None or steps - {"do_center_crop"} != {"do_resize", "do_rescale", "do_normalize"} or len(look.image_mean) != 3:
        return None
    given: dict[str, int] = {key: int(size.get(key) or 0) for key in ("shortest_edge", "height", "width") if size.get(key)}
    whole: tuple[int, int]
    if set(given) == {"shortest_edge"}:
        short, long = sorted(shape[1:])
        longer = int(given["shortest_edge"] * long / short)
        whole = (given["shortest_edge"], longer) if shape[1] <= shape[2] else (longer, given["shortest_edge"])
    elif set(given) == {"height", "width"}:
        whole = (given["height"], given["width"])
    else:
        return None
    cut = (int(look.crop_size["height"]), int(look.crop_size["width"])) if "do_center_crop" in steps else whole
    return (whole, cut, mode) if cut[0] <= whole[0] and cut[1] <= whole[1] else None


def _vector(found: Any) -> Tensor:
    """The vectors (N, D), which come alone or as the pooled part of an output."""
    return found if isinstance(found, Tensor) else found.pooler_output
