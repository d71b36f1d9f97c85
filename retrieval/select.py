"""Selection: the part of a general corpus that resembles a task's training texts.

A selector (retrieval/selectors) ranks documents for the training texts. With `bm25` every text queries the corpus, and
the union of their best K documents is kept, each as its best hit: the one with the smallest rank, then the highest
score. Documents that hold dev or test text are dropped, and, if asked for, those nearly the same as a better one. The
rest is ordered by rank, score and row, and cut at a budget, so that a smaller selection is a prefix of a larger one.
Several tasks share one selection by quota (retrieval/quota.py).

A selection folder: selection.jsonl.gz, a line {"id", "text", "source", "rank" (from 1), "score", "query" (the training
example's id)}, and "task" where there are several; rows.npy int64, ranks.npy int32, scores.npy float64, queries.npy
int32 (index of the training text, -1 for none; those of several tasks follow one another); leaks.npy int64 (rows of the
whole corpus that leak); hits.npy int32[training texts], where they query; manifest.json. It is found again by the hash
of all that made it.
"""

import gzip
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from retrieval import folders, selectors, summary
from retrieval.analyze import ANALYZERS
from retrieval.corpus import Corpus, Progress
from retrieval.engines import ENGINES, MEMORY
from retrieval.engines.scan import Stream
from retrieval.leak import find_leaks
from retrieval.ngrams import kl_reduction
from retrieval.quota import draft
from retrieval.ranking import Found, Ranking, fetched
from retrieval.repeats import Repeats
from retrieval.scoring import SCORINGS
from tasks.errors import InputError
from tasks.types import Example, Task

