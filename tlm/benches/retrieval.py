"""`tlm bench retrieval`: BM25 engines side by side, each in a process of its own that takes turns with the others.

All engines get the same terms (our analyzer `english`), whole training texts as queries, and Lucene's scoring. Ours
gets all queries of a task at once, as a selection does; a rival, whose time a query does not depend on their number,
gets RIVAL_QUERIES of them. Indexing of bm25s is timed without making terms of the texts, ours and Lucene's with it.
Rivals of the default engines= take part where they are installed.

task= names one task or several with commas between. The parts are `search` (one thread, then two), `index`, `scan`,
`memory` and `growth`; cases= chooses among them. With out=FILE each part is written when it is done, and one that is
there is not measured again.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

from tasks.errors import InputError
from tlm.benches import rounds
from tlm.config import BenchConfig, DataConfig
from tlm.ledger import Ledger
from tlm.prepare import open_corpus, open_task
from tlm.progress import Progress
from tlm.run import environment, read_json, write_json

OURS = ("bm25", "scan")
ROUNDS = 5
RIVAL_QUERIES = 200
K = (50, 1000)
SCAN_QUERIES = (100, 1_000, 10_000)
MEMORY_TIMES = (1, 4, 16)
GROWTH_DOCUMENTS = (50_000, 100_000, 200_000, 400_000)
GROWTH_QUERIES = (100, 500, 1_000, 2_000)
PRELOAD = ["numpy", "numba", "retrieval.engines.bm25"]


def bench(config: BenchConfig) -> int:
    from retrieval.engines import ENGINES, load

    if not config.corpus:
        raise InputError("corpus=: missing; `tlm bench retrieval corpus=...` needs it")
    if unknown := [name for name in config.engines if name not in ENGINES]:
        raise InputError(f"engines={unknown[0]}: no such engine; use some of {', '.join(ENGINES)}")
    cases = list(PARTS) if config.cases == BenchConfig().cases else config.cases
    if unknown := [name for name in cases if name not in PARTS]:
        raise InputError(f"cases={unknown[0]}: no such case; use some of {', '.join(PARTS)}")
    progress, out = Progress(), Path(config.out) if config.out else None
    if config.engines == BenchConfig().engines:
        config = replace(config, engines=[name for name in config.engines if installed(name, load, progress)])
    corpus = open_corpus(config.corpus, Path(config.cache).expanduser(), Ledger(), progress)
    texts = {}
    for spec in config.task.split(","):
        task = open_task(spec, DataConfig())
        texts[task.name] = list(task.texts("train"))[: config.queries]
    rows = read_json(out)["rows"] if out and out.exists() else []
    for case in cases:
        if any(row["case"].split(",")[0] == case for row in rows):
            progress.say(f"{case}: is in {out} already")
            continue
        rows += PARTS[case](config, corpus.folder, texts, progress)
        if out:
            write_json(out, {"machine": environment(), "rows": rows})
    rounds.show(rows, "case", "engine")
    if out and any(row["case"].startswith("growth") for row in rows):
        plot(rows, out.with_suffix(".png"))
    return 0


def installed(engine: str, load: Callable, progress: Progress) -> bool:
    try:
        load(engine)
    except InputError as error:
        progress.say(f"{engine} does not take part: {error}")
        return False
    return True


# --- parts: each gives rows -----------------------------------------------------------------------------------------


def search(config: BenchConfig, store: Path, texts: dict[str, list[str]], progress: Progress) -> list[dict]:
    rows = []
    for threads in (1, 2):
        contestants = {
            engine: partial(searching, engine, store, Path(config.cache).expanduser(), texts, K, threads)
            for engine in config.engines
        }
        title = f"search, {threads} thread{'s' * (threads > 1)}"
        records = rounds.contest(title, contestants, 0, threads, PRELOAD, progress, ROUNDS)
        for engine, record in records.items():
            for case in record.turns[0]:
                rate = median(turn[case] for turn in record.turns)
                rows.append(row(f"search, {case}, {threads} threads", engine, "queries", rate, "queries/s", record))
    return rows


def index(config: BenchConfig, store: Path, texts: dict[str, list[str]], progress: Progress) -> list[dict]:
    contestants = {
        engine: partial(indexing, engine, store, Path(config.cache).expanduser())
        for engine in config.engines
        if engine != "scan"
    }
    records = rounds.contest("index", contestants, 0, 1, PRELOAD, progress, ROUNDS)
    rows = []
    for engine, record in records.items():
        rate, size = (median(turn[i] for turn in record.turns) for i in range(2))
        rows.append(row("index, 1 threads", engine, "documents", rate, "documents/s", record))
        rows.append(row("index, 1 threads", engine, "on disk", size, "bytes", record))
        if record.peak_memory is not None:
            rows.append(row("index, 1 threads", engine, "peak memory", record.peak_memory, "bytes", record))
    return rows


def scan(config: BenchConfig, store: Path, texts: dict[str, list[str]], progress: Progress) -> list[dict]:
    queries = [text for task in texts.values() for text in task]
    rows = []
    for number in SCAN_QUERIES:
        some = (queries * (1 + number // len(queries)))[:number]
        contestants = {"scan": partial(scanning, store, Path(config.cache).expanduser(), some)}
        records = rounds.contest(f"scan, {number:,} queries", contestants, 0, 1, PRELOAD, progress, ROUNDS)
        record = records["scan"]
        rows.append(row(f"scan, {number:,} queries", "scan", "text", median(record.turns), "MB/s", record))
    return rows


def memory(config: BenchConfig, store: Path, texts: dict[str, list[str]], progress: Progress) -> list[dict]:
    """Of scan over the corpus's files, each read several times."""
    queries = next(iter(texts.values()))[:1000]
    rows = []
    for times in MEMORY_TIMES:
        contestants = {"scan": partial(streaming, config.corpus, times, queries)}
        records = rounds.contest(f"memory, {times} x the corpus", contestants, 0, 1, PRELOAD, progress, 1)
        record = records["scan"]
        if record.peak_memory is not None:
            rows.append(
                row(f"memory, {times} x the corpus", "scan", "peak memory", record.peak_memory, "bytes", record)
            )
        rows.append(row(f"memory, {times} x the corpus", "scan", "text", median(record.turns), "MB/s", record))
    return rows


