"""Our BM25: an index of what each document holds, and a pass over it for some thousands of queries at once.

A shard of the index holds a run of the corpus's documents: for each its distinct terms, ascending, and their counts, in
about 2 bytes a posting. No score is kept, so that any scoring, k1 and b reads the same index, and so that document
frequencies and the average length are added up over shards when the index is opened: how a corpus was cut changes
nothing. A shard is named by the hash of its text. Those that are there are never built again, be it after a kill or
when documents were added to a corpus.

Searching decodes postings at about 2 ns each, once for up to 2,048 queries, and leaves the rest to `batch`. A sixteenth
of the documents passes first and tells about how high the floors will be, which spares most of the exact scoring of
documents that later ones drive out. Where that told too much of a query, it is searched again without.

A shard folder: postings.bin; starts.npy uint32[documents + 1] into it; sizes.npy (distinct terms) and lengths.npy
(terms) uint32[documents]; df.npy uint32[terms]; term_*.npy, the vocabulary; most_counts.npy uint32[.., 2], each length
that occurs and the largest count of a term in documents of that length.
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np
from numba import njit

from retrieval import folders
from retrieval.analyze import Analyzer
from retrieval.corpus import Corpus, Progress
from retrieval.engines import MEMORY, Hits, num_threads
from retrieval.engines.batch import (
    Batch,
    Best,
    Saturations,
    add_up,
    floors_at,
    make_batch,
    make_saturations,
    merge,
    nothing_yet,
    put_in_order,
    working_space,
)  # fmt: skip
from retrieval.engines.lanes import word_at
from retrieval.scoring import SCORINGS, Scoring
from retrieval.vocabulary import Vocabulary
from tasks.errors import InputError

KIND, SHARD_KIND, VERSION = "bm25 index", "bm25 shard", 2
CHUNK_DOCUMENTS = 8_192
MEMORY_PER_TEXT = 16  # a thread that builds a shard takes at most so many times the size of its text
QUERIES_A_PASS = 2_048
DOCUMENTS_A_JOB = 512
SAMPLED = 16  # one job in so many passes first
BEST_BYTES = 256 << 20  # for the K best of all queries of a pass, in all threads


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
) -> "BM25":
    """The index of this corpus and analyzer below `folder`; what of it is not there yet is built.

    Raises InputError for impossible parameters and for a damaged index.
    """
    if k1 < 0 or not 0 <= b <= 1:
        raise InputError(f"BM25 wants k1 of at least 0 and b from 0 to 1, not k1={k1} and b={b}")
    folder, threads = Path(folder), num_threads(threads)
    place = place_of(folder, corpus.fingerprint, analyzer)
    shard_bytes = max(memory // MEMORY_PER_TEXT // threads, 1)
    write = partial(_write, corpus, analyzer, folder, shard_bytes, threads, progress)
    manifest = folders.ensure(place, KIND, VERSION, lambda new: write())
    if not all((folder / name / folders.MANIFEST).exists() for name in manifest["shards"]):
        shutil.rmtree(place)  # it holds names alone; the shards that are there stay
        manifest = folders.ensure(place, KIND, VERSION, lambda new: write())
    return BM25(place, manifest, analyzer, SCORINGS[scoring], k1, b, threads)


def place_of(folder: Path, fingerprint: str, analyzer: Analyzer) -> Path:
    """Where the index of a corpus is, or would be."""
    return folder / folders.key(corpus=fingerprint, analyzer=analyzer.hash, version=VERSION)


class Shard:
    """Documents `first` and following of the corpus, opened."""

    def __init__(self, folder: Path, first: int, analyzer: Analyzer):
        manifest = folders.load(folder, SHARD_KIND, VERSION)
        self.folder, self.first, self.documents = folder, first, manifest["documents"]
        self.vocabulary = Vocabulary.load(folder, analyzer)
        self.postings = np.asarray(np.memmap(folder / "postings.bin", np.uint8, "r"))
        self.starts, self.sizes, self.lengths, self.df, self.most_counts = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ("starts", "sizes", "lengths", "df", "most_counts")
        )

    def decode(
        self, rows: np.ndarray, table: np.ndarray, saturations: Saturations, space: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """bounds, slots and places, as `add_up` wants them, of the documents at `rows` of the shard.

        table: `_slot_table`. space: [slots, places, extra], kept from one call to the next, since memory that the
        system gives anew costs more than what is written there.
        """
        size = int(self.sizes[rows].sum()) + 1
        if not space or len(space[0]) < size:
            space[:] = np.empty(2 * size, np.uint32), np.empty(2 * size, np.uint32), np.empty(2 * size, np.int64)
        bounds = _decode_all(
            rows, self.postings, self.starts, self.sizes, self.lengths, saturations.first, table, *space
        )
        return bounds, space[0], space[1]


class BM25:
    """An index opened, to be searched with one scoring."""

    def __init__(
        self, folder: Path, manifest: dict, analyzer: Analyzer, scoring: Scoring, k1: float, b: float, threads: int
    ):
        self.folder, self.seconds = folder, manifest["seconds"]
        self.shards: list[Shard] = []
        for name in manifest["shards"]:
            self.shards.append(Shard(folder.parent / name, self._num_documents, analyzer))
        self._scoring, self._threads = scoring, threads
        self._saturations = self._make_saturations(manifest["words"], k1, b)
        self._merged, self._all_idf = self._all_terms(analyzer) if scoring.of_all_terms else (None, None)

    @property
    def _num_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def search(self, queries: list[list[str]], k: int) -> Hits:
        """See `Hits`; k at least 1. Threads share the documents; the result does not depend on their number."""
        k = min(k, self._num_documents)
        hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k)))
        step = int(np.clip(BEST_BYTES // (16 * k * self._threads), 1, QUERIES_A_PASS))
        for first in range(0, len(queries), step):
            self._search(queries[first : first + step], Hits(*(column[first : first + step] for column in hits)))
        return hits

    def explain(self, query: list[str], row: int) -> dict[str, float]:
        """What each term of the query adds to the score of one document; terms that it lacks are left out."""
        batch, slots_of = make_batch([query], self._idf, self._saturations.most)
        shard = next(shard for shard in self.shards if row < shard.first + shard.documents)
        rows, table = np.array([row - shard.first]), _slot_table(shard, slots_of)
        (_, size), slots, places = shard.decode(rows, table, self._saturations, [])
        impacts = np.zeros(len(batch.idf))
        impacts[slots[:size]] = (batch.idf[slots[:size]] * self._saturations.exact[places[:size]]).astype(np.float32)
        terms = {slot: term for term, slot in slots_of.items()}
        adds = batch.counts.astype(np.float64) * impacts[batch.slots]
        return {terms[int(slot)]: float(add) for slot, add in zip(batch.slots, adds, strict=True) if add}

    def _search(self, queries: list[list[str]], hits: Hits, guess: bool = True) -> None:
        """Fills `hits` for the queries of one pass."""
        k = hits.rows.shape[1]
        batch, slots_of = make_batch(queries, self._idf, self._saturations.most)
        tables = [_slot_table(shard, slots_of) for shard in self.shards]
        # Of K documents K / 16 are expected in the sample; four standard deviations more make a safe guess.
        share = k / SAMPLED
        rank = int(share + 4 * share**0.5) + 4
        guess = guess and rank < k and self._num_documents > 4 * SAMPLED * DOCUMENTS_A_JOB
        guesses = np.zeros(len(queries))
        best = Best(*hits, np.zeros(len(queries), np.int64), nothing_yet(len(queries), 0).floors)
        if guess:
            sample = nothing_yet(len(queries), rank)
            self._let_pass(batch, tables, sample, sampled=1)
            guesses = np.where(sample.kept == rank, sample.scores[:, 0], 0)
            best.floors[: len(queries)] = floors_at(batch, guesses)
            merge(best, sample)
        self._let_pass(batch, tables, best, sampled=0 if guess else -1)
        put_in_order(best)
        # What the sample had with just the guessed score it did not keep, so only scores above that are sure.
        wrong = np.flatnonzero((guesses > 0) & (hits.scores[:, -1] <= guesses))
        if len(wrong):
            again = Hits(hits.rows[wrong], hits.scores[wrong])
            for column, nothing in zip(again, (-1, 0), strict=True):
                column[:] = nothing
            self._search([queries[query] for query in wrong], again, guess=False)
            hits.rows[wrong], hits.scores[wrong] = again

    def _let_pass(self, batch: Batch, tables: list[np.ndarray], best: Best, sampled: int) -> None:
        """Offers all documents to `best`, or those of the sample (1) or the others (0)."""
        step = DOCUMENTS_A_JOB * (SAMPLED if sampled == 1 else 1)
        jobs = deque(
            (shard, table, first)
            for shard, table in zip(self.shards, tables, strict=True)
            for first in range(0, shard.documents, step)
        )

        def work(mine: Best) -> None:
            space, decoded = working_space(batch), []
            while jobs:
                try:
                    shard, table, first = jobs.popleft()
                except IndexError:  # another thread was faster
                    return
                rows = np.arange(first, min(first + step, shard.documents))
                if sampled >= 0:
                    rows = rows[(rows % SAMPLED == 0) == sampled]
                bounds, slots, places = shard.decode(rows, table, self._saturations, decoded)
                add_up(rows + shard.first, bounds, slots, places, self._saturations, batch, mine, space)

        others = [nothing_yet(*best.rows.shape) for _ in range(self._threads - 1)]
        for other in others:
            other.floors[:] = best.floors
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(work, [best, *others]))
        for other in others:
            merge(best, other)

    def _idf(self, terms: list[str]) -> np.ndarray:
        """float64[terms], NaN for those that the corpus lacks."""
        idf = np.full(len(terms), np.nan)
        if self._scoring.of_all_terms:
            ids = self._merged.ids(terms)
            idf[ids >= 0] = self._all_idf[ids[ids >= 0]]
            return idf
        df = np.zeros(len(terms), np.int64)
        for shard in self.shards:
            ids = shard.vocabulary.ids(terms)
            df[ids >= 0] += shard.df[ids[ids >= 0]]
        idf[df > 0] = self._scoring.idf(df[df > 0], self._num_documents)
        return idf

    def _all_terms(self, analyzer: Analyzer) -> tuple[Vocabulary, np.ndarray]:
        """One vocabulary for all shards, numbered by first occurrence, and each term's idf."""
        if len(self.shards) == 1:
            return self.shards[0].vocabulary, self._scoring.idf(self.shards[0].df.astype(np.int64), self._num_documents)
        merged, df = Vocabulary(analyzer), np.zeros(0, np.int64)
        for shard in self.shards:
            ids = merged.merge(shard.vocabulary)
            df = np.concatenate([df, np.zeros(len(merged) - len(df), np.int64)])
            df[ids] += shard.df
        return merged, self._scoring.idf(df, self._num_documents)

    def _make_saturations(self, words: int, k1: float, b: float) -> Saturations:
        """Of all lengths and counts that occur in any shard."""
        pairs = np.concatenate([shard.most_counts for shard in self.shards])
        lengths, which = np.unique(pairs[:, 0], return_inverse=True)
        most = np.zeros(len(lengths), np.int64)
        np.maximum.at(most, which, pairs[:, 1])
        average = max(words / self._num_documents, 1e-9)
        return make_saturations(lengths.astype(np.int64), most, average, self._scoring.saturation, k1, b)