KIND, VERSION = "selection", 1
FETCHED = "fetched"


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
    tasks: Task | Sequence[Task],
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
    max_similarity: float | None = None,
    query_terms: int = 128,
    model: str | None = None,
    quota: Sequence[float] | None = None,
    like: Selection | None = None,
    seed: int = 0,
    threads: int = 0,
    memory: int = MEMORY,
    cluster: str | None = None,
    progress: Progress | None = None,
) -> Selection:
    """The selection for a task, or for several, made under `cache` or found there.

    `k`: documents a query, by `paper_k` if None. `max_documents` and `max_words` bound the selection; `like` takes the
    bound from another one: its words if it was cut by words, else its number of documents. The selectors `random` and
    `dsir` draw documents by `seed` until the bound. Texts with more terms than `query_terms` query by their key terms.
    `max_similarity`: documents at least so alike to a better one are dropped (retrieval/repeats.py). `model`: the
    folder that the selector `embedding` uses. `quota`: what each of several tasks gets of the bound and, times `k`, of
    the documents a query; equal if None. `memory`: bytes that building an index may take.
    A `Stream` is for the engine scan alone; it holds repeats, of which the first stays, and is looked through for leaks
    only as far as it was found. `cluster`: a Ray address (see `retrieval.cluster`) whose machines read it.
    Raises InputError for unknown names and values out of range, and where nothing is found.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    names = {"selector": selectors.OPTIONS, "engine": ENGINES, "analyzer": ANALYZERS, "scoring": SCORINGS}
    for name, value in {"selector": selector, "engine": engine, "analyzer": analyzer, "scoring": scoring}.items():
        if value not in names[name]:
            raise InputError(f"retrieval.{name}={value} is unknown; choose one of {', '.join(names[name])}")
    bounds = {"k": k, "max_documents": max_documents, "max_words": max_words, "query_terms": query_terms}
    for name, bound in bounds.items():
        if bound is not None and bound < 1:
            raise InputError(f"retrieval.{name}={bound} must be at least 1")
    if max_similarity is not None and not 0 < max_similarity <= 1:
        raise InputError(f"retrieval.max_similarity={max_similarity} must be above 0 and at most 1")
    if isinstance(corpus, Stream) and (selector, engine) != ("bm25", "scan"):
        raise InputError(f"files without a store are for retrieval.engine=scan alone, not for {selector} with {engine}")
    if cluster and not isinstance(corpus, Stream):
        raise InputError(f"retrieval.cluster={cluster} is for retrieval.engine=scan over files; leave it out")
    if like is not None:
        max_documents, max_words = _bounds_of(like)
    if selector in selectors.EVERYTHING and max_documents is None and max_words is None:
        raise InputError(f"the selector {selector} wants a bound: retrieval.max_documents or retrieval.max_words")
    shares = _shares(tasks, quota)
    given = {
        "engine": engine, "analyzer": analyzer, "scoring": scoring, "k1": k1, "b": b, "query_terms": query_terms,
        "model": model, "seed": seed, "k": k or (paper_k(len(tasks[0].splits["train"])) if len(tasks) == 1 else None),
    }  # fmt: skip
    options = {"selector": selector, "max_documents": max_documents, "max_words": max_words}
    options |= {"max_similarity": max_similarity} | {name: given[name] for name in selectors.OPTIONS[selector]}
    embedding = selectors.load(selector) if selector == "embedding" else None
    key = folders.key(
        train=[[(example.id, example.text) for example in task.splits["train"]] for task in tasks],
        unseen=[[task.texts("dev"), task.texts("test")] for task in tasks],
        names=[task.name for task in tasks] if len(tasks) > 1 else None,
        shares=shares,
        corpus=corpus.fingerprint,
        analyzer=ANALYZERS[analyzer].hash,
        options=options,
        model=embedding.fingerprint(embedding.model_folder(model)) if embedding else None,
        version=VERSION,
    )
    folder = Path(cache) / "selections" / key

    def write(new: Path) -> dict:
        return _write(new, tasks, shares, corpus, options, Path(cache), threads, memory, cluster, progress)

    folders.ensure(folder, KIND, VERSION, write)
    return Selection(folder)


def _bounds_of(like: Selection) -> tuple[int | None, int | None]:
    if like.manifest["options"]["max_words"] is not None:
        return None, like.manifest["words"]
    return len(like), None


def _shares(tasks: Sequence[Task], quota: Sequence[float] | None) -> list[float]:
    """Of the whole; they sum to 1."""
    quota = [1.0] * len(tasks) if quota is None else list(quota)
    if len(quota) != len(tasks) or not all(math.isfinite(part) and part > 0 for part in quota):
        listed = ",".join(f"{part:g}" for part in quota)
        raise InputError(f"quota={listed}: give one number above 0 for each of the {len(tasks)} tasks")
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError(f"task={','.join(task.name for task in tasks)}: a task is named twice; leave one out")
    return [part / sum(quota) for part in quota]


def _write(
    folder: Path,
    tasks: Sequence[Task],
    shares: Sequence[float],
    corpus: Corpus | Stream,
    options: dict,
    cache: Path,
    threads: int,
    memory: int,
    cluster: str | None,
    progress: Progress | None,
) -> dict:
    def rank(task: Task, own: dict) -> Ranking:
        of_task = task.texts("train"), corpus, own, cache
        return selectors.load(options["selector"]).rank(*of_task, threads, memory, cluster, progress)

    rankings, parts, seconds = _rankings(tasks, shares, options, rank)
    stream, row_of = None, lambda rows: rows
    if isinstance(corpus, Stream):  # from here on the documents that were found stand for it
        with _timed(seconds, "fetch"):
            stream, (corpus, rankings, rows) = corpus, fetched(rankings, folder / FETCHED)
        row_of = rows.__getitem__
    found = [ranking.found for ranking in rankings]
    unseen = [
        (task.name, split, example) for task in tasks for split in ("dev", "test") for example in task.splits[split]
    ]
    leaks = find_leaks(corpus, [example.text for _, _, example in unseen], cache, threads, progress)
    seconds["leaks"] = leaks.seconds
    clean = [each.at(~np.isin(each.rows, leaks.rows)) for each in found]
    repeats = None if options["max_similarity"] is None else Repeats(corpus, options["max_similarity"])
    with _timed(seconds, "union"):
        bounds = options["max_documents"], options["max_words"]
        given, turns = draft(clean, shares, np.asarray(corpus.words), *bounds, repeats and repeats.refuses)
    if not len(turns):
        raise InputError(
            f"of {sum(len(each.rows) for each in found)} documents none is left: all leak, or max_words is below the "
            "first's"
        )
    kept, examples, firsts = _in_turns(clean, given, turns, tasks)
    hits = None if rankings[0].hits is None else np.concatenate([ranking.hits for ranking in rankings])
    with _timed(seconds, "write"):
        digest = _write_lines(folder, tasks, corpus, kept, turns, examples, progress)
        columns = kept._asdict() | {"rows": row_of(kept.rows), "leaks": row_of(leaks.rows)}
        for name, column in (columns if hits is None else columns | {"hits": hits}).items():
            np.save(folder / f"{name}.npy", column)

    def nearness(texts: list[str], rows: np.ndarray) -> dict:
        if stream is not None:  # random documents of it, to compare with, would take another pass
            return {}
        return {"kl": kl_reduction(texts, corpus, rows) if len(rows) else None}

    with _timed(seconds, "kl"):
        kl = nearness([example.text for example in examples], kept.rows)
        for number, part in enumerate(parts if len(tasks) > 1 else []):
            own = kept.rows[turns == number]
            part |= {"documents": len(own), "words": int(corpus.words[own].sum())}
            part |= nearness(tasks[number].texts("train"), own)
    all_found = np.unique(np.concatenate([each.rows for each in found]))
    whole = corpus if stream is None else stream
    manifest = {
        "task": "+".join(task.name for task in tasks),
        "train_texts": len(examples),
        "corpus": {
            "folder": str(corpus.folder) if stream is None else stream.spec,
            "fingerprint": whole.fingerprint,
            "documents": len(whole),
        },
        "options": options,
        "documents": len(kept.rows),
        "words": int(corpus.words[kept.rows].sum()),
        "by_source": summary.by_source(corpus, kept.rows),
        **kl,
        "leaks": summary.leaks(leaks, all_found, unseen),
        "samples": summary.samples(corpus, examples, kept),
        "seconds": seconds,
        "sha256": digest,
    }
    if len(tasks) > 1:
        manifest["tasks"] = parts
    if repeats:
        manifest["near_duplicates"] = {"dropped": repeats.dropped, "examples": repeats.examples}
    if hits is not None:
        manifest["found"] = len(all_found)
        manifest["queries"] = summary.queries(examples, hits, kept)
    if options["selector"] != "random":
        manifest["scores"] = summary.scores(kept)
    if rankings[0].explain:
        manifest["terms"] = summary.strongest_terms(rankings, firsts, kept, turns)
    for example in [*manifest["leaks"]["examples"], *(repeats.examples if repeats else [])]:
        example["row"] = int(row_of(example["row"]))
    if stream is not None:
        shutil.rmtree(folder / FETCHED)
    return manifest


def _rankings(
    tasks: Sequence[Task], shares: Sequence[float], options: dict, rank: Callable[[Task, dict], Ranking]
) -> tuple[list[Ranking], list[dict], dict[str, float]]:
    """Each task's ranking; what the manifest says of each task; and what each part took, also where it lay in the
    cache. Raises InputError where a task finds nothing."""
    rankings, parts, seconds = [], [], {}
    for task, share in zip(tasks, shares, strict=True):
        own = dict(options)
        if "k" in own:
            own["k"] = max(1, round((own["k"] or paper_k(len(task.splits["train"]))) * share * len(tasks)))
        ranking = rank(task, own)
        if not len(ranking.found.rows):
            raise InputError(
                f"no document of the corpus shares a term with any of the {len(task.splits['train'])} training texts "
                f"of {task.name}; choose a corpus in the task's language"
            )
        for phase, spent in ranking.seconds.items():  # only searching is done anew for each task
            seconds[phase] = round(spent + (seconds.get(phase, 0) if phase == "search" else 0), 3)
        rankings.append(ranking)
        parts.append({"task": task.name, "quota": share} | ({"k": own["k"]} if "k" in own else {}))
    return rankings, parts, seconds


def _in_turns(
    clean: Sequence[Found], given: Sequence[np.ndarray], turns: np.ndarray, tasks: Sequence[Task]
) -> tuple[Found, list[Example], list[int]]:
    """The drafted documents in their order; the training texts of all tasks, which their queries now count through;
    and where each task's begin."""
    examples = [example for task in tasks for example in task.splits["train"]]
    firsts = np.cumsum([0, *(len(task.splits["train"]) for task in tasks)])[:-1].tolist()
    drafted = [each.at(places) for each, places in zip(clean, given, strict=True)]
    moved = [
        each._replace(queries=np.where(each.queries >= 0, each.queries + first, -1).astype(np.int32))
        for each, first in zip(drafted, firsts, strict=True)
    ]
    order = np.argsort(np.argsort(turns, kind="stable"), kind="stable")  # from task by task to turn by turn
    kept = Found(*(np.concatenate(columns)[order] for columns in zip(*moved, strict=True)))
    return kept, examples, firsts


def _write_lines(
    folder: Path,
    tasks: Sequence[Task],
    corpus: Corpus,
    found: Found,
    turns: np.ndarray,
    examples: Sequence[Example],
    progress: Progress | None,
) -> str:
    """Writes selection.jsonl.gz; returns the SHA-256 of its lines, which are the same on every machine."""
    digest = hashlib.sha256()
    with (
        (folder / "selection.jsonl.gz").open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as file,
    ):
        columns = (column.tolist() for column in (*found, turns))
        for done, (row, rank, score, query, task) in enumerate(zip(*columns, strict=True), 1):
            document = corpus[row]
            record = {
                "id": document.id, "text": document.text, "source": document.source,
                "rank": rank, "score": score, "query": examples[query].id if query >= 0 else None,
            }  # fmt: skip
            if len(tasks) > 1:
                record["task"] = tasks[task].name
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
            if progress and done % 5_000 == 0:
                progress(done, len(found.rows), "writing the selection")
    return digest.hexdigest()


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - start, 3)
