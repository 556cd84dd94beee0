"""Drops what is not worth reading, by tests in the order of their cost: rules, language, duplicates, clusters, likeness to the reference.

Paper   Yi: Open Foundation Models by 01.AI (2024), arXiv 2403.04652
Idea    A chain of tests, cheap ones first, each with its own reason and its own count: rules on length, symbols, repetition and lines;
        language; exact duplicates; near-duplicates of texts by MinHash and of images by a hash of their low frequencies; clusters that
        hold the smallest share of reference rows; a classifier that tells the reference from the pool. A row is tried until it fails.
        Of a group of duplicates the row with the smallest sample_id stays.
Small   No perplexity, coherence or safety scorer (`filter.perplexity` is the first of them), no list of URLs, no exact match below whole
        texts, no masking of personal data, no weights for topics. Quality is a logistic regression on hashed byte 4-grams, clusters are
        k-means over TF-IDF and SVD. Yi's thresholds are not published: Gopher's, C4's, FineWeb's and DataComp's stand here, looser
        where they would kill captions. Two classifiers, each asked only about the half of the pool that it did not learn from.
        Measured: AG News with 30% junk and 40% copies, 10 seeds: F1 of what is dropped .955 against .771 for duplicates only (the whole
        interval .184-.186 above), precision .966 against .992, junk found .87, copies .99-1.00, clean texts lost .023; held-out loss of
        a 6-gram model at equal characters 2.08 bits, against 2.13 and, with nothing dropped, 2.19.
Limits  MinHash finds copies of most of their words, no paraphrases: with shingles of 3 words, .83 of those with 5 to 10% of the words
        changed, with 2 words .99; but of texts of a few words 2 tell too little apart. Groups are chains: the ends of one may differ more
        than the threshold. Word salad passes (.04 found): no test reads word order. The share that falls for quality falls in a clean
        pool too. The hash finds images with noise, other light or JPEG's losses (.94 at noise of 8 levels on Fashion-MNIST, .0003 of
        the others lost), not shifted or cropped ones, and fewer of very smooth ones. Of scripts without spaces the rules on words
        see characters. Held in memory: 205 bytes and the id for a text, 24 + 64 C more for an image of C channels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from tasks.core.dataset import SCHEMAS, Dataset, decode
from tasks.core.errors import UserError
from tasks.core.method import Made, method
from tasks.core.progress import track
from tasks.filter import _near, _quality
from tasks.filter._shared import keep_top
from tasks.filter._text import (
    BLOCKED,
    LONG,
    REPEATS,
    SHORT,
    SYMBOLS,
    UNFINISHED,
    Rules,
    block_list,
    fault,
    languages_of,
    normalised,
    words,
)

RULES = (SHORT, LONG, BLOCKED, SYMBOLS, REPEATS, UNFINISHED)
LANGUAGE, EXACT, NEAR_TEXT, NEAR_IMAGE, CLUSTER, QUALITY = (
    "language",
    "duplicate of another row",
    "near-duplicate text",
    "near-duplicate image",
    "cluster",
    "quality",
)
READ_AT_ONCE = 2048
Positions = npt.NDArray[np.int64]


class Config(Rules):
    """Settings of `cascade`. The thresholds of the rules are `Rules`, with their sources."""

    languages: tuple[str, ...] = Field((), description="ISO 639-1 codes of the languages that stay; empty: all")
    language_from: int = Field(20, ge=0, description="shorter texts, in characters, are not asked for their language")
    exact: bool = Field(True, description="drop rows that are the same: text, or image and caption")
    near_text: float | None = Field(0.6, gt=0, le=1, description="Jaccard similarity from which texts are near-duplicates; null: off")
    shingle: int = Field(3, ge=1, description="words in a shingle")  # datatrove 5, for documents
    near_image: int | None = Field(6, ge=0, le=16, description="bits in which the hashes of near-duplicate images may differ; null: off")
    near_pixels: float = Field(3, ge=0, description="mean difference of their 8 x 8 thumbnails, in levels of 255, at most")
    near_embedding: float | None = Field(None, gt=0, le=1, description="cosine of thumbnails from which images are the same; null: off")
    same_caption: bool = Field(True, description="near-duplicate images fall only where their captions are near-duplicates too")
    clusters: int = Field(0, ge=0, description="number of semantic clusters; 0: off")
    cluster_share: float = Field(0.1, ge=0, lt=1, description="largest share of rows that fall with the clusters least like the reference")
    quality: float = Field(0.0, ge=0, lt=1, description="share of rows, those least like the reference, that falls; 0: off")
    strength: float = Field(1.0, gt=0, description="inverse of the classifier's regularisation")
    learn_from: int = Field(10_000, ge=2, description="rows of the pool, and of the reference, that clusters and classifier learn from")


SMOKE = Config(languages=("en",), near_embedding=0.999, clusters=3, quality=0.1, learn_from=100)


@dataclass
class State:
    """What is remembered of each of N rows: 205 bytes for a text, 24 + 64 C more for an image of C channels, and the id.

    `order` (N,) are positions by id, `fell` (N,) is the position of a reason in `reasons`, or their number. `same` (N, 1 or 2) are hashes
    of text and image, 0 for a text that is not there.
    """

    ids: pa.ChunkedArray
    order: Positions = field(repr=False)
    reasons: tuple[str, ...]
    fell: npt.NDArray[np.uint8]
    same: npt.NDArray[np.void] = field(repr=False)
    keys: _near.Keys = field(repr=False)
    slots: _near.Slots = field(repr=False)
    seen: _near.Seen | None = field(repr=False)

    def standing(self) -> Positions:
        """Positions of the rows that no test has dropped yet, by sample_id."""
        return self.order[self.fell[self.order] == len(self.reasons)]

    def drop(self, at: Positions, reason: str) -> None:
        """These rows fell, for this reason."""
        self.fell[at] = self.reasons.index(reason)

    def drop_repeats(self, at: Positions, label: Positions, reason: str) -> None:
        """Of the rows `at` (n,) with equal labels (n,) all but the first fall."""
        _, first = np.unique(label, return_index=True)
        self.drop(np.delete(at, first), reason)


def reasons_of(cfg: Config, images: bool) -> tuple[str, ...]:
    """The reasons of the tests that are on, in their order."""
    near_image = images and (cfg.near_image is not None or cfg.near_embedding is not None)
    on = ((LANGUAGE, cfg.languages), (EXACT, cfg.exact), (NEAR_TEXT, cfg.near_text), (NEAR_IMAGE, near_image))
    return (*RULES, *(reason for reason, is_on in (*on, (CLUSTER, cfg.clusters), (QUALITY, cfg.quality)) if is_on))


def read(pool: Dataset, cfg: Config, seed: int) -> State:
    """Ask each row by itself, and remember its signatures. Streams; a row that a rule dropped has no signatures."""
    count, images = len(pool), pool.info.shape != (0, 0, 0)
    reasons, blocked = reasons_of(cfg, images), block_list(cfg.blocked)
    speaks = languages_of(cfg.languages) if cfg.languages else None
    fell = np.full(count, len(reasons), dtype=np.uint8)
    same = np.zeros((count, 2 if images else 1), dtype="V16")
    keys, slots = np.zeros((count, _near.BANDS), np.uint32), np.zeros((count, _near.BANDS * _near.ROWS), np.uint8)
    small = np.zeros((count, pool.info.shape[0], _near.SIDE, _near.SIDE), np.uint8)
    seen = _near.Seen(np.zeros(count, np.uint64), small) if images else None
    ids, start, ticks = [], 0, track(range(count), "read pool")
    for batch in pool.batches(["sample_id", "caption", *(["image"] if images else [])], READ_AT_ONCE):
        ids.append(batch.column(0))
        told: list[tuple[int, list[str]]] = []
        for at, text in enumerate(batch.column(1).to_pylist(), start=start):
            if text is None and images:
                continue  # an image without a caption is judged as an image
            text = text or ""
            tokens = words(text)
            reason = fault(text, tokens, cfg, blocked)
            if not reason and speaks is not None and len(text) >= cfg.language_from and not speaks(text):
                reason = LANGUAGE
            if reason:
                fell[at] = reasons.index(reason)
                continue
            same[at, 0] = _digest(normalised(text).encode())
            told.append((at, tokens))
        if cfg.near_text is not None:
            spoken = [at for at, _ in told]
            keys[spoken], slots[spoken] = _near.sketch([_near.shingles(tokens, cfg.shingle) for _, tokens in told], seed)
        if seen is not None:
            where = start + np.flatnonzero(fell[start : start + len(batch)] == len(reasons))
            pixels = decode(batch.column(2).field("bytes").take(pa.array(where - start)).to_pylist(), pool.info.shape)
            same[where, 1] = [_digest(image.tobytes()) for image in pixels]
            seen.hashes[where], seen.small[where] = _near.look(pixels)
        start += sum(1 for _ in islice(ticks, len(batch)))
    next(ticks, None)
    names = pa.chunked_array(ids, pa.string())
    return State(names, np.asarray(pc.sort_indices(names)).astype(np.int64), reasons, fell, same, keys, slots, seen)


def drop_duplicates(state: State, *, near_text: float | None) -> Positions:
    """Exact and near-duplicates by text; of pairs those with the same pixels. Gives the group of texts of each row (N,)."""
    if EXACT in state.reasons:
        at = state.standing()
        state.drop_repeats(at, _labels(state.same[at]), EXACT)
    at, told = state.standing(), np.zeros(len(state.fell), dtype=np.int64)
    if near_text is None:
        told[at] = _labels(state.same[at, :1])
        return told
    ranked = (state.keys[at, band] for band in range(_near.BANDS))
    told[at] = _near.groups(len(at), ranked, _near.alike_texts(state.slots, at, near_text))
    pixels = _labels(state.same[at, 1:]) if state.seen is not None else np.zeros(len(at), np.int64)
    state.drop_repeats(at, _both(told[at], pixels), NEAR_TEXT)
    return told


def drop_images(state: State, told: Positions, *, distance: int | None, tolerance: float, cosine: float | None, same_caption: bool) -> None:
    """Near-duplicate images, by hash and thumbnail and by the cosine of thumbnails; `same_caption`: only where texts are of one group."""
    assert state.seen is not None
    for by_hash in (True, False):
        at = state.standing()
        if by_hash and distance is not None:
            alike = _near.alike_images(state.seen, at, distance, tolerance)
            label = _near.groups(len(at), _near.image_keys(state.seen.hashes[at], distance), alike)
        elif not by_hash and cosine is not None:
            label = _near.joined(len(at), *_near.nearest(_near.embedded(state.seen.small[at]), cosine))
        else:
            continue
        state.drop_repeats(at, _both(label, told[at]) if same_caption else label, NEAR_IMAGE)


def drop_clusters(state: State, pool: Dataset, reference: Dataset, *, count: int, share: float, learn_from: int, seed: int) -> None:
    """Clusters of texts, or of images where there are any, that hold the smallest share of the reference."""
    at = state.standing()
    if len(at) < count:
        return
    if state.seen is not None:
        theirs = np.concatenate([_near.look(images).small for _, images in reference.image_batches()])
        theirs = theirs[np.argsort(reference.ids(), kind="stable")]
        found = _quality.vector_clusters(_near.embedded(np.concatenate([theirs, state.seen.small[at]])), count, seed)
        near, own = found[: len(theirs)], found[len(theirs) :]
    else:
        good, sample = _quality.some(reference, seed, learn_from), _quality.some(pool.take(at), seed, learn_from)
        assign = _quality.text_clusters([*good, *sample], count, seed)
        near, own = assign(good), _quality.each(pool, at, assign).astype(np.int64)
    state.drop(at[_quality.strangers(own, near, count, share)[own]], CLUSTER)


def drop_unlike(
    state: State, pool: Dataset, reference: Dataset, *, share: float, strength: float, learn_from: int, seed: int
) -> tuple[Positions, npt.NDArray[np.float64]]:
    """The `share` of the texts least like the reference's. Gives the rows that were asked, those with a text, and their probabilities.

    Two classifiers: each row is asked of the one that did not learn from its half of the pool, as rows seen as negatives look worse.
    """
    at = state.standing()
    at = at[np.ascontiguousarray(state.same[at, 0]).view(np.uint8).reshape(-1, 16).any(1)]
    good = _quality.some(reference, seed, learn_from)
    half = (_quality.lot(state.ids.take(pa.array(at)).to_pylist(), seed) & np.uint64(1)).astype(np.int64)
    likely = np.zeros(len(at))
    for side in (0, 1):
        asked, learnt = at[half == side], at[half != side]
        if len(asked) and len(learnt):
            score = _quality.classifier(good, _quality.some(pool.take(learnt), seed, learn_from // 2), strength)
            likely[half == side] = _quality.each(pool, asked, score)
    if len(at) == 0:
        return at, likely
    kept, _ = keep_top(likely.astype(np.float32), state.ids.take(pa.array(at)), len(at) - int(round(share * len(at), 6)))
    state.drop(at[~kept], QUALITY)
    return at, likely


@method(
    paper="Yi: Open Foundation Models by 01.AI (2024)",
    arxiv="2403.04652",
    claim="what is dropped: a higher F1 against planted junk and copies than by removing duplicates only, and a lower held-out loss",
)
def cascade(pool: Dataset, reference: Dataset, cfg: Config = Config(), *, seed: int = 0, device: str = "cpu") -> Made:
    """Try each row of `pool` by one test after another.

    Raises UserError where the pool is empty, where nothing would be left, where a language is not known, and where clusters or quality
    are asked for without reference rows that have what they read.
    """
    if len(pool) == 0:
        raise UserError("the pool has no rows to judge; give at least one")
    if (cfg.clusters or cfg.quality) and len(reference) == 0:
        raise UserError("clusters and quality compare the pool with the reference, which has no rows; give some, or set both to 0")
    if pool.info.shape != reference.info.shape and len(reference):
        raise UserError(f"pool images are {pool.info.shape} and reference images {reference.info.shape}; they must have one shape")
    learn = {"learn_from": cfg.learn_from, "seed": seed}
    state = read(pool, cfg, seed)
    told = drop_duplicates(state, near_text=cfg.near_text)
    if NEAR_IMAGE in state.reasons:
        how = {"distance": cfg.near_image, "tolerance": cfg.near_pixels, "cosine": cfg.near_embedding}
        drop_images(state, told, **how, same_caption=cfg.same_caption)  # type: ignore[arg-type]
    if cfg.clusters:
        drop_clusters(state, pool, reference, count=cfg.clusters, share=cfg.cluster_share, **learn)
    scores = state.fell.astype(np.float64)
    if cfg.quality:
        asked, likely = drop_unlike(state, pool, reference, share=cfg.quality, strength=cfg.strength, **learn)
        scores[asked] = len(state.reasons) - 1 + likely
    counts = np.bincount(state.fell, minlength=len(state.reasons) + 1).tolist()
    if counts[-1] == 0:
        most = state.reasons[int(np.argmax(counts))]
        raise UserError(f"none of the pool's {len(pool)} rows is left: {max(counts)} fell as {most!r}; loosen that test")
    by_reason = {reason.replace(" ", "_").replace("-", "_"): float(n) for reason, n in zip(state.reasons, counts, strict=False)}
    figures = {"rows": float(len(pool)), "kept": float(counts[-1]), **by_reason}
    reasons = pa.array([*state.reasons, ""]).take(pa.array(state.fell))
    kept = state.fell == len(state.reasons)
    columns = [state.ids, pa.array(scores / len(state.reasons), pa.float32()), pa.array(kept), reasons]
    return Made(pa.table(columns, schema=SCHEMAS["verdicts"]), figures)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _labels(same: npt.NDArray[np.void]) -> Positions:
    """Equal numbers (n,) for equal rows of hashes (n, k)."""
    whole = np.ascontiguousarray(same).view(f"V{16 * same.shape[1]}").ravel()
    return np.unique(whole, return_inverse=True)[1].ravel().astype(np.int64)


def _both(one: Positions, other: Positions) -> Positions:
    """Equal numbers (n,) where both are equal."""
    return one * (int(other.max(initial=0)) + 1) + other
