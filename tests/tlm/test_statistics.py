"""Statistics against slow or independent references: tasks.metrics, scipy's tests, closed testing, figures by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from tasks.metrics import METRICS, calibration_error
from tlm.statistics import (
    Answers,
    differences,
    holm,
    interval,
    mean_sd,
    reliability,
    resampled_scores,
    weighted_scores,
)


def answers(gold, rates, rng, metric="accuracy", num_labels=3):
    """An arm whose seeds are right with these rates."""
    wrong = (gold + rng.integers(1, num_labels, (len(rates), len(gold)))) % num_labels
    right = rng.random(wrong.shape) < np.array(rates)[:, None]
    return Answers(gold, np.where(right, gold, wrong), num_labels, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_weighted_scores_are_those_of_repeated_examples(metric):
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 4, 30)  # of five labels: one is never stated by gold
    arm = answers(gold, [0.7, 0.4], rng, metric, num_labels=5)
    weights = rng.multinomial(30, np.full(30, 1 / 30), 20)
    found = weighted_scores(arm, weights)
    for row, scores in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(30), row)
        slow = [METRICS[metric](gold[rows], predicted[rows], 5) for predicted in arm.predicted]
        assert scores == pytest.approx(slow)


def test_mean_and_standard_deviation():
    assert mean_sd([1.0, 2.0, 6.0]) == (3.0, pytest.approx(np.std([1, 2, 6], ddof=1)))
    assert mean_sd([2.0]) == (2.0, None)


def test_with_one_seed_the_p_value_is_near_mcnemars():
    """On the same examples, the sign test over those on which two arms differ asks the same question."""
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 3, 800)
    for shift in (0.0, 0.02, 0.04, 0.06):
        first, second = answers(gold, [0.75], rng), answers(gold, [0.75 - shift], rng)
        one, other = (arm.predicted[0] == gold for arm in (first, second))
        exact = stats.binomtest(int((one & ~other).sum()), int((one ^ other).sum())).pvalue
        (found,) = differences({"t": {"a": first, "b": second}}, 4000)
        assert found.difference == pytest.approx(one.mean() - other.mean())
        assert found.p == pytest.approx(exact, abs=0.05)


def test_the_intervals_width_counts_examples_and_seeds():
    """Accuracy of S seeds: the variance of examples' means over seeds / N, and that of seeds / S."""
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 3, 2000)
    arm = answers(gold, [0.60, 0.70, 0.80], rng)
    right = arm.predicted == gold
    by_hand = right.mean(1).var(ddof=1) / 3 + right.mean(0).var() / 2000
    drawn = resampled_scores({"t": {"a": arm}}, 4000)["a"]
    # The bootstrap's examples' part is of the drawn seeds' mean, which two seeds have a little more of than three.
    assert drawn.std() == pytest.approx(np.sqrt(by_hand), rel=0.05)
    low, high = interval({"t": {"a": arm}}, 2000)["a"]
    assert low < right.mean() < high


def test_false_alarms_are_as_rare_as_they_are_said_to_be():
    """Two arms alike but for chance: seeds spread, examples are hard for one arm or for all. A p below 0.1 should come
    in a tenth of the cases or fewer."""
    rng, alarms = np.random.default_rng(3), 0
    for _ in range(200):
        gold, hard = np.zeros(150, int), rng.standard_normal(150)
        arms = {}
        for name in "ab":
            skill = 0.7 + 0.1 * rng.standard_normal((3, 1)) + 0.7 * rng.standard_normal(150)
            wrong = skill + 0.3 * rng.standard_normal((3, 150)) < hard
            arms[name] = Answers(gold, wrong.astype(int), 2, "accuracy")
        alarms += differences({"t": arms}, 300)[0].p < 0.1
    assert 6 <= alarms <= 30  # of 200


def test_verdicts_and_the_mean_over_tasks():
    rng = np.random.default_rng(4)
    golds = {"t": rng.integers(0, 3, 500), "u": rng.integers(0, 3, 90)}
    tasks = {
        task: {name: answers(gold, [rate] * 3, rng) for name, rate in (("good", 0.9), ("bad", 0.6), ("poor", 0.6))}
        for task, gold in golds.items()
    }
    found = {(d.first, d.second): d for d in differences(tasks, 500)}
    assert found["good", "bad"].verdict == "better"
    assert found["bad", "poor"].verdict == "not told apart"
    swapped = {t: dict(reversed(arms.items())) for t, arms in tasks.items()}
    assert {(d.first, d.second): d.verdict for d in differences(swapped, 500)}["bad", "good"] == "worse"
    gaps = [
        (tasks[t]["good"].predicted == g).mean() - (tasks[t]["bad"].predicted == g).mean() for t, g in golds.items()
    ]
    assert found["good", "bad"].difference == pytest.approx(np.mean(gaps))
    assert all(d.corrected >= d.p for d in found.values())


def test_holm_by_hand_and_by_closed_testing():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    rng = np.random.default_rng(5)
    for _ in range(20):
        p = rng.random(4) ** 2
        # A hypothesis' corrected p is the largest Bonferroni p of all intersections that hold it (Marcus et al. 1976).
        sets = [s for size in range(1, 5) for s in itertools.combinations(range(4), size)]
        closed = [max(min(1, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(4)]
        assert holm(list(p)) == pytest.approx(closed)


def test_reliability_adds_up_to_the_calibration_error():
    rng = np.random.default_rng(6)
    probabilities = rng.dirichlet(np.ones(4), 123)
    gold = rng.integers(0, 4, 123)
    bins = reliability(gold, probabilities)
    assert [count for *_, count in bins] == [13, 13, 13] + [12] * 7
    assert [confidence for confidence, *_ in bins] == sorted(confidence for confidence, *_ in bins)
    gap = sum(count * abs(confidence - accuracy) for confidence, accuracy, count in bins) / 123
    assert gap == pytest.approx(calibration_error(gold, probabilities))
