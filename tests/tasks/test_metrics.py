"""Metrics against scikit-learn, the interval against an independent reckoning, calibration by hand."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from tasks.metrics import METRICS, bootstrap_interval, calibration_error, scores

RIVAL = {
    "accuracy": accuracy_score,
    "macro_f1": lambda gold, predicted: f1_score(gold, predicted, average="macro"),
    "micro_f1": lambda gold, predicted: f1_score(gold, predicted, average="micro"),
}


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_metrics_equal_scikit_learn(pairs):
    gold, predicted = np.array(pairs).T
    for name, metric in METRICS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = RIVAL[name](gold, predicted)
        assert metric(gold, predicted, 5) == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ([0, 0, 0], [0, 0, 0]),  # a single label
        ([0, 0, 0], [1, 1, 1]),  # never right
        ([0, 1, 1], [0, 0, 0]),  # a label that is never predicted
        ([0, 0, 2], [0, 1, 2]),  # a label that is never gold, another in neither
        ([4], [4]),
    ],
)
def test_degenerate_cases_equal_scikit_learn(gold, predicted):
    for name, metric in METRICS.items():
        assert metric(gold, predicted, 5) == pytest.approx(RIVAL[name](gold, predicted), abs=1e-12), name


def test_scores_hold_every_metric():
    gold = np.array([0, 1, 2, 1])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3], [0.3, 0.4, 0.3]])
    result = scores(gold, probabilities)
    assert list(result) == ["accuracy", "macro_f1", "micro_f1", "calibration_error"]
    assert result["accuracy"] == result["micro_f1"] == 0.75
    assert result["macro_f1"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert all(type(value) is float for value in result.values())


def test_no_examples_is_our_own_error():
    with pytest.raises(AssertionError, match="no examples"):
        METRICS["accuracy"]([], [], 2)
    with pytest.raises(AssertionError, match="predictions"):
        METRICS["accuracy"]([0], [0, 1], 2)


def test_interval_of_accuracy_is_the_binomial_one():
    """Resampled accuracy is Binomial(n, accuracy) / n exactly, so its quantiles are known."""
    from scipy.stats import binom

    n, hits = 400, 320
    gold, predicted = np.zeros(n, int), np.arange(n) // hits
    low, high = bootstrap_interval("accuracy", gold, predicted, 2, resamples=4000, seed=1)
    expected_low, expected_high = binom.ppf([0.025, 0.975], n, hits / n) / n
    assert low == pytest.approx(expected_low, abs=0.004)
    assert high == pytest.approx(expected_high, abs=0.004)


def test_interval_of_macro_f1_agrees_with_scipy():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(3)
    gold = rng.choice(3, size=150, p=[0.6, 0.3, 0.1])
    predicted = np.where(rng.random(150) < 0.7, gold, rng.integers(3, size=150))
    ours = bootstrap_interval("macro_f1", gold, predicted, 3, resamples=2000, seed=0)
    theirs = bootstrap(
        (gold, predicted),
        RIVAL["macro_f1"],
        paired=True,
        vectorized=False,
        n_resamples=400,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours == bootstrap_interval("macro_f1", gold, predicted, 3, resamples=2000, seed=0)
    assert ours[0] < METRICS["macro_f1"](gold, predicted, 3) < ours[1]
    assert bootstrap_interval("accuracy", [1], [1], 2) == (1.0, 1.0)


def test_calibration_error_by_hand():
    # Confidences .5 .6 | .7 .9 in two bins; right: 1 0 | 1 1. |1.1 - 1| / 4 + |1.6 - 2| / 4
    confidence = np.array([0.9, 0.5, 0.7, 0.6])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    gold = np.array([0, 0, 0, 1])
    assert calibration_error(gold, probabilities, bins=2) == pytest.approx((0.1 + 0.4) / 4)
    assert calibration_error(gold, probabilities, bins=1) == pytest.approx(abs(2.7 - 3) / 4)
    # More bins than examples: each its own, |c - right|.
    assert calibration_error(gold, probabilities, bins=10) == pytest.approx((0.1 + 0.5 + 0.3 + 0.6) / 4)


@settings(deadline=None)
@given(seed=st.integers(0, 20), size=st.integers(1, 60))
def test_calibration_error_equals_the_slow_loop_in_any_order(seed, size):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([1, 1, 1], size).round(1)
    gold = rng.integers(3, size=size)
    rows = sorted(
        (max(p), float(np.argmax(p) == g)) for p, g in zip(probabilities.tolist(), gold.tolist(), strict=True)
    )
    expected, start = 0.0, 0
    for number in range(10):
        count = size // 10 + (number < size % 10)
        part = rows[start : start + count]
        start += count
        if part:
            mean_confidence = math.fsum(c for c, _ in part) / count
            expected += count / size * abs(mean_confidence - math.fsum(right for _, right in part) / count)
    assert calibration_error(gold, probabilities) == pytest.approx(expected, abs=1e-9)
    order = rng.permutation(size)
    assert calibration_error(gold[order], probabilities[order]) == pytest.approx(expected, abs=1e-9)
