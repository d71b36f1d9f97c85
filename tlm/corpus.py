"""`tlm corpus add`: documents added to a store, and to what was indexed of it."""

from pathlib import Path

from retrieval import folders
from retrieval.analyze import ANALYZERS
from retrieval.corpus import KIND, Corpus, add_documents, build_corpus, read_documents
from retrieval.engines import bm25
from tasks import files
from tasks.errors import InputError
from tlm.config import CorpusConfig, num_bytes
from tlm.progress import Progress


def add(store: Path, specs: list[str], config: CorpusConfig) -> int:
    """Makes the store where there is none."""
    progress, indexes = Progress(), Path(config.cache).expanduser() / "indexes"
    paths = [path for spec in specs for path in files.expand(spec)]
    if store.exists() and not folders.holds(store, KIND) and (not store.is_dir() or any(store.iterdir())):
        raise InputError(f"{store}: is there and is not a corpus store; name another place for the store")
    if not folders.holds(store, KIND):
        with progress.phase("corpus"):
            corpus = build_corpus(read_documents(paths), store, paths, progress.update)
        print(f"{store}: {len(corpus):,} documents{dropped(corpus, {})}")
        return 0
    old = Corpus(store)
    with progress.phase("corpus"):
        corpus = add_documents(read_documents(paths), store, paths, progress.update)
    for analyzer in ANALYZERS.values():
        if bm25.place_of(indexes, old.fingerprint, analyzer).exists():
            with progress.phase("index"):
                memory = num_bytes("memory", config.memory)
                bm25.open_engine(
                    corpus, analyzer, "lucene", 1.2, 0.75, indexes, config.threads, progress.update, memory
                )
    more = len(corpus) - len(old)
    print(f"{store}: {more:,} documents added, {len(corpus):,} now{dropped(corpus, old.statistics['dropped'])}")
    return 0


def dropped(corpus: Corpus, before: dict[str, int]) -> str:
    counts = {name: count - before.get(name, 0) for name, count in corpus.statistics["dropped"].items()}
    return f" ({counts['blank']:,} blank ones and {counts['duplicates']:,} repeats dropped)"
