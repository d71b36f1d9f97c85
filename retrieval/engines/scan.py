"""BM25 without an index: the queries are indexed, and the corpus streams past.

Nothing is kept of the corpus, so memory does not grow with it, and it may lie anywhere: a store, or files of any kind
at any fsspec address (`Stream`). A first pass counts what the scoring needs (documents, words, in how many documents
each term of a query stands), which is kept and may be given; the second adds up as `bm25` does, so that both find the
same documents with the same scores. What a pass has found is saved each minute: after a kill it goes on there.
"""

import json
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numba import njit

from retrieval import folders
from retrieval.analyze import TERM, Analyzer
from retrieval.corpus import (
    Corpus,
    Document,
    Progress,
    build_corpus,
    digest_of,
    file_state,
    read_documents,
    terms_of,
)  # fmt: skip
from retrieval.engines import MEMORY, Hits, num_threads
from retrieval.engines.batch import (
    Batch,
    Best,
    Saturations,
    add_up,
    make_batch,
    make_saturations,
    merge,
    nothing_yet,
    put_in_order,
    working_space,
)  # fmt: skip
from retrieval.scoring import SCORINGS
from retrieval.vocabulary import Vocabulary
from tasks import files
from tasks.errors import InputError

VERSION = 2
CHUNK_DOCUMENTS = 2_048
CHUNKS_A_LEG = 16  # between two looks at the clock, a thread
QUERIES_A_BATCH = 2_048
SECONDS_A_SAVE = 60


class Stream:
    """Documents of files that are only ever read from the first to the last; a document's row is its number there.

    Blank texts are left out as in a store. Repeats are not, since to know them all would take memory.
    """

    def __init__(self, spec: str):
        self.spec, self.paths = spec, files.expand(spec)
        self.counts: list[int] = []  # documents of each file, once they have been counted

    @property
    def fingerprint(self) -> str:
        return folders.key(files=[file_state(path) for path in self.paths])

    def __len__(self) -> int:
        """Once they have been counted."""
        return sum(self.counts)

    def documents(self, first: int = 0) -> Iterator[Document]:
        """From row `first` on; files before it are not read if their documents have been counted."""
        counts = []
        for number in range(len(self.paths)):
            if self.counts and first >= self.counts[number]:
                first -= self.counts[number]
                continue
            seen = 0
            for seen, document in enumerate(documents_of(self.paths, number), 1):
                if seen > first:
                    yield document
            first = max(first - seen, 0)
            counts.append(seen)
        if len(counts) == len(self.paths):
            self.counts = counts

    def fetch(
        self, rows: np.ndarray, folder: Path, reading: Callable[..., Iterable[list[Document]]] = map
    ) -> tuple[Corpus, np.ndarray]:
        """The documents at some ascending rows as a store, repeats left out; and the row of each int64[len(store)].

        `reading` does of(number of a file, its rows) for all files that have any. Raises InputError where one of the
        documents has the id of another.
        """
        kept, digests, rows_of = [], set(), {}
        starts = np.cumsum([0, *self.counts])
        parts = np.split(rows, np.searchsorted(rows, starts[1:-1]))
        numbers = [number for number, part in enumerate(parts) if len(part)]
        inner = [(parts[number] - starts[number]).tolist() for number in numbers]

        def wanted() -> Iterator[Document]:
            documents = chain.from_iterable(reading(partial(documents_at, self.paths), numbers, inner))
            for row, document in zip(rows.tolist(), documents, strict=True):
                digest = digest_of(terms_of(document.text))
                if digest in digests:
                    continue
                digests.add(digest)
                kept.append(row)
                if rows_of.setdefault(document.id, row) != row:
                    raise InputError(
                        f"{self.spec}: the id {document.id!r} repeats: rows {rows_of[document.id]} and {row} have it; "
                        "give each document its own, or none"
                    )
                yield document

        return build_corpus(wanted(), folder, self.paths), np.array(kept, np.int64)

    def __getitem__(self, row: int) -> Document:
        return next(self.documents(row))


