"""Exact top K for many queries at once, while documents pass by: what the engines bm25 and scan have in common.

A document is added up for all queries of a batch together. A term that many of them hold is a row of weights, a lane a
query, and 128 lanes are added in four instructions (`lanes.add_rows`); a term that few hold is a list of those few.
Touching postings costs next to nothing this way: the time goes where a document and a query share a term, and a good
part of that is shared by 32 queries. These sums are of 16-bit integers and only a filter: whatever may be among a
query's K best is scored again as the formula says, in float64, and goes to a heap. The K-th best score there raises
the query's floor. So results are exact, ties included, and do not depend on the order in which documents pass.

The filter errs on one side. Weights and saturations are rounded down to integers and their product once more, so that a
document's sum is below its score by less than 2 for each term of the query, and 8 for the rounded factors; floors are
lowered by as much. Both are at least so large that a shared term always counts: what shares none is not looked at.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

from retrieval.engines.lanes import MASKS, TILE, add_rows, lowest_bit

BLOCK = 64  # documents that are added up together: their sums, 2 bytes a query each, fit the second-level cache
LISTED_SHARE = 48  # a term is a list if fewer than one in so many queries hold it: measured, flat from 32 to 64
MOST = 65_535
LEAST_WEIGHT, LEAST_FACTOR = 64, 1_024  # their product is 2^16: 1 after the shift


class Batch(NamedTuple):
    """Queries, ready for `pass_by`. A slot is a distinct term of the batch; the first `len(rows[0])` are rows.

    slots int32, counts float32: terms of query q, in the order in which they first stand in it, and how often, are at
    bounds[q]:bounds[q + 1]. idf float64[slots]. rows uint16[tiles, rows, TILE]. The queries of list i are at
    list_bounds[i]:list_bounds[i + 1] of list_lanes uint32 (their places in a block's sums) and list_weights uint16.
    scales float64[Q]: a score times it is a sum. margins int64[Q].
    """

    slots: np.ndarray
    counts: np.ndarray
    bounds: np.ndarray
    idf: np.ndarray
    rows: np.ndarray
    list_bounds: np.ndarray
    list_lanes: np.ndarray
    list_weights: np.ndarray
    scales: np.ndarray
    margins: np.ndarray


class Saturations(NamedTuple):
    """What a count of a term in a document is worth: `exact` float64 and `factors` uint32 (of 65,535, rounded down).

    A document of n terms that holds one t times has it at `first[n] + t`. `most` is the largest.
    """

    exact: np.ndarray
    factors: np.ndarray
    first: np.ndarray
    most: float


class Best(NamedTuple):
    """The K best documents of each query so far, a heap each whose root is the worst; `floors` uint16[tiles * TILE]."""

    rows: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    floors: np.ndarray


def make_batch(queries: list[list[str]], idf_of: Callable[[list[str]], np.ndarray], most: float) -> tuple[Batch, dict]:
    """The batch, and the slot of each term that the corpus knows.

    idf_of: float64 for each of a list of distinct terms, NaN where the corpus lacks it. most: of the saturations.
    """
    numbers: dict[str, int] = {}
    found = [[numbers.setdefault(term, len(numbers)) for term in query] for query in queries]
    query_of = np.repeat(np.arange(len(queries)), [len(query) for query in found])
    terms, counts, query_of = _distinct(np.array([t for query in found for t in query], np.int64), query_of)
    names = list(numbers)
    idf = idf_of(names)
    known = ~np.isnan(idf[terms])
    terms, counts, query_of = terms[known], counts[known].astype(np.float64), query_of[known]

    holders = np.bincount(terms, minlength=len(names))
    num_tiles = -(-len(queries) // TILE)
    as_row = holders * LISTED_SHARE > num_tiles * TILE
    order = np.argsort(~as_row, kind="stable")  # rows first
    order = order[holders[order] > 0]
    slot_of = np.full(len(names), -1, np.int32)
    slot_of[order] = np.arange(len(order), dtype=np.int32)
    slots, num_rows = slot_of[terms], int(as_row.sum())

    # The most that each term adds to a score. Okapi's idf may be below 0, which the filter leaves out.
    adds = np.maximum(counts * idf[terms] * most, 0)
    reach = np.bincount(query_of, adds, len(queries))
    sizes = np.bincount(query_of, minlength=len(queries))
    largest = np.zeros(len(queries))
    np.maximum.at(largest, query_of, adds)
    # A document never reaches all that a long query offers, so that a lane may be full at a quarter of it: that is safe
    # (a full lane passes every floor), and leaves finer steps where the floors are.
    scales = MOST / np.maximum(np.maximum(reach / np.clip(sizes / 16, 1, 4), largest), 1e-30)
    weights = np.floor(adds * scales[query_of] * (1 - 1e-12))
    weights = np.where(adds > 0, np.maximum(weights, LEAST_WEIGHT), 0).astype(np.uint16)

    tiles, lanes = np.divmod(query_of, TILE)
    rows = _aligned((num_tiles, num_rows, TILE))
    in_row = slots < num_rows
    rows[tiles[in_row], slots[in_row], lanes[in_row]] = weights[in_row]
    listed = np.flatnonzero(~in_row)
    listed = listed[np.argsort(slots[listed], kind="stable")]
    batch = Batch(
        slots, counts.astype(np.float32), np.concatenate([[0], np.cumsum(sizes)]), idf[order], rows,
        np.concatenate([[0], np.cumsum(holders[order[num_rows:]])]),
        (tiles * (BLOCK + 1) * TILE + lanes)[listed].astype(np.uint32), weights[listed], scales, 2 * sizes + 10,
    )  # fmt: skip
    return batch, {names[number]: slot for slot, number in enumerate(order)}


def _distinct(terms: np.ndarray, query_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(term, count, query) without repeats, the terms of a query in the order in which they first stand in it."""
    pairs = query_of * (int(terms.max(initial=0)) + 1) + terms
    _, first, counts = np.unique(pairs, return_index=True, return_counts=True)
    order = np.argsort(first)
    first = first[order]
    return terms[first], counts[order], query_of[first]


def make_saturations(lengths: np.ndarray, most_counts: np.ndarray, average: float, saturation, k1, b) -> Saturations:
    """For documents of these lengths (distinct, ascending), in which a term stands at most `most_counts` times."""
    sizes = most_counts.astype(np.int64) + 1
    ends = np.cumsum(sizes)
    counts = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
    relative = np.repeat(lengths / average, sizes)
    exact = np.where(counts > 0, saturation(np.maximum(counts, 1), relative, k1, b), 0)
    most = float(exact.max(initial=1e-30))
    factors = np.maximum(np.floor(exact / most * MOST), LEAST_FACTOR).astype(np.uint32)
    first = np.zeros(int(lengths.max(initial=0)) + 1, np.int64)
    first[lengths] = ends - sizes
    return Saturations(exact, factors, first, most)


def nothing_yet(num_queries: int, k: int) -> Best:
    """No query has a document; floors of 1 let everything in that shares a term. Lanes without a query are closed."""
    floors = _aligned((-(-num_queries // TILE) * TILE,))
    floors[:] = MOST
    floors[:num_queries] = 1
    shape = (num_queries, k)
    return Best(np.full(shape, -1, np.int64), np.zeros(shape), np.zeros(num_queries, np.int64), floors)


def floors_at(batch: Batch, scores: np.ndarray) -> np.ndarray:
    """The floors that let every document in whose score is at least `scores` float64[Q]."""
    return np.clip(np.floor(scores * batch.scales) - batch.margins, 1, MOST).astype(np.uint16)


def working_space(batch: Batch) -> tuple[np.ndarray, ...]:
    """What `add_up` needs to itself: one for each thread."""
    tiles = len(batch.rows)
    return (
        _aligned((tiles * (BLOCK + 1) * TILE,)),
        np.empty((BLOCK, tiles * TILE), np.uint16),
        np.zeros(BLOCK, np.int64),
        np.zeros(len(batch.idf), np.float32),
    )


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros uint16 that begin at a cache line, since a vector that spans two is read at half the speed."""
    size = 2 * int(np.prod(shape))
    space = np.zeros(size + 64, np.uint8)
    start = -space.ctypes.data % 64
    return space[start : start + size].view(np.uint16).reshape(shape)


@njit(cache=True, nogil=True)
def add_up(rows, bounds, slots, places, saturations, batch, best, space):
    """Lets documents pass by: row rows[d] of the corpus holds the batch's slots uint32 at bounds[d]:bounds[d + 1], and
    what their counts are worth is at `places` uint32 of the saturations."""
    for begin in range(0, len(rows), BLOCK):
        some = slice(begin, min(begin + BLOCK, len(rows)))
        _add_up_block(rows[some], bounds[begin : some.stop + 1], slots, places, saturations, batch, best, space)


@njit(cache=True, nogil=True)
def _add_up_block(rows, bounds, slots, places, saturations, batch, best, space):
    sums, passed, num_passed, impacts = space
    num_documents, num_rows, num_tiles = len(rows), batch.rows.shape[1], batch.rows.shape[0]
    size = bounds[num_documents] - bounds[0]
    row_numbers, row_factors = np.empty(size + 1, np.uint32), np.empty(size + 1, np.uint32)
    row_ends = np.empty(num_documents + 1, np.int64)
    row_ends[0] = 0
    end = 0
    for d in range(num_documents):
        mine = np.int64(d * TILE)
        for p in range(bounds[d], bounds[d + 1]):
            slot, factor = np.int64(slots[p]), np.int64(saturations.factors[places[p]])
            if slot < num_rows:
                row_numbers[end], row_factors[end] = slot, factor
                end += 1
                continue
            i = slot - num_rows
            for j in range(np.uint64(batch.list_bounds[i]), np.uint64(batch.list_bounds[i + 1])):
                lane = np.uint64(batch.list_lanes[j] + mine)
                sums[lane] = min(np.int64(sums[lane]) + ((np.int64(batch.list_weights[j]) * factor) >> 16), 65_535)
        row_ends[d + 1] = end
        num_passed[d] = 0
    masks = np.empty(MASKS, np.uint64)
    # Addresses, since a slice of an array would be counted as one more reference each time. They are signed, since
    # Numba makes a float of a signed and an unsigned number.
    sums_at, weights_at, floors_at = _address(sums), _address(batch.rows), _address(best.floors)
    numbers_at, factors_at, masks_at = _address(row_numbers), _address(row_factors), _address(masks)
    for tile in range(num_tiles):
        for d in range(num_documents):
            start = row_ends[d]
            add_rows(
                sums_at + 2 * TILE * (tile * (BLOCK + 1) + d), weights_at + 2 * TILE * tile * num_rows,
                numbers_at + 4 * start, factors_at + 4 * start, row_ends[d + 1] - start,
                floors_at + 2 * TILE * tile, masks_at,
            )  # fmt: skip
            for i in range(MASKS):
                mask = masks[i]
                while mask != 0:
                    passed[d, num_passed[d]] = tile * TILE + 64 * i + lowest_bit(mask)
                    num_passed[d] += 1
                    mask &= mask - np.uint64(1)
    adds = np.empty(len(batch.idf) + 1)
    for d in range(num_documents):
        if num_passed[d] == 0:
            continue
        for p in range(bounds[d], bounds[d + 1]):
            impacts[slots[p]] = np.float32(batch.idf[slots[p]] * saturations.exact[places[p]])
        for i in range(num_passed[d]):
            query = np.int64(passed[d, i])
            size = 0
            for j in range(np.uint64(batch.bounds[query]), np.uint64(batch.bounds[query + 1])):
                impact = impacts[np.uint32(batch.slots[j])]
                adds[size] = np.float64(batch.counts[j]) * np.float64(impact)
                size += impact != 0
            score = 0.0
            for j in range(size):  # in the order of the query's terms
                score += adds[j]
            if score > 0 and _offer(query, rows[d], score, best):
                floor = np.int64(best.scores[query, 0] * batch.scales[query]) - batch.margins[query]
                if floor > best.floors[query]:
                    best.floors[query] = min(floor, 65_535)
        for p in range(bounds[d], bounds[d + 1]):
            impacts[slots[p]] = 0


@njit(cache=True, nogil=True)
def _address(array):
    return np.int64(array.ctypes.data)


@njit(cache=True, nogil=True)
def _offer(query, row, score, best):
    """Keeps a document if it is among the K best; says whether the K-th best score is known and may have risen."""
    rows, scores, kept = best.rows[query], best.scores[query], best.kept[query]
    if kept < len(rows):
        rows[kept], scores[kept] = row, score
        best.kept[query] += 1
        if kept + 1 < len(rows):
            return False
        for root in range(len(rows) // 2 - 1, -1, -1):
            _sift(rows, scores, root, len(rows))
        return True
    if score < scores[0] or (score == scores[0] and row > rows[0]):
        return False
    rows[0], scores[0] = row, score
    _sift(rows, scores, 0, len(rows))
    return True


@njit(cache=True, nogil=True)
def merge(best, other):
    """Offers the documents of `other` to `best`, for all queries."""
    for query in range(len(other.kept)):
        for i in range(other.kept[query]):
            _offer(query, other.rows[query, i], other.scores[query, i], best)


@njit(cache=True, nogil=True)
def put_in_order(best):
    """Turns each heap into a list, the best first, by score and then the smaller row."""
    for query in range(len(best.kept)):
        rows, scores, kept = best.rows[query], best.scores[query], best.kept[query]
        if kept < len(rows):
            for root in range(kept // 2 - 1, -1, -1):
                _sift(rows, scores, root, kept)
        for last in range(kept - 1, 0, -1):  # heap sort: the worst goes last
            rows[0], rows[last] = rows[last], rows[0]
            scores[0], scores[last] = scores[last], scores[0]
            _sift(rows, scores, 0, last)


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
