"""Selectors: which documents of a corpus a task wants, one file each, one signature, so that rivals can stand in.

rank(texts, corpus, options, cache, threads=0, memory=MEMORY, cluster=None, progress=None) -> Ranking
    texts: the task's training texts. options: values of the names that OPTIONS lists for the selector.
"""

from importlib import import_module
from types import ModuleType

from tasks.errors import InputError

OPTIONS = {
    "bm25": ("engine", "analyzer", "scoring", "k1", "b", "k", "query_terms"),
    "random": ("seed",),
    "dsir": ("seed",),
    "tfidf": ("analyzer", "k"),
    "embedding": ("model", "k"),
}


def load(name: str) -> ModuleType:
    return import_module(f"retrieval.selectors.{name}")


def missing(name: str, error: ImportError) -> InputError:
    return InputError(
        f"retrieval.selector={name} needs the package {error.name}: pip install -c constraints.txt -e '.[{name}]'"
    )


EVERYTHING = tuple(name for name, options in OPTIONS.items() if "k" not in options)  # rank all, and so want a bound
