"""The selector `tfidf`: each training text finds the documents nearest to it by cosine of TF-IDF vectors.

The vectors are scikit-learn's TfidfVectorizer's with sublinear_tf (tested): (1 + log tf) (log((1 + N) / (1 + df)) + 1),
scaled to length 1. They lie on disk as a sparse matrix, made once for a corpus and an analyzer: values.bin float32 and
columns.bin int32 [entries], ends.npy int64[documents + 1], idf.npy float64[terms], and the vocabulary. Memory does not
grow with the corpus, but for the vocabulary.
"""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from retrieval import folders
from retrieval.analyze import ANALYZERS, Analyzer
from retrieval.corpus import Corpus, Progress
from retrieval.engines import Hits
from retrieval.ranking import Ranking, nearest, union
from retrieval.vocabulary import Vocabulary

KIND, VERSION = "TF-IDF vectors", 1
BLOCK_DOCUMENTS = 8_192


def rank(texts, corpus, options, cache, threads=0, memory=0, cluster=None, progress=None) -> Ranking:
    analyzer = ANALYZERS[options["analyzer"]]
    folder = cache / "tfidf" / folders.key(corpus=corpus.fingerprint, analyzer=analyzer.hash, version=VERSION)
    manifest = folders.ensure(folder, KIND, VERSION, lambda place: _write(place, corpus, analyzer, progress))
    start = time.perf_counter()
    vocabulary, idf = Vocabulary.load(folder, analyzer), np.load(folder / "idf.npy")
    documents = _Matrix(folder, np.load(folder / "ends.npy"), len(idf))
    queries = vectors(counts(vocabulary.encode_known(text.encode() for text in texts), len(idf)), idf)

    def search(part: slice) -> Hits:
        wanted = queries[part]
        return nearest(((wanted @ documents.block(*block).T).toarray() for block in _blocks(corpus)), options["k"])

    def explain(text: int, row: int) -> dict[str, float]:
        both = queries[[text]].multiply(documents.block(row, row + 1)).tocoo()
        return {vocabulary.term(column): float(add) for column, add in zip(both.coords[1], both.data, strict=True)}

    found, hits = union(search, len(texts), options["k"], progress)
    seconds = {"vectors": manifest["seconds"], "search": round(time.perf_counter() - start, 3)}
    return Ranking(found, seconds, hits, explain)


def counts(encoded: tuple[np.ndarray, np.ndarray], num_terms: int) -> csr_array:
    """Occurrences of each term in each text, float32[texts, terms], from term ids and offsets; -1 is no term."""
    ids, ends = encoded
    known = ids >= 0
    ends = np.concatenate([[0], np.cumsum(known)])[ends]
    matrix = csr_array((np.ones(ends[-1], np.float32), ids[known], ends), (len(ends) - 1, num_terms))
    matrix.sum_duplicates()
    return matrix


def vectors(matrix: csr_array, idf: np.ndarray) -> csr_array:
    """Counts to TF-IDF vectors of length 1, in place."""
    matrix.data = ((1 + np.log(matrix.data)) * idf[matrix.indices]).astype(np.float32)
    lengths = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    matrix.data /= np.repeat(np.where(lengths > 0, lengths, 1), np.diff(matrix.indptr)).astype(np.float32)
    return matrix


class _Matrix:
    """The vectors on disk: a block of documents at a time as a sparse matrix."""

    def __init__(self, folder: Path, ends: np.ndarray, num_terms: int):
        self._columns = np.memmap(folder / "columns.bin", np.int32, "r")
        self._values = np.memmap(folder / "values.bin", np.float32, "r+")
        self._ends, self._num_terms = ends, num_terms

    def block(self, first: int, last: int) -> csr_array:
        """float32[last - first, terms], a copy."""
        bounds = self._ends[first : last + 1]
        entries = slice(bounds[0], bounds[-1])
        parts = np.array(self._values[entries]), np.array(self._columns[entries]), bounds - bounds[0]
        return csr_array(parts, (last - first, self._num_terms))

    def replace(self, first: int, last: int, block: csr_array) -> None:
        self._values[self._ends[first] : self._ends[last]] = block.data


def _write(folder: Path, corpus: Corpus, analyzer: Analyzer, progress: Progress | None) -> dict:
    """First the counts, which give the document frequencies; then, from them, the weights in their place."""
    vocabulary, frequencies, ends = Vocabulary(analyzer), np.zeros(0, np.int64), [np.zeros(1, np.int64)]
    with (folder / "columns.bin").open("wb") as columns, (folder / "values.bin").open("wb") as values:
        for first, last in _blocks(corpus):
            encoded = vocabulary.encode(corpus.encoded(row) for row in range(first, last))
            matrix = counts(encoded, len(vocabulary))
            frequencies = np.pad(frequencies, (0, len(vocabulary) - len(frequencies)))
            frequencies += np.bincount(matrix.indices, minlength=len(vocabulary))
            matrix.indices.astype(np.int32).tofile(columns)
            matrix.data.tofile(values)
            ends.append(matrix.indptr[1:] + ends[-1][-1])
            if progress:
                progress(last, len(corpus), "counting terms")
    ends, idf = np.concatenate(ends), np.log((1 + len(corpus)) / (1 + frequencies)) + 1
    matrix = _Matrix(folder, ends, len(idf))
    for first, last in _blocks(corpus):
        matrix.replace(first, last, vectors(matrix.block(first, last), idf))
    np.save(folder / "ends.npy", ends)
    np.save(folder / "idf.npy", idf)
    vocabulary.save(folder)
    return {"documents": len(corpus)}


def _blocks(corpus: Corpus) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, len(corpus), BLOCK_DOCUMENTS), len(corpus)]))
