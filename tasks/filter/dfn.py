"""Keeps the pairs that an image-text network, trained on a small clean set, finds well matched.

Paper   Data Filtering Networks (2023), arXiv 2309.17425
Idea    A two-tower network is trained by symmetric InfoNCE with a learned temperature on a small trusted set, never on the pool. Each
        pair of the pool is then scored once and alone, by the cosine of its image and its caption, and the top share is kept. The
        threshold is DataComp's, the score at index int(n * keep) of the descending sort; ties at it are settled by sample_id, so that
        exactly int(n * keep) rows survive. (DataComp keeps every row at the threshold too: one more, and all ties.)
Small   Three or four convolutions with batch norm and a bag of words instead of CLIP's transformers, trained from scratch on hundreds
        of pairs instead of 357 million. Fine-tuning on class names and averaging its weights with those before (`tune_steps`) are off:
        what they bring was not measured here. A network of `transformers` (`pretrained`) scores as it is, without training. Training
        images are shifted and get noise, since so small a set is memorised otherwise: without them AUROC on digits is .957, not .996.
        Measured: digits (defaults, 3 seeds, 180 reference pairs, pool of 1,000, 70% right, keep 0.6): AUROC .994-.998, kept pairs
        right .998-1.000. Fashion-MNIST (400 steps of 128, 5 seeds, 1,500 pairs, pool of 12,000, 45% right, wrong names a similar
        class, keep 0.3): AUROC .953-.963, kept right .957-.970; a model trained on them is .796 accurate zero-shot, on all pairs .631,
        on random ones .600, on those of a filter trained on 6,000 half wrong pairs .668, on right ones only .825.
Limits  A clean reference matters less where errors are arbitrary: .800 against .761 there. On emoji AUROC is .710 against .684 (not
        certain on five seeds): a weak filter either way. Similar classes are confused most: on Fashion-MNIST AUROC is .921-.934
        against their names, .980-.984 against arbitrary ones. Hard classes are kept less often: shirts are .02-.03 of the kept pairs
        there, a tenth of the pool. A bag of words cannot see word order. Words that the reference captions lack are all one untrained
        token, so that a right caption in new words falls with the wrong ones: the figure `unknown_words` says how common they are. The
        reference set is held in memory; the pool is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.core import loop
from tasks.core.dataset import Dataset, decode
from tasks.core.errors import UserError
from tasks.core.method import Made, MethodConfig, method
from tasks.core.progress import track
from tasks.filter._clip import Pretrained
from tasks.filter._resume import digest, engine, place, scored
from tasks.filter._shared import Scores, augment, compiled, keep_top, need_compiler, pixels, staged, survivors, verdicts, words

UNKNOWN = 0  # the token of every word that the reference captions lack; never trained, so that it points nowhere in particular
HOTTEST = 100.0  # what the cosines are multiplied with at most (CLIP)
SCORED_AT_ONCE = 512
SEEN_AT_ONCE = 128  # by the image tower on the CPU: what it computes of more leaves the cache, and is new memory from the system each time
TEMPLATE = "a photo of a {}"  # what a class is called in fine-tuning (CLIP)
PAIR = ("image", "caption")
Tokens = list[npt.NDArray[np.int64]]
Pairs = tuple[Tensor, Tensor, Tensor]


class Config(MethodConfig):
    """Settings of `dfn`. Defaults without another source were chosen on validation rows of digits and Fashion-MNIST."""

    pretrained: str | None = Field(None, description="CLIP or its kin as a folder or hub id, to score with as it is; none: train one here")
    keep: float = Field(0.3, gt=0, le=1, description="share of the pool that survives")  # DataComp's CLIP baseline; the paper has 0.15
    threshold: float | None = Field(None, ge=-1, le=1, description="keep the pairs above this cosine; `keep` is then not used")
    steps: int = Field(200, ge=1, description="training batches")
    batch: int = Field(64, ge=2, description="pairs in a batch")
    lr: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="of weight matrices; not of biases, gains and the temperature")
    width: int = Field(16, ge=1, description="channels of the first convolution")
    embedding: int = Field(64, ge=1, description="size of a word's embedding")
    dim: int = Field(64, ge=2, description="size of the space that both towers share")
    temperature: float = Field(0.07, ge=1 / HOTTEST, description="first temperature of the softmax; it is learned")  # CLIP
    mask_same: bool = Field(False, description="leave pairs of the same caption out of the negatives")
    shift: int = Field(1, ge=0, description="training images are moved by up to so many pixels")
    noise: float = Field(0.2, ge=0, description="standard deviation of the noise on training images, whose pixels lie in 0..1")
    tune_steps: int = Field(0, ge=0, description="batches of fine-tuning on the trusted labelled rows, told by the names of their classes")
    tune_lr: float = Field(1e-3, gt=0, description="its peak learning rate")
    ensemble: float = Field(0.5, ge=0, le=1, description="share of the fine-tuned weights in the mean with those before")  # WiSE-FT
    compile: bool = Field(False, description="score with towers compiled by torch; takes a C++ compiler, and about a minute at first")


SMOKE = Config(keep=0.5, steps=6, batch=16, width=4, mask_same=True, tune_steps=2)


def vocabulary(captions: Iterable[str]) -> dict[str, int]:
    """Token of each word of the captions, from 1 on in alphabetical order; `UNKNOWN` is for all other words."""
    known = sorted({word for caption in captions for word in words(caption)})
    return {word: token for token, word in enumerate(known, start=1)}


def tokenise(captions: Iterable[str], known: dict[str, int]) -> Tokens:
    """Tokens of each caption, the same array for equal ones; a caption without any word is one unknown word."""
    captions = list(captions)
    of = {text: np.array([known.get(word, UNKNOWN) for word in words(text)] or [UNKNOWN], dtype=np.int64) for text in set(captions)}
    return [of[text] for text in captions]


def bags(tokens: Sequence[npt.NDArray[np.int64]], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """All tokens one after another (T,), and where each of the N captions starts (N,)."""
    starts = np.cumsum([0] + [len(some) for some in tokens[:-1]])
    return torch.from_numpy(np.concatenate(tokens)).to(device), torch.from_numpy(starts).to(device)


class Towers(nn.Module):
    """An image tower and a text tower into one space of `dim` dimensions, and the learned temperature.

    Images: convolutions with batch norm, halving the sides until they are 4 pixels or less. Texts: mean of the word embeddings, then two
    layers. First weights come from torch's global generator: build it inside `loop.seeded`.
    """

    def __init__(
        self, shape: tuple[int, int, int], tokens: int, *, width: int, embedding: int, dim: int, temperature: float, mean: float, std: float
    ) -> None:
        super().__init__()
        inputs, *sides = shape
        halvings = max(0, math.ceil(math.log2(max(sides) / 4)))
        stages = max(3, halvings)
        layers: list[nn.Module] = []
        for stage in range(stages):
            outputs, stride = width * min(2**stage, 4), 1 if stage < stages - halvings else 2
            layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs, sides = outputs, [-(-side // stride) for side in sides]
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * sides[0] * sides[1], dim))
        self.words = nn.EmbeddingBag(tokens, embedding, mode="mean")
        self.text = nn.Sequential(nn.Linear(embedding, 2 * embedding), nn.GELU(), nn.Linear(2 * embedding, dim))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.mean, self.std = mean, std

    def see(self, images: Tensor) -> Tensor:
        """Unit vectors (N, dim) of images (N, C, H, W) in [0, 1]."""
        return F.normalize(self.image((images - self.mean) / self.std), dim=-1)

    def read(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Unit vectors (N, dim) of captions as `bags` gives them."""
        return F.normalize(self.text(self.words(tokens, starts)), dim=-1)


