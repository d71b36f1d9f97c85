"""The rival to beat: TF-IDF of words and word pairs with logistic regression, tuned on dev as carefully as our own.

It sees the task's training texts only, costs seconds, and on small tasks beats most of what is trained from scratch.
So it gets all that helps it, as dev decides:
- tokens: words, or also single letters and runs of punctuation. Relation tasks mark their entities by `[[ ]]` and
  `<< >>` (sciie: 54 macro-F1 with these, 35 without); plain news are half a point better without;
- class weights: none, or balanced, worth 5 to 10 points where labels are uneven and texts few (500 of chemprot:
  49.7 to 54.8 micro-F1; 500 of sciie: 30.6 to 40.6 macro-F1);
- C, the inverse of the regularization.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from tasks.metrics import METRICS

PATTERNS = (r"\w+|[^\w\s]+", r"\w\w+")
WEIGHTS = (None, "balanced")
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)  # C


@dataclass(frozen=True)
class TfidfModel:
    """A fitted rival, with what dev chose; `strength` is C, `seconds` the time of all fits together."""

    labels: tuple[str, ...]
    pattern: str
    class_weight: str | None
    strength: float
    dev_score: float
    num_features: int
    seconds: float
    vectorizer: object
    classifier: object

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float64[N, num_labels], columns in the order of `labels`; 0 for a label that had no training text."""
        result = np.zeros((len(texts), len(self.labels)))
        if len(texts):
            result[:, self.classifier.classes_] = self.classifier.predict_proba(self.vectorizer.transform(texts))
        return result


def fit(
    train_texts: Sequence[str],
    train_targets: Sequence[int],
    dev_texts: Sequence[str],
    dev_targets: Sequence[int],
    labels: Sequence[str],
    metric: str,
    seed: int = 0,
    threads: int = 1,
) -> TfidfModel:
    """Fits on train and keeps what scores best on dev (the first of equals): 2 fits for the pattern, 10 for the rest.

    Targets are numbers of `labels`; at least two different ones are needed. `metric` is one of tasks.metrics.METRICS.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    start, score = time.perf_counter(), METRICS[metric]

    def attempt(pattern: str, class_weight: str | None, strength: float) -> tuple:
        vectorizer, train, dev = features[pattern]
        classifier = LogisticRegression(C=strength, class_weight=class_weight, max_iter=1000, random_state=seed)
        classifier.fit(train, train_targets)
        return score(dev_targets, classifier.predict(dev), len(labels)), pattern, vectorizer, classifier

    with threadpool_limits(threads or None):
        features = {}
        for pattern in PATTERNS:
            vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=pattern)
            features[pattern] = vectorizer, vectorizer.fit_transform(train_texts), vectorizer.transform(dev_texts)
        pattern = max((attempt(pattern, "balanced", 10.0) for pattern in PATTERNS), key=lambda a: a[0])[1]
        attempts = (attempt(pattern, *settings) for settings in product(WEIGHTS, STRENGTHS))
        dev_score, pattern, vectorizer, classifier = max(attempts, key=lambda a: a[0])
    return TfidfModel(
        labels=tuple(labels),
        pattern=pattern,
        class_weight=classifier.class_weight,
        strength=classifier.C,
        dev_score=dev_score,
        num_features=len(vectorizer.vocabulary_),
        seconds=time.perf_counter() - start,
        vectorizer=vectorizer,
        classifier=classifier,
    )
