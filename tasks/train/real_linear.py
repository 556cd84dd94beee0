"""Trains a linear classifier on CLIP's features of few balanced rows and of prompts, and averages it with the zero-shot one.

Paper   The Neglected Tails of Vision-Language Models (2024), arXiv 2401.12425, section on REAL-Linear
Idea    The head has no bias and begins as the zero-shot classifier: for each class the mean embedding of its prompts, with the name that
        captions use most (`names`, which filter.real counts). Each step takes 32 image features and 32 of prompts, all of length 1, as
        rows of one batch: cross-entropy of 100 times their product with the head (cross-modal adaptation, CVPR 2023). The towers stay as
        they are. The head in the end is half the learned one and half the zero-shot one. Rows are those that filter.real keeps.
Small   Without `pretrained` a small CLIP is trained on the captions of the data. Ten passes over the rows that are there, where the
        authors' code counts those that were asked for; no augmentation, as there.
Limits  Few rows are few steps: 500 make 156, in which the authors' rate hardly moves a head of 64 dimensions; .004 was best there.
        Fashion-MNIST of 8x8 pixels with a CLIP trained on a long tail (8 seeds, filter.real): accuracy over classes .716, zero-shot .705
        (+.011, from .007 to .015). That it gains more on the two rarest classes (.023) than on the others (.008) is not certain
        (-.018 to .048). The learned head alone .711, which is no certain difference (-.007 to .016): it is better on the
        rarest, .721 against .686, and worse on the others, .709 against .723. A network to start from has no text tower:
        the rows of its head stand for the prompts. Labels are the rows' own; the paper's are the names by which a row was found.
        A class without rows is told by its prompts alone. All rows are held in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import clip, loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import MethodConfig, method
from tasks.core.networks import Net
from tasks.core.progress import track
from tasks.core.text_to_image import quiet
from tasks.train.supervised import check_start

SCALE = 100.0  # exp(4.60517), what cosines are multiplied with (authors' code)


class Config(MethodConfig):
    """Settings of `real_linear`, the authors' where not said otherwise. `clip_*` and `pretrained` are not read where a network is given."""

    names: dict[str, str] = Field({}, description="what a class is called in prompts, where not by its own name")
    templates: tuple[str, ...] = Field(("a photo of a {}",), min_length=1, description="prompts, with {} for the name")  # CLIP
    pretrained: str | None = Field(None, description="CLIP as a folder or hub id; none: a small one is trained on the captions")
    batch: int = Field(32, ge=1, description="image features of a step, and as many of prompts")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0)
    warm_up: int = Field(50, ge=0, description="steps in which the learning rate rises")
    warm_up_lr: float = Field(1e-5, ge=0, description="learning rate of the first step")
    passes: float = Field(10.0, gt=0, description="passes over the rows")
    most_steps: int = Field(32_000, ge=1, description="steps at most")
    learned: float = Field(0.5, ge=0, le=1, description="share of the learned head in the final one")
    clip_steps: int = Field(600, ge=1, description="training batches of the small CLIP")
    clip_batch: int = Field(128, ge=2, description="pairs in one of them")
    clip_lr: float = Field(1e-3, gt=0, description="its peak learning rate")


SMOKE = Config(names={"three": "digit three"}, batch=8, warm_up=2, passes=0.5, clip_steps=4, clip_batch=16)


def prompts(classes: Sequence[str], names: Mapping[str, str], templates: Sequence[str]) -> list[list[str]]:
    """The prompts of each class. Raises UserError for a name of something that is no class, and a template without a place for it."""
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise UserError(f"names: {unknown[0]!r} is no class of the data; there are {', '.join(classes) or 'none'}")
    wrong = [template for template in templates if "{}" not in template]
    if wrong:
        raise UserError(f"templates: {wrong[0]!r} has no {{}} for the name of a class")
    return [[template.replace("{}", names.get(own, own)) for template in templates] for own in classes]


def zero_shot(texts: Tensor) -> Tensor:
    """Weights (classes, D) of length 1 of the zero-shot classifier: means of the embeddings (classes, templates, D) of prompts."""
    return F.normalize(F.normalize(texts, dim=-1).mean(1), dim=-1)


def rate(step: int, steps: int, lr: float, warm_up: int, first: float) -> float:
    """Learning rate of a step, from 0 on: in a line from `first` to `lr`, then down a cosine that `steps` steps would bring to 0.

    In the authors' code too the cosine begins behind the warm-up and is cut off that much before its end.
    """
    if step < warm_up:
        return first + (lr - first) * step / warm_up
    return lr * (1 + math.cos(math.pi * (step - warm_up) / steps)) / 2


