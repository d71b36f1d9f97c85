"""BM25 variants: what one term adds to a document's score is idf(term) * saturation(term in document).

A document's score is the sum over the query's terms that it holds, a term that the query repeats counted as often.
All take NumPy arrays or numbers. df: number of documents with the term; num_documents: all of the corpus; tf: count of
the term in the document; length: the document's number of terms divided by the corpus's average, after the analyzer.
Lengths are exact, unlike in the Lucene library, which rounds them to one byte. The variants are compared in Kamphuis,
de Vries, Boytsov and Lin, "Which BM25 do you mean?", ECIR 2020.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Scoring(NamedTuple):
    idf: Callable  # (df, num_documents) -> weights; df of every term of the corpus where it is `of_all_terms`
    saturation: Callable  # (tf, length, k1, b) -> weights
    of_all_terms: bool = False


def idf_lucene(df, num_documents):
    """Lucene 8 and later: ln(1 + (N - df + .5) / (df + .5)), always positive."""
    return np.log(1 + (num_documents - df + 0.5) / (df + 0.5))


def idf_robertson(df, num_documents):
    """Robertson and Spärck Jones 1976: ln((N - df + .5) / (df + .5)), 0 where that is negative (df > N / 2)."""
    return np.maximum(np.log((num_documents - df + 0.5) / (df + 0.5)), 0)


def idf_atire(df, num_documents):
    """Trotman, Jia and Crane 2012 (ATIRE): ln(N / df)."""
    return np.log(num_documents / df)


def idf_okapi(df, num_documents, epsilon=0.25):
    """As rank_bm25's BM25Okapi: Robertson's, but epsilon times the average over all terms where it is negative."""
    idf = np.log(num_documents - df + 0.5) - np.log(df + 0.5)
    return np.where(idf < 0, epsilon * np.mean(idf), idf)


def idf_plus(df, num_documents):
    """Lv and Zhai, CIKM 2011: ln((N + 1) / df)."""
    return np.log((num_documents + 1) / df)


def idf_long(df, num_documents):
    """Lv and Zhai, SIGIR 2011: ln((N + 1) / (df + .5))."""
    return np.log((num_documents + 1) / (df + 0.5))


def saturation(tf, length, k1, b):
    """Robertson et al., TREC-3 1994, less the factor k1 + 1, as Lucene since 8: tf / (tf + k1 (1 - b + b length))."""
    return tf / (tf + k1 * (1 - b + b * length))


def saturation_okapi(tf, length, k1, b):
    """The same with the factor k1 + 1, as the paper has it."""
    return (k1 + 1) * saturation(tf, length, k1, b)


def saturation_plus(tf, length, k1, b, delta=1.0):
    """BM25+ (Lv and Zhai, CIKM 2011): no document that has the term falls below delta. Those without it get nothing."""
    return saturation_okapi(tf, length, k1, b) + delta


def saturation_long(tf, length, k1, b, delta=0.5):
    """BM25L (Lv and Zhai, SIGIR 2011): the normalised count c = tf / (1 - b + b length) is raised by delta."""
    c = tf / (1 - b + b * length) + delta
    return (k1 + 1) * c / (k1 + c)


SCORINGS = {
    "lucene": Scoring(idf_lucene, saturation),
    "robertson": Scoring(idf_robertson, saturation),
    "atire": Scoring(idf_atire, saturation_okapi),
    "okapi": Scoring(idf_okapi, saturation_okapi, of_all_terms=True),
    "bm25plus": Scoring(idf_plus, saturation_plus),
    "bm25l": Scoring(idf_long, saturation_long),
}
