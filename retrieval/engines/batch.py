"""Exact top K for many queries at once, while documents pass by: what the engines bm25 and scan have in common.

A document is added up for all queries of a batch together. A term that many of them hold is a row of weights, a lane a
query, and 256 lanes are added in four instructions (`lanes.add_rows`); a term that few hold is a list of those few.
Touching postings costs next to nothing this way: the time goes where a document and a query share a term, and a good
part of that is shared by 64 queries. These sums are of 8-bit integers and only a filter: whatever may be among a
query's K best is scored again as the formula says, in float64, and kept. The K-th best score raises the query's floor.
So results are exact, ties included, and do not depend on the order in which documents pass.

Eight bits do because each query's weights are scaled so that its floor stands at about 150 to 250, wherever it may be
(`quantise`), and because a document is seen relative to what it pays for a term that it holds once: such a term counts
with its weight, one that it holds more often with so many quarters of it, and what the document's length takes away
is put on the floors instead. Documents pass in the order of that, some of like length together, so that they share
floors; lengths far apart (`CLASSES`) have weights of their own. The filter errs on one side: weights and quarters are
rounded up, floors down, and a sum that is full at 255 passes every floor.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

from retrieval.engines.lanes import MASKS, TILE, add_rows, lowest_bit

BLOCK = 64  # documents that are added up together: their sums, 1 byte a query each, fit the second-level cache
LISTED_SHARE = 128  # a term is a list if fewer than one in so many queries hold it
FULL = 255
AIM = 150  # where a query's floor stands, in the documents of a class that have it lowest
LEVELS = 32  # of what a term that stands once is worth, for each factor of two
CLASSES, LEVELS_A_CLASS = 5, 16
WHOLE = 4  # quarters
SAFE = 1 - 2e-6  # floors are lowered by more than rounding can do


class Batch(NamedTuple):
    """Queries, ready for `quantise`. A slot is a distinct term of the batch; the first `num_rows` are rows.

    slots int32, counts float32: terms of query q, in the order in which they first stand in it, and how often, are at
    bounds[q]:bounds[q + 1]. idf float64[slots]. What the rows hold: weights float64 of queries int32, at places int64
    of an array [tiles, rows, TILE]. The queries of list i are at list_bounds[i]:list_bounds[i + 1] of list_queries
    int32, list_weights float64 and list_lanes uint32 (their places in a block's sums). reach float64[Q]: of weights.
    """

    slots: np.ndarray
    counts: np.ndarray
    bounds: np.ndarray
    idf: np.ndarray
    num_rows: int
    row_weights: np.ndarray
    row_queries: np.ndarray
    row_places: np.ndarray
    list_bounds: np.ndarray
    list_queries: np.ndarray
    list_weights: np.ndarray
    list_lanes: np.ndarray
    reach: np.ndarray


class Weights(NamedTuple):
    """The weights of a batch as 8-bit integers, for each class of documents. A weight times scales float64[Q] is one.

    rows uint8[classes, tiles, rows, TILE]; lists uint32[classes, ..]: 256 times the lane, and the weight.
    """

    rows: np.ndarray
    lists: np.ndarray
    scales: np.ndarray


class Saturations(NamedTuple):
    """What a count of a term in a document is worth, `exact` float64; `quarters` uint16: of what it is worth once.

    A document of n terms that holds one t times has it at `first[n] + t`. `most` is the largest worth of a term that
    stands once; in a document of `levels` uint8 it is at most 2^(-level / LEVELS) of that.
    """

    exact: np.ndarray
    quarters: np.ndarray
    levels: np.ndarray
    first: np.ndarray
    most: float


class Best(NamedTuple):
    """Among the documents of each query so far its K best, in no order, rows int64 and scores float64 [Q, more than K].

    Only the first `kept` int64[Q] are there. What scores less than `least` float64[Q] need not be kept.
    """

    rows: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    least: np.ndarray
    k: int


def make_batch(queries: list[list[str]], idf_of: Callable[[list[str]], np.ndarray]) -> tuple[Batch, dict]:
    """The batch, and the slot of each term that the corpus knows.

    idf_of: float64 for each of a list of distinct terms, NaN where the corpus lacks it.
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

    weights = np.maximum(counts * idf[terms], 0)  # Okapi's idf may be below 0, which the filter leaves out
    sizes = np.bincount(query_of, minlength=len(queries))
    tiles, lanes = np.divmod(query_of, TILE)
    in_row = np.flatnonzero(slots < num_rows)
    listed = np.flatnonzero(slots >= num_rows)
    listed = listed[np.argsort(slots[listed], kind="stable")]
    query_of = query_of.astype(np.int32)
    batch = Batch(
        slots, counts.astype(np.float32), np.concatenate([[0], np.cumsum(sizes)]), idf[order], num_rows,
        weights[in_row], query_of[in_row], ((tiles * num_rows + slots) * TILE + lanes)[in_row],
        np.concatenate([[0], np.cumsum(holders[order[num_rows:]])]),
        query_of[listed], weights[listed], (tiles * (BLOCK + 1) * TILE + lanes)[listed].astype(np.uint32),
        np.bincount(query_of, weights, len(queries)),
    )  # fmt: skip
    return batch, {names[number]: slot for slot, number in enumerate(order)}


def _distinct(terms: np.ndarray, query_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(term, count, query) without repeats, the terms of a query in the order in which they first stand in it."""
    pairs = query_of * (int(terms.max(initial=0)) + 1) + terms
    _, first, counts = np.unique(pairs, return_index=True, return_counts=True)
    order = np.argsort(first)
    first = first[order]
    return terms[first], counts[order], query_of[first]


def quantise(batch: Batch, saturations: Saturations, expected: np.ndarray) -> Weights:
    """Weights so fine that a score of `expected` float64[Q] is about the floor; 0 where nothing is known of it."""
    sizes = np.diff(batch.bounds)
    guess = 0.25 * batch.reach * saturations.most / np.clip(sizes / 8, 1, 4)  # measured on three tasks, K = 50
    scales = AIM * saturations.most / np.maximum(np.where(expected > 0, expected, guess), 1e-30)
    tiles = -(-len(sizes) // TILE)
    rows = _aligned((CLASSES, tiles, batch.num_rows, TILE))
    lists = np.empty((CLASSES, len(batch.list_lanes)), np.uint32)
    _quantise(batch, scales, rows.reshape(CLASSES, -1), lists)
    return Weights(rows, lists, scales)


@njit(cache=True, nogil=True)
def _quantise(batch, scales, rows, lists):
    for c in range(len(rows)):
        share = 2.0 ** (-c * LEVELS_A_CLASS / LEVELS)
        for i in range(len(batch.row_places)):
            weight = np.ceil(batch.row_weights[i] * scales[batch.row_queries[i]] * share)
            rows[c, batch.row_places[i]] = min(weight, FULL)
        for i in range(len(batch.list_lanes)):
            weight = np.ceil(batch.list_weights[i] * scales[batch.list_queries[i]] * share)
            lists[c, i] = batch.list_lanes[i] << 8 | np.uint32(min(weight, FULL))


def make_saturations(lengths: np.ndarray, most_counts: np.ndarray, average: float, saturation, k1, b) -> Saturations:
    """For documents of these lengths (distinct, ascending), in which a term stands at most `most_counts` times."""
    sizes = most_counts.astype(np.int64) + 1
    starts = np.cumsum(sizes) - sizes
    counts = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    relative = np.repeat(lengths / average, sizes)
    exact = np.where(counts > 0, saturation(np.maximum(counts, 1), relative, k1, b), 0)
    once = np.repeat(exact[starts + np.minimum(most_counts, 1)], sizes)
    most = float(once.max(initial=1e-30))
    once = np.where(once > 0, once, most)
    levels = np.clip(np.floor(LEVELS * np.log2(most / once) - 1e-9), 0, 255).astype(np.uint8)
    quarters = np.clip(np.ceil(WHOLE * exact / once * (1 - 1e-12)), WHOLE, WHOLE * FULL).astype(np.uint16)
    first = np.zeros(int(lengths.max(initial=0)) + 1, np.int64)
    first[lengths] = starts
    return Saturations(exact, quarters, levels, first, most)


def nothing_yet(num_queries: int, k: int) -> Best:
    """No query has a document, and all that share a term are wanted."""
    shape = (num_queries, k + min(max(k, 32), 1024))
    return Best(np.empty(shape, np.int64), np.empty(shape), np.zeros(num_queries, np.int64), np.zeros(num_queries), k)


def working_space(batch: Batch) -> tuple[np.ndarray, ...]:
    """What `add_up` needs to itself: one for each thread."""
    tiles = -(-len(batch.reach) // TILE)
    floors = _aligned((tiles * TILE,))
    floors[:] = FULL  # lanes without a query stay closed
    return (
        _aligned((tiles * (BLOCK + 1) * TILE,)),
        floors,
        np.empty((BLOCK, tiles * TILE), np.uint16),
        np.zeros(BLOCK, np.int64),
        np.zeros(len(batch.idf), np.float32),
    )


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros uint8 that begin at a cache line, since a vector that spans two is read at half the speed."""
    size = int(np.prod(shape))
    space = np.zeros(size + 64, np.uint8)
    start = -space.ctypes.data % 64
    return space[start : start + size].reshape(shape)


@njit(cache=True, nogil=True)
def add_up(rows, bounds, slots, places, saturations, batch, weights, best, space):
    """Lets documents pass by: row rows[d] of the corpus holds the batch's slots uint32 at bounds[d]:bounds[d + 1], and
    what their counts are worth is at `places` uint32 of the saturations."""
    order, ends = _by_level(bounds, places, saturations.levels)
    for c in range(CLASSES):
        last = LEVELS_A_CLASS * (c + 1) if c + 1 < CLASSES else 256
        for begin in range(ends[LEVELS_A_CLASS * c], ends[last], BLOCK):
            some = order[begin : min(begin + BLOCK, ends[last])]
            _add_up_block(some, c, rows, bounds, slots, places, saturations, batch, weights, best, space)


@njit(cache=True, nogil=True)
def _by_level(bounds, places, levels):
    """Documents that hold a slot, by level; those of level i are at ends[i]:ends[i + 1]."""
    ends = np.zeros(258, np.int64)
    for d in range(len(bounds) - 1):
        if bounds[d] < bounds[d + 1]:
            ends[levels[places[bounds[d]]] + 2] += 1
    ends = np.cumsum(ends)
    order = np.empty(ends[257], np.int64)
    for d in range(len(bounds) - 1):
        if bounds[d] < bounds[d + 1]:
            level = levels[places[bounds[d]]] + 1
            order[ends[level]] = d
            ends[level] += 1
    return order, ends


@njit(cache=True, nogil=True)
def _add_up_block(documents, c, rows, bounds, slots, places, saturations, batch, weights, best, space):
    sums, floors, passed, num_passed, impacts = space
    num_documents, num_rows, num_tiles = len(documents), batch.num_rows, len(floors) // TILE
    lists = weights.lists[c]
    level = np.int64(saturations.levels[places[bounds[documents[0]]]])
    height = SAFE * 2.0 ** ((level - c * LEVELS_A_CLASS) / LEVELS) / saturations.most
    for query in range(len(best.least)):
        floors[query] = np.uint8(min(max(best.least[query] * weights.scales[query] * height, 1.0), 255.0))
    num_wholes, num_parts = 0, 0
    for d in documents:
        for p in range(bounds[d], bounds[d + 1]):
            num_wholes += saturations.quarters[places[p]] >> 2
        num_parts += bounds[d + 1] - bounds[d]
    wholes = np.empty(num_wholes, np.uint32)
    halves, quarters = np.empty(num_parts, np.uint32), np.empty(num_parts, np.uint32)
    ends = np.zeros((num_documents + 1, 3), np.int64)
    num_wholes, num_halves, num_quarters = 0, 0, 0
    for i in range(num_documents):
        d, mine = documents[i], np.int64(i * TILE)
        for p in range(bounds[d], bounds[d + 1]):
            slot, worth = np.int64(slots[p]), np.int64(saturations.quarters[places[p]])
            if slot < num_rows:
                wholes[num_wholes] = slot
                num_wholes += 1
                if worth != WHOLE:
                    for _ in range((worth >> 2) - 1):
                        wholes[num_wholes] = slot
                        num_wholes += 1
                    halves[num_halves], quarters[num_quarters] = slot, slot
                    num_halves += (worth >> 1) & 1
                    num_quarters += worth & 1
                continue
            for j in range(batch.list_bounds[slot - num_rows], batch.list_bounds[slot - num_rows + 1]):
                lane, weight = np.int64(lists[j] >> 8) + mine, np.int64(lists[j] & FULL)
                if worth != WHOLE:
                    weight = (weight * worth + 3) >> 2
                sums[lane] = min(np.int64(sums[lane]) + weight, FULL)
        ends[i + 1, 0], ends[i + 1, 1], ends[i + 1, 2] = num_wholes, num_halves, num_quarters
        num_passed[i] = 0
    masks = np.empty(MASKS, np.uint64)
    # Addresses, since a slice of an array would be counted as one more reference each time. They are signed, since
    # Numba makes a float of a signed and an unsigned number.
    sums_at, floors_at, masks_at = _address(sums), _address(floors), _address(masks)
    weights_at = _address(weights.rows) + c * num_tiles * num_rows * TILE
    wholes_at, halves_at, quarters_at = _address(wholes), _address(halves), _address(quarters)
    for tile in range(num_tiles):
        for i in range(num_documents):
            add_rows(
                sums_at + TILE * (tile * (BLOCK + 1) + i), weights_at + TILE * tile * num_rows,
                wholes_at + 4 * ends[i, 0], ends[i + 1, 0] - ends[i, 0],
                halves_at + 4 * ends[i, 1], ends[i + 1, 1] - ends[i, 1],
                quarters_at + 4 * ends[i, 2], ends[i + 1, 2] - ends[i, 2],
                floors_at + TILE * tile, masks_at,
            )  # fmt: skip
            for word in range(MASKS):
                mask = masks[word]
                while mask != 0:
                    passed[i, num_passed[i]] = tile * TILE + 64 * word + lowest_bit(mask)
                    num_passed[i] += 1
                    mask &= mask - np.uint64(1)
    adds = np.empty(len(batch.idf) + 1)
    for i in range(num_documents):
        if num_passed[i] == 0:
            continue
        d = documents[i]
        for p in range(bounds[d], bounds[d + 1]):
            impacts[slots[p]] = np.float32(batch.idf[slots[p]] * saturations.exact[places[p]])
        for j in range(num_passed[i]):
            query = np.int64(passed[i, j])
            size = 0
            for t in range(np.uint64(batch.bounds[query]), np.uint64(batch.bounds[query + 1])):
                impact = impacts[np.uint32(batch.slots[t])]
                adds[size] = np.float64(batch.counts[t]) * np.float64(impact)
                size += impact != 0
            score = 0.0
            for t in range(size):  # in the order of the query's terms
                score += adds[t]
            if score > 0:
                _offer(query, rows[d], score, best)
        for p in range(bounds[d], bounds[d + 1]):
            impacts[slots[p]] = 0


@njit(cache=True, nogil=True)
def _address(array):
    return np.int64(array.ctypes.data)


@njit(cache=True, nogil=True)
def _offer(query, row, score, best):
    """Keeps a document unless it cannot be among the K best."""
    if score < best.least[query]:
        return
    rows, scores, kept = best.rows[query], best.scores[query], best.kept[query]
    rows[kept], scores[kept] = row, score
    best.kept[query] = kept + 1
    if kept + 1 == len(rows):
        _select(rows, scores, kept + 1, best.k)
        best.kept[query] = best.k
        best.least[query] = max(best.least[query], scores[: best.k].min())


@njit(cache=True, nogil=True)
def merge(best, other):
    """Offers the documents of `other` to `best`, for all queries."""
    for query in range(len(other.kept)):
        for i in range(other.kept[query]):
            _offer(query, other.rows[query, i], other.scores[query, i], best)


def put_in_order(best: Best, hits) -> None:
    """Fills hits with the K best of each query, the best first, by score and then the smaller row."""
    _put_in_order(best, hits.rows, hits.scores)


@njit(cache=True, nogil=True)
def _put_in_order(best, hit_rows, hit_scores):
    for query in range(len(best.kept)):
        rows, scores, kept = best.rows[query], best.scores[query], best.kept[query]
        if kept > best.k:
            _select(rows, scores, kept, best.k)
            kept = best.k
        _sort(rows, scores, kept)
        hit_rows[query, :kept], hit_scores[query, :kept] = rows[:kept], scores[:kept]
        hit_rows[query, kept:], hit_scores[query, kept:] = -1, 0


@njit(cache=True, nogil=True)
def _split(rows, scores, start, end):
    """Splits start:end in two, neither empty, the better ones first; returns where the second begins."""
    middle = (start + end - 1) // 2
    row, score = rows[middle], scores[middle]
    i, j = start - 1, end
    while True:
        i += 1
        while scores[i] > score or (scores[i] == score and rows[i] < row):
            i += 1
        j -= 1
        while scores[j] < score or (scores[j] == score and rows[j] > row):
            j -= 1
        if i >= j:
            return j + 1
        rows[i], rows[j] = rows[j], rows[i]
        scores[i], scores[j] = scores[j], scores[i]


@njit(cache=True, nogil=True)
def _select(rows, scores, size, k):
    """Brings the k best of `size` to the beginning."""
    start, end = 0, size
    while end - start > 1:
        middle = _split(rows, scores, start, end)
        if middle == k:
            return
        if middle < k:
            start = middle
        else:
            end = middle


@njit(cache=True, nogil=True)
def _sort(rows, scores, size):
    """Quicksort down to short stretches, which are then sorted by insertion."""
    starts, ends = np.empty(64, np.int64), np.empty(64, np.int64)
    starts[0], ends[0], depth = 0, size, 1
    while depth:
        depth -= 1
        start, end = starts[depth], ends[depth]
        while end - start > 12:
            middle = _split(rows, scores, start, end)
            if middle - start > end - middle:  # the longer waits, so that few do
                starts[depth], ends[depth], start = start, middle, middle
            else:
                starts[depth], ends[depth], end = middle, end, middle
            depth += 1
    for i in range(1, size):
        row, score, j = rows[i], scores[i], i
        while j and (scores[j - 1] < score or (scores[j - 1] == score and rows[j - 1] > row)):
            rows[j], scores[j] = rows[j - 1], scores[j - 1]
            j -= 1
        rows[j], scores[j] = row, score
