"""Selection: the part of a general corpus that resembles a task's training texts.

Every training text queries the corpus and the union of their best K documents is kept, each document as its best hit:
the one with the smallest rank, then the highest score. Documents that hold dev or test text are dropped. The rest is
ordered by rank, score and row, and cut at a budget, so that a smaller selection is a prefix of a larger one.

A selection folder: selection.jsonl.gz, a line {"id", "text", "source", "rank" (from 1), "score", "query" (the training
example's id)}; rows.npy int64, ranks.npy int32, scores.npy float64, queries.npy int32 (index of the training text, -1
for none); leaks.npy int64 (rows of the whole corpus that leak); hits.npy int32[training texts]; manifest.json. It is
found again by the hash of all that made it.
"""

import gzip
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrieval import folders
from retrieval.analyze import ANALYZERS
from retrieval.baselines import random_rows
from retrieval.cluster import Cluster
from retrieval.corpus import Corpus, Progress
from retrieval.engines import ENGINES, MEMORY
from retrieval.engines.scan import Stream
from retrieval.leak import find_leaks
from retrieval.queries import make_queries
from retrieval.scoring import SCORINGS
from tasks.errors import InputError
from tasks.types import Task

KIND, VERSION = "selection", 1
SELECTORS = ("bm25", "random")
QUERIES_A_BATCH = 2_048  # as many as the engine bm25 takes at once; fewer where they would have more hits than:
HITS_IN_MEMORY = 4_000_000
HITS_A_SCAN = 16_000_000  # 16 bytes each, in each thread
FETCHED = "fetched"
EXPLAINED_DOCUMENTS = 500
SHOWN = 3


class Found(NamedTuple):
    """Documents and their best hits, [N] each: rows int64, ranks int32 from 1, scores float64, queries int32."""

    rows: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    queries: np.ndarray

    def at(self, places: np.ndarray | slice) -> "Found":
        return Found(*(column[places] for column in self))


class Selection:
    """A selection folder opened: `rows`, `ranks`, `scores`, `queries` and `leaks` as in its files, and `manifest`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = folders.load(self.folder, KIND, VERSION)
        if self.manifest is None:
            raise InputError(f"{folder} is not a selection: it has no {folders.MANIFEST}")
        self.rows, self.ranks, self.scores, self.queries, self.leaks = (
            np.load(self.folder / f"{name}.npy") for name in (*Found._fields, "leaks")
        )

    def __len__(self) -> int:
        return len(self.rows)

    def records(self) -> Iterator[dict]:
        """The lines of selection.jsonl.gz, best first."""
        with gzip.open(self.folder / "selection.jsonl.gz", "rt", encoding="utf-8", newline="\n") as lines:
            yield from map(json.loads, lines)

    def texts(self) -> Iterator[str]:
        return (record["text"] for record in self.records())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the lines."""
        return self.manifest["sha256"]


def paper_k(num_queries: int) -> int:
    """Documents a query by the TLM paper's rule (section 3.2 and its table of hyper-parameters)."""
    if num_queries < 5_000:
        return 5_000
    return 50 if num_queries > 100_000 else 500


def select(
    task: Task,
    corpus: Corpus | Stream,
    *,
    cache: Path,
    selector: str = "bm25",
    engine: str = "bm25",
    analyzer: str = "english",
    scoring: str = "lucene",
    k1: float = 1.2,
    b: float = 0.75,
    k: int | None = None,
    max_documents: int | None = None,
    max_words: int | None = None,
    query_terms: int = 128,
    like: Selection | None = None,
    seed: int = 0,
    threads: int = 0,
    memory: int = MEMORY,
    cluster: str | None = None,
    progress: Progress | None = None,
) -> Selection:
    """The selection for a task, made under `cache` or found there.

    `k`: documents a query, by `paper_k` if None. `max_documents` and `max_words` bound the selection; `like` takes the
    bound from another one: its words if it was cut by words, else its number of documents. The selector `random` draws
    documents by `seed` until the bound. Texts with more terms than `query_terms` query by their key terms.
    `memory`: bytes that building an index may take. A `Stream` is for the engine scan alone; it holds repeats, of which
    the first stays, and is looked through for leaks only as far as it was found. `cluster`: a Ray address (see
    `retrieval.cluster`) whose machines read it.
    Raises InputError for unknown names and values out of range, and where nothing is found.
    """
    names = {"selector": SELECTORS, "engine": ENGINES, "analyzer": ANALYZERS, "scoring": SCORINGS}
    for name, value in {"selector": selector, "engine": engine, "analyzer": analyzer, "scoring": scoring}.items():
        if value not in names[name]:
            raise InputError(f"retrieval.{name}={value} is unknown; choose one of {', '.join(names[name])}")
    bounds = {"k": k, "max_documents": max_documents, "max_words": max_words, "query_terms": query_terms}
    for name, bound in bounds.items():
        if bound is not None and bound < 1:
            raise InputError(f"retrieval.{name}={bound} must be at least 1")
    if isinstance(corpus, Stream) and (selector, engine) != ("bm25", "scan"):
        raise InputError(f"files without a store are for retrieval.engine=scan alone, not for {selector} with {engine}")
    if cluster and not isinstance(corpus, Stream):
        raise InputError(f"retrieval.cluster={cluster} is for retrieval.engine=scan over files; leave it out")
    if like is not None:
        max_documents, max_words = _bounds_of(like)
    options = {"selector": selector, "max_documents": max_documents, "max_words": max_words}
    if selector == "random":
        if max_documents is None and max_words is None:
            raise InputError("the selector random wants a bound: retrieval.max_documents or retrieval.max_words")
        options["seed"] = seed
    else:
        k = k or paper_k(len(task.splits["train"]))
        options |= {
            "engine": engine, "analyzer": analyzer, "scoring": scoring, "k1": k1, "b": b, "k": k,
            "query_terms": query_terms,
        }  # fmt: skip
    key = folders.key(
        train=[(example.id, example.text) for example in task.splits["train"]],
        unseen=[task.texts("dev"), task.texts("test")],
        corpus=corpus.fingerprint,
        analyzer=ANALYZERS[analyzer].hash,
        options=options,
        version=VERSION,
    )
    folder = Path(cache) / "selections" / key

    def write(new: Path) -> dict:
        return _write(new, task, corpus, options, Path(cache), threads, memory, cluster, progress)

    folders.ensure(folder, KIND, VERSION, write)
    return Selection(folder)