def _slot_table(shard: Shard, slots_of: dict[str, int]) -> np.ndarray:
    """int32[terms of the shard]: the batch's slot of each, -1 for those that no query holds."""
    table = np.full(len(shard.vocabulary), -1, np.int32)
    ids = shard.vocabulary.ids(list(slots_of))
    slots = np.fromiter(slots_of.values(), np.int32, len(slots_of))
    table[ids[ids >= 0]] = slots[ids >= 0]
    return table


# Postings of a document, n terms with ascending ids: 2 bits for each that say how many bytes its value has (1 to 4), in
# whole bytes; the values, lowest byte first; then counts. A value is 4 * (id - the last id - 1) + min(count, 4) - 1. A
# count of 4 or more is also in 7 bits a byte, lowest first, all but the last with the highest bit set, less 4.


@njit(cache=True, nogil=True)
def _decode_all(rows, postings, starts, sizes, lengths, firsts, table, slots, places, extra):
    """Fills slots and places for documents; returns their bounds int64[documents + 1]."""
    bounds = np.zeros(len(rows) + 1, np.int64)
    for i in range(len(rows)):
        bounds[i + 1] = _decode(
            rows[i], postings, starts, sizes, lengths, firsts, table, slots, places, bounds[i], extra
        )
    return bounds


