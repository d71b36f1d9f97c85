"""Leaks: documents of the corpus that hold a passage of a dev or test text.

The rule: a document leaks if it shares a run of 13 tokens with a dev or test text, or holds the whole of one that has
only 8 to 12; a token is a run of [a-z0-9] in the ASCII-lower-cased text (13-grams: Brown et al. 2020, appendix C).
Shorter texts cannot be told from chance: they are counted and not looked for.

The fast path reads each byte of the corpus once: prefix hashes of the tokens give the hash of any run in constant time,
a small bit table refuses nearly all of them, and what remains is compared byte by byte, so the result is exact. The
tests hold a slow twin against it.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numba import njit

from retrieval import folders
from retrieval.corpus import Corpus, Progress
from retrieval.engines import num_threads

KIND, VERSION = "leak list", 1
RUN_TOKENS = 13
SHORT_TOKENS = 8
BLOCK_DOCUMENTS = 20_000
_LETTER_OF = np.array([ord(chr(b).lower()) if b < 0x80 and chr(b).isalnum() else 0 for b in range(256)], np.uint8)
_ASCII_LOWER = {ord(upper): ord(upper.lower()) for upper in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_BASE = np.uint64(0xD1342543DE82EF95)


@dataclass(frozen=True)
class Leaks:
    """What `find_leaks` found. `rows` int64[leaks], ascending; `examples`: for each row {row, id, shared: the run,
    text: the index of the text that has it}; `not_checked`: number of texts under 13 tokens, of which `whole` were
    looked for as a whole; `documents`: how many were looked at; `seconds`: how long, when it was done."""

    rows: np.ndarray
    examples: list[dict]
    not_checked: int
    whole: int
    documents: int
    seconds: float


def find_leaks(
    corpus: Corpus, texts: Iterable[str], cache: Path, threads: int = 0, progress: Progress | None = None
) -> Leaks:
    """The documents of `corpus` that share text with any of `texts`: looked for once, then kept under `cache`."""
    lines = [" ".join(re.findall("[a-z0-9]+", text.translate(_ASCII_LOWER))) for text in texts]
    folder = Path(cache) / "leaks" / folders.key(corpus=corpus.fingerprint, texts=lines, version=VERSION)
    manifest = folders.ensure(folder, KIND, VERSION, lambda place: _write(place, corpus, lines, threads, progress))
    examples = [json.loads(line) for line in (folder / "leaks.jsonl").read_text().splitlines()]
    counts = {name: manifest[name] for name in ("not_checked", "whole", "documents", "seconds")}
    return Leaks(np.array([example["row"] for example in examples], np.int64), examples, **counts)


def _write(folder: Path, corpus: Corpus, lines: list[str], threads: int, progress: Progress | None) -> dict:
    runs = _RunTable(lines)
    with (folder / "leaks.jsonl").open("w") as file:
        for row, start in _scan_all(corpus, runs, threads, progress):
            example = {"row": row, "id": corpus[row].id, "shared": runs.run(start), "text": runs.text(start)}
            file.write(json.dumps(example) + "\n")
    short = runs.sizes < RUN_TOKENS
    whole = short & (runs.sizes >= SHORT_TOKENS)
    return {"documents": len(corpus), "not_checked": int(short.sum()), "whole": int(whole.sum())}


def _scan_all(corpus: Corpus, runs: "_RunTable", threads: int, progress: Progress | None):
    """(row, place of the first run found in it) of each leaking document, rows ascending."""
    letters, offsets = np.asarray(corpus.letters), np.asarray(corpus.offsets)
    bounds = [*range(0, len(corpus), BLOCK_DOCUMENTS), len(corpus)]
    blocks = list(pairwise(bounds))
    found = []
    with ThreadPoolExecutor(num_threads(threads)) as pool:
        for (_, last), starts in zip(blocks, pool.map(lambda b: runs.scan(letters, offsets, *b), blocks), strict=True):
            found.append(starts)
            if progress:
                progress(last, len(corpus), "looking for leaks")
    starts = np.concatenate(found)
    return [(int(row), int(starts[row])) for row in np.flatnonzero(starts >= 0)]


class _RunTable:
    """Hash table of the runs that must not stand in the corpus. `lines`: tokens with single blanks between them."""

    def __init__(self, lines: list[str]):
        self.sizes = np.array([line.count(" ") + 1 if line else 0 for line in lines], np.int64)
        self._letters = np.frombuffer(("\n".join(lines) + "\n").encode(), np.uint8)
        self._bounds = np.cumsum([0, *(len(line) + 1 for line in lines)])
        self._tokens = np.where(self.sizes >= SHORT_TOKENS, np.minimum(self.sizes, RUN_TOKENS), 0)  # 0: no runs
        lengths = np.unique(self._tokens[self._tokens > 0])
        self._lengths = lengths, np.array([pow(int(_BASE), int(n), 1 << 64) for n in lengths], np.uint64)
        runs = int((self.sizes - self._tokens + 1)[self._tokens > 0].sum())
        size = 1 << max(10, (2 * runs).bit_length())
        self._table = np.zeros(size, np.uint64), np.full(size, -1, np.int64), np.zeros(size // 4, np.uint64)
        _insert(self._letters, self._bounds, self._tokens, _LETTER_OF, *self._lengths, *self._table)

    def scan(self, letters: np.ndarray, offsets: np.ndarray, first: int, last: int) -> np.ndarray:
        """int64[last - first]: for each document the place of a run that it holds, -1 where it holds none."""
        return _scan(letters, offsets, first, last, _LETTER_OF, *self._lengths, *self._table, self._letters)

    def text(self, start: int) -> int:
        return int(np.searchsorted(self._bounds, start, "right")) - 1

    def run(self, start: int) -> str:
        text = self.text(start)
        line = self._letters[start : self._bounds[text + 1] - 1].tobytes().decode()
        return " ".join(line.split(" ")[: self._tokens[text]])


# In the kernels, hashes[j] - hashes[i] * base^(j - i) is the hash of tokens i .. j - 1 of a text. The table's three
# arrays: `keys`, the hashes of runs; `values`, where a run starts, times 16, plus its number of tokens, or -1 for an
# empty slot; `bits`, a bit for the hash of each run.


@njit(cache=True, nogil=True)
def _prefix_hashes(letters, start, end, letter_of, hashes, places):
    """Hashes the tokens of letters[start:end], notes where each begins, returns their number."""
    tokens = 0
    inside = False
    hashes[0] = 0
    for i in range(start, end + 1):
        letter = letter_of[letters[i]] if i < end else np.uint8(0)
        if letter != 0:
            if not inside:
                places[tokens] = i
                hashed = np.uint64(0xCBF29CE484222325)
                inside = True
            hashed = (hashed ^ np.uint64(letter)) * np.uint64(0x100000001B3)  # FNV-1a
        elif inside:
            hashed = (hashed ^ (hashed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
            hashes[tokens + 1] = hashes[tokens] * _BASE + (hashed ^ (hashed >> np.uint64(29)))
            tokens += 1
            inside = False
    return tokens


@njit(cache=True, nogil=True)
def _run_hash(hashes, first, length, power):
    hashed = hashes[first + length] - hashes[first] * power
    return (hashed ^ (hashed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True, nogil=True)
def _find(hashed, length, letters, start, end, letter_of, keys, values, lines):
    """The slot of the first `length` tokens of letters[start:end], or the empty slot where they belong."""
    slot = hashed & np.uint64(len(keys) - 1)
    while values[slot] >= 0:
        if keys[slot] == hashed and values[slot] & 15 == length:
            i, position = start, values[slot] >> 4
            tokens = 0
            while tokens < length:
                while letter_of[letters[i]] == 0:
                    i += 1
                while i < end and letter_of[letters[i]] != 0 and letter_of[letters[i]] == lines[position]:
                    i += 1
                    position += 1
                if letter_of[lines[position]] != 0 or (i < end and letter_of[letters[i]] != 0):
                    break
                position += 1
                tokens += 1
            if tokens == length:
                break
        slot = (slot + np.uint64(1)) & np.uint64(len(keys) - 1)
    return slot


@njit(cache=True, nogil=True)
def _insert(lines, bounds, tokens_of, letter_of, lengths, powers, keys, values, bits):
    if len(bounds) == 1:
        return
    longest = (bounds[1:] - bounds[:-1]).max() + 1
    hashes, places = np.empty(longest, np.uint64), np.empty(longest, np.int64)
    for line in range(len(bounds) - 1):
        length = tokens_of[line]
        if length == 0:
            continue
        start, end = bounds[line], bounds[line + 1] - 1
        tokens = _prefix_hashes(lines, start, end, letter_of, hashes, places)
        power = powers[np.searchsorted(lengths, length)]
        for first in range(tokens - length + 1):
            hashed = _run_hash(hashes, first, length, power)
            slot = _find(hashed, length, lines, places[first], end, letter_of, keys, values, lines)
            keys[slot] = hashed
            if values[slot] < 0:
                values[slot] = places[first] * 16 + length
            bit = (hashed >> np.uint64(20)) & np.uint64(64 * len(bits) - 1)
            bits[bit >> np.uint64(6)] |= np.uint64(1) << (bit & np.uint64(63))


@njit(cache=True, nogil=True)
def _scan(letters, offsets, first_row, last_row, letter_of, lengths, powers, keys, values, bits, lines):
    found = np.full(last_row - first_row, -1, np.int64)
    longest = (offsets[first_row + 1 : last_row + 1] - offsets[first_row:last_row]).max() + 2
    hashes, places = np.empty(longest, np.uint64), np.empty(longest, np.int64)
    for row in range(first_row, last_row):
        end = offsets[row + 1]
        tokens = _prefix_hashes(letters, offsets[row], end, letter_of, hashes, places)
        for n in range(len(lengths)):
            for first in range(tokens - lengths[n] + 1):
                hashed = _run_hash(hashes, first, lengths[n], powers[n])
                bit = (hashed >> np.uint64(20)) & np.uint64(64 * len(bits) - 1)
                if (bits[bit >> np.uint64(6)] >> (bit & np.uint64(63))) & np.uint64(1):
                    slot = _find(hashed, lengths[n], letters, places[first], end, letter_of, keys, values, lines)
                    if values[slot] >= 0 and found[row - first_row] < 0:
                        found[row - first_row] = values[slot] >> 4
    return found