def _bounds_of(like: Selection) -> tuple[int | None, int | None]:
    if like.manifest["options"]["max_words"] is not None:
        return None, like.manifest["words"]
    return len(like), None


def _write(
    folder: Path,
    task: Task,
    corpus: Corpus | Stream,
    options: dict,
    cache: Path,
    threads: int,
    memory: int,
    cluster: str | None,
    progress: Progress | None,
) -> dict:
    unseen = [*task.texts("dev"), *task.texts("test")]
    stream = corpus if isinstance(corpus, Stream) else None
    seconds = {}  # what each part takes, also where it lay in the cache
    if stream is None:
        leaks = find_leaks(corpus, unseen, cache, threads, progress)
        seconds["leaks"] = leaks.seconds
    if options["selector"] == "random":
        found = _all_at_random(len(corpus), options["seed"])
    else:
        how = (ANALYZERS[options["analyzer"]], options["scoring"], options["k1"], options["b"], cache / "indexes")
        if cluster:
            engine = Cluster(cluster, corpus, *how, threads, progress)
        else:
            engine = ENGINES[options["engine"]](corpus, *how, threads, progress, memory)
        seconds["index"] = engine.seconds
        with _timed(seconds, "search"):
            queries = make_queries(task.texts("train"), ANALYZERS[options["analyzer"]], options["query_terms"])
            found, hits = _search(engine, queries, options["k"], progress)
        np.save(folder / "hits.npy", hits)
    if not len(found.rows):
        raise InputError(
            f"no document of the corpus shares a term with any of the {len(task.splits['train'])} training texts of "
            f"{task.name}; choose a corpus in the task's language"
        )
    documents = len(corpus)
    if stream is not None:  # from here on the documents that were found stand for it
        with _timed(seconds, "fetch"):
            corpus, rows_there = engine.fetch(np.sort(found.rows), folder / FETCHED)
        found = found.at(np.isin(found.rows, rows_there))
        found = found._replace(rows=np.searchsorted(rows_there, found.rows))
        leaks = find_leaks(corpus, unseen, cache, threads, progress)
        seconds["leaks"] = leaks.seconds
    leaking = np.isin(found.rows, leaks.rows)
    kept = _cut(found.at(~leaking), corpus, options)
    if not len(kept.rows):
        raise InputError(f"of {len(found.rows)} documents none is left: all leak, or max_words is below the first's")
    with _timed(seconds, "write"):
        digest = _write_lines(folder, task, corpus, kept, progress)
        columns = kept._asdict() | {"leaks": leaks.rows}
        if stream is not None:
            columns |= {name: rows_there[columns[name]] for name in ("rows", "leaks")}
        for name, column in columns.items():
            np.save(folder / f"{name}.npy", column)
    manifest = {
        "task": task.name,
        "train_texts": len(task.splits["train"]),
        "corpus": {
            "folder": stream.spec if stream is not None else str(corpus.folder),
            "fingerprint": (corpus if stream is None else stream).fingerprint,
            "documents": documents,
        },
        "options": options,
        "documents": len(kept.rows),
        "words": int(corpus.words[kept.rows].sum()),
        "by_source": _by_source(corpus, kept.rows),
        "leaks": {
            "dropped": int(leaking.sum()),
            "in_corpus": len(leaks.rows),
            "documents_checked": leaks.documents,
            "texts": len(unseen),
            "texts_under_13_tokens": leaks.not_checked,
            "of_these_searched_whole": leaks.whole,
            "examples": _leak_examples(leaks.examples, found.rows[leaking]),
        },
        "seconds": seconds,
        "sha256": digest,
    }
    if options["selector"] != "random":
        manifest["found"] = len(found.rows)
        manifest["queries"] = _query_report(task, queries, hits)
        explain = (
            (lambda query, row: engine.explain_text(query, corpus[row].text)) if stream is not None else engine.explain
        )
        manifest["terms"] = _strongest_terms(explain, queries, kept)
    if stream is not None:
        shutil.rmtree(folder / FETCHED)
    return manifest