@njit(cache=True, nogil=True)
def _decode(document, postings, starts, sizes, lengths, firsts, table, slots, places, size, extra):
    """Appends the slots of a document's terms and the places of their saturations; returns the new size."""
    address = np.int64(postings.ctypes.data)
    controls, num_terms = np.int64(starts[document]), np.int64(sizes[document])
    at = controls + (num_terms + 3) // 4
    first = firsts[lengths[document]] + 1
    term, num_extra = np.int64(-1), 0
    last = len(slots) - 1  # takes what is not wanted
    for i in range(num_terms):
        bytes_less_1 = (np.int64(postings[np.uint64(controls + (i >> 2))]) >> (2 * (i & 3))) & 3
        value = np.int64(word_at(address + at)) & (0xFFFFFFFF >> (24 - 8 * bytes_less_1))
        at += bytes_less_1 + 1
        term += (value >> 2) + 1
        slot = table[np.uint64(term)]
        slots[np.uint64(size)], places[np.uint64(size)] = slot, first + (value & 3)
        extra[np.uint64(num_extra)] = size if slot >= 0 else last
        num_extra += (value & 3) == 3
        size += slot >= 0
    for i in range(num_extra):
        shift, more = 0, 0
        while True:
            more |= np.int64(postings[at] & 127) << shift
            shift += 7
            at += 1
            if postings[at - 1] < 128:
                break
        places[extra[i]] += more
    return size


