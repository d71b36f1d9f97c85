"""The watch over losses, on series whose spikes are known."""

import math

import numpy as np

from tlm.spikes import IN_ROW, LEAST, NATS, REWINDS, WINDOW, Spikes

TEXTS = 8


def falling(n: int, seed: int) -> list[float]:
    """Losses as a healthy run has them: from 9 down to 4, with noise."""
    noise = np.random.default_rng(seed).normal(0, 0.25, n)
    return (4 + 5 * np.exp(-np.arange(n) / 100) + noise).tolist()


def test_healthy_series_have_no_spikes():
    for seed in range(10):
        watch = Spikes()
        assert not any(watch.judge("external", loss, 1.0, TEXTS) for loss in falling(2000, seed))


def test_a_loss_far_above_the_median_is_one_and_the_next_is_not():
    watch = Spikes()
    for loss in falling(300, 0):
        watch.judge("external", loss, 1.0, TEXTS)
    assert "median of the last 64" in watch.judge("external", 9.5, 1.0, TEXTS)
    assert watch.judge("external", 4.3, 1.0, TEXTS) is None


def test_near_zero_a_harmless_loss_is_none():
    watch = Spikes()
    assert not any(watch.judge("task", 0.001, 1.0, TEXTS) for _ in range(100))
    assert watch.judge("task", NATS, 1.0, TEXTS) is None


def test_kinds_are_apart_and_the_window_is_bounded():
    watch = Spikes()
    for _ in range(200):
        assert watch.judge("external", 8.0, 1.0, TEXTS) is None
        assert watch.judge("task", 0.5, 1.0, TEXTS) is None
    assert {kind: len(losses) for kind, losses in watch.losses.items()} == {"external": WINDOW, "task": WINDOW}


def test_before_the_window_is_filled_the_first_loss_is_the_measure():
    watch = Spikes()
    assert watch.judge("external", 9.0, 1.0, TEXTS) is None
    assert watch.judge("external", 9.0 + 2 * NATS - 0.1, 1.0, TEXTS) is None
    assert "at the beginning" in watch.judge("external", 9.0 + 2 * NATS + 0.1, 1.0, TEXTS)
    assert len(watch.losses["external"]) < LEAST


def test_what_is_no_number_is_named():
    assert "loss is nan" in Spikes().judge("task", math.nan, 1.0, TEXTS)
    assert "norm is inf" in Spikes().judge("task", 1.0, math.inf, TEXTS)


def test_policies_and_their_limits():
    watch = Spikes()
    assert [watch.action("rewind", True) for _ in range(REWINDS + 1)] == ["rewind"] * REWINDS + ["stop"]
    assert watch.action("log", finite=False) == "stop"
    assert watch.action("log", finite=True) == "log"
    for _ in range(IN_ROW):
        watch.judge("task", math.nan, 1.0, TEXTS)
        assert watch.action("skip", finite=False) == "skip"
    watch.judge("task", math.nan, 1.0, TEXTS)
    assert watch.action("skip", finite=False) == "stop"


def test_a_state_goes_on_where_it_was():
    one, losses = Spikes(), falling(100, 3)
    for loss in losses[:50]:
        one.judge("external", loss, 1.0, TEXTS)
    two = Spikes(**one.state())
    for loss in [*losses[50:], 30.0]:
        assert one.judge("external", loss, 1.0, TEXTS) == two.judge("external", loss, 1.0, TEXTS)
    assert one == two


def test_two_misread_texts_of_four_are_no_spike_and_of_sixteen_are():
    for kind, texts, loss, spike in (
        ("task", 2, 12.0, False), ("task", 4, 4.8, False), ("task", 16, 4.8, True), ("task", 4, 8.1, True),
        ("external", 4, 4.8, True),
    ):  # fmt: skip
        watch = Spikes()
        for _ in range(40):
            watch.judge(kind, 0.03, 1.0, texts)
        assert bool(watch.judge(kind, loss, 1.0, texts)) == spike
