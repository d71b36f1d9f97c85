"""The selector `dsir`: importance resampling by hashed n-grams (Xie et al. 2023; features: retrieval/ngrams.py).

A document's weight is the product over its n-grams of their share in the task's training texts over their share in the
corpus. Gumbel noise, drawn by `seed`, on the logarithms of the weights makes their order a draw without replacement.
Weights and draw equal those of the package `data-selection` (tested). Documents under 100 tokens, which it drops, come
after all others here: most have weights about 1, a draw of them is hardly about the task.
"""

import time

import numpy as np

from retrieval.ngrams import corpus_ngrams, hashed, shares, sums
from retrieval.ranking import Found, Ranking

LEAST_TOKENS = 100


def rank(texts, corpus, options, cache, threads=0, memory=0, cluster=None, progress=None) -> Ranking:
    buckets, ends, hashing = corpus_ngrams(corpus, cache, threads, progress)
    start = time.perf_counter()
    weights = log_weights(texts, buckets, ends)
    scores = weights + np.random.default_rng(options["seed"]).gumbel(size=len(weights))
    is_short = np.diff(ends) < 2 * LEAST_TOKENS - 1  # each token and each two in a row is an n-gram
    order = np.lexsort((-scores, is_short))
    ranks = np.arange(1, len(order) + 1, dtype=np.int32)
    found = Found(order, ranks, scores[order], np.full(len(order), -1, np.int32))
    return Ranking(found, {"ngrams": hashing, "search": round(time.perf_counter() - start, 3)})


def log_weights(texts: list[str], buckets: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """float64[documents]: the logarithm of each document's weight, from the n-grams of the corpus."""
    return sums(buckets, ends, np.log(shares(hashed(texts)[0])) - np.log(shares(buckets)))
