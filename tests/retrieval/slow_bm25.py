"""BM25 the slow and obvious way: for every query, every document; the twin that the engines are held against."""

from collections import Counter

import numpy as np

from retrieval.scoring import SCORINGS


def slow_search(texts, analyzer, scoring, k1, b, queries, k) -> list[list[tuple[int, float]]]:
    """For each query its best (row, score) by score, then row; impacts are rounded to float32, as in the index."""
    counts = [Counter(analyzer.terms(text)) for text in texts]
    average = sum(map(Counter.total, counts)) / len(texts)
    df = Counter(term for count in counts for term in count)
    names = list(df)
    idf = dict(zip(names, SCORINGS[scoring].idf(np.array([df[name] for name in names]), len(texts)), strict=True))
    found = []
    for query in queries:
        scores = []
        for row, count in enumerate(counts):
            score = 0.0
            for term, times in Counter(query).items():
                if term in count:
                    weight = SCORINGS[scoring].saturation(count[term], count.total() / average, k1, b)
                    score += times * float(np.float32(idf[term] * weight))
            scores.append((row, score))
        hits = [hit for hit in scores if hit[1] > 0]
        found.append(sorted(hits, key=lambda hit: (-hit[1], hit[0]))[:k])
    return found


def as_pairs(hits) -> list[list[tuple[int, float]]]:
    """Engine hits in the same form."""
    return [
        [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
        for rows, scores in zip(*hits, strict=True)
    ]
