"""Retrieves by name a small set that has as many rows of rare classes as of common ones, and counts how rare each class is.

Paper   The Neglected Tails of Vision-Language Models (2024), arXiv 2401.12425
Idea    Captions are searched for the names of each class, by text alone. Matches times the share of them that is relevant is the
        frequency of the concept; the rarest fifth of the classes is the tail. By all names a class's rows are retrieved, ranked by how
        close their caption is to the class's prompts, and those that are not below 0 are kept, up to the same number for each class
        (REAL-Linear's set, for `train.real_linear`). The most frequent name of a class, and never the most accurate one, belongs
        into prompts (REAL-Prompt): the figures `named: class as name` count them. A caption that names several classes counts for
        each and may be kept by each, as in the authors' code, which never compares classes; a verdict holds its row once.
Small   Names are settings and not a language model's. Relevance is judged by an image-text network and not by a language model: of a
        sample of the matches, the share whose image is as close to the class's prompts as all but `slack` of the trusted rows of the
        class are, as a share of those. So a class that is hard to see does not count as rare. The network is filter.dfn's small one,
        trained on the reference, or `pretrained`. As in the authors' code, relevance corrects the frequency and not what is retrieved.
        Measured: Fashion-MNIST of 8x8 pixels, counts of classes as 1 / rank^2 (4,839 to 48), a CLIP trained on them, 8 seeds: a
        probe on 50 rows a class is .686 accurate on the two rarest, on as many rows by lot .601 (+.085, from .018 to .152),
        zero-shot .664; on all classes .716, .702, .705. Zero-shot with the class's own name (3% of its captions) .607.
Limits  The probe gains .023 on the rarest classes and .008 on the others: that the first is more is not certain (-.018 to .048). Counted
        frequency and accuracy rank ten classes alike by .24 only (Spearman; -.13 to .61), since classes differ by difficulty; less the
        accuracy of a CLIP that saw all classes equally often it is .63 (.44 to .82). `per_class` above what the rarest class has
        unbalances the set: with ten times that the probe lost .11 on the tail (28x28 pixels, 1 seed). Relevance changed nothing there,
        where names are hardly ambiguous. It asks whether the image fits, which the paper's judge cannot see; images that are like the
        class pass. The small network knows the words of the reference alone: other names are one unknown word to it, and rank at random
        among themselves. Plurals are other names. A class that no caption names keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tasks.core import clip, loop
from tasks.core.dataset import Dataset
from tasks.core.errors import UserError
from tasks.core.method import Made, MethodConfig, method
from tasks.core.progress import track
from tasks.core.text_to_image import quiet
from tasks.filter._resume import place
from tasks.filter._shared import Mask, survivors, verdicts
from tasks.filter._synonyms import Matches, match, most_frequent, names_of, tail
from tasks.filter.dfn import Towers, bags, fit, read_reference, tokenise, vocabulary

AT_ONCE = 512
NOTHING = (0, 0, 0)  # the shape of the images of a pool of texts
ENOUGH = 5  # trusted rows of a class that give it a threshold of its own; with fewer it has that of all classes
HELD_OUT = 4  # one in so many reference rows is not trained on: thresholds are set on these
Labels = npt.NDArray[np.int64]
Reader = Callable[[Sequence[str]], Tensor]  # N texts -> unit vectors (N, D)
Seer = Callable[[npt.NDArray[np.uint8]], Tensor]  # images (N, C, H, W) -> unit vectors (N, D)


class Config(MethodConfig):
    """Settings of `real`. Those of the small network are filter.dfn's."""

    synonyms: dict[str, tuple[str, ...]] = Field({}, description="other names of each class; its own always counts")
    per_class: int = Field(500, ge=1, description="rows of a class that are kept at most")  # paper; 100 in the authors' code
    templates: tuple[str, ...] = Field(("a photo of a {}",), min_length=1, description="prompts, with {} for a class's name")  # CLIP
    relevance_sample: int = Field(200, ge=0, description="matches of a class whose relevance is judged; 0: all matches count")
    slack: float = Field(0.25, gt=0, lt=1, description="share of the trusted rows below a class's threshold of relevance")
    pretrained: str | None = Field(None, description="CLIP as a folder or hub id; none: a small network is trained here")
    steps: int = Field(200, ge=1, description="training batches of the small network")
    batch: int = Field(64, ge=2, description="pairs in a batch")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    width: int = Field(16, ge=1, description="channels of the first convolution")
    dim: int = Field(64, ge=2, description="size of the space that images and texts share")


SMOKE = Config(synonyms={"three": ("digit three",)}, per_class=10, relevance_sample=5, steps=6, batch=16, width=4)