def growth(config: BenchConfig, store: Path, texts: dict[str, list[str]], progress: Progress) -> list[dict]:
    from retrieval.corpus import Corpus, build_corpus

    rows, corpus, cache = [], Corpus(store), Path(config.cache).expanduser()
    name, task = next(iter(texts.items()))
    points = [(documents, len(task)) for documents in GROWTH_DOCUMENTS if documents < len(corpus)]
    points += [(len(corpus), queries) for queries in GROWTH_QUERIES if queries <= len(task)]
    for documents, queries in points:
        part = store
        if documents < len(corpus):
            part = cache / "bench" / f"{corpus.fingerprint[:16]}-{documents}"
            build_corpus(islice(corpus, documents), part)
        contestants = {
            engine: partial(searching, engine, part, cache, {name: task[:queries]}, K[:1], 1)
            for engine in config.engines
        }
        title = f"growth, {documents:,} documents, {queries:,} queries"
        records = rounds.contest(title, contestants, 0, 1, PRELOAD, progress, ROUNDS)
        for engine, record in records.items():
            rate = median(next(iter(turn.values())) for turn in record.turns)
            rows.append(row(title, engine, "queries", rate, "queries/s", record))
    return rows


PARTS: dict[str, Callable] = {"search": search, "index": index, "scan": scan, "memory": memory, "growth": growth}


def row(case: str, engine: str, metric: str, value: float, unit: str, record: rounds.Record) -> dict:
    return rounds.row("retrieval", case, engine, metric, value, unit, len(record.turns))


# --- contestants (see rounds.py) ------------------------------------------------------------------------------------