def _all_at_random(num_documents: int, seed: int) -> Found:
    """The whole corpus, in a random order that stands for a ranking."""
    ranks = np.arange(1, num_documents + 1, dtype=np.int32)
    rows = random_rows(num_documents, seed)
    return Found(rows, ranks, np.zeros(num_documents), np.full(num_documents, -1, np.int32))


def _search(engine, queries: list[list[str]], k: int, progress: Progress | None) -> tuple[Found, np.ndarray]:
    """The union of all queries' hits by rank, score and row; and how many hits each query had, int32[queries]."""
    num_hits = np.zeros(len(queries), np.int32)
    parts, waiting = [], 0
    step = min(QUERIES_A_BATCH, max(HITS_IN_MEMORY // k, 1))
    if getattr(engine, "in_passes", False):  # a batch is a pass through the corpus: let there be few
        engine.count(queries)
        step = max(HITS_A_SCAN // k, 1)
    for first in range(0, len(queries), step):
        hits = engine.search(queries[first : first + step], k)
        query, place = np.nonzero(hits.rows >= 0)
        num_hits[first : first + len(hits.rows)] = np.bincount(query, minlength=len(hits.rows))
        ranks, numbers = (place + 1).astype(np.int32), (query + first).astype(np.int32)
        parts.append(Found(hits.rows[query, place], ranks, hits.scores[query, place], numbers))
        waiting += len(query)
        if waiting > HITS_IN_MEMORY:
            parts, waiting = [_best_hits(parts)], 0
        if progress:
            progress(min(first + step, len(queries)), len(queries), "searching")
    found = _best_hits(parts)
    return found.at(np.lexsort((found.rows, -found.scores, found.ranks))), num_hits


def _best_hits(parts: list[Found]) -> Found:
    """One hit for each document: the smallest rank, then the highest score, then the first query."""
    hits = Found(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    hits = hits.at(np.lexsort((hits.queries, -hits.scores, hits.ranks, hits.rows)))
    return hits.at(np.diff(hits.rows, prepend=-1) != 0)


def _cut(found: Found, corpus: Corpus, options: dict) -> Found:
    """The longest prefix within the bounds."""
    found = found.at(slice(options["max_documents"]))
    if options["max_words"] is None:
        return found
    words = np.cumsum(corpus.words[found.rows], dtype=np.int64)
    return found.at(slice(int(np.searchsorted(words, options["max_words"], "right"))))


def _write_lines(folder: Path, task: Task, corpus: Corpus, found: Found, progress: Progress | None) -> str:
    """Writes selection.jsonl.gz; returns the SHA-256 of its lines, which are the same on every machine."""
    ids = [example.id for example in task.splits["train"]]
    digest = hashlib.sha256()
    with (
        (folder / "selection.jsonl.gz").open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as file,
    ):
        columns = (column.tolist() for column in found)
        for done, (row, rank, score, query) in enumerate(zip(*columns, strict=True), 1):
            document = corpus[row]
            record = {
                "id": document.id, "text": document.text, "source": document.source,
                "rank": rank, "score": score, "query": ids[query] if query >= 0 else None,
            }  # fmt: skip
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
            if progress and done % 5_000 == 0:
                progress(done, len(found.rows), "writing the selection")
    return digest.hexdigest()


def _by_source(corpus: Corpus, rows: np.ndarray) -> dict[str, dict[str, int]]:
    """Documents and words of each source, the largest first."""
    size, sources = len(corpus.source_names), corpus.sources[rows]
    documents = np.bincount(sources, minlength=size)
    words = np.bincount(sources, corpus.words[rows], minlength=size)
    return {
        corpus.source_names[source]: {"documents": int(documents[source]), "words": int(words[source])}
        for source in np.argsort(-documents, kind="stable")
        if documents[source]
    }


def _leak_examples(examples: list[dict], dropped: np.ndarray) -> list[dict]:
    rows = set(dropped[:SHOWN].tolist())
    return [example for example in examples if example["row"] in rows]


def _query_report(task: Task, queries: list[list[str]], hits: np.ndarray) -> dict:
    """How the queries fared; those that found nothing are counted and the first of them named."""
    empty = [task.splits["train"][query].id for query in np.flatnonzero(hits == 0)]
    return {
        "number": len(queries),
        "terms": sum(map(len, queries)),
        "hits": {"fewest": int(hits.min()), "median": float(np.median(hits)), "most": int(hits.max())},
        "without_hits": len(empty),
        "without_hits_examples": empty[:SHOWN],
    }


def _strongest_terms(explain: Callable, queries: list[list[str]], found: Found) -> dict[str, float]:
    """The ten terms that add most to the scores of the first documents."""
    adds = Counter()
    for row, query in zip(found.rows[:EXPLAINED_DOCUMENTS], found.queries, strict=False):
        adds.update(explain(queries[query], int(row)))
    return {term: round(score, 1) for term, score in adds.most_common(10)}


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - start, 3)