def class_prompts(read: Reader, names: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
    """Mean prompt (classes, D) of each class: over its names, of the unit mean of a name's templates.

    What comes near to it has a high mean cosine with the names, which is what the authors rank by. Raises UserError for a template
    without a place for the name.
    """
    wrong = [template for template in templates if "{}" not in template]
    if wrong:
        raise UserError(f"templates: {wrong[0]!r} has no {{}} for the name of a class")
    found = []
    for several in names:
        each = read([template.replace("{}", name) for name in several for template in templates]).unflatten(0, (len(several), -1))
        found.append(F.normalize(each.mean(1), dim=-1).mean(0))
    return torch.stack(found)


def nearness(pool: Dataset, matches: Matches, prompts: Tensor, read: Reader) -> npt.NDArray[np.float32]:
    """Similarity (M,) of each match's caption with the prompts of its class. Rounded, so that equal captions are equally near."""
    rows, which = np.unique(matches.at, return_inverse=True)
    pieces, ticks = [], track(range(len(rows)), "rank captions")
    for batch in pool.take(rows).batches(["caption"], AT_ONCE):
        pieces.append((read([text or "" for text in batch.column(0).to_pylist()]) @ prompts.T).cpu().numpy())
        sum(1 for _ in islice(ticks, len(batch)))
    next(ticks, None)
    return np.round(np.concatenate(pieces)[which, matches.labels], 5).astype(np.float32)


def retrieve(
    ids: Sequence[str], matches: Matches, near: npt.NDArray[np.float32], classes: Sequence[str], per_class: int
) -> tuple[npt.NDArray[np.float32], Mask, list[str]]:
    """Score (N,), which rows are kept, and why the others are not. ids: the sample_id of each row; ties are settled by it.

    A row's score is its best nearness, -1 where it names no class. The reason is that of its best class.
    """
    scores, kept, reasons = np.full(len(ids), -1, dtype=np.float32), np.zeros(len(ids), dtype=bool), ["names no class"] * len(ids)
    for at, label, value in zip(matches.at.tolist(), matches.labels.tolist(), near.tolist(), strict=True):
        if reasons[at] == "names no class" or value > scores[at]:
            scores[at] = value
            reasons[at] = "caption unlike its class" if value < 0 else f"{classes[label]}: no room left"
    for label in range(len(classes)):
        own = np.flatnonzero((matches.labels == label) & (near >= 0)).tolist()
        own.sort(key=lambda m: (-near[m], ids[int(matches.at[m])]))
        kept[matches.at[own[:per_class]]] = True
    return scores, kept, reasons


def relevance(
    pool: Dataset,
    matches: Matches,
    trusted: Dataset,
    names: Sequence[Sequence[str]],
    prompts: Tensor,
    see: Seer,
    *,
    sample: int,
    slack: float,
    generator: torch.Generator,
) -> npt.NDArray[np.float64]:
    """Share of the matches of each class (classes,) that show it: those near its prompts, by image, in units of the trusted rows' share.

    Each class is judged on `sample` matches drawn at random. Its threshold is the quantile `slack` of its trusted rows' cosines. A class
    without matches has 1. Raises UserError where no trusted caption names a class.
    """
    known = match(trusted, names)
    if not len(known.at):
        raise UserError("no reference caption names a class, so relevance cannot be judged: set relevance_sample to 0, or give such rows")
    cosines = _cosines(trusted, known.at, known.labels, prompts, see)
    chosen = []
    for label in range(len(names)):
        own = np.flatnonzero(matches.labels == label)
        chosen.append(own[torch.randperm(len(own), generator=generator)[:sample].numpy()])
    asked = np.sort(np.concatenate(chosen))
    found = _cosines(pool, matches.at[asked], matches.labels[asked], prompts, see)
    rates = np.ones(len(names))
    for label in np.unique(matches.labels[asked]):
        own = cosines[known.labels == label]
        threshold = np.quantile(own if len(own) >= ENOUGH else cosines, slack)
        rates[label] = min(1.0, float((found[matches.labels[asked] == label] >= threshold).mean()) / (1 - slack))
    return rates


def _cosines(data: Dataset, at: Labels, labels: Labels, prompts: Tensor, see: Seer) -> npt.NDArray[np.float32]:
    """Cosine (M,) of the image at each of the rows `at` (M,), ascending, with the prompts of the class beside it."""
    rows, which = np.unique(at, return_inverse=True)
    towards = F.normalize(prompts, dim=-1).T
    every = torch.cat([see(images) @ towards for _, images in data.take(rows).image_batches(AT_ONCE)]).cpu().numpy()
    return np.asarray(every[which, labels])


def _loaded(name: str, device: str) -> tuple[Reader, Seer]:
    """What reads and sees by a CLIP of `transformers`."""
    with quiet():
        network = clip.load(name).to(device)

    def read(texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return clip.text_features(network, texts)

    return read, lambda images: clip.embed_images(network, images).to(device)


def _trained(trusted: Dataset, cfg: Config, generator: torch.Generator, device: str) -> tuple[Reader, Seer, list[dict[str, float]]]:
    """What reads and sees by filter.dfn's network, trained on trusted pairs, and the curve of its loss."""
    images, captions = read_reference(trusted)
    known = vocabulary(captions)
    mean, std = loop.pixel_stats(images)
    size: dict[str, Any] = {"width": cfg.width, "embedding": cfg.dim, "dim": cfg.dim, "temperature": 0.07}
    towers = Towers(trusted.info.shape, len(known) + 1, **size, mean=mean, std=std)
    curve = fit(
        towers, images, tokenise(captions, known), steps=cfg.steps, batch=cfg.batch, lr=cfg.lr, weight_decay=0.1, mask_same=True,
        shift=1, noise=0.2, generator=generator, device=device,
    )  # fmt: skip

    def read(texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return towers.read(*bags(tokenise(texts, known), device))

    def see(images: npt.NDArray[np.uint8]) -> Tensor:
        with torch.no_grad():
            return towers.see(loop.to_float(images, device))

    return read, see, curve


@method(
    paper="The Neglected Tails of Vision-Language Models (2024)",
    arxiv="2401.12425",
    claim="a linear probe on a balanced set found by name beats one on rows by lot, on rare classes; frequent names beat class names",
)
def real(pool: Dataset, reference: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """Find the names in the captions of `pool`, count concepts, keep the rows of each class whose captions are nearest to its prompts.

    Raises UserError for synonyms of no class, where the reference cannot train or judge, where the network cannot be had, or where no row
    would be left.
    """
    rows, classes, device = len(pool), pool.info.classes, place(device)
    survivors(rows, 1.0)
    names = names_of(classes, cfg.synonyms)
    matches = match(pool, names)
    if not len(matches.at):
        raise UserError("no caption of the pool names a class: give the names that captions have in 'synonyms'")
    if pool.info.shape == NOTHING and (cfg.pretrained is None or cfg.relevance_sample):
        raise UserError("the pool has no images: name a CLIP in 'pretrained' and set relevance_sample to 0, to go by texts alone")
    curve: list[dict[str, float]] = []
    with loop.seeded(seed) as generator:
        trusted = reference
        if cfg.pretrained is not None:
            read, see = _loaded(cfg.pretrained, device)
        else:
            if pool.info.shape != reference.info.shape:
                raise UserError(f"pool images are {pool.info.shape} and reference images {reference.info.shape}; they must have one shape")
            learnt = reference
            if cfg.relevance_sample:
                order = torch.randperm(len(reference), generator=generator).numpy()
                trusted, learnt = (reference.take(some) for some in (order[::HELD_OUT], np.delete(order, np.s_[::HELD_OUT])))
            read, see, curve = _trained(learnt, cfg, generator, device)
        prompts = class_prompts(read, names, cfg.templates)
        near = nearness(pool, matches, prompts, read)
        rates = np.ones(len(classes))
        if cfg.relevance_sample:
            how: dict[str, Any] = {"sample": cfg.relevance_sample, "slack": cfg.slack, "generator": generator}
            rates = relevance(pool, matches, trusted, names, prompts, see, **how)
    ids = pool.column("sample_id")
    scores, kept, reasons = retrieve(ids.to_pylist(), matches, near, classes, cfg.per_class)
    if not kept.any():
        raise UserError("no caption is near the prompts of the class that it names: train longer, or name a network in 'pretrained'")
    figures = _figures(rows, matches, names, classes, rates, kept)
    if curve:
        figures |= {"reference_rows": float(len(reference)), "loss": curve[-1]["loss"]}
    return Made(verdicts(ids, scores, kept, reasons), figures, tuple(curve))


def _figures(
    rows: int, matches: Matches, names: list[list[str]], classes: Sequence[str], rates: npt.NDArray[np.float64], kept: Mask
) -> dict[str, float]:
    """What was counted: of the pool, of each class, and of each of its names; `tail: class` are the rarest, with their frequency."""
    found = matches.of_class()
    frequency = rates * found
    own = np.bincount(matches.labels[kept[matches.at]], minlength=len(classes))
    several = np.bincount(matches.at, minlength=rows)
    figures = {"rows": float(rows), "kept": float(kept.sum()), "naming_a_class": float((several > 0).sum())}
    figures |= {"naming_several": float((several > 1).sum()), "rarest": float(frequency.min()), "most_common": float(frequency.max())}
    for label, name in enumerate(classes):
        each = {"frequency": frequency[label], "matches": found[label], "relevance": rates[label], "kept": own[label]}
        figures |= {f"{what}: {name}": float(value) for what, value in each.items()}
        figures |= {f"named: {name} as {said}": float(count) for said, count in zip(names[label], matches.counts[label], strict=True)}
    figures |= {f"tail: {classes[label]}": float(frequency[label]) for label in tail(frequency)}
    return figures | {"renamed": float(sum(most_frequent(*pair) != pair[0][0] for pair in zip(names, matches.counts, strict=True)))}