def searching(
    engine: str, store: Path, cache: Path, texts: dict[str, list[str]], ks: tuple[int, ...], threads: int
) -> Iterator:
    """{case: queries a second} a turn."""
    from retrieval.analyze import ANALYZERS
    from retrieval.corpus import Corpus
    from retrieval.engines import ENGINES

    yield
    analyzer = ANALYZERS["english"]
    opened = ENGINES[engine](Corpus(store), analyzer, "lucene", 1.2, 0.75, cache / "indexes", threads)
    while True:
        rates = {}
        for name, given in texts.items():
            queries = [analyzer.terms(text) for text in given[: None if engine in OURS else RIVAL_QUERIES]]
            for k in ks:
                start = time.perf_counter()
                opened.search(queries, k)
                rates[f"{name}, K = {k:,}"] = len(queries) / (time.perf_counter() - start)
        yield rates


def indexing(engine: str, store: Path, cache: Path) -> Iterator:
    """(documents a second, bytes on disk) a turn."""
    from retrieval.analyze import ANALYZERS
    from retrieval.corpus import Corpus
    from retrieval.engines import ENGINES

    yield
    corpus = Corpus(store)
    cache.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=cache))
        try:
            opened = ENGINES[engine](corpus, ANALYZERS["english"], "lucene", 1.2, 0.75, folder, 1)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield len(corpus) / opened.seconds, size
        finally:
            shutil.rmtree(folder)


def scanning(store: Path, cache: Path, texts: list[str]) -> Iterator:
    """Megabytes of raw text a second a turn: the second pass, terms of the texts included."""
    from retrieval.analyze import ANALYZERS
    from retrieval.corpus import Corpus
    from retrieval.engines import ENGINES

    yield
    corpus, analyzer = Corpus(store), ANALYZERS["english"]
    queries = [analyzer.terms(text) for text in texts]
    opened = ENGINES["scan"](corpus, analyzer, "lucene", 1.2, 0.75, cache / "indexes", 1)
    opened.search(queries, K[0])  # the first pass as well, whose statistics are kept
    while True:
        start = time.perf_counter()
        opened.search(queries, K[0])
        yield corpus.statistics["bytes"] / 1e6 / (time.perf_counter() - start)


def streaming(spec: str, times: int, texts: list[str]) -> Iterator:
    """Megabytes a second a turn, both passes, over files that are read again and again as if there were more."""
    from retrieval.analyze import ANALYZERS
    from retrieval.corpus import read_documents
    from retrieval.engines import ENGINES
    from retrieval.engines.scan import Stream

    yield
    analyzer, stream = ANALYZERS["english"], Stream(spec)
    stream.paths = stream.paths * times
    queries = [analyzer.terms(text) for text in texts]
    size = times * sum(len(document.text.encode()) for document in read_documents(Stream(spec).paths))
    while True:
        with tempfile.TemporaryDirectory() as folder:
            opened = ENGINES["scan"](stream, analyzer, "lucene", 1.2, 0.75, Path(folder), 1)
            start = time.perf_counter()
            opened.search(queries, K[0])
            yield 2 * size / 1e6 / (time.perf_counter() - start)


def plot(rows: list[dict], path: Path) -> None:
    """Milliseconds a query, by documents and by queries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    grown = [row for row in rows if row["case"].startswith("growth")]
    numbers = [tuple(int(part.split()[0].replace(",", "")) for part in row["case"].split(", ")[1:]) for row in grown]
    most = [max(pair[i] for pair in numbers) for i in range(2)]
    for axis, which, label in zip(both, (0, 1), ("documents", "queries at once"), strict=True):
        for engine in rounds.distinct(grown, "engine"):
            points = sorted(
                (pair[which], 1e3 / row["value"])
                for row, pair in zip(grown, numbers, strict=True)
                if row["engine"] == engine and pair[1 - which] == most[1 - which]
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=engine)
        axis.set(xlabel=label, xscale="log", yscale="log", ylabel="milliseconds a query")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