def documents_of(paths: list[str], number: int) -> Iterator[Document]:
    """Of one of the files, blank texts left out."""
    return (document for document in read_documents(paths, slice(number, number + 1)) if TERM.search(document.text))


def documents_at(paths: list[str], number: int, rows: list[int]) -> list[Document]:
    """At ascending rows of one of the files."""
    wanted = set(rows)
    documents = islice(documents_of(paths, number), rows[-1] + 1)
    return [document for row, document in enumerate(documents) if row in wanted]


def open_engine(
    corpus: Corpus | Stream,
    analyzer: Analyzer,
    scoring: str,
    k1: float,
    b: float,
    folder: Path,
    threads: int = 0,
    progress: Progress | None = None,
    memory: int = MEMORY,
) -> "Scan":
    """Builds nothing; statistics and unfinished searches are kept in `folder`.

    Raises InputError for impossible parameters, and for a scoring that wants to know all terms of the corpus.
    """
    if k1 < 0 or not 0 <= b <= 1:
        raise InputError(f"BM25 wants k1 of at least 0 and b from 0 to 1, not k1={k1} and b={b}")
    if SCORINGS[scoring].of_all_terms:
        raise InputError(f"the engine scan cannot do the scoring {scoring}, which depends on all terms; use bm25")
    return Scan(corpus, analyzer, scoring, k1, b, Path(folder), num_threads(threads), progress)


