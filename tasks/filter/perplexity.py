"""Keeps the pairs whose caption a model that sees the image finds least surprising.

Paper   POINTS (2024), arXiv 2409.04828, section on filtering by perplexity
Idea    PPL(caption | image) = exp of the mean negative log-likelihood of the caption's tokens, each given the image and the tokens before
        it, by a model that is trained already. The lowest share is kept. A row's score is minus the logarithm of its perplexity. The
        model is any image-to-text model of `transformers` (`model`, from a folder or the hub), or else a small captioner that is trained
        on the trusted pairs: convolutions give a few tokens that stand before the caption's bytes in a causal transformer. With
        `condition: none` it is the plain perplexity of a text, by a causal language model: for pools of texts, and as a control, since
        it cannot see that a caption belongs to another image.
Small   Two layers of width 64 over bytes instead of a language model of billions of weights, from scratch on hundreds of pairs; images
        are shifted and get noise as in filter.dfn. Captions are those of the pool, not rewritten by a model before. Measured: digits
        (defaults, 2 seeds, 180 reference pairs, pool of 1,000, 60% right): AUROC .990-.992, all kept pairs right. Fashion-MNIST (width
        32, 5 seeds, 500 pairs, pool of 2,000, 59% right, wrong names those of any class): kept pairs right .948-.980, of random ones .576,
        of the lowest by the text alone .597; AUROC .851. A captioner trained on them finds the right name more often than one
        trained on all pairs, .439 against .249 at equal steps; than one trained on random pairs it is not certain (.295, from .14 to .41).
Limits  What is easily foretold is kept: long captions of fixed words (25 characters there, 17 in the pool; the figures `kept_words` and
        `kept_vocabulary` tell), and the classes that are hard to confuse. Some are then hardly seen in training (1 coat in 200 kept pairs,
        one seed), so that the loss of clean captions is far higher than with all pairs (15.3 against 3.3 nats). `by_length` heals the first
        (17 characters, .977 right, .473 found), not the second (10.9 nats). Half of the pool instead of a fifth is .863 right and finds
        most, .511. With longer training the gain in names found turns round: at 400 steps, on two other sets of captions (one seed each),
        it was .26 against .50 and .42 against .56 with all pairs. Any sample of fewer captions has fewer different words. Without a model
        the tokens are bytes, and the end of the caption is one of them; a loaded model's tokens are its own, so that thresholds do not
        carry over. Loaded models are tested with an encoder-decoder, BLIP and LLaVA, each tiny; others may want images or prompts in
        another form, and are then mostly refused. The reference set is held in memory; the pool is not.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field
from torch import nn

from tasks.core import loop
from tasks.core.dataset import Dataset, decode
from tasks.core.errors import UserError
from tasks.core.method import Made, MethodConfig, method
from tasks.filter._captioners import Captioner, Loaded, Pixels, Reader, fit
from tasks.filter._resume import digest, place, scored
from tasks.filter._shared import Mask, Scores, keep_top, survivors, verdicts, words

NOTHING = (0, 0, 0)  # the shape of the images of a pool of texts
LENGTHS = 10  # groups of captions of about the same length


class Config(MethodConfig):
    """Settings of `perplexity`. Defaults without another source were chosen on validation rows of Fashion-MNIST."""

    keep: float = Field(0.2, gt=0, le=1, description="share of the pool that survives, of the lowest perplexity")  # the paper's
    threshold: float | None = Field(None, gt=1, description="keep the captions of a perplexity below this; `keep` is then not used")
    by_length: bool = Field(False, description="keep that share among captions of about the same length, so that no length is favoured")
    condition: Literal["image", "none"] = Field("image", description="image: perplexity given the image; none: of the text alone")
    model: str = Field("", description="image-to-text model (or causal language model) as a folder or hub id; empty: train a small one")
    prompt: str = Field("", description="text before the caption, for a loaded model; an encoder-decoder has no place for it")
    longest: int = Field(256, ge=1, description="characters of a caption that are read")
    at_once: int = Field(64, ge=1, description="captions scored at once")
    steps: int = Field(400, ge=1, description="training batches, as the next eight only where no model is named")
    batch: int = Field(32, ge=2, description="pairs in a batch")
    lr: float = Field(6e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="of weight matrices; not of biases and gains")
    channels: int = Field(16, ge=1, description="channels of the first convolution")
    prefix: int = Field(4, ge=1, description="tokens that the image becomes")
    width: int = Field(64, ge=8, multiple_of=8, description="width of the transformer")
    layers: int = Field(2, ge=1, description="layers of the transformer")
    shift: int = Field(1, ge=0, description="training images are moved by up to so many pixels")  # as the next, filter.dfn's
    noise: float = Field(0.2, ge=0, description="standard deviation of the noise on training images, whose pixels lie in 0..1")


SMOKE = Config(keep=0.5, by_length=True, steps=4, batch=16, channels=4, width=16, layers=1)


def read_pairs(batch: pa.RecordBatch, shape: tuple[int, int, int] | None, longest: int) -> tuple[Pixels, list[str]]:
    """Images (n, C, H, W), where they have a shape and are to be seen, and captions, stripped and cut."""
    images = decode(batch.column("image").field("bytes").to_pylist(), shape) if shape else None
    return images, [(text or "").strip()[:longest] for text in batch.column("caption").to_pylist()]


def read_reference(reference: Dataset, sees: bool, longest: int) -> tuple[Pixels, list[str]]:
    """Images (N, C, H, W), where they are to be seen, and captions of the trusted rows.

    Raises UserError for a row without a caption and where there are no rows.
    """
    pieces: list[Any] = []
    captions: list[str] = []
    for batch in reference.batches(["sample_id", "caption", *(["image"] if sees else [])], 1024):
        images, texts = read_pairs(batch, reference.info.shape if sees else None, longest)
        if "" in texts:
            raise UserError(f"reference row {batch.column(0)[texts.index('')].as_py()!r} has no caption; every reference row needs one")
        pieces.append(images)
        captions += texts
    if not captions:
        raise UserError("the reference set has no rows to train a captioner on: give some, or name a trained one with 'model'")
    return np.concatenate(pieces) if sees else None, captions


def score_pool(
    reader: Reader, pool: Dataset, sees: bool, longest: int, at_once: int, key: str, device: str = "cpu"
) -> tuple[Scores, npt.NDArray[np.int64]]:
    """Minus the mean loss of the tokens, and their number, of all rows in order. `key`: what they depend on besides the rows;
    `device`: where the reader's network is.

    A row without a caption has the lowest score of all. Raises UserError where there is no other.
    """

    def prepare(batch: pa.RecordBatch) -> tuple[Pixels, list[str]]:
        return read_pairs(batch, pool.info.shape if sees else None, longest)

    def score(pairs: tuple[Pixels, list[str]]) -> Scores:
        images, captions = pairs
        told = np.array([bool(text) for text in captions], dtype=bool)
        made = np.full((len(captions), 2), (np.nan, 0), dtype=np.float32)
        if told.any():
            losses, counts = reader(None if images is None else images[told], [text for text in captions if text])
            made[told] = np.stack([-losses.cpu().numpy(), counts.cpu().numpy()], axis=1)
        return made

    found = scored(pool, ["caption", *(["image"] if sees else [])], prepare, score, key=key, size=at_once, device=device)
    scores, lengths = found[:, 0].copy(), found[:, 1].astype(np.int64)
    silent = np.isnan(scores)
    if silent.all():
        raise UserError("no row of the pool has a caption of which the model can tell a perplexity")
    scores[silent] = np.nextafter(scores[~silent].min(), np.float32(-np.inf))
    return scores, lengths


def within_lengths(scores: Scores, lengths: npt.NDArray[np.int64], groups: int = LENGTHS) -> Scores:
    """The share (N,) of the captions of about the same length that score no higher than each: groups of about equal size, whole lengths."""
    from scipy.stats import rankdata

    edges = np.quantile(lengths, np.arange(1, groups) / groups)
    group = np.searchsorted(edges, lengths, side="right")
    ranks = np.empty(len(scores), dtype=np.float32)
    for one in np.unique(group):
        at = group == one
        ranks[at] = rankdata(scores[at], method="max") / at.sum()
    return ranks


def caption_figures(pool: Dataset, kept: Mask) -> dict[str, float]:
    """Mean number of words of a caption and number of different words, of all captions and of the kept ones."""
    known: tuple[set[str], set[str]] = (set(), set())
    total, at = [0, 0], 0
    for batch in pool.batches(["caption"]):
        for text in batch.column(0).to_pylist():
            found = words(text or "")
            for which in (0, 1)[: 1 + bool(kept[at])]:
                known[which].update(found)
                total[which] += len(found)
            at += 1
    return {
        "words": total[0] / len(kept),
        "kept_words": total[1] / max(int(kept.sum()), 1),
        "vocabulary": float(len(known[0])),
        "kept_vocabulary": float(len(known[1])),
    }


@method(
    paper="POINTS (2024)",
    arxiv="2409.04828",
    claim="right captions among the kept pairs: a larger share than among random pairs, and than by a perplexity that cannot see the image",
)
def perplexity(pool: Dataset, reference: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """Score each caption of `pool` by itself and keep the least surprising; `reference` is read only where no model is named.

    Raises UserError where images are wanted and missing, where shapes differ, for a model that does not fit, and where no row is left.
    """
    sees, device = cfg.condition == "image", place(device)
    count = survivors(len(pool), cfg.keep)
    for name, data in (("pool", pool), ("reference set", reference)):
        if sees and data.info.shape == NOTHING and not (cfg.model and data is reference):
            raise UserError(f"the {name} has no images: set 'condition: none' to judge texts alone")
    if sees and not cfg.model and pool.info.shape != reference.info.shape:
        raise UserError(f"pool images are {pool.info.shape} and reference images {reference.info.shape}; they must have one shape")
    shape = pool.info.shape if sees else None
    curve: list[dict[str, float]] = []
    with loop.seeded(seed) as generator:
        reader: Reader
        if cfg.model:
            reader = loaded = Loaded(cfg.model, shape, cfg.prompt, device)
            model: nn.Module = loaded.model
        else:
            images, captions = read_reference(reference, sees, cfg.longest)
            mean, std = (0.0, 1.0) if images is None else loop.pixel_stats(images)
            size = {"channels": cfg.channels, "prefix": cfg.prefix, "width": cfg.width, "layers": cfg.layers}
            net = Captioner(shape, **size, mean=mean, std=std)
            curve = fit(
                net,
                images,
                captions,
                steps=cfg.steps,
                batch=cfg.batch,
                lr=cfg.lr,
                weight_decay=cfg.weight_decay,
                shift=cfg.shift,
                noise=cfg.noise,
                generator=generator,
                device=device,
            )
            reader, model = net.read, net
        key = digest(model, cfg.condition, cfg.prompt, str(cfg.longest), *([device] if device != "cpu" else []))  # other last bits
        scores, lengths = score_pool(reader, pool, sees, cfg.longest, cfg.at_once, key, device)
    ids = pool.column("sample_id")
    if cfg.threshold is None:
        kept, cut = keep_top(within_lengths(scores, lengths) if cfg.by_length else scores, ids, count)
        reason = f"perplexity above the lowest {100 * cfg.keep:.4g}%" + (" of its length" if cfg.by_length else "")
        threshold = math.exp(-scores[kept].min() if cfg.by_length else -cut)
    else:
        kept, threshold = scores > np.float32(-math.log(cfg.threshold)), cfg.threshold
        reason = f"perplexity not below {threshold:.4g}"
        if not kept.any():
            raise UserError(
                f"no caption of the pool has a perplexity below threshold={threshold:.4g}; the lowest is {math.exp(-scores.max()):.4g}"
            )
    figures = {
        "rows": float(len(scores)),
        "kept": float(kept.sum()),
        "threshold": threshold,
        "perplexity": math.exp(-scores.mean()),
        "kept_perplexity": math.exp(-scores[kept].mean()),
        **caption_figures(pool, kept),
    }
    if curve:
        figures |= {"reference_rows": float(len(reference)), "loss": curve[-1]["loss"]}
    return Made(verdicts(ids, scores, kept, reason), figures, tuple(curve))
