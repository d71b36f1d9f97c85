from math import isclose, log

import numpy as np
import pytest

from retrieval.scoring import SCORINGS

N, DF, TF, LENGTH, K1, B = 1000, 37, 3, 1.7, 1.2, 0.75
NORM = 1 - B + B * LENGTH
BY_HAND = {
    "lucene": log(1 + 963.5 / 37.5) * 3 / (3 + 1.2 * NORM),
    "robertson": log(963.5 / 37.5) * 3 / (3 + 1.2 * NORM),
    "atire": log(1000 / 37) * 2.2 * 3 / (3 + 1.2 * NORM),
    "okapi": log(963.5 / 37.5) * 2.2 * 3 / (3 + 1.2 * NORM),
    "bm25plus": log(1001 / 37) * (1 + 2.2 * 3 / (3 + 1.2 * NORM)),
    "bm25l": log(1001 / 37.5) * 2.2 * (3 / NORM + 0.5) / (1.2 + 3 / NORM + 0.5),
}


@pytest.mark.parametrize("name", SCORINGS)
def test_equals_the_formula_by_hand(name):
    idf, saturation, _ = SCORINGS[name]
    score = idf(np.array([DF]), N)[0] * saturation(np.array([TF]), np.array([LENGTH]), K1, B)[0]
    assert isclose(score, BY_HAND[name], rel_tol=1e-12)


def test_terms_in_most_documents():
    df = np.array([1, 900])
    rare, common = log(999.5 / 1.5), log(100.5 / 900.5)
    assert (SCORINGS["lucene"].idf(df, N) > 0).all()
    assert SCORINGS["robertson"].idf(df, N)[1] == 0
    assert np.allclose(SCORINGS["okapi"].idf(df, N), [rare, 0.25 * (rare + common) / 2], rtol=1e-12)
