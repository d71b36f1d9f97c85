"""Metrics of classification, as scikit-learn defines them, and of generated text: numpy only, so they load at once.

Those of classification take gold: int[N] and predicted: int[N] (label numbers below num_labels) and return fractions.
"""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np


def accuracy(gold: np.ndarray, predicted: np.ndarray, num_labels: int) -> float:
    gold, predicted = _checked(gold, predicted)
    return float(np.mean(gold == predicted))


def macro_f1(gold: np.ndarray, predicted: np.ndarray, num_labels: int) -> float:
    """Mean over labels of 2 TP / (2 TP + FP + FN); labels that stand neither in gold nor in predicted are left out."""
    gold, predicted = _checked(gold, predicted)
    hits = np.bincount(gold[gold == predicted], minlength=num_labels)
    stated = np.bincount(gold, minlength=num_labels) + np.bincount(predicted, minlength=num_labels)
    return float(np.mean(2 * hits[stated > 0] / stated[stated > 0]))


def micro_f1(gold: np.ndarray, predicted: np.ndarray, num_labels: int) -> float:
    """With one label a text, each miss is one false positive and one false negative: it equals the accuracy."""
    return accuracy(gold, predicted, num_labels)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
}


def calibration_error(gold: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over bins of equal counts (Naeini et al. 2015; equal counts as in HELM).

    probabilities: float[N, C]. The mean, weighted by size, of |accuracy - mean confidence| in each bin of confidence.
    Equal confidences are ordered by correctness, so that the order of the examples does not matter.
    """
    gold, predicted = _checked(gold, np.argmax(probabilities, axis=1))
    confidence, correct = np.max(probabilities, axis=1).astype(np.float64), gold == predicted
    order = np.lexsort((correct, confidence))
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(abs(np.sum(confidence[part]) - np.sum(correct[part])) for part in parts) / len(gold))


def scores(gold: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Every metric and the calibration error; probabilities: float[N, C]."""
    predicted, num_labels = np.argmax(probabilities, axis=1), np.shape(probabilities)[1]
    result = {name: metric(gold, predicted, num_labels) for name, metric in METRICS.items()}
    return {**result, "calibration_error": calibration_error(gold, probabilities)}


def bootstrap_interval(
    metric: str, gold: np.ndarray, predicted: np.ndarray, num_labels: int, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the metric by the percentile bootstrap over examples (Efron & Tibshirani 1993, ch. 13).

    It tells how far the score would move with another test set of this size, not with another training seed.
    """
    gold, predicted = _checked(gold, predicted)
    rng, function = np.random.default_rng(seed), METRICS[metric]
    draws = (rng.integers(len(gold), size=len(gold)) for _ in range(resamples))
    values = [function(gold[rows], predicted[rows], num_labels) for rows in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def words(text: str) -> list[str]:
    """What generated text is compared by: lower-case runs of letters and digits, and each other mark."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def exact_match(said: str, wanted: str) -> float:
    return float(words(said) == words(wanted))


def token_f1(said: str, wanted: str) -> float:
    """F1 of the words as bags (Rajpurkar et al. 2016, SQuAD, but articles and marks count)."""
    ours, theirs = Counter(words(said)), Counter(words(wanted))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(said: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004)."""
    ours, theirs = words(said), words(wanted)
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = row
        row = [0]
        for i, other in enumerate(theirs):
            row.append(before[i] + 1 if word == other else max(before[i + 1], row[i]))
    return _f1(row[-1], len(ours), len(theirs))


GENERATED: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def _f1(common: int, said: int, wanted: int) -> float:
    """Two empty texts agree."""
    return 2 * common / (said + wanted) if said + wanted else 1.0


def _checked(gold, predicted) -> tuple[np.ndarray, np.ndarray]:
    gold, predicted = np.asarray(gold), np.asarray(predicted)
    assert gold.shape == predicted.shape, f"{gold.shape} gold labels, {predicted.shape} predictions"
    assert gold.ndim == 1, f"one label a text is wanted, not an array of shape {gold.shape}"
    assert len(gold), "no examples to score"
    return gold, predicted
