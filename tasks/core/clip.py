"""CLIP: its two towers at work, the contrastive loss, and the classifier made of its image tower, which a small dictionary describes.

Self-contained as `networks.py` is, where no function but the classifier is called: a copy of both travels with registered models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core.networks import Net

WIDTH = 64  # of both towers of `small`, and of the space that they share
LARGEST_SCALE = 100.0  # the temperature is learnt, but never below 1 / 100 (CLIP, section 2.5)
VISION = (
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"),
)


class ClipClassifier(Net):
    """CLIP's image tower with its projection, and a weight vector of each class: logits = scale * cosine, where those are normalised.

    arch: `vision` (fields of `CLIPVisionConfig`), `pixel_mean` and `pixel_std` (one value a channel of the tower), `shape` and `classes`;
    `mean` and `std` are 0 and 1. Images of `shape` are resized, and grey ones repeated, to what the tower takes.
    `scale` is a buffer: the temperature is a state that training leaves alone. Raises ValueError where the channels do not fit.
    """

    scale: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, arch: dict[str, Any]) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__(arch)
        config = CLIPVisionConfig(**arch["vision"])
        if arch["shape"][0] not in (1, config.num_channels):
            raise ValueError(f"images of {arch['shape'][0]} channels do not fit an image tower of {config.num_channels}")
        self.tower: Any = CLIPVisionModelWithProjection(config)
        self.head = nn.Linear(config.projection_dim, arch["classes"], bias=False)
        self.register_buffer("scale", torch.tensor(LARGEST_SCALE))
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.tensor(arch[name])[:, None, None], persistent=False)

    def features(self, images: Tensor) -> Tensor:
        pixels = tower_pixels(images, self.tower.config, self.pixel_mean, self.pixel_std)
        features: Tensor = self.scale * F.normalize(self.tower(pixel_values=pixels).image_embeds, dim=-1)
        return features


def tower_pixels(images: Tensor, config: Any, mean: Tensor, std: Tensor) -> Tensor:
    """What an image tower of this `CLIPVisionConfig` takes, of images (N, C, H, W) in [0, 1]: resized whole, repeated, standardised."""
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(images.shape[2:]) != size:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (images.expand(-1, config.num_channels, -1, -1) - mean) / std


@dataclass
class Clip:
    """A `CLIPModel`, its tokenizer, mean and standard deviation of the pixels that it is used to (channels, 1, 1), and where it is."""

    model: Any
    tokenizer: Any
    mean: Tensor
    std: Tensor
    device: str = "cpu"

    def to(self, device: str) -> Clip:
        """Move everything; gives itself."""
        self.model.to(device)
        self.mean, self.std, self.device = self.mean.to(device), self.std.to(device), device
        return self

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by, at most 100: one over the temperature."""
        scale: Tensor = self.model.logit_scale.exp().clamp(max=LARGEST_SCALE)
        return scale


