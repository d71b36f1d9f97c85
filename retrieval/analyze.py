"""Text to terms. An analyzer has a name and a hash, which an index keeps: other terms, other index.

Terms are runs of letters and digits of the lower-cased text, in any script, so that no language is lost; there is no
stemming. `english` leaves out Lucene's 33 stop words: 29% of running English, in the longest lists of postings.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

# org.apache.lucene.analysis.en.EnglishAnalyzer.ENGLISH_STOP_WORDS_SET
LUCENE_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
TERM = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Analyzer:
    name: str
    stop_words: frozenset[str] = frozenset()

    def terms(self, text: str) -> list[str]:
        """Terms of a text in their order, repeats kept. `retrieval.vocabulary` does the same for many texts, faster."""
        return [term for term in TERM.findall(text.lower()) if term not in self.stop_words]

    @cached_property
    def hash(self) -> str:
        parts = (TERM.pattern, "lower", *sorted(self.stop_words))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


ANALYZERS = {a.name: a for a in (Analyzer("english", frozenset(LUCENE_STOP_WORDS.split())), Analyzer("words"))}
