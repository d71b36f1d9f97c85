"""Near-duplicates: documents that are nearly the same as one that was taken before.

Two documents are alike by the share of runs of 5 words that both have among those that either has (Jaccard). MinHash
with locality-sensitive hashing (Broder 1997; the library datasketch) proposes pairs, and the runs themselves decide: no
document is dropped wrongly, and hardly one is missed.
"""

from datasketch import MinHash, MinHashLSH

from retrieval.analyze import ANALYZERS
from retrieval.corpus import Corpus

RUN_WORDS = 5
PERMUTATIONS = 128
# LSH is tuned for a lower similarity, and against missing pairs, since what it proposes is checked: of pairs at the
# bound itself it then misses 1 in 250 (at 0.5) or fewer; tuned for the bound, 1 in 8.
SLACK, WEIGHTS = 0.8, (0.1, 0.9)  # weights of false positives and false negatives
SHOWN = 3


class Repeats:
    """The documents taken so far. `dropped`: how many were refused; `examples`: the first of them."""

    def __init__(self, corpus: Corpus, similarity: float):
        self._corpus, self._similarity = corpus, similarity
        self._taken = MinHashLSH(threshold=SLACK * similarity, num_perm=PERMUTATIONS, weights=WEIGHTS)
        self.dropped, self.examples = 0, []

    def refuses(self, row: int) -> bool:
        """Whether the document is alike to one taken; if not it is taken."""
        runs = runs_of(self._corpus.encoded(row).decode())
        sketch = MinHash(PERMUTATIONS)
        sketch.update_batch([run.encode() for run in runs])
        for other in sorted(self._taken.query(sketch)):
            similarity = jaccard(runs, runs_of(self._corpus.encoded(other).decode()))
            if similarity >= self._similarity:
                self.dropped += 1
                if len(self.examples) < SHOWN:
                    ids = {"id": self._corpus[row].id, "like": self._corpus[other].id}
                    self.examples.append({"row": row, **ids, "similarity": round(similarity, 3)})
                return True
        self._taken.insert(row, sketch)
        return False


def runs_of(text: str) -> set[str]:
    """The runs of RUN_WORDS words of a text; all of it where it has fewer."""
    words = ANALYZERS["words"].terms(text)
    return {" ".join(words[i : i + RUN_WORDS]) for i in range(max(1, len(words) - RUN_WORDS + 1))}


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)
