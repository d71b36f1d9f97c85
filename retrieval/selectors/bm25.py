"""The selector `bm25`, the paper's: each training text, or its key terms, finds its best documents by BM25."""

import time

from retrieval.analyze import ANALYZERS
from retrieval.cluster import Cluster
from retrieval.engines import ENGINES, MEMORY
from retrieval.engines.scan import Stream
from retrieval.queries import make_queries
from retrieval.ranking import Ranking, union

HITS_A_SCAN = 16_000_000  # 16 bytes each, in each thread


def rank(texts, corpus, options, cache, threads=0, memory=MEMORY, cluster=None, progress=None) -> Ranking:
    """The corpus may be a stream, and then `cluster` the Ray address of machines that read it."""
    analyzer, k = ANALYZERS[options["analyzer"]], options["k"]
    how = (analyzer, options["scoring"], options["k1"], options["b"], cache / "indexes")
    if cluster:
        engine = Cluster(cluster, corpus, *how, threads, progress)
    else:
        engine = ENGINES[options["engine"]](corpus, *how, threads, progress, memory)
    start = time.perf_counter()
    queries = make_queries(texts, analyzer, options["query_terms"])
    step = None
    if getattr(engine, "in_passes", False):  # each search is a pass through the corpus: let there be few
        engine.count(queries)
        step = max(HITS_A_SCAN // k, 1)
    found, hits = union(lambda part: engine.search(queries[part], k), len(queries), k, progress, step)
    seconds = {"index": engine.seconds, "search": round(time.perf_counter() - start, 3)}
    explain, fetch = (engine.explain_text, engine.fetch) if isinstance(corpus, Stream) else (engine.explain, None)
    return Ranking(found, seconds, hits, lambda text, document: explain(queries[text], document), fetch)
