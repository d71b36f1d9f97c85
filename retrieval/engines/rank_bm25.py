"""The reference engine: the package rank_bm25, which scores every document in plain Python for every query.

Hundreds of times slower than ours, and all in memory, but written by others: it shows that ours is right. `okapi` is
the package as it is; lucene, robertson and atire put their idf in the place of its own and keep its scoring loop. Its
BM25+ and BM25L depart from their papers and are not offered.
"""

import time
from collections import Counter
from pathlib import Path

import numpy as np
from rank_bm25 import BM25Okapi

from retrieval.analyze import Analyzer
from retrieval.corpus import Corpus, Progress
from retrieval.engines import MEMORY, Hits
from retrieval.scoring import SCORINGS, saturation_okapi
from tasks.errors import InputError


def open_engine(
    corpus: Corpus,
    analyzer: Analyzer,
    scoring: str,
    k1: float,
    b: float,
    folder: Path,
    threads: int = 0,
    progress: Progress | None = None,
    memory: int = MEMORY,
) -> "RankBM25":
    """Reads the whole corpus into memory; keeps nothing in `folder` and uses one thread."""
    if scoring not in ("okapi", "lucene", "robertson", "atire"):
        raise InputError(f"the engine rank_bm25 does not know the scoring {scoring}; choose okapi, or the engine bm25")
    start = time.perf_counter()
    terms = [analyzer.terms(document.text) for document in corpus]
    if not any(terms):
        raise InputError("the engine rank_bm25 cannot index a corpus without any term")
    index = BM25Okapi(terms, k1=k1, b=b)
    if scoring != "okapi":
        df = Counter(term for document in index.doc_freqs for term in document)
        has_factor = SCORINGS[scoring].saturation is saturation_okapi
        idf = SCORINGS[scoring].idf(np.array(list(df.values())), len(terms)) / (1 if has_factor else k1 + 1)
        index.idf = dict(zip(df, idf.tolist(), strict=True))
    return RankBM25(index, time.perf_counter() - start)


class RankBM25:
    def __init__(self, index: BM25Okapi, seconds: float):
        self._index, self.seconds = index, seconds

    def search(self, queries: list[list[str]], k: int) -> Hits:
        """See `Hits`."""
        k = min(k, self._index.corpus_size)
        hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k)))
        for query, rows, scores in zip(queries, *hits, strict=True):
            found = self._index.get_scores(query)
            best = np.argsort(-found, kind="stable")[:k]
            best = best[found[best] > 0]
            rows[: len(best)], scores[: len(best)] = best, found[best]
        return hits

    def explain(self, query: list[str], row: int) -> dict[str, float]:
        """What each term of the query adds to the score of one document; terms that it lacks are left out."""
        held = [term for term in query if term in self._index.doc_freqs[row]]
        return {term: self._index.get_batch_scores([term] * held.count(term), [row])[0] for term in held}