@njit(cache=True, nogil=True)
def _encode(ids, ends, df, sizes, most_counts, coded):
    """Codes documents whose terms are ids[ends[d]:ends[d + 1]]; returns how many bytes of `coded` they take.

    Adds to df; fills sizes (distinct terms) and most_counts (the largest count) of each document, and `starts`.
    """
    seen_in, place = np.full(len(df), -1, np.int32), np.empty(len(df), np.int64)
    pairs = np.empty(0, np.int64)
    starts = np.empty(len(ends), np.int64)
    at = 0
    for document in range(len(ends) - 1):
        starts[document] = at
        if ends[document + 1] - ends[document] > len(pairs):
            pairs = np.empty(2 * (ends[document + 1] - ends[document]), np.int64)
        size = 0
        for i in range(ends[document], ends[document + 1]):
            term = ids[i]
            if seen_in[term] != document:
                seen_in[term], place[term] = document, size
                pairs[size] = np.int64(term) << 32
                df[term] += 1
                size += 1
            pairs[place[term]] += 1
        sizes[document] = size
        held = pairs[:size]
        held.sort()
        controls, before, most = at, -1, 0
        at += (size + 3) // 4
        coded[controls:at] = 0
        for i in range(size):
            term, count = held[i] >> 32, held[i] & 0xFFFFFFFF
            most = max(most, count)
            value = 4 * (term - before - 1) + min(count, 4) - 1
            before = term
            bytes_less_1 = 0
            coded[at] = value & 255
            at += 1
            while value > 255:
                value >>= 8
                coded[at] = value & 255
                at += 1
                bytes_less_1 += 1
            coded[controls + (i >> 2)] |= bytes_less_1 << (2 * (i & 3))
        for i in range(size):
            more = (held[i] & 0xFFFFFFFF) - 4
            if more >= 0:
                while more > 127:
                    coded[at] = more & 127 | 128
                    more >>= 7
                    at += 1
                coded[at] = more
                at += 1
        most_counts[document] = most
    starts[len(ends) - 1] = at
    return starts


# Building