def info_nce(images: Tensor, texts: Tensor, scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """Mean over both directions of the cross-entropy of `scale * images @ texts.T` with the diagonal as the right answers (CLIP).

    images, texts (N, D) of unit length. `same` (N,): a number for each caption; pairs of equal number are no negatives of each other.
    """
    logits = scale * images @ texts.T
    right = torch.arange(len(logits), device=logits.device)
    if same is not None:
        twins = (same[:, None] == same) & (right[:, None] != right)
        logits = logits.masked_fill(twins, -torch.inf)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def fit(
    towers: Towers,
    images: npt.NDArray[np.uint8],
    tokens: Tokens,
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    mask_same: bool,
    shift: int,
    noise: float,
    generator: torch.Generator,
    device: str = "cpu",
) -> list[dict[str, float]]:
    """Train in place by AdamW with a one-cycle schedule; gives about 50 rows of `step`, `loss` and `temperature`.

    images (N, C, H, W), tokens of the N captions. A batch has `batch` pairs, or N where there are fewer.
    Raises UserError where the loss is no longer a number.
    """
    _, numbers = np.unique([some.tobytes().hex() for some in tokens], return_inverse=True)
    same = torch.from_numpy(numbers)
    towers.to(device).train()
    decay = [weights for weights in towers.parameters() if weights.ndim > 1]
    plain = [weights for weights in towers.parameters() if weights.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    schedule = loop.one_cycle(optimiser, lr, steps)
    batches = loop.index_batches(len(images), min(batch, len(images)), steps, generator)
    curve: list[dict[str, float]] = []
    for step in track(range(1, steps + 1), "train filter"):
        at = next(batches)
        seen = towers.see(augment(loop.to_float(images[at.numpy()], device), shift, noise, generator))
        told = towers.read(*bags([tokens[i] for i in at.tolist()], device))
        loss = info_nce(seen, told, towers.log_scale.exp(), same[at].to(device) if mask_same else None)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            towers.log_scale.clamp_(max=math.log(HOTTEST))
        if step % max(1, steps // 50) == 0 or step == steps:
            if not math.isfinite(loss.item()):
                raise UserError(f"the filter's loss is no longer a number at step {step}: set lr lower than {lr}")
            curve.append({"step": step, "loss": loss.item(), "temperature": math.exp(-towers.log_scale.item())})
    towers.eval()
    return curve


@torch.no_grad()
def cosines(towers: Towers, images: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
    """Cosine (N,) of each image (N, C, H, W) in [0, 1] with its own caption, as `bags` gives them. The towers must be in eval mode, so
    that no pair depends on another.
    """
    told = towers.read(tokens, starts)
    parts = images.tensor_split(-(-len(images) // SEEN_AT_ONCE)) if images.device.type == "cpu" else [images]
    return (torch.cat([towers.see(some) for some in parts]) * told).sum(1)


def score(towers: Towers, images: npt.NDArray[np.uint8], tokens: Tokens, device: str = "cpu") -> Scores:
    """`cosines` of uint8 images and of the tokens of their captions."""
    return cosines(towers, loop.to_float(images, device), *bags(tokens, device)).cpu().numpy()


def reader(known: dict[str, int], shape: tuple[int, int, int], device: str = "cpu") -> Callable[[pa.RecordBatch], Pairs]:
    """What makes images (N, C, H, W), and the `bags` of N captions, of a batch with the columns `image` and `caption`.

    Images are in [0, 1]; for an accelerator they stay uint8, which is a quarter to copy.
    """

    def read(batch: pa.RecordBatch) -> Pairs:
        images = pixels(batch.column("image").field("bytes").to_pylist(), shape)
        ready = loop.to_float(images) if device == "cpu" else torch.from_numpy(np.array(images, order="C"))
        told = bags(tokenise([text or "" for text in batch.column("caption").to_pylist()], known))
        return staged(ready, device), staged(told[0], device), staged(told[1], device)

    return read


def judge(towers: Towers, device: str = "cpu", fast: bool = False) -> Callable[[Pairs], Scores]:
    """What scores the pairs that `reader` makes; `fast`: by compiled towers."""

    def cosine(pairs: Pairs) -> Scores:
        if fast:
            compiled(towers.image, towers.text)
        images, *told = (some.to(device, non_blocking=True) for some in pairs)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        return cosines(towers.to(device), images, *told).cpu().numpy()

    return cosine


def unknown_words(pool: Dataset, known: dict[str, int]) -> float:
    """The share of the words in the pool's captions that are not known."""
    unknown = read = 0
    for batch in pool.batches(["caption"], 8 * SCORED_AT_ONCE):
        for some in tokenise([text or "" for text in batch.column(0).to_pylist()], known):
            unknown, read = unknown + int((some == UNKNOWN).sum()), read + len(some)
    return unknown / max(read, 1)


def averaged(before: dict[str, Tensor], after: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights between two sets of them, `share` of the way to the second; whole numbers, such as counts of batches, are the second's."""
    return {name: torch.lerp(before[name], value, share) if value.is_floating_point() else value for name, value in after.items()}


def read_reference(reference: Dataset) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Images (N, C, H, W) and captions of the clean pairs. Raises UserError for a caption without words or for less than two captions."""
    images, captions = [np.zeros((0, *reference.info.shape), dtype=np.uint8)], []
    for batch in reference.batches(["sample_id", "image", "caption"]):
        images.append(decode(batch.column(1).field("bytes").to_pylist(), reference.info.shape))
        for name, text in zip(batch.column(0).to_pylist(), batch.column(2).to_pylist(), strict=True):
            if not words(text or ""):
                raise UserError(f"reference row {name!r} has no words in its caption; every reference pair needs a right caption")
            captions.append(text)
    different = len({tuple(words(text)) for text in captions})
    if different < 2:
        raise UserError(f"the reference set has {different} different captions; telling pairs apart needs 2 or more")
    return np.concatenate(images), captions


@method(
    paper="Data Filtering Networks (2023)",
    arxiv="2309.17425",
    claim="right captions among the kept pairs: a larger share than among as many random pairs",
)
def dfn(pool: Dataset, reference: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """Train on `reference` alone, or take a network that is named, score each pair of `pool` by itself, keep the best.

    Raises UserError where image shapes differ, where the reference set has less than two captions, where the network cannot be had, or
    where no row would be left.
    """
    device, count = place(device, cfg.pretrained is None or engine() == "local"), survivors(len(pool), cfg.keep)
    if cfg.compile:
        need_compiler()
    score_all = partial(scored, pool, PAIR, size=SCORED_AT_ONCE, device=device)
    roughly = [word for word, changes in (("compiled", cfg.compile), (device, device != "cpu")) if changes]  # other last bits
    figures: dict[str, float] = {"rows": float(len(pool))}
    curve: list[dict[str, float]] = []
    with loop.seeded(seed) as generator:
        if cfg.pretrained is not None:
            network = Pretrained(cfg.pretrained, device, cfg.compile)
            scores = score_all(network.reader(pool.info.shape), network.score, key=digest(network, *roughly))
        else:
            towers, known, curve = _trained(pool, reference, cfg, generator, device)
            read = reader(known, pool.info.shape, device)
            scores = score_all(read, judge(towers, device, cfg.compile), key=digest(towers, *known, *roughly))
            figures |= {"unknown_words": unknown_words(pool, known), "reference_rows": float(len(reference)), "loss": curve[-1]["loss"]}
    ids = pool.column("sample_id")
    if cfg.threshold is None:
        kept, threshold = keep_top(scores, ids, count)
        reason = f"score below the top {100 * cfg.keep:.4g}%"
    else:
        kept, threshold = scores > np.float32(cfg.threshold), cfg.threshold
        reason = f"score not above {threshold:.4g}"
        if not kept.any():
            raise UserError(f"no pair of the pool scores above threshold={threshold:.4g}; the best has {scores.max():.4g}")
    figures |= {"kept": float(kept.sum()), "threshold": threshold, "score_mean": float(scores.mean())}
    return Made(verdicts(ids, scores, kept, reason), figures, tuple(curve))


def _trained(
    pool: Dataset, reference: Dataset, cfg: Config, generator: torch.Generator, device: str
) -> tuple[Towers, dict[str, int], list[dict[str, float]]]:
    """Towers that have learnt the trusted pairs, the words they know, and the curve of their loss."""
    if pool.info.shape != reference.info.shape:
        raise UserError(f"pool images are {pool.info.shape} and reference images {reference.info.shape}; they must have one shape")
    images, captions = read_reference(reference)
    templates = [TEMPLATE.format(name) for name in reference.info.classes] if cfg.tune_steps else []
    known = vocabulary([*captions, *templates])
    mean, std = loop.pixel_stats(images)
    size = {"width": cfg.width, "embedding": cfg.embedding, "dim": cfg.dim}
    towers = Towers(pool.info.shape, len(known) + 1, **size, temperature=cfg.temperature, mean=mean, std=std)
    recipe = cfg.model_dump(include={"batch", "weight_decay", "shift", "noise"}) | {"generator": generator, "device": device}
    curve = fit(towers, images, tokenise(captions, known), steps=cfg.steps, lr=cfg.lr, mask_same=cfg.mask_same, **recipe)
    if cfg.tune_steps:
        labels = reference.labels()
        if len(np.unique(labels[labels >= 0])) < 2:
            raise UserError("fine-tuning the filter needs trusted rows of two classes or more: set tune_steps to 0")
        before = {name: value.clone() for name, value in towers.state_dict().items()}
        told = tokenise([templates[label] for label in labels[labels >= 0]], known)
        fit(towers, images[labels >= 0], told, steps=cfg.tune_steps, lr=cfg.tune_lr, mask_same=True, **recipe)
        towers.load_state_dict(averaged(before, towers.state_dict(), cfg.ensemble))
    return towers.eval(), known, curve