def fit_head(
    weights: Tensor,
    images: Tensor,
    labels: Tensor,
    texts: Tensor,
    of: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    warm_up: int,
    warm_up_lr: float,
    generator: torch.Generator,
) -> Tensor:
    """The learned head (classes, D), from the zero-shot `weights`, which stay as they are.

    images (N, D) with labels (N,), texts (M, D) of the classes `of` (M,), brought to length 1. Raises UserError where training diverged.
    """
    head = weights.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([head], lr=lr, weight_decay=weight_decay)
    streams = [loop.index_batches(len(some), batch, steps, generator) for some in (images, texts)]
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    for step in track(range(steps), "train probe"):
        seen, told = (next(stream).to(head.device) for stream in streams)
        optimiser.param_groups[0]["lr"] = rate(step, steps, lr, warm_up, warm_up_lr)
        logits = SCALE * torch.cat([images[seen], texts[told]]) @ head.T
        loss = F.cross_entropy(logits, torch.cat([labels[seen], of[told]]))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    if not bool(torch.isfinite(head).all()):
        raise UserError(f"'train.real_linear' diverged: weights are no longer finite numbers; set a smaller lr than {lr:g}")
    return head.detach()


@method(
    paper="The Neglected Tails of Vision-Language Models (2024)",
    arxiv="2401.12425",
    claim="a linear probe on balanced retrieved rows gains more on rare classes than on common ones, against zero-shot",
)
def real_linear(data: Dataset, cfg: Config = Config(), *, start: Net | None = None, seed: int = 0, device: str = "cpu") -> Net:
    """CLIP's image tower with a head learned on the labelled rows of `data`; from a copy of `start`, a CLIP classifier, where one is given.

    Raises UserError where no row has a label or no caption is there to train a CLIP on, for names of no class, where the CLIP cannot be
    had or does not fit, and where training diverged.
    """
    labels, classes = data.labels(), data.info.classes
    known = labels >= 0
    if not known.any():
        raise UserError("no row of the data has a label: the probe needs labelled rows")
    if labels.max() >= len(classes):
        raise UserError(f"label {labels.max()} has no class name: labels must lie below {len(classes)}")
    asked = prompts(classes, cfg.names, cfg.templates)
    with loop.seeded(seed) as generator:
        net, texts = _from_start(start, data, device) if start is not None else _from_clip(data, asked, cfg, generator, device)
        rows = data.where(known)
        images = _features(net, rows.images(), device)
        weights = zero_shot(texts)
        told = torch.arange(len(classes)).repeat_interleave(texts.shape[1])
        recipe = cfg.model_dump(include={"batch", "lr", "weight_decay", "warm_up", "warm_up_lr"})
        steps = max(1, min(cfg.most_steps, int(len(images) * cfg.passes / cfg.batch)))
        learned = fit_head(
            weights, images, torch.from_numpy(rows.labels()), texts.flatten(0, 1), told, steps=steps, generator=generator, **recipe
        )
    with torch.no_grad():
        net.head.weight.copy_(cfg.learned * learned + (1 - cfg.learned) * weights)
        net.scale.fill_(SCALE)
    return net.eval()


def _from_start(start: Net, data: Dataset, device: str) -> tuple[clip.ClipClassifier, Tensor]:
    """A copy of it, and the rows of its head as the prompts (classes, 1, D). Raises UserError where it is no CLIP that fits the data."""
    if not isinstance(start, clip.ClipClassifier):
        raise UserError("the model to start from is no CLIP classifier; train.real_linear goes on from one, or from none")
    check_start(start, data)
    net = copy.deepcopy(start)
    return net, net.head.weight.detach().clone()[:, None]


def _from_clip(
    data: Dataset, asked: list[list[str]], cfg: Config, generator: torch.Generator, device: str
) -> tuple[clip.ClipClassifier, Tensor]:
    """A classifier without a head of its own, and the embeddings of the prompts (classes, templates, D)."""
    flat = [prompt for several in asked for prompt in several]
    if cfg.pretrained is not None:
        with quiet():
            model = clip.load(cfg.pretrained)
    else:
        captions = data.captions()
        has = np.array([bool(text.strip()) for text in captions], dtype=bool)
        if not has.any():
            raise UserError("no row of the data has a caption to train a small CLIP on: name one in 'pretrained'")
        images, captions = data.where(has).images(), [text for text in captions if text.strip()]
        mean, std = loop.pixel_stats(images)
        model = clip.small(data.info.shape, [*captions, *flat], mean=mean, std=std).to(device)
        clip.fit_contrastive(
            model, images, captions, steps=cfg.clip_steps, batch=cfg.clip_batch, lr=cfg.clip_lr, generator=generator
        )  # fmt: skip
    with torch.no_grad():
        texts = clip.text_features(model.to(device), flat).cpu().unflatten(0, (len(asked), -1))
    try:
        return clip.as_net(model.to("cpu"), texts[:, 0], data.info.shape), texts
    except ValueError as error:
        raise UserError(f"pretrained: {error}") from None


def _features(net: clip.ClipClassifier, images: npt.NDArray[np.uint8], device: str) -> Tensor:
    """Image features (N, D) of length 1, on the CPU."""
    tower = loop.on(net, device)
    with torch.no_grad():
        pieces = [tower.features(loop.to_float(images[at : at + 256], device)).cpu() for at in range(0, len(images), 256)]
    return F.normalize(torch.cat(pieces), dim=-1)
