"""What a person wants to know of a selection, as numbers and short texts for its manifest."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from retrieval.corpus import Corpus
from retrieval.leak import Leaks
from retrieval.ranking import Found, Ranking
from tasks.types import Example

EXPLAINED_DOCUMENTS = 500
SHOWN = 3  # examples
SAMPLES = 5
SAMPLE_WORDS = 30
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
FETCHED = (0, 1, 3, 10, 30, 100, 300, 1_000)  # where the steps of a count begin


def by_source(corpus: Corpus, rows: np.ndarray) -> dict[str, dict[str, int]]:
    """Documents and words of each source, the largest first."""
    size, sources = len(corpus.source_names), corpus.sources[rows]
    documents = np.bincount(sources, minlength=size)
    words = np.bincount(sources, corpus.words[rows], minlength=size)
    return {
        corpus.source_names[source]: {"documents": int(documents[source]), "words": int(words[source])}
        for source in np.argsort(-documents, kind="stable")
        if documents[source]
    }


def scores(found: Found) -> dict:
    """Quantiles of the scores by percent, and the number of documents in ten steps from the least to the most."""
    counts, bounds = np.histogram(found.scores, 10)
    quantiles = np.percentile(found.scores, QUANTILES)
    return {
        "percentiles": {str(q): round(float(score), 4) for q, score in zip(QUANTILES, quantiles, strict=True)},
        "histogram": {"bounds": [round(float(bound), 4) for bound in bounds], "documents": counts.tolist()},
    }


def queries(examples: Sequence[Example], hits: np.ndarray, found: Found) -> dict:
    """How the training texts fared as queries; those that found nothing are counted and the first of them named.

    `hits`: documents that each found. `fetched`: how many texts are the best hit's text of how many documents of the
    selection `found`; {"from": 3, "to": 9, "queries": 5} are 5 texts that fetched 3 to 9 documents each.
    """
    empty = [examples[query].id for query in np.flatnonzero(hits == 0)]
    fetched = np.bincount(found.queries, minlength=len(examples))
    steps = np.bincount(np.searchsorted(FETCHED, fetched, "right") - 1, minlength=len(FETCHED))
    ends = [begin - 1 for begin in FETCHED[1:]] + [max(int(fetched.max()), FETCHED[-1])]
    return {
        "number": len(examples),
        "hits": {"fewest": int(hits.min()), "median": float(np.median(hits)), "most": int(hits.max())},
        "without_hits": len(empty),
        "without_hits_examples": empty[:SHOWN],
        "fetched": [
            {"from": begin, "to": end, "queries": int(count)}
            for begin, end, count in zip(FETCHED, ends, steps, strict=True)
            if count
        ],
    }


def leaks(leaks: Leaks, found: np.ndarray, unseen: Sequence[tuple[str, str, Example]]) -> dict:
    """What leaks of the documents `found`, int64 rows, ascending; the first of them, each with the run that it shares
    and whose it is. `unseen`: (task, split, example) of the texts that were looked for."""
    dropped = found[np.isin(found, leaks.rows)]
    shown, examples = set(dropped[:SHOWN].tolist()), []
    for example in leaks.examples:
        if example["row"] in shown:
            task, split, text = unseen[example["text"]]
            examples.append(example | {"text": text.id, "split": split, "task": task})
    return {
        "dropped": len(dropped),
        "in_corpus": len(leaks.rows),
        "documents_checked": leaks.documents,
        "texts": len(unseen),
        "texts_under_13_tokens": leaks.not_checked,
        "of_these_searched_whole": leaks.whole,
        "examples": examples,
    }


def strongest_terms(rankings: Sequence[Ranking], firsts: np.ndarray, found: Found, tasks: np.ndarray) -> dict:
    """The ten terms that add most to the scores of the first documents. `firsts`: number of each task's first text."""
    adds = Counter()
    for row, query, task in zip(found.rows[:EXPLAINED_DOCUMENTS], found.queries, tasks, strict=False):
        adds.update(rankings[task].explain(int(query - firsts[task]), int(row)))
    return {term: round(score, 1) for term, score in adds.most_common(10)}


def samples(corpus: Corpus, examples: Sequence[Example], found: Found) -> list[dict]:
    """Documents spread over the selection from the best to the last, each beside the text that fetched it."""
    shown = []
    for place in np.unique(np.linspace(0, len(found.rows) - 1, SAMPLES).astype(int)):
        document, query = corpus[int(found.rows[place])], int(found.queries[place])
        shown.append({
            "id": document.id, "source": document.source, "rank": int(found.ranks[place]),
            "score": round(float(found.scores[place]), 4), "text": _clip(document.text),
            "query": {"id": examples[query].id, "text": _clip(examples[query].text)} if query >= 0 else None,
        })  # fmt: skip
    return shown


def _clip(text: str) -> str:
    words = text.split()
    return " ".join(words[:SAMPLE_WORDS]) + (" ..." if len(words) > SAMPLE_WORDS else "")
