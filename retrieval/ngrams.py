"""Hashed n-grams, the features of DSIR: Xie, Santurkar, Ma and Liang, "Data Selection for Language Models via
Importance Resampling", 2023, with the choices of its package `data-selection`.

A text's tokens are the runs of word characters and of other marks in its lower-cased form; each token and each two
in a row, with a blank between, count in the bucket SHA-256 modulo 10,000. The n-grams of a corpus are hashed once and
kept: ngrams.npy uint16, the buckets of all documents one after another, and ends.npy int64[documents + 1].
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from numba import njit, uint32, uint64

from retrieval import folders
from retrieval.corpus import Corpus, Progress
from retrieval.engines import num_threads

KIND, VERSION = "n-gram store", 1
BUCKETS = 10_000
BLOCK_DOCUMENTS = 5_000
SMOOTHING = 1e-8  # added to each bucket's share, as the package does
TOKEN = re.compile(r"\w+|[^\w\s]+")
COMPARED_DOCUMENTS = 10_000


def hashed(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of the n-grams of texts, uint16[all of them], and their int64[texts + 1] offsets."""
    lines = [" ".join(TOKEN.findall(text.lower())).encode() for text in texts]
    letters, bounds = np.frombuffer(b"".join(lines), np.uint8), np.cumsum([0, *map(len, lines)])
    buckets = np.empty(2 * (np.count_nonzero(letters == 32) + len(lines)), np.uint16)
    ends = np.zeros(len(lines) + 1, np.int64)
    _hash_lines(letters, bounds, buckets, ends)
    return buckets[: ends[-1]], ends


def corpus_ngrams(corpus: Corpus, cache: Path, threads: int = 0, progress: Progress | None = None):
    """(buckets, offsets) of all documents, mapped, and the seconds that it took to make them."""
    folder = Path(cache) / "ngrams" / folders.key(corpus=corpus.fingerprint, version=VERSION)
    manifest = folders.ensure(folder, KIND, VERSION, lambda place: _write(place, corpus, threads, progress))
    return np.memmap(folder / "ngrams.bin", np.uint16, "r"), np.load(folder / "ends.npy"), manifest["seconds"]


def shares(buckets: np.ndarray) -> np.ndarray:
    """float64[BUCKETS]: the share of each bucket, smoothed."""
    counts = np.bincount(buckets, minlength=BUCKETS)
    return counts / counts.sum() + SMOOTHING


def kl_reduction(texts: list[str], corpus: Corpus, rows: np.ndarray) -> dict:
    """How much nearer to the task's `texts` the documents `rows` are than random ones: KL divergences in nats of the
    texts' n-grams from those of the selection and from those of as many words drawn from the whole corpus.

    Of a selection of more than COMPARED_DOCUMENTS so many, evenly over it, are compared. Words, since the fewer n-grams
    there are the more of the texts' are missing among them, which alone makes a divergence large.
    """
    some = rows[np.unique(np.linspace(0, len(rows) - 1, COMPARED_DOCUMENTS).astype(int))]
    others = np.random.default_rng(0).permutation(len(corpus))
    others = others[: 1 + np.searchsorted(np.cumsum(corpus.words[others]), corpus.words[some].sum())]
    target, selected, drawn = (shares(hashed(t)[0]) for t in (texts, corpus.texts(some), corpus.texts(others)))
    to_selection, to_random = kl(target, selected), kl(target, drawn)
    return {
        "to_selection": round(to_selection, 4), "to_random": round(to_random, 4),
        "reduction": round(to_random - to_selection, 4), "documents": len(some),
    }  # fmt: skip


def kl(target: np.ndarray, other: np.ndarray) -> float:
    """Kullback-Leibler divergence of `target` from `other`, in nats."""
    return float((target * np.log(target / other)).sum())


@njit(cache=True, nogil=True)
def sums(buckets, ends, values):
    """float64[texts]: the sum of `values`, float64[BUCKETS], over the n-grams of each text."""
    totals = np.zeros(len(ends) - 1)
    for text in range(len(totals)):
        for i in range(ends[text], ends[text + 1]):
            totals[text] += values[buckets[i]]
    return totals


