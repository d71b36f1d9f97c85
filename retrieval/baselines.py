"""Selections to compare with: the same output as retrieval's, from rules that do not look at the task."""

import numpy as np


def random_rows(num_documents: int, seed: int) -> np.ndarray:
    """All rows int64[num_documents] in an order drawn by `seed`: its first n are n documents drawn at random."""
    return np.random.default_rng(seed).permutation(num_documents)
