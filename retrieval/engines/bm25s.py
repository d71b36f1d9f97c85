"""A rival: the package bm25s with its Numba backend, the fastest of the Python engines.

It gets our terms, so that speed and not the analyzer is compared. Scores are float32 sums; documents with equal scores
come in any order.
"""

import time
from itertools import pairwise
from pathlib import Path

import bm25s
import numpy as np

from retrieval import folders
from retrieval.analyze import Analyzer
from retrieval.corpus import Corpus, Progress
from retrieval.engines import MEMORY, Hits, num_threads
from retrieval.vocabulary import Vocabulary
from tasks.errors import InputError

KIND, VERSION = "bm25s index", 1
METHODS = ("lucene", "robertson", "atire")


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
) -> "BM25S":
    """The index of this corpus below `folder`, built in memory if it is not there, and read into memory."""
    if scoring not in METHODS:
        raise InputError(f"the engine bm25s does not know the scoring {scoring}; choose one of {', '.join(METHODS)}")
    key = folders.key(
        engine="bm25s", corpus=corpus.fingerprint, analyzer=analyzer.hash, scoring=scoring, k1=k1, b=b, version=VERSION
    )

    def write(new: Path) -> dict:
        vocabulary = Vocabulary(analyzer)
        ids, ends = vocabulary.encode(corpus.encoded(row) for row in range(len(corpus)))
        if not len(ids):
            raise InputError("the engine bm25s cannot index a corpus without any term")
        documents = [ids[start:end].tolist() for start, end in pairwise(ends)]
        start = time.perf_counter()
        index = bm25s.BM25(method=scoring, k1=k1, b=b, backend="numba")
        index.index((documents, {vocabulary.term(id): id for id in range(len(vocabulary))}), show_progress=False)
        index.save(new, show_progress=False)
        return {"seconds": round(time.perf_counter() - start, 3)}  # without making terms of the texts

    manifest = folders.ensure(Path(folder) / key, KIND, VERSION, write)
    index = bm25s.BM25.load(Path(folder) / key, load_corpus=False)
    index.backend = "numba"
    index.activate_numba_scorer()
    return BM25S(index, Path(folder) / key, len(corpus), num_threads(threads), manifest["seconds"])


class BM25S:
    def __init__(self, index: bm25s.BM25, folder: Path, num_documents: int, threads: int, seconds: float):
        self.index, self.folder, self.seconds = index, folder, seconds
        self._num_documents, self._threads = num_documents, threads

    def search(self, queries: list[list[str]], k: int) -> Hits:
        """See `Hits`."""
        k = min(k, self._num_documents)
        hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k)))
        known = [i for i, query in enumerate(queries) if any(term in self.index.vocab_dict for term in query)]
        if known:  # it fails at a query without any
            rows, scores = self.index.retrieve(
                [queries[i] for i in known], k=k, n_threads=self._threads, show_progress=False,
                backend_selection="numba",
            )  # fmt: skip
            hits.rows[known], hits.scores[known] = np.where(scores > 0, rows, -1), scores
        return hits

    def explain(self, query: list[str], row: int) -> dict[str, float]:
        """What each term of the query adds to the score of one document; terms that it lacks are left out."""
        adds = {}
        for term in query:
            if term in self.index.vocab_dict and (add := float(self.index.get_scores([term])[row])):
                adds[term] = adds.get(term, 0.0) + add
        return adds
