"""The selector `bm25`, the paper's: each training text, or its key terms, finds its best documents by BM25."""

import time

from retrieval.analyze import ANALYZERS
from retrieval.engines import ENGINES, MEMORY
from retrieval.queries import make_queries
from retrieval.ranking import Ranking, union


def rank(texts, corpus, options, cache, threads=0, memory=MEMORY, progress=None) -> Ranking:
    analyzer = ANALYZERS[options["analyzer"]]
    engine = ENGINES[options["engine"]](
        corpus, analyzer, options["scoring"], options["k1"], options["b"], cache / "indexes", threads, progress, memory
    )
    start = time.perf_counter()
    queries = make_queries(texts, analyzer, options["query_terms"])
    found, hits = union(
        lambda part: engine.search(queries[part], options["k"]), len(queries), options["k"], progress
    )  # fmt: skip
    seconds = {"index": engine.seconds, "search": round(time.perf_counter() - start, 3)}
    return Ranking(found, seconds, hits, lambda text, row: engine.explain(queries[text], row))
