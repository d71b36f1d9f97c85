"""The rival to beat: TF-IDF of words and word pairs with logistic regression, tuned on dev as carefully as our own.

It sees the task's training texts only, costs seconds, and on small tasks beats most of what is trained from scratch.
So it gets what helps it: runs of punctuation are tokens (relation tasks mark their entities by `[[ ]]` and `<< >>`;
without them sciie falls from 51 to 23 macro-F1), and dev chooses the regularization and whether the labels are weighted
alike (worth 3 points of macro-F1 on sciie, nothing where labels are even).
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from tasks.metrics import METRICS

TOKENS = r"\w+|[^\w\s]+"
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)  # C, the inverse of the regularization
WEIGHTS = (None, "balanced")


@dataclass(frozen=True)
class TfidfModel:
    """A fitted rival, and what a report says of it: settings chosen, dev score, features, seconds of fitting all."""

    labels: tuple[str, ...]
    strength: float
    class_weight: str | None
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
    """Fits on train, one model for each of STRENGTHS x WEIGHTS, and keeps the best on dev (the first of equals).

    Targets are numbers of `labels`; at least two different ones are needed. `metric` is one of tasks.metrics.METRICS.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    start, score = time.perf_counter(), METRICS[metric]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=TOKENS, min_df=1)
    with threadpool_limits(threads or None), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1,000 iterations are 5 times what the hardest task took
        train, dev = vectorizer.fit_transform(train_texts), vectorizer.transform(dev_texts)
        best_score, best = -1.0, None
        for class_weight, strength in product(WEIGHTS, STRENGTHS):
            classifier = LogisticRegression(
                C=strength, class_weight=class_weight, max_iter=1000, random_state=seed
            ).fit(train, train_targets)
            dev_score = score(dev_targets, classifier.predict(dev), len(labels))
            if dev_score > best_score:
                best_score, best = dev_score, classifier
    return TfidfModel(
        labels=tuple(labels),
        strength=best.C,
        class_weight=best.class_weight,
        dev_score=best_score,
        num_features=train.shape[1],
        seconds=time.perf_counter() - start,
        vectorizer=vectorizer,
        classifier=best,
    )