class Scan:
    seconds, in_passes = 0.0, True

    def __init__(self, corpus, analyzer, scoring, k1, b, folder, threads, progress):
        self._corpus, self._analyzer, self._scoring = corpus, analyzer, scoring
        self._k1, self._b, self._folder, self._threads, self._progress = k1, b, folder, threads, progress
        self._counts: dict | None = None

    def search(self, queries: list[list[str]], k: int, statistics: Path | None = None) -> Hits:
        """See `Hits`. statistics: a file that an earlier first pass wrote, of this corpus or of one that is like it."""
        return self._search(queries, k, self.count(queries, statistics))

    def search_part(self, queries: list[list[str]], k: int, counts: dict) -> Hits:
        """The same where these documents are but a part of those that `counts` is of (see `count`)."""
        return self._search(queries, k, counts, part=True)

    def _search(self, queries: list[list[str]], k: int, counts: dict, part: bool = False) -> Hits:
        vocabulary, terms = self._terms_of(queries)
        num_documents, df = counts["documents"], np.array([counts["df"].get(term, 0) for term in terms], np.int64)
        idf = np.full(len(terms), np.nan)
        idf[df > 0] = SCORINGS[self._scoring].idf(df[df > 0], num_documents)
        idf_of = dict(zip(terms, idf.tolist(), strict=True))
        lengths, most = np.array(counts["most_counts"], np.int64).T
        average = max(counts["words"] / num_documents, 1e-9)
        saturations = make_saturations(lengths, most, average, SCORINGS[self._scoring].saturation, self._k1, self._b)

        k = min(k, num_documents)
        hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k)))
        batches: list[tuple[Batch, np.ndarray, Best]] = []
        for first in range(0, len(queries), QUERIES_A_BATCH):
            some = slice(first, first + QUERIES_A_BATCH)
            batch, slots_of = make_batch(
                queries[some], lambda names: np.array([idf_of.get(name, np.nan) for name in names]), saturations.most
            )
            table = np.full(len(vocabulary), -1, np.int32)
            table[vocabulary.ids(list(slots_of))] = list(slots_of.values())
            empty = nothing_yet(len(queries[some]), 0)
            batches.append((batch, table, Best(hits.rows[some], hits.scores[some], empty.kept, empty.floors)))
        unfinished = None if part else self.unfinished(queries, k, counts)
        self._let_pass(vocabulary, batches, saturations, num_documents, unfinished)
        for _, _, best in batches:
            put_in_order(best)
        return hits

    def explain(self, query: list[str], row: int) -> dict[str, float]:
        """What each term of the query adds to the score of one document; terms that it lacks are left out."""
        return self.explain_text(query, self._corpus[row].text)

    def fetch(self, rows: np.ndarray, folder: Path) -> tuple[Corpus, np.ndarray]:
        """See `Stream.fetch`."""
        return self._corpus.fetch(rows, folder)

    def explain_text(self, query: list[str], text: str) -> dict[str, float]:
        terms, counts = self._analyzer.terms(text), self.count([query])
        scoring, length = SCORINGS[self._scoring], len(terms) / max(counts["words"] / counts["documents"], 1e-9)
        adds = {}
        for term in query:
            if term in terms:
                idf = scoring.idf(np.array([counts["df"][term]]), counts["documents"])[0]
                impact = np.float32(idf * scoring.saturation(terms.count(term), length, self._k1, self._b))
                adds[term] = query.count(term) * float(impact)
        return adds

    def _texts(self, first: int) -> Iterator[bytes]:
        if isinstance(self._corpus, Stream):
            return (document.text.encode() for document in self._corpus.documents(first))
        return (self._corpus.encoded(row) for row in range(first, len(self._corpus)))

    def _chunks(self, first: int) -> Iterator[tuple[int, list[bytes]]]:
        """(row of the first, texts), some documents at a time."""
        texts = self._texts(first)
        while chunk := list(islice(texts, CHUNK_DOCUMENTS)):
            yield first, chunk
            first += len(chunk)

    # The first pass

    def count_part(self, queries: list[list[str]]) -> dict:
        """As `count`, of documents that are but a part of the corpus: there may be none, and nothing is kept."""
        return self._count(*self._terms_of(queries))

    def count(
        self,
        queries: list[list[str]],
        given: Path | None = None,
        counting: Callable[[list[list[str]]], dict] | None = None,
    ) -> dict:
        """What scoring these queries needs, counted (by `counting`, if it is given) unless an earlier pass did:

        {"documents", "words", "df": {term: documents}, "most_counts": [[length, largest count], ...], "files": of a
        stream, the documents of each}.
        """
        if not given and self._counts and all(term in self._counts["df"] for query in queries for term in query):
            return self._counts
        vocabulary, terms = self._terms_of(queries)
        path = Path(given) if given else self._counts_path
        known = self._read_counts(path)
        if known is None and given:
            raise InputError(f"{path}: no such file of statistics")
        missing = [term for term in terms if known and term not in known["df"]]
        if missing and given:
            raise InputError(f"{path}: does not say in how many documents {missing[0]!r} stands; leave it out")
        if known is None or missing:
            unfinished = self._counts_path.with_suffix(".unfinished.json")
            known = counting(queries) if counting else self._count(vocabulary, terms, unfinished)
            if not known["documents"]:
                raise InputError("the corpus has no document; check its files")
            self.write(self._counts_path, lambda half: half.write_text(json.dumps(known)))
        if not given:
            self._counts = known
            if isinstance(self._corpus, Stream):
                self._corpus.counts = known["files"]
        return known

    @property
    def _counts_path(self) -> Path:
        key = folders.key(corpus=self._corpus.fingerprint, analyzer=self._analyzer.hash, version=VERSION)
        return self._folder / f"{key}.statistics.json"

    def _terms_of(self, queries: list[list[str]]) -> tuple[Vocabulary, list[str]]:
        """The distinct terms, numbered in this order; those that the analyzer never yields stand in no text."""
        terms = list({term: None for query in queries for term in query})
        terms = [term for term in terms if self._analyzer.terms(term) == [term]]
        vocabulary = Vocabulary(self._analyzer)
        vocabulary.add(terms)
        return vocabulary, terms

    def _read_counts(self, path: Path) -> dict | None:
        if not path.exists():
            return None
        try:
            known = json.loads(path.read_text())
            if {"documents", "words", "df", "most_counts", "files"} <= set(known):
                return known
        except (ValueError, TypeError):
            pass
        raise InputError(f"{path}: is not a file of statistics; delete it and it is made again")

    def _count(self, vocabulary: Vocabulary, terms: list[str], unfinished: Path | None = None) -> dict:
        """`unfinished`: where to save."""
        df, words, documents, most = np.zeros(max(len(terms), 1), np.int64), 0, 0, {}
        saved, half_way = time.monotonic(), self._read_counts(unfinished) if unfinished else None
        if half_way and list(half_way["df"]) == terms:
            df[: len(terms)], most = list(half_way["df"].values()), dict(half_way["most_counts"])
            words, documents = half_way["words"], half_way["documents"]

        def counted() -> dict:
            return {
                "documents": documents, "words": words, "df": dict(zip(terms, df.tolist(), strict=False)),
                "most_counts": sorted(most.items()), "files": getattr(self._corpus, "counts", []),
            }  # fmt: skip

        def count(chunk: tuple[int, list[bytes]]) -> tuple:
            ids, ends = vocabulary.encode_known(chunk[1])
            bounds, found, counts = _count(ids, ends, len(df))
            return chunk, ends, bounds, found, counts

        def save() -> None:
            state = json.dumps(counted())
            self.write(unfinished, lambda half: half.write_text(state))

        with ThreadPoolExecutor(self._threads) as pool, _kept_on_errors(save if unfinished else None):
            chunks = self._chunks(documents)
            for (first, texts), ends, bounds, found, counts in _ahead(pool, count, chunks, self._threads):
                df += np.bincount(found, minlength=len(df))
                words, documents = words + int(ends[-1]), first + len(texts)
                largest = np.zeros(len(texts), np.int64)
                holding = np.diff(bounds) > 0
                largest[holding] = np.maximum.reduceat(counts, bounds[:-1][holding]) if len(counts) else 0
                for length, value in zip(np.diff(ends).tolist(), largest.tolist(), strict=True):
                    most[length] = max(most.get(length, 0), value)
                if self._progress:
                    self._progress(documents, None, "counting")
                if unfinished and time.monotonic() - saved > SECONDS_A_SAVE:
                    save()
                    saved = time.monotonic()
        if unfinished:
            unfinished.unlink(missing_ok=True)
        return counted()

    # The second pass

    def _let_pass(
        self,
        vocabulary: Vocabulary,
        batches: list,
        saturations: Saturations,
        num_documents: int,
        unfinished: Path | None,
    ) -> None:
        """`unfinished`: where to save, None for a part of the corpus."""
        mine = [[nothing_yet(*best.rows.shape) for _, _, best in batches] for _ in range(self._threads - 1)]
        bests = [[best for _, _, best in batches], *mine]
        spaces = [[working_space(batch) for batch, _, _ in batches] for _ in range(self._threads)]
        done = self._load(unfinished, bests[0]) if unfinished else 0
        chunks, saved = self._chunks(done), time.monotonic()

        def work(thread: int, leg: list) -> None:
            for first, texts in leg:
                ids, ends = vocabulary.encode_known(texts)
                bounds, found, counts = _count(ids, ends, len(vocabulary))
                places = (np.repeat(saturations.first[np.diff(ends)], np.diff(bounds)) + counts).astype(np.uint32)
                rows = np.arange(first, first + len(texts))
                for (batch, table, _), best, space in zip(batches, bests[thread], spaces[thread], strict=True):
                    add_up(rows, *_only_slots(bounds, found, places, table), saturations, batch, best, space)

        def save() -> None:
            self._merge(bests)
            self._save(unfinished, bests[0], done)

        with ThreadPoolExecutor(self._threads) as pool, _kept_on_errors(save if unfinished else None):
            while leg := list(islice(chunks, CHUNKS_A_LEG * self._threads)):
                list(pool.map(work, range(self._threads), [leg[t :: self._threads] for t in range(self._threads)]))
                done = leg[-1][0] + len(leg[-1][1])
                if self._progress:
                    self._progress(done, num_documents, "scanning")
                if unfinished and time.monotonic() - saved > SECONDS_A_SAVE:
                    save()
                    saved = time.monotonic()
        if unfinished and done != num_documents:
            raise InputError(f"the corpus has {done} documents, its statistics say {num_documents}; count them again")
        self._merge(bests)
        if unfinished:
            unfinished.unlink(missing_ok=True)

    def _merge(self, bests: list[list[Best]]) -> None:
        for other in bests[1:]:
            for best, addition in zip(bests[0], other, strict=True):
                merge(best, addition)
                addition.kept[:] = 0
                np.maximum(addition.floors, best.floors, out=addition.floors)

    def unfinished(self, queries: list[list[str]], k: int, counts: dict) -> Path:
        """Where this very search saves what it has found."""
        key = folders.key(
            corpus=self._corpus.fingerprint, analyzer=self._analyzer.hash, scoring=self._scoring, k1=self._k1,
            b=self._b, queries=queries, k=k, words=counts["words"], version=VERSION,
        )  # fmt: skip
        return self._folder / f"{key}.unfinished.npz"

    def _save(self, path: Path, bests: list[Best], done: int) -> None:
        arrays = {f"{name}{i}": getattr(best, name) for i, best in enumerate(bests) for name in Best._fields}

        def write(half: Path) -> None:
            with half.open("wb") as file:
                np.savez(file, done=done, **arrays)

        self.write(path, write)

    def _load(self, path: Path, bests: list[Best]) -> int:
        """Fills `bests` with what an earlier, killed search has found; returns how many documents it has seen."""
        if not path.exists():
            return 0
        try:
            with np.load(path) as saved:
                for i, best in enumerate(bests):
                    for name in Best._fields:
                        getattr(best, name)[:] = saved[f"{name}{i}"]
                return int(saved["done"])
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: is damaged; delete it and the search starts again") from error

    def write(self, path: Path, write) -> None:
        half = path.with_name(f".{path.name}.half")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(half)
            half.replace(path)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise InputError(f"{path}: cannot be written ({error.strerror or error}); free some space") from error