def _write(
    corpus: Corpus, analyzer: Analyzer, folder: Path, shard_bytes: int, threads: int, progress: Progress | None
) -> dict:
    """Builds the shards that are not there; returns the index's manifest."""
    bounds = _bounds(corpus, analyzer, folder, shard_bytes)
    done, lock = 0, Lock()

    def step(documents: int) -> None:
        nonlocal done
        with lock:
            done += documents
            if progress:
                progress(done, len(corpus), "indexing")

    def build(rows: tuple[int, int]) -> tuple[str, dict]:
        name = _shard_name(corpus, rows, analyzer)
        write = partial(_write_shard, corpus, rows, analyzer, step)
        return name, folders.ensure(folder / name, SHARD_KIND, VERSION, write)

    with ThreadPoolExecutor(threads) as pool:
        shards = list(pool.map(build, pairwise(bounds)))
    totals = {name: sum(shard[name] for _, shard in shards) for name in ("documents", "postings", "words")}
    return totals | {
        "corpus": corpus.fingerprint, "analyzer": analyzer.name, "shards": [name for name, _ in shards],
        "bytes": sum(sum(shard["files"].values()) for _, shard in shards),
    }  # fmt: skip


def _bounds(corpus: Corpus, analyzer: Analyzer, folder: Path, shard_bytes: int) -> list[int]:
    """Rows at which shards begin, and the end. Parts that an index of the store had before stay cut as they were."""
    sizes = []
    for fingerprint in corpus.earlier:
        if index := folders.load(place_of(folder, fingerprint, analyzer), KIND, VERSION):
            shards = [folders.load(folder / name, SHARD_KIND, VERSION) for name in index["shards"]]
            sizes = [shard["documents"] for shard in shards] if all(shards) else sizes
    before, bounds = {0, *np.cumsum(sizes).tolist()}, [0]
    for part in corpus.parts:
        if {bounds[-1], part} <= before:
            bounds += [bound for bound in before if bounds[-1] < bound <= part]
        else:
            start, end = int(corpus.offsets[bounds[-1]]), int(corpus.offsets[part])
            bounds += [*np.searchsorted(corpus.offsets, np.arange(start, end, shard_bytes)).tolist(), part]
        bounds = sorted(set(bounds))
    return bounds


def _shard_name(corpus: Corpus, rows: tuple[int, int], analyzer: Analyzer) -> str:
    """Named by all that is in it: the same documents are the same shard, in whatever corpus they are."""
    offsets = corpus.offsets[rows[0] : rows[1] + 1]
    digest = hashlib.sha256((offsets - offsets[0]).tobytes())
    digest.update(np.asarray(corpus.letters[offsets[0] : offsets[-1]]))
    return folders.key(text=digest.hexdigest(), analyzer=analyzer.hash, version=VERSION)


def _write_shard(
    corpus: Corpus, rows: tuple[int, int], analyzer: Analyzer, step: Callable[[int], None], folder: Path
) -> dict:
    num_documents = rows[1] - rows[0]
    vocabulary, df = Vocabulary(analyzer), np.zeros(0, np.int64)
    starts, lengths, sizes, most_counts = (np.zeros(num_documents + 1, np.int64) for _ in range(4))
    with (folder / "postings.bin").open("wb") as file:
        for first in range(0, num_documents, CHUNK_DOCUMENTS):
            last = min(first + CHUNK_DOCUMENTS, num_documents)
            ids, ends = vocabulary.encode(corpus.encoded(rows[0] + row) for row in range(first, last))
            df = np.concatenate([df, np.zeros(len(vocabulary) - len(df), np.int64)])
            coded = np.empty(6 * len(ids) + len(ends), np.uint8)
            places = _encode(ids, ends, df, sizes[first:last], most_counts[first:last], coded)
            coded[: places[-1]].tofile(file)
            starts[first + 1 : last + 1] = starts[first] + places[1:]
            lengths[first:last] = np.diff(ends)
            step(last - first)
        np.zeros(4, np.uint8).tofile(file)  # values are read four bytes at a time
    lengths, sizes, most_counts = lengths[:-1], sizes[:-1], most_counts[:-1]
    distinct, which = np.unique(lengths, return_inverse=True)
    most = np.zeros(len(distinct), np.int64)
    np.maximum.at(most, which, most_counts)
    vocabulary.save(folder)
    arrays = {"starts": starts, "sizes": sizes, "lengths": lengths, "df": df, "most_counts": np.c_[distinct, most]}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values.astype(np.uint32))
    return {
        "documents": num_documents, "terms": len(vocabulary), "postings": int(sizes.sum()), "words": int(lengths.sum())
    }  # fmt: skip
