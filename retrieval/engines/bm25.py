"""Our BM25: every posting's score is worked out when the index is built, so that searching only adds up.

The index lies on disk and is memory-mapped: for each term its documents and what the term adds to each ("impact",
float32), one term after another (CSC). A query adds its terms' impacts, in the order in which the terms first stand in
it, into one float64 a document; then one pass keeps the K best. Sums of float32 in float64 are exact but for the
rarest cases, so documents with equal impacts tie exactly and rows decide, also at the K-th place. All postings of the
query's terms are touched, 8 bytes each: that is this engine's speed limit.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numba import njit

from retrieval import folders
from retrieval.analyze import Analyzer
from retrieval.corpus import Corpus, Progress
from retrieval.engines import Hits, num_threads
from retrieval.scoring import SCORINGS
from retrieval.vocabulary import Vocabulary
from tasks.errors import InputError

KIND, VERSION = "bm25 index", 1
CHUNK_DOCUMENTS = 8_192
CHUNK_POSTINGS = 1 << 20
QUERIES_A_JOB = 32


def open_engine(
    corpus: Corpus,
    analyzer: Analyzer,
    scoring: str,
    k1: float,
    b: float,
    folder: Path,
    threads: int = 0,
    progress: Progress | None = None,
) -> "BM25":
    """The index of this corpus, analyzer and scoring below `folder`, built there if it is not yet.

    Raises InputError for impossible parameters and for a damaged index.
    """
    if k1 < 0 or not 0 <= b <= 1:
        raise InputError(f"BM25 wants k1 of at least 0 and b from 0 to 1, not k1={k1} and b={b}")
    key = folders.key(
        corpus=corpus.fingerprint, analyzer=analyzer.hash, scoring=scoring, k1=float(k1), b=float(b), version=VERSION
    )
    place = Path(folder) / key
    manifest = folders.ensure(place, KIND, VERSION, lambda new: _write(new, corpus, analyzer, scoring, k1, b, progress))
    return BM25(place, manifest, analyzer, num_threads(threads))


class BM25:
    """An index opened. `rows` uint32[postings], `impacts` float32[postings]; those of term t begin at `starts[t]`."""

    def __init__(self, folder: Path, manifest: dict, analyzer: Analyzer, threads: int):
        self.folder, self.vocabulary = folder, Vocabulary.load(folder, analyzer)
        self.seconds: float = manifest["seconds"]
        self._num_documents, self._threads = manifest["documents"], threads
        self._starts, self._rows, self._impacts = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("starts", "rows", "impacts")
        )

    def search(self, queries: list[list[str]], k: int) -> Hits:
        """See `Hits`; k at least 1. Threads share the queries; the result does not depend on their number."""
        terms, weights, bounds = self._as_numbers(queries)
        hits = Hits(
            np.full((len(queries), min(k, self._num_documents)), -1, np.int64),
            np.zeros((len(queries), min(k, self._num_documents))),
        )

        def search_some(first: int) -> None:
            job = slice(first, first + QUERIES_A_JOB)
            _search(
                terms, weights, bounds[first : first + QUERIES_A_JOB + 1], self._starts, self._rows, self._impacts,
                np.zeros(self._num_documents), hits.rows[job], hits.scores[job],
            )  # fmt: skip

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(search_some, range(0, len(queries), QUERIES_A_JOB)))
        return hits

    def explain(self, query: list[str], row: int) -> dict[str, float]:
        """What each term of the query adds to the score of one document; terms that it lacks are left out."""
        terms, weights, _ = self._as_numbers([query])
        adds = {}
        for term, weight in zip(terms, weights, strict=True):
            rows = self._rows[self._starts[term] : self._starts[term + 1]]
            place = np.searchsorted(rows, row)
            if place < len(rows) and rows[place] == row:
                adds[self.vocabulary.term(term)] = float(weight * self._impacts[self._starts[term] + place])
        return adds

    def _as_numbers(self, queries: list[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct known terms int32 of all queries, their counts float64, int64[Q + 1] bounds of the queries."""
        counts = [dict.fromkeys(query, 0) for query in queries]
        for query, count in zip(queries, counts, strict=True):
            for term in query:
                count[term] += 1
        distinct = list({term: None for count in counts for term in count})
        ids = dict(zip(distinct, self.vocabulary.ids(distinct).tolist(), strict=True))
        known = [[(ids[term], times) for term, times in count.items() if ids[term] >= 0] for count in counts]
        bounds = np.cumsum([0, *map(len, known)])
        terms = np.array([term for query in known for term, _ in query], np.int32)
        return terms, np.array([times for query in known for _, times in query], np.float64), bounds


@njit(cache=True, nogil=True)
def _search(terms, weights, bounds, starts, rows, impacts, sums, hit_rows, hit_scores):
    """Fills hit_rows and hit_scores [queries, k]; sums: one zero a document, and zeros again afterwards."""
    for query in range(len(bounds) - 1):
        for i in range(bounds[query], bounds[query + 1]):
            weight = weights[i]
            for p in range(starts[terms[i]], starts[terms[i] + 1]):
                sums[rows[p]] += weight * impacts[p]
        _keep_best(sums, hit_rows[query], hit_scores[query])