@contextmanager
def _kept_on_errors(save: Callable[[], None] | None) -> Iterator[None]:
    """A file that cannot be read, or no longer, ends a pass; what was found until then is saved."""
    try:
        yield
    except InputError:
        if save:
            save()
        raise


def _ahead(pool: ThreadPoolExecutor, function, chunks: Iterator, threads: int) -> Iterator:
    """function of each chunk, in their order, with few of them in memory at a time."""
    while leg := list(islice(chunks, 2 * threads)):
        yield from pool.map(function, leg)


@njit(cache=True, nogil=True)
def _count(ids, ends, num_terms):
    """bounds int64[documents + 1], known distinct terms int32 of each document, and their counts int64."""
    bounds = np.zeros(len(ends), np.int64)
    found, counts = np.empty(len(ids), np.int32), np.empty(len(ids), np.int64)
    seen_in, place = np.full(num_terms, -1, np.int64), np.empty(num_terms, np.int64)
    size = 0
    for document in range(len(ends) - 1):
        for i in range(ends[document], ends[document + 1]):
            term = ids[i]
            if term < 0:
                continue
            if seen_in[term] != document:
                seen_in[term], place[term] = document, size
                found[size], counts[size] = term, 0
                size += 1
            counts[place[term]] += 1
        bounds[document + 1] = size
    return bounds, found[:size], counts[:size]


@njit(cache=True, nogil=True)
def _only_slots(bounds, found, places, table):
    """bounds, slots and places of the terms that have a slot."""
    new_bounds = np.zeros(len(bounds), np.int64)
    slots, kept = np.empty(len(found), np.uint32), np.empty(len(found), np.uint32)
    size = 0
    for document in range(len(bounds) - 1):
        for p in range(bounds[document], bounds[document + 1]):
            slot = table[found[p]]
            if slot >= 0:
                slots[size], kept[size] = slot, places[p]
                size += 1
        new_bounds[document + 1] = size
    return new_bounds, slots, kept