def load(name: str, *, setting: str = "pretrained") -> Clip:
    """Load a CLIP from a local folder or a hub id (safetensors only), frozen and in eval mode. Call it inside `text_to_image.quiet`.

    Raises UserError, which names the `setting`, where the folder is not there or holds no CLIP.
    """
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

    from tasks.core.errors import UserError

    here = Path(name).expanduser()
    # a hub id is `name` or `owner/name`; everything else can only be a path
    if not here.is_dir() and (here.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(f"{setting}: there is no folder {name}; give a folder with a CLIP or a hub id like 'owner/name'")
    source = str(here) if here.is_dir() else name
    try:
        found: Any = CLIPModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
        tokenizer = CLIPTokenizer.from_pretrained(source)
        look = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{setting}: {name} holds no CLIP that can be loaded here ({str(error).partition(chr(10))[0]})") from None
    model, missing = found[0], sorted(found[1]["missing_keys"])
    if missing:  # another kind of network: what it lacks would be noise
        raise UserError(f"{setting}: {name} holds no CLIP that can be loaded here (it has no {missing[0]})")
    model.float().eval().requires_grad_(False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (look.image_mean, look.image_std))
    return Clip(model, tokenizer, mean, std)


def small(shape: tuple[int, int, int], captions: Sequence[str], *, mean: float = 0.5, std: float = 0.5, spare: int = 4) -> Clip:
    """A fresh small CLIP for images of this shape, in whose vocabulary every word of the captions is one token; under 0.2 M weights.

    `mean` and `std` of the pixels; `spare`: tokens that a text may have beyond the longest caption. First weights come from torch's
    global generator: call it inside `loop.seeded`.
    """
    from transformers import CLIPConfig, CLIPModel

    from tasks.core.text_to_image import make_tokenizer

    tokenizer = make_tokenizer(captions)
    tokenizer.model_max_length += spare
    both = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": WIDTH}
    text = {**both, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    patch = patch_size(shape[1], shape[2])
    vision = {**both, "num_channels": shape[0], "image_size": -(-max(shape[1:]) // patch) * patch, "patch_size": patch}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval()
    return Clip(model, tokenizer, torch.full((shape[0], 1, 1), mean), torch.full((shape[0], 1, 1), std))


def patch_size(height: int, width: int) -> int:
    """2 pixels, doubled until there are at most eight patches on a side: 2 for 8 and 16 px, 4 for 28 and 32."""
    patch = 2
    while max(height, width) > 8 * patch:
        patch *= 2
    return patch


def tokens(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Token ids (N, L), padded to the longest of these texts; one that is too long for the tower is cut off."""
    longest = min(clip.tokenizer.model_max_length, clip.model.config.text_config.max_position_embeddings)
    return torch.tensor(clip.tokenizer(list(texts), padding="longest", max_length=longest, truncation=True)["input_ids"])


def text_features(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Embeddings (N, D) of texts, of length 1. Equal ones are encoded once. Gradients flow where they are wanted."""
    distinct = {text: at for at, text in enumerate(dict.fromkeys(texts))}
    # behind the end nothing is looked at: the text tower sees what came before
    pooled = clip.model.text_model(input_ids=tokens(clip, list(distinct)).to(clip.device)).pooler_output
    found = F.normalize(clip.model.text_projection(pooled), dim=-1)
    return found[torch.tensor([distinct[text] for text in texts], device=found.device)]


def image_features(clip: Clip, images: Tensor) -> Tensor:
    """Embeddings (N, D) of images (N, C, H, W) in [0, 1], of length 1. Gradients flow where they are wanted."""
    pixels = tower_pixels(images.to(clip.device), clip.model.config.vision_config, clip.mean, clip.std)
    return F.normalize(clip.model.visual_projection(clip.model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


@torch.no_grad()
def embed_images(clip: Clip, images: npt.NDArray[np.uint8], *, size: int = 256) -> Tensor:
    """Embeddings (N, D) of uint8 images (N, C, H, W), of length 1, on the CPU, in eval mode; `size` at once."""
    from tasks.core.loop import to_float

    clip.model.eval()
    pieces = [image_features(clip, to_float(images[at : at + size])).cpu() for at in range(0, len(images), size)]
    return torch.cat(pieces) if pieces else torch.empty(0, clip.model.config.projection_dim)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of N pairs of embeddings (N, D) of length 1: the mean of the cross-entropy of rows and of columns.

    Pairs that share one text are told apart as well, in vain: it adds the same slope as if each of their images were right.
    """
    logits, own = scale * images @ texts.T, torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def fit_contrastive(
    clip: Clip,
    images: npt.NDArray[np.uint8],
    captions: Sequence[str],
    *,
    steps: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
    weight_decay: float = 0.01,
    what: str = "train clip",
) -> list[float]:
    """Train both towers and the temperature on pairs of an image (N, C, H, W) uint8 and its caption, in place; gives the losses.

    AdamW with one cycle of the learning rate. Leaves everything frozen and in eval mode. Raises ValueError where there are no pairs,
    UserError where training diverged.
    """
    from tasks.core.loop import check_finite, index_batches, one_cycle, to_float
    from tasks.core.progress import track

    clip.model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(clip.model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = one_cycle(optimiser, lr, steps)
    batches = index_batches(len(images), batch, steps, generator)
    losses = []
    for _ in track(range(steps), what):
        at = next(batches)
        told = text_features(clip, [captions[i] for i in at.tolist()])
        loss = contrastive_loss(image_features(clip, to_float(images[at.numpy()])), told, clip.scale)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    check_finite(clip.model, what, lr)
    clip.model.eval().requires_grad_(False)
    return losses


def as_net(clip: Clip, head: Tensor, shape: tuple[int, int, int]) -> ClipClassifier:
    """A classifier of images of this shape: a copy of the image tower, and `head` (classes, D), a row for each class, as it is.

    A LoRA must have been merged. On the CPU, in eval mode, its weights trainable. Raises ValueError where the channels do not fit.
    """
    vision = {name: getattr(clip.model.config.vision_config, name) for name in VISION}
    vision["projection_dim"] = clip.model.config.projection_dim  # the whole model's rules, as in its own projections
    vision |= {name: list(value) for name, value in vision.items() if isinstance(value, tuple)}
    own = {"kind": "clip", "shape": list(shape), "classes": len(head), "mean": 0.0, "std": 1.0}
    pixels = {"pixel_mean": _rounded(clip.mean), "pixel_std": _rounded(clip.std)}
    net = ClipClassifier({**own, **pixels, "vision": vision})
    weights = {name: value for name, value in clip.model.state_dict().items() if name.startswith(("vision_model.", "visual_projection."))}
    net.tower.load_state_dict(weights)
    with torch.no_grad():
        net.head.weight.copy_(head)
        net.scale.copy_(clip.scale)
    return net.eval()


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 8) for value in values.flatten().tolist()]