@njit(cache=True, nogil=True)
def _keep_best(sums, best_rows, best_scores):
    """The best by (score, then the smaller row), in order; a heap whose root is the worst of them. Clears `sums`."""
    kept = 0
    floor = 0.0  # rows come in ascending order: one that only equals the worst kept score loses the tie
    for row in range(len(sums)):
        score = sums[row]
        if score <= floor:
            continue
        if kept < len(best_rows):
            best_rows[kept], best_scores[kept] = row, score
            kept += 1
            if kept == len(best_rows):
                for root in range(kept // 2 - 1, -1, -1):
                    _sift(best_rows, best_scores, root, kept)
                floor = best_scores[0]
        else:
            best_rows[0], best_scores[0] = row, score
            _sift(best_rows, best_scores, 0, kept)
            floor = best_scores[0]
    sums[:] = 0
    if kept < len(best_rows):
        for root in range(kept // 2 - 1, -1, -1):
            _sift(best_rows, best_scores, root, kept)
    for last in range(kept - 1, 0, -1):  # heap sort: the worst goes last
        best_rows[0], best_rows[last] = best_rows[last], best_rows[0]
        best_scores[0], best_scores[last] = best_scores[last], best_scores[0]
        _sift(best_rows, best_scores, 0, last)


@njit(cache=True, nogil=True)
def _sift(rows, scores, root, size):
    """Moves the root of a heap down to where both below it are better: higher score, or the same and a smaller row."""
    row, score = rows[root], scores[root]
    while 2 * root + 1 < size:
        child = 2 * root + 1
        other = child + 1
        if other < size and (
            scores[other] < scores[child] or (scores[other] == scores[child] and rows[other] > rows[child])
        ):
            child = other
        if score < scores[child] or (score == scores[child] and row > rows[child]):
            break
        rows[root], scores[root] = rows[child], scores[child]
        root = child
    rows[root], scores[root] = row, score


# Building: one pass over the text writes (term, count) pairs to a file, document by document; a second one over that
# file puts them, scored, where their terms are. Memory holds the vocabulary and one chunk.


def _write(
    folder: Path, corpus: Corpus, analyzer: Analyzer, scoring: str, k1: float, b: float, progress: Progress | None
) -> dict:
    vocabulary = Vocabulary(analyzer)
    pairs = folder / "pairs.tmp"
    lengths = np.zeros(len(corpus), np.int64)  # terms of each document
    distinct = np.zeros(len(corpus), np.int64)  # distinct ones
    df = np.zeros(0, np.int64)
    with pairs.open("wb") as file:
        for first in range(0, len(corpus), CHUNK_DOCUMENTS):
            chunk = range(first, min(first + CHUNK_DOCUMENTS, len(corpus)))
            ids, ends = vocabulary.encode(corpus.encoded(row) for row in chunk)
            lengths[chunk.start : chunk.stop] = np.diff(ends)
            df = np.concatenate([df, np.zeros(len(vocabulary) - len(df), np.int64)])
            found = np.empty((len(ids), 2), np.int32)
            size = _count(ids, ends, df, distinct[chunk.start : chunk.stop], found)
            found[:size].tofile(file)
            if progress:
                progress(chunk.stop, len(corpus), "indexing")
    vocabulary.save(folder)
    starts = np.concatenate([[0], np.cumsum(df)])
    np.save(folder / "starts.npy", starts)
    num_postings = int(starts[-1])
    rows = _new_array(folder / "rows.npy", np.uint32, num_postings)
    impacts = _new_array(folder / "impacts.npy", np.float32, num_postings)
    idf = SCORINGS[scoring].idf(df, len(corpus))
    relative_lengths = lengths / max(lengths.mean(), 1e-9)
    places = starts[:-1].copy()
    for documents, terms, counts in _read_pairs(pairs, distinct):
        weights = SCORINGS[scoring].saturation(counts, relative_lengths[documents], k1, b)
        _place(documents, terms, (idf[terms] * weights).astype(np.float32), places, rows, impacts)
    rows.flush()
    impacts.flush()
    pairs.unlink()
    return {
        "documents": len(corpus), "terms": len(vocabulary), "postings": num_postings, "words": int(lengths.sum()),
        "corpus": corpus.fingerprint, "analyzer": analyzer.name, "scoring": scoring, "k1": k1, "b": b,
    }  # fmt: skip


def _read_pairs(path: Path, distinct: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(document, term, count) of all postings in the order of the documents, some whole documents at a time."""
    ends = np.cumsum(distinct)
    first = 0
    with path.open("rb") as file:
        while first < len(distinct):
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + CHUNK_POSTINGS)))
            pairs = np.fromfile(file, np.int32, 2 * int(ends[last - 1] - done)).reshape(-1, 2)
            yield np.repeat(np.arange(first, last, dtype=np.uint32), distinct[first:last]), pairs[:, 0], pairs[:, 1]
            first = last


def _new_array(path: Path, kind: type, size: int) -> np.ndarray:
    """A mapped .npy file whose space is taken beforehand: a full disk is an error here and not a crash later."""
    array = np.lib.format.open_memmap(path, "w+", kind, (size,))
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@njit(cache=True, nogil=True)
def _count(ids, ends, df, distinct, found):
    """Fills `found` with each document's (term, count) pairs, adds to df, fills distinct; returns how many pairs."""
    size = 0
    seen_in = np.full(len(df), -1, np.int32)
    place = np.empty(len(df), np.int32)
    for document in range(len(ends) - 1):
        before = size
        for i in range(ends[document], ends[document + 1]):
            term = ids[i]
            if seen_in[term] != document:
                seen_in[term] = document
                place[term] = size
                found[size, 0], found[size, 1] = term, 0
                df[term] += 1
                size += 1
            found[place[term], 1] += 1
        distinct[document] = size - before
    return size


@njit(cache=True, nogil=True)
def _place(documents, terms, weights, places, rows, impacts):
    for i in range(len(terms)):
        place = places[terms[i]]
        rows[place], impacts[place] = documents[i], weights[i]
        places[terms[i]] = place + 1
