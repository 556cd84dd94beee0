"""Near-duplicates: signatures of texts (MinHash) and of images (DCT hash and thumbnail), and the groups that they form.

A signature depends on nothing but its own row, and rows are compared in one given order, so neither the order of rows nor of shards
decides. Hashes of images are computed in whole numbers, where sums do not depend on the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BANDS, ROWS = 20, 5  # two texts of Jaccard similarity s meet with 1 - (1 - s^5)^20: .47 at s = .5, .80 at .6, .975 at .7, .9996 at .8
REACH = 4  # a row is compared with the first of its bucket and with so many before it: linear in rows, whatever the buckets' size
AT_ONCE = 1 << 16  # pairs compared at once
SIDE = 8  # of the thumbnail, and of the low frequencies that the image hash keeps
FINE = 1024  # weights are rounded to a FINE-th, so that all sums are whole numbers below 2^53
PCA_FROM = 20_000  # images from which the components are taken
Keys = npt.NDArray[np.uint32]
Slots = npt.NDArray[np.uint8]
Groups = npt.NDArray[np.int64]
Alike = Callable[[Groups, Groups], npt.NDArray[np.bool_]]


class Seen(NamedTuple):
    """Signatures of images: hash (N,) uint64 of the low frequencies in grey, thumbnail (N, C, 8, 8) uint8."""

    hashes: npt.NDArray[np.uint64]
    small: npt.NDArray[np.uint8]


def shingles(tokens: Sequence[str], size: int) -> list[str]:
    """Runs of `size` words; a shorter text is one shingle."""
    if size == 1 and tokens:
        return list(tokens)
    return [" ".join(some) for some in zip(*(tokens[at:] for at in range(size)), strict=False)] or [" ".join(tokens)]


def sketch(texts: Sequence[Sequence[str]], seed: int) -> tuple[Keys, Slots]:
    """MinHash of N sets of shingles: band keys (N, 20) uint32, and the low byte of each of the 100 minima (N, 100)."""
    from rensa import RMinHash

    if not texts:
        return np.zeros((0, BANDS), np.uint32), np.zeros((0, BANDS * ROWS), np.uint8)
    rows = RMinHash.digest_matrix_from_token_sets(texts, num_perm=BANDS * ROWS, seed=seed % 2**32).to_rows()
    minima = np.array(rows, dtype=np.uint32)
    odd = np.random.default_rng(seed % 2**32).integers(0, 2**63, ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    keys = (minima.reshape(-1, BANDS, ROWS).astype(np.uint64) * odd).sum(2, dtype=np.uint64) >> np.uint64(32)
    return keys.astype(np.uint32), minima.astype(np.uint8)


def similarity(one: Slots, other: Slots) -> npt.NDArray[np.float64]:
    """Jaccard similarity (N,) as the share of equal minima, less those whose low bytes are equal by chance (b-bit MinHash)."""
    chance = 1 / 256
    return ((one == other).mean(1) - chance) / (1 - chance)


def look(images: npt.NDArray[np.uint8]) -> Seen:
    """Signatures of images (N, C, H, W): a bit for each of the 8 x 8 lowest frequencies of the grey image that is above their median
    (as pHash; the mean of the image is no part of the median), and the image as 8 x 8 pixels.
    """
    count, channels, height, width = images.shape
    grey = images.sum(1, dtype=np.float64)
    low = (_frequencies(height) @ grey @ _frequencies(width).T).reshape(count, -1)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    down, across = _areas(height), _areas(width)
    small = (down @ images.astype(np.float64) @ across.T) / (down.sum(1)[:, None] * across.sum(1))
    return Seen(np.packbits(bits, axis=1).view(np.uint64).ravel(), np.rint(small).astype(np.uint8).reshape(count, channels, SIDE, SIDE))


def image_keys(hashes: npt.NDArray[np.uint64], distance: int) -> Iterator[npt.NDArray[np.uint64]]:
    """Keys (N,), of which two hashes at most `distance` bits apart share one: of distance + 2 parts of the hash at least two are equal."""
    edges = np.linspace(0, 64, distance + 3).astype(int)
    masks = [((1 << int(high)) - 1) ^ ((1 << int(low)) - 1) for low, high in pairwise(edges)]
    for one, other in combinations(masks, 2):
        yield hashes & np.uint64(one | other)


def alike_texts(slots: Slots, at: Groups, least: float) -> Alike:
    """Whether the texts at two positions of `at` are at least so similar."""
    return lambda one, other: similarity(slots[at[one]], slots[at[other]]) >= least


def alike_images(seen: Seen, at: Groups, distance: int, tolerance: float) -> Alike:
    """Whether hashes differ in at most `distance` bits, and thumbnails by a mean of at most `tolerance` levels of 255."""

    def same(one: Groups, other: Groups) -> npt.NDArray[np.bool_]:
        one, other = at[one], at[other]
        near = np.bitwise_count(seen.hashes[one] ^ seen.hashes[other]) <= distance
        gaps = np.abs(seen.small[one].astype(np.int16) - seen.small[other]).mean((1, 2, 3))
        return near & (gaps <= tolerance)

    return same


def groups(count: int, keys: Iterator[npt.NDArray[Any]], alike: Alike) -> Groups:
    """For each of `count` rows the first row of its group (N,): rows that share a key and are alike, and those alike to these.

    keys: one array (N,) after another. In a bucket of equal keys each row is compared with the first and with the 4 before it.
    """
    found = np.arange(count)
    for key in keys:
        order = np.argsort(key, kind="stable")
        placed = key[order]
        starts = np.flatnonzero(np.r_[True, placed[1:] != placed[:-1]]) if count else np.zeros(0, np.int64)
        heads = np.repeat(starts, np.diff(np.r_[starts, count]))
        place = np.arange(count)
        for back in range(REACH + 1):  # first the bucket's first row, then those just before
            later = np.flatnonzero(place > heads) if back == 0 else np.flatnonzero(place - back > heads)
            one, other = order[heads[later] if back == 0 else later - back], order[later]
            differ = found[one] != found[other]
            found = _joined(found, one[differ], other[differ], alike)
    return found


def nearest(vectors: npt.NDArray[np.float32], least: float, count: int = 8) -> tuple[Groups, Groups]:
    """Pairs of rows (N, D) of unit length with a cosine of at least `least`, among the `count` nearest of each, by usearch's graph.

    Rows go in one after another by one thread, so that equal input gives an equal graph.
    """
    from usearch.index import Index

    graph = Index(ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_add=64, expansion_search=64)
    graph.add(np.arange(len(vectors)), vectors, threads=1)
    matches = graph.search(vectors, min(count, len(vectors)), threads=1)
    near = np.asarray(matches.distances).reshape(len(vectors), -1) <= 1 - least
    one = np.repeat(np.arange(len(vectors)), near.shape[1]).reshape(near.shape)[near]
    return one, np.asarray(matches.keys).reshape(near.shape)[near].astype(np.int64)


def embedded(small: npt.NDArray[np.uint8], dimensions: int = 32) -> npt.NDArray[np.float32]:
    """Thumbnails (N, C, 8, 8) as unit vectors (N, D): their principal components, whose signs do not matter for a cosine."""
    flat = small.reshape(len(small), -1).astype(np.float64)
    flat -= flat.mean(0)
    some = flat[:: -(-len(flat) // PCA_FROM)]
    _, axes = np.linalg.eigh(some.T @ some)
    vectors = flat @ axes[:, ::-1][:, :dimensions]
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def joined(count: int, one: Groups, other: Groups) -> Groups:
    """For each row the first row (N,) that a chain of the pairs leads to."""
    return _joined(np.arange(count), one, other, _any)


def _any(one: Groups, _: Groups) -> npt.NDArray[np.bool_]:
    return np.ones(len(one), dtype=bool)


def _joined(found: Groups, one: Groups, other: Groups, alike: Alike) -> Groups:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    kept = [alike(one[at : at + AT_ONCE], other[at : at + AT_ONCE]) for at in range(0, len(one), AT_ONCE)]
    same = np.concatenate(kept) if kept else np.zeros(0, dtype=bool)
    if not same.any():
        return found
    count = len(found)
    links = coo_array((np.ones(same.sum(), dtype=bool), (found[one[same]], found[other[same]])), shape=(count, count))
    number, label = connected_components(links, directed=False)
    first = np.full(number, count)
    np.minimum.at(first, label, np.arange(count))
    return first[label][found]


def _frequencies(side: int) -> npt.NDArray[np.float64]:
    """The 8 lowest rows of the DCT of a side (8, side), as whole numbers; a side below 8 has fewer, the others are 0."""
    at = np.arange(side)
    waves = np.cos(np.pi * (2 * at + 1) * np.arange(SIDE)[:, None] / (2 * side))
    waves[side:] = 0
    return np.rint(FINE * waves)


def _areas(side: int) -> npt.NDArray[np.float64]:
    """How much of each pixel of a side lies in each of 8 equal parts (8, side), as whole numbers."""
    edges, at = np.linspace(0, side, SIDE + 1)[:, None], np.arange(side)
    return np.rint(FINE * np.clip(np.minimum(edges[1:], at + 1) - np.maximum(edges[:-1], at), 0, None))
