"""A ranking: documents of a corpus, the best first, as a selector wants them for the training texts of a task.

Where each text searches, the union of what the texts find is kept, each document as its best hit: the one with the
smallest rank, then the highest score. Several rankings, of one task each, are drafted into one selection.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrieval.corpus import Corpus, Progress
from retrieval.engines import Hits

QUERIES_A_BATCH = 2_048  # as many as the engine bm25 takes at once; fewer where they would have more hits than:
HITS_IN_MEMORY = 4_000_000
LAST_ROW = np.uint64(0xFFFFFFFF)


class Found(NamedTuple):
    """Documents and their best hits, [N] each: rows int64, ranks int32 from 1, scores float64, queries int32: the
    index of the training text, -1 for none."""

    rows: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    queries: np.ndarray

    def at(self, places: np.ndarray | slice) -> "Found":
        return Found(*(column[places] for column in self))


class Ranking(NamedTuple):
    """`hits` int32[texts]: how many documents each text found, None where texts do not search. `explain(text, row)`:
    what each term adds to a score, None where scores have no terms. `seconds`: what each part took.

    Of a stream, whose documents cannot be read one by one: `fetch(ascending rows, folder)` as `Stream.fetch`, and
    `explain(text, document's text)`.
    """

    found: Found
    seconds: dict[str, float]
    hits: np.ndarray | None = None
    explain: Callable[[int, int | str], dict[str, float]] | None = None
    fetch: Callable[[np.ndarray, Path], tuple[Corpus, np.ndarray]] | None = None


def fetched(rankings: Sequence[Ranking], folder: Path) -> tuple[Corpus, list[Ranking], np.ndarray]:
    """All that was found of a stream as a store in `folder`, repeats left out; the rankings of its documents; and the
    row of each in the stream, int64[len(store)]."""
    found = np.unique(np.concatenate([ranking.found.rows for ranking in rankings]))
    store, rows = rankings[0].fetch(found, folder)

    def moved(ranking: Ranking) -> Ranking:
        found = ranking.found.at(np.isin(ranking.found.rows, rows))
        found = found._replace(rows=np.searchsorted(rows, found.rows))
        return ranking._replace(found=found, explain=lambda text, row: ranking.explain(text, store[row].text))

    return store, list(map(moved, rankings)), rows


def union(
    search: Callable[[slice], Hits],
    num_queries: int,
    k: int,
    progress: Progress | None = None,
    step: int | None = None,
) -> tuple[Found, np.ndarray]:
    """The union of all queries' hits by rank, score and row; and how many hits each query had, int32[queries].

    `search(queries first to last)` gives at most `k` hits of each; `step`: of how many queries at once.
    """
    num_hits = np.zeros(num_queries, np.int32)
    parts, waiting = [], 0
    step = step or min(QUERIES_A_BATCH, max(HITS_IN_MEMORY // k, 1))
    for first in range(0, num_queries, step):
        hits = search(slice(first, first + step))
        query, place = np.nonzero(hits.rows >= 0)
        num_hits[first : first + len(hits.rows)] = np.bincount(query, minlength=len(hits.rows))
        ranks, numbers = (place + 1).astype(np.int32), (query + first).astype(np.int32)
        parts.append(Found(hits.rows[query, place], ranks, hits.scores[query, place], numbers))
        waiting += len(query)
        if waiting > HITS_IN_MEMORY:
            parts, waiting = [_best_hits(parts)], 0
        if progress:
            progress(min(first + step, num_queries), num_queries, "searching")
    found = _best_hits(parts)
    return found.at(np.lexsort((found.rows, -found.scores, found.ranks))), num_hits


def _best_hits(parts: list[Found]) -> Found:
    """One hit for each document: the smallest rank, then the highest score, then the first query."""
    hits = Found(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    hits = hits.at(np.lexsort((hits.queries, -hits.scores, hits.ranks, hits.rows)))
    return hits.at(np.diff(hits.rows, prepend=-1) != 0)


def nearest(blocks: Iterable[np.ndarray], k: int) -> Hits:
    """The `k` highest scores above 0 of each query, ties by row, where scores come in blocks of successive documents.

    A block: float32[queries, its documents]. Score and row make one number, so that a partition keeps the best k; and
    what is not above a query's k-th so far is passed over at once: most of all but the first blocks.
    """
    best, first = None, 0
    for block in blocks:
        best = np.zeros((len(block), 0), np.uint64) if best is None else best
        least = _scores(best.min(axis=1)) if best.shape[1] == k else np.zeros(len(block), np.float32)
        query, document = np.nonzero(block > least[:, None])
        counts = np.bincount(query, minlength=len(block))
        place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query]
        new = np.zeros((len(block), counts.max(initial=0)), np.uint64)
        bits = block[query, document].astype(np.float32).view(np.uint32).astype(np.uint64)
        new[query, place] = (bits << np.uint64(32)) | (LAST_ROW - (first + document).astype(np.uint64))
        best = np.concatenate([best, new], axis=1)
        if best.shape[1] > k:
            best = np.partition(best, -k, axis=1)[:, -k:]
        first += block.shape[1]
    best = np.sort(best, axis=1)[:, ::-1]
    rows = np.where(best > 0, LAST_ROW - (best & LAST_ROW), np.uint64(0)).astype(np.int64)
    rows[best == 0] = -1
    return Hits(rows, _scores(best).astype(np.float64))


def _scores(keys: np.ndarray) -> np.ndarray:
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
