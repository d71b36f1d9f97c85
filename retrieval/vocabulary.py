"""Terms to numbers, fast: a hash table from the bytes of a term to its id, which also splits the text into terms.

The fast path reads UTF-8 bytes, where it knows letters and digits of ASCII only. A text with other bytes is first
rewritten by the analyzer itself as its terms with blanks between, in which every byte beyond ASCII belongs to a term.
So the result equals `Analyzer.terms` for every text (tested), and mostly-English corpora pass at the table's speed.

Ids count up from 0 in the order of first occurrence. On disk: the terms one after another; the table is made again.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numba import njit

from retrieval.analyze import Analyzer

_AS_IS = np.array([b if b >= 0x80 or chr(b).isalnum() else 0 for b in range(256)], np.uint8)  # 0: ends a term
_LOWERED = np.array([ord(chr(b).lower()) if 0 < b < 0x80 else b for b in _AS_IS], np.uint8)


class Vocabulary:
    """Hash table of terms. `slots` int32[2^m]: term number or -1; term i is bytes starts[i]:starts[i + 1] of `letters`.

    The analyzer's stop words are the first terms of the table and have no id: ids are term numbers less their count.
    """

    def __init__(self, analyzer: Analyzer):
        self._analyzer = analyzer
        self._stop_words = len(analyzer.stop_words)
        self._terms = 0  # stop words included
        self._slots = np.full(1 << 12, -1, np.int32)
        self._starts = np.zeros(1 << 11, np.int64)
        self._letters = np.zeros(1 << 14, np.uint8)
        self._encode([word.encode() for word in sorted(analyzer.stop_words)], _AS_IS, skip=0, grow=True)

    def __len__(self) -> int:
        return self._terms - self._stop_words

    def term(self, id: int) -> str:
        start, end = self._starts[id + self._stop_words : id + self._stop_words + 2]
        return self._letters[start:end].tobytes().decode()

    def encode(self, texts: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the terms of UTF-8 texts, new ones added: int32[all terms] and its int64[texts + 1] offsets."""
        return self._encode(self._rewritten(texts), _LOWERED, self._stop_words, grow=True)

    def encode_known(self, texts: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The same with nothing added: -1 for terms that are unknown."""
        return self._encode(self._rewritten(texts), _LOWERED, self._stop_words, grow=False)

    def add(self, terms: list[str]) -> np.ndarray:
        """int32[terms]: the id of each, new ones added. A term as the analyzer yields it, or the ids are too many."""
        return self._encode([term.encode() for term in terms], _AS_IS, self._stop_words, grow=True)[0]

    def ids(self, terms: list[str]) -> np.ndarray:
        """int32[terms]: the id of each, -1 for one that is unknown (or a stop word)."""
        ids, ends = self._encode([term.encode() for term in terms], _AS_IS, self._stop_words, grow=False)
        found = np.full(len(terms), -1, np.int32)
        single = np.diff(ends) == 1  # a stop word is none, and what an analyzer never yields may be several
        found[single] = ids[ends[:-1][single]]
        return found

    def save(self, folder: Path) -> None:
        np.save(folder / "term_starts.npy", self._starts[: self._terms + 1].astype(np.uint32))
        np.save(folder / "term_letters.npy", self._letters[: self._starts[self._terms]])

    @classmethod
    def load(cls, folder: Path, analyzer: Analyzer) -> "Vocabulary":
        """The saved terms, for look-ups only."""
        self = cls(analyzer)
        self._starts = np.load(folder / "term_starts.npy").astype(np.int64)
        self._letters = np.asarray(np.load(folder / "term_letters.npy", mmap_mode="c"))
        self._terms = len(self._starts) - 1
        self._make_slots()
        return self

    def merge(self, other: "Vocabulary") -> np.ndarray:
        """int32[len(other)]: the ids here of the other's terms, new ones added."""
        return self.add([other.term(id) for id in range(len(other))])

    def _rewritten(self, texts: Iterable[bytes]) -> list[bytes]:
        return [t if t.isascii() else " ".join(self._analyzer.terms(t.decode())).encode() for t in texts]

    def _encode(self, texts: list[bytes], letter_of: np.ndarray, skip: int, grow: bool):
        buffer = np.frombuffer(b"".join(texts), np.uint8)
        bounds = np.cumsum([0, *map(len, texts)])
        ids = np.empty(len(buffer) // 2 + len(texts), np.int32)
        ends = np.zeros(len(texts) + 1, np.int64)
        done = 0
        while True:
            done, self._terms = _encode_texts(
                buffer, bounds, letter_of, skip, grow, done, self._slots, self._starts, self._letters, self._terms,
                ids, ends,
            )  # fmt: skip
            if done == len(texts):
                return ids[: ends[-1]], ends
            self._grow(len(texts[done]))

    def _grow(self, size: int) -> None:
        """Makes room for a text of `size` bytes, in which every second byte may be a new term."""
        terms = 2 * (self._terms + size // 2 + 2)
        if terms > len(self._starts):
            self._starts = np.resize(self._starts, terms)
            self._make_slots()
        letters = int(self._starts[self._terms]) + size
        if letters > len(self._letters):
            self._letters = np.resize(self._letters, 2 * letters)

    def _make_slots(self) -> None:
        self._slots = np.full(1 << int(2 * len(self._starts) - 1).bit_length(), -1, np.int32)
        _fill(self._slots, self._starts, self._letters, self._terms)


@njit(cache=True, nogil=True)
def _slot(letters, start, end, slots, starts, known, hashed):
    """Where the term letters[start:end] stands in the table, or the empty slot where it belongs."""
    mask = len(slots) - 1
    place = (hashed ^ (hashed >> np.uint64(29))) & np.uint64(mask)
    while True:
        term = slots[place]
        if term < 0:
            return place
        first = starts[term]
        if starts[term + 1] - first == end - start:
            i = 0
            while i < end - start and known[first + i] == letters[start + i]:
                i += 1
            if i == end - start:
                return place
        place = (place + np.uint64(1)) & np.uint64(mask)


@njit(cache=True, nogil=True)
def _hash(letters, start, end):
    hashed = np.uint64(0xCBF29CE484222325)  # FNV-1a
    for i in range(start, end):
        hashed = (hashed ^ np.uint64(letters[i])) * np.uint64(0x100000001B3)
    return hashed


@njit(cache=True, nogil=True)
def _fill(slots, starts, letters, terms):
    for term in range(terms):
        hashed = _hash(letters, starts[term], starts[term + 1])
        slots[_slot(letters, starts[term], starts[term + 1], slots, starts, letters, hashed)] = term


@njit(cache=True, nogil=True)
def _encode_texts(buffer, bounds, letter_of, skip, grow, done, slots, starts, letters, terms, ids, ends):
    """Goes on at text `done`; stops before a text for which the table may have no room. Returns (done, terms)."""
    count = ends[done]
    word = np.empty(0, np.uint8)
    for text in range(done, len(bounds) - 1):
        size = bounds[text + 1] - bounds[text]
        if grow and (terms + size // 2 + 2 > len(starts) or starts[terms] + size > len(letters)):
            return text, terms
        if size > len(word):
            word = np.empty(2 * size, np.uint8)
        length = 0
        for i in range(bounds[text], bounds[text + 1] + 1):
            letter = letter_of[buffer[i]] if i < bounds[text + 1] else np.uint8(0)
            if letter != 0:
                word[length] = letter
                length += 1
            elif length > 0:
                place = _slot(word, 0, length, slots, starts, letters, _hash(word, 0, length))
                term = slots[place]
                if term < 0 and grow:
                    term = terms
                    slots[place] = term
                    letters[starts[term] : starts[term] + length] = word[:length]
                    starts[term + 1] = starts[term] + length
                    terms += 1
                if term < 0 or term >= skip:
                    ids[count] = term - skip if term >= 0 else -1
                    count += 1
                length = 0
        ends[text + 1] = count
    return len(bounds) - 1, terms
