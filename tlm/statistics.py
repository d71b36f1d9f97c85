"""What scores are worth: mean and spread, differences beside chance, calibration, and the words for all that.

Differences are judged by a paired bootstrap over test examples and seeds (Efron & Tibshirani 1993; over both at once as
in Sellam et al. 2022, arXiv 2106.16163): both arms are scored on the same resampled examples, and their seeds are drawn
again as well. That is cautious: what varies by seed and example together is counted twice (Owen 2007). Of S seeds S - 1
are drawn, so that the variance of the mean is not too small by a factor of (S - 1) / S (Rao & Wu 1988). P-values of
many pairs are corrected by Holm's method (1979).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev

import numpy as np

RESAMPLES = 5000
LEVEL = 0.05  # of a difference that is told apart
SMALLEST_SEEDS = 3


@dataclass(frozen=True)
class Answers:
    """What an arm said of a task's test texts: gold int64[N], predicted int64[S, N] (a row a seed)."""

    gold: np.ndarray
    predicted: np.ndarray
    num_labels: int
    metric: str  # of tasks.metrics.METRICS


@dataclass(frozen=True)
class Difference:
    """Of two arms, `first` less `second`, in the mean over tasks of the mean over seeds; as fractions."""

    first: str
    second: str
    difference: float
    low: float  # the 95% interval
    high: float
    p: float
    corrected: float  # p by Holm, over all pairs

    @property
    def verdict(self) -> str:
        """Of the first arm beside the second: better, worse or not told apart."""
        if self.corrected >= LEVEL:
            return "not told apart"
        return "better" if self.difference > 0 else "worse"


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (of a sample; None of a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def weighted_scores(answers: Answers, weights: np.ndarray) -> np.ndarray:
    """The metric of each seed on examples that count `weights` times, int[R, N] -> float64[R, S]."""
    weights = weights.astype(np.float64)
    right = answers.predicted == answers.gold
    if answers.metric != "macro_f1":  # with one label a text, micro-F1 is the accuracy
        return weights @ right.T / weights.sum(1, keepdims=True)
    labels = np.arange(answers.num_labels)
    gold = (answers.gold[:, None] == labels).astype(np.float64)
    of_gold, scores = weights @ gold, []
    for predicted, hit in zip(answers.predicted, right, strict=True):
        said = (predicted[:, None] == labels).astype(np.float64)
        stated = of_gold + weights @ said
        hits = weights @ (gold * hit[:, None])
        f1 = np.divide(2 * hits, stated, out=np.zeros_like(hits), where=stated > 0)
        scores.append(f1.sum(1) / (stated > 0).sum(1))
    return np.stack(scores, 1)


def resampled_scores(tasks: Mapping[str, Mapping[str, Answers]], resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """The bootstrap's mean score of each arm, float64[resamples]; `tasks`: task -> arm -> answers, all arms in each."""
    totals: dict[str, np.ndarray] = {}
    for number, (_, arms) in enumerate(sorted(tasks.items())):
        rng = np.random.default_rng([0, number])
        (size,) = {len(answers.gold) for answers in arms.values()}
        weights = rng.multinomial(size, np.full(size, 1 / size), resamples)
        for arm, answers in arms.items():
            seeds = len(answers.predicted)
            drawn = rng.integers(seeds, size=(resamples, max(1, seeds - 1)))
            scores = np.take_along_axis(weighted_scores(answers, weights), drawn, 1).mean(1)
            totals[arm] = totals.get(arm, 0.0) + scores / len(tasks)
    return totals


def mean_score(tasks: Mapping[str, Mapping[str, Answers]], arm: str) -> float:
    """Over tasks and seeds."""
    once = ((arms[arm], np.ones((1, len(arms[arm].gold)))) for arms in tasks.values())
    return fmean(float(weighted_scores(*pair).mean()) for pair in once)


def differences(tasks: Mapping[str, Mapping[str, Answers]], resamples: int = RESAMPLES) -> list[Difference]:
    """Every pair of arms. p is two-sided: twice the share of resamples on the other side of zero, ties with it."""
    if not tasks:
        return []
    arms = list(next(iter(tasks.values())))
    drawn, found = resampled_scores(tasks, resamples), []
    for first, second in combinations(arms, 2):
        gaps = drawn[first] - drawn[second]
        beyond = min((gaps <= 0).sum(), (gaps >= 0).sum())
        p = min(1.0, 2 * (beyond + 1) / (resamples + 1))
        low, high = np.percentile(gaps, [2.5, 97.5])
        gap = mean_score(tasks, first) - mean_score(tasks, second)
        found.append((first, second, gap, float(low), float(high), float(p)))
    corrected = holm([p for *_, p in found])
    return [Difference(*values, p) for values, p in zip(found, corrected, strict=True)]


def interval(tasks: Mapping[str, Mapping[str, Answers]], resamples: int = RESAMPLES) -> dict[str, tuple[float, float]]:
    """The 95% interval of each arm's mean score, over examples and seeds."""
    return {arm: tuple(np.percentile(s, [2.5, 97.5])) for arm, s in resampled_scores(tasks, resamples).items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the order given: the i-th smallest of m times m - i, never falling."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def reliability(gold: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, texts) of each bin of equal count, from the least confident to the most.

    Bins as those of tasks.metrics.calibration_error: the gaps, weighted by size, add up to it.
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == gold
    order = np.lexsort((correct, confidence))
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [(float(confidence[part].mean()), float(correct[part].mean()), len(part)) for part in parts]