def _write(folder: Path, corpus: Corpus, threads: int, progress: Progress | None) -> dict:
    bounds = [*range(0, len(corpus), BLOCK_DOCUMENTS), len(corpus)]
    ends = [np.zeros(1, np.int64)]
    num = num_threads(threads)
    with (folder / "ngrams.bin").open("wb") as file, ThreadPoolExecutor(num) as pool:
        blocks = list(pairwise(bounds))
        for turn in range(0, len(blocks), num):  # few blocks at a time, so that memory does not grow with the corpus
            work = pool.map(lambda block: hashed(corpus.texts(range(*block))), blocks[turn : turn + num])
            for buckets, block_ends in work:
                buckets.tofile(file)
                ends.append(block_ends[1:] + ends[-1][-1])
            if progress:
                done = blocks[min(turn + num, len(blocks)) - 1][1]
                progress(done, len(corpus), "hashing n-grams")
    np.save(folder / "ends.npy", np.concatenate(ends))
    return {"documents": len(corpus)}


# --- SHA-256 (FIPS 180-4), compiled: 100 million n-grams take minutes by hashlib ------------------------------------

_PRIMES = [n for n in range(2, 312) if all(n % d for d in range(2, n))]  # the first 64
_START = np.array([int(p ** (1 / 2) % 1 * 2**32) for p in _PRIMES[:8]], np.uint32)
_ROUND = np.array([int(p ** (1 / 3) % 1 * 2**32) for p in _PRIMES], np.uint32)


@njit(cache=True, nogil=True)
def _hash_lines(letters, bounds, buckets, ends):
    """Fills `buckets` and `ends` of lines of tokens with single blanks between."""
    state, words, count = np.empty(8, np.uint32), np.empty(64, np.uint32), 0
    for line in range(len(bounds) - 1):
        before, start = -1, bounds[line]
        for i in range(bounds[line], bounds[line + 1] + 1):
            if i > start and (i == bounds[line + 1] or letters[i] == 32):
                buckets[count] = _bucket(letters, start, i, state, words)
                count += 1
                if before >= 0:
                    buckets[count] = _bucket(letters, before, i, state, words)
                    count += 1
                before, start = start, i + 1
        ends[line + 1] = count


@njit(cache=True, nogil=True)
def _bucket(letters, start, end, state, words):
    """SHA-256 of letters[start:end], as a number, modulo BUCKETS. `state` uint32[8], `words` uint32[64]: for work."""
    size = end - start
    state[:] = _START
    for block in range((size + 9 + 63) // 64):
        words[:16] = 0
        for i in range(64 * block, min(64 * block + 64, size + 1)):
            letter = uint32(letters[start + i]) if i < size else uint32(128)
            words[(i >> 2) & 15] |= letter << uint32(8 * (3 - (i & 3)))
        if size + 9 <= 64 * block + 64:
            words[15] = 8 * size
        _mix(state, words)
    bucket = np.uint64(0)
    for part in state:
        bucket = ((bucket << np.uint64(32)) | np.uint64(part)) % np.uint64(BUCKETS)
    return bucket


@njit(cache=True, nogil=True, inline="always")
def _turned(word, by):
    return uint32(uint32(word >> uint32(by)) | uint32(word << uint32(32 - by)))


# Numba makes 64 bits of a sum of two uint32, and looks whether a signed index is negative: both cost time here.
@njit(cache=True, nogil=True)
def _mix(state, words):
    for i in range(uint64(16), uint64(64)):
        x, y = words[i - uint64(15)], words[i - uint64(2)]
        x = uint32(_turned(x, 7) ^ _turned(x, 18) ^ uint32(x >> uint32(3)))
        y = uint32(_turned(y, 17) ^ _turned(y, 19) ^ uint32(y >> uint32(10)))
        words[i] = uint32(uint32(words[i - uint64(16)] + x) + uint32(words[i - uint64(7)] + y))
    a, b, c, d, e, f, g, h = state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7]
    for i in range(uint64(64)):
        x = uint32(h + uint32(_turned(e, 6) ^ _turned(e, 11) ^ _turned(e, 25)))
        x = uint32(x + uint32(uint32(g ^ (e & (f ^ g))) + uint32(_ROUND[i] + words[i])))
        y = uint32(uint32(_turned(a, 2) ^ _turned(a, 13) ^ _turned(a, 22)) + uint32((a & b) | (c & (a | b))))
        h, g, f, e, d, c, b, a = g, f, e, uint32(d + x), c, b, a, uint32(x + y)
    for i, part in enumerate((a, b, c, d, e, f, g, h)):
        state[i] += part
