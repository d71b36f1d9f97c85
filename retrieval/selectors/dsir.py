"""The selector `dsir`: importance resampling by hashed n-grams (Xie et al. 2023; features: retrieval/ngrams.py).

A document's weight is the product over its n-grams of their share in the task's training texts over their share in the
corpus. Gumbel noise, drawn by `seed`, on the logarithms of the weights makes their order a draw without replacement.
The weights equal those of the package `data-selection` (tested); its least length of 100 tokens is not asked for.
"""

import time

import numpy as np

from retrieval.ngrams import corpus_ngrams, hashed, shares, sums
from retrieval.ranking import Ranking, whole_corpus


def rank(texts, corpus, options, cache, threads=0, memory=0, progress=None) -> Ranking:
    buckets, ends, hashing = corpus_ngrams(corpus, cache, threads, progress)
    start = time.perf_counter()
    weights = log_weights(texts, buckets, ends)
    noise = np.random.default_rng(options["seed"]).gumbel(size=len(weights))
    found = whole_corpus(weights + noise)
    return Ranking(found, {"ngrams": hashing, "search": round(time.perf_counter() - start, 3)})


def log_weights(texts: list[str], buckets: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """float64[documents]: the logarithm of each document's weight, from the n-grams of the corpus."""
    return sums(buckets, ends, np.log(shares(hashed(texts)[0])) - np.log(shares(buckets)))
