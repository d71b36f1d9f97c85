"""The selector `random`: the whole corpus in an order drawn by `seed`, whatever the task."""

import numpy as np

from retrieval.ranking import Found, Ranking


def rank(texts, corpus, options, cache, threads=0, memory=0, cluster=None, progress=None) -> Ranking:
    size = len(corpus)
    rows, ranks = random_rows(size, options["seed"]), np.arange(1, size + 1, dtype=np.int32)
    return Ranking(Found(rows, ranks, np.zeros(size), np.full(size, -1, np.int32)), seconds={})


def random_rows(num_documents: int, seed: int) -> np.ndarray:
    """All rows int64[num_documents] in an order drawn by `seed`: its first n are n documents drawn at random."""
    return np.random.default_rng(seed).permutation(num_documents)
