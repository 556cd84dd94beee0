"""How much rows are like the reference: a classifier on hashed n-grams, and semantic clusters with few reference rows in them.

What is learnt is learnt from rows in the order of their ids and applied to each row by itself, through sparse products that add up one row
at a time: neither the order of rows nor of batches decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.core.dataset import Dataset
from tasks.core.errors import UserError

BITS, GRAM = 16, 4  # n-grams of 4 bytes, hashed to 2^16 features
WORDS = 2**14  # features of the clusters
DIMENSIONS = 50
ASKED_AT_ONCE = 2048
Score = Callable[[Sequence[str]], npt.NDArray[np.float64]]
Assign = Callable[[Sequence[str]], npt.NDArray[np.int64]]


def grams(texts: Sequence[str], limit: int = 2000) -> Any:
    """Counts of hashed byte 4-grams, rows of length 1 (N, 2^16), as a CSR matrix; texts are read up to `limit` bytes.

    All texts are hashed as one array: a twentieth of the time of scikit-learn's HashingVectorizer on characters.
    """
    from scipy.sparse import csr_matrix

    blobs = [b" " + text.lower().encode()[:limit] + b" " * GRAM for text in texts]
    sizes = np.array([len(blob) - GRAM for blob in blobs], dtype=np.int64)
    flat = np.frombuffer(b"".join(blobs) + b" " * GRAM, dtype=np.uint8).astype(np.uint32)
    codes = flat[:-3] | flat[1:-2] << np.uint32(8) | flat[2:-1] << np.uint32(16) | flat[3:] << np.uint32(24)
    starts = np.cumsum(np.r_[0, sizes[:-1] + GRAM]) if len(sizes) else sizes
    ends = np.cumsum(sizes)
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)
    features = (codes[at] * np.uint32(2654435761)) >> np.uint32(32 - BITS)
    values = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes)
    return csr_matrix((values, features.astype(np.int32), np.r_[0, ends]), shape=(len(blobs), 1 << BITS))


def classifier(good: Sequence[str], others: Sequence[str], strength: float) -> Score:
    """Logistic regression of `good` texts against `others`, both kinds weighing the same; gives the probability (N,) of the good."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    rows = grams([*good, *others])
    rows.sum_duplicates()
    kinds = np.r_[np.ones(len(good)), np.zeros(len(others))]
    with threadpool_limits(1):  # sums of threads come in any order
        fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=300, tol=1e-3).fit(rows, kinds)
    weights, bias = fitted.coef_[0], float(fitted.intercept_[0])

    def score(texts: Sequence[str]) -> npt.NDArray[np.float64]:
        return 1 / (1 + np.exp(-(grams(texts) @ weights + bias)))

    return score


def text_clusters(texts: Sequence[str], count: int, seed: int) -> Assign:
    """k-means over the 50 first singular vectors of TF-IDF of hashed words; gives the cluster (N,) of each text.

    The centres are folded back into words, so that a text is assigned by one sparse product.
    """
    from scipy.sparse import csr_matrix
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from threadpoolctl import threadpool_limits

    hashed = HashingVectorizer(n_features=WORDS, alternate_sign=False, norm=None)
    weigh = TfidfTransformer(sublinear_tf=True)
    with threadpool_limits(1):
        rows = weigh.fit_transform(hashed.transform(texts))
        dimensions = min(DIMENSIONS, min(rows.shape) - 1)
        reduce = TruncatedSVD(dimensions, random_state=seed % 2**32).fit(rows)
        points = rows @ reduce.components_.T
        centres = KMeans(count, n_init=3, random_state=seed % 2**32).fit(points).cluster_centers_
        back = 2 * reduce.components_.T @ centres.T
    offset = (centres**2).sum(1)

    def assign(some: Sequence[str]) -> npt.NDArray[np.int64]:
        if not some:
            return np.zeros(0, np.int64)
        found: csr_matrix = weigh.transform(hashed.transform(some))
        return np.asarray(found @ back - offset).argmax(1).astype(np.int64)

    return assign


def vector_clusters(vectors: npt.NDArray[np.float32], count: int, seed: int) -> npt.NDArray[np.int64]:
    """k-means over vectors (N, D): the cluster of each (N,)."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return KMeans(count, n_init=3, random_state=seed % 2**32).fit_predict(vectors).astype(np.int64)


def strangers(pool: npt.NDArray[np.int64], reference: npt.NDArray[np.int64], count: int, share: float) -> npt.NDArray[np.bool_]:
    """Clusters (count,) that fall: those with the smallest share of reference rows first, while they hold at most `share` of the pool.

    pool, reference: the cluster of each row. A cluster in which the reference is no rarer than in the whole never falls.
    """
    own, others = np.bincount(reference, minlength=count), np.bincount(pool, minlength=count)
    rate = own / np.maximum(own + others, 1)
    fallen, left = np.zeros(count, dtype=bool), share * len(pool)
    for cluster in np.lexsort((np.arange(count), rate)):
        if others[cluster] > left or rate[cluster] >= len(reference) / (len(reference) + len(pool)):
            break
        fallen[cluster] = True
        left -= others[cluster]
    return fallen


def lot(ids: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each id (N,), whatever else is in the pool."""
    key = str(seed).encode()
    blobs = (hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in ids)
    return np.frombuffer(b"".join(blobs), dtype=np.uint64)


def some(data: Dataset, seed: int, count: int) -> list[str]:
    """Texts of at most `count` rows, drawn by their ids, in the order of the ids. Raises UserError where there is none."""
    ids = data.ids()
    chosen = data.take(np.argsort(lot(ids, seed), kind="stable")[: max(count, 1)])
    found = sorted((name, text) for name, text in zip(chosen.ids(), chosen.captions(), strict=True) if text.strip())
    if not found:
        raise UserError("quality and clusters read texts, and these rows have none: give captions, or set quality and clusters to 0")
    return [text for _, text in found]


def each(pool: Dataset, at: npt.NDArray[np.int64], judge: Callable[[Sequence[str]], npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """What is judged of the texts at positions (n,), in their order. Streams."""
    places, found, start = np.sort(at), np.zeros(len(at)), 0
    for batch in pool.take(at).batches(["caption"], ASKED_AT_ONCE):
        found[start : start + len(batch)] = judge([text or "" for text in batch.column(0).to_pylist()])
        start += len(batch)
    return found[np.searchsorted(places, at)]
