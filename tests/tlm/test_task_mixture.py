"""The multitask mixture: shares by hand, exact counts a block, every instance once an epoch, one integer to go on."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import InputError
from tlm.task_mixture import TaskMixture, block_counts, shares


def mixture(seed=0, batch=16):
    return TaskMixture(seed, ("a", "b", "c"), sizes=(5, 30, 7), templates=(1, 2, 4), counts=(3, 12, 9), batch=batch)


def test_shares_by_hand():
    assert shares([100, 300], "xy") == pytest.approx([0.25, 0.75])
    assert shares([100, 900], "xy", task_cap=300) == pytest.approx([0.25, 0.75])
    assert shares([100, 900], "xy", temperature=2) == pytest.approx([0.25, 0.75])  # 10 : 30
    assert shares([100, 9999], "xy", task_cap=900, temperature=2) == pytest.approx([0.25, 0.75])
    assert shares([1, 10**6], "xy", temperature=1e9) == pytest.approx([0.5, 0.5])


def test_a_family_is_scaled_down_and_the_others_grow():
    assert shares([300, 500, 100, 100], "xxyz", family_share=0.5) == pytest.approx([3 / 16, 5 / 16, 0.25, 0.25])
    # x is cut to 0.4; what it leaves brings y from 0.25 to 0.5, so that y is cut too
    assert shares([70, 25, 5], "xyz", family_share=0.4) == pytest.approx([0.4, 0.4, 0.2])
    assert shares([70, 25, 5], "xyz", family_share=1 / 3) == pytest.approx([1 / 3] * 3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.sampled_from("pqrst")), min_size=1, max_size=40),
    st.floats(0.2, 1),
    st.floats(1, 5),
)
def test_any_shares(tasks, family_share, temperature):
    sizes, families = zip(*tasks, strict=True)
    family_share = max(family_share, 1 / len(set(families)))
    found = shares(sizes, families, task_cap=200, family_share=family_share, temperature=temperature)
    totals = Counter()
    for family, share in zip(families, found, strict=True):
        totals[family] += share
    assert sum(found) == pytest.approx(1)
    assert max(totals.values()) <= family_share * (1 + 1e-9)
    free = [
        share / min(size, 200) ** (1 / temperature)
        for share, size, family in zip(found, sizes, families, strict=True)
        if totals[family] < family_share * (1 - 1e-9)
    ]
    assert free == pytest.approx(free[:1] * len(free))  # where no cap bites, shares stay in proportion


def test_shares_that_cannot_be():
    with pytest.raises(InputError, match="1 of 2 tasks have no instance"):
        shares([0, 4], "xy")
    with pytest.raises(InputError, match="family_share=0.3: the mixture has 3 families"):
        shares([1, 1, 1], "xyz", family_share=0.3)


def test_counts_by_hand():
    assert list(block_counts(np.array([0.5, 0.3, 0.2]), 10)) == [5, 3, 2]
    assert list(block_counts(np.array([0.46, 0.33, 0.21]), 10)) == [5, 3, 2]  # 4.6, 3.3, 2.1
    assert list(block_counts(np.array([0.98, 0.01, 0.01]), 10)) == [8, 1, 1]
    assert list(block_counts(np.array([0.98, 0.01, 0.01]), 3)) == [1, 1, 1]
    with pytest.raises(InputError, match="block=2: must be at least the number of tasks, 3"):
        block_counts(np.array([0.98, 0.01, 0.01]), 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=60), st.integers(0, 500))
def test_any_counts(weights, more):
    weights = np.array(weights) / sum(weights)
    block = len(weights) + more
    counts = block_counts(weights, block)
    assert counts.sum() == block
    assert counts.min() >= 1
    assert (counts <= np.ceil(weights * block) + 1e-6).all()  # none gets more than its share rounded up


def test_every_block_holds_each_task_exactly():
    drawn = mixture()
    blocks = drawn.at(np.arange(20 * 24)).tasks.reshape(20, 24)
    assert all(Counter(block.tolist()) == {0: 3, 1: 12, 2: 9} for block in blocks)
    assert len({tuple(block) for block in blocks}) == 20  # each in an order of its own


def test_every_instance_once_an_epoch():
    tasks, instances, _ = mixture().at(np.arange(50 * 24))
    for task, size in enumerate((5, 30, 7)):
        drawn, seen = mixture().counts[task], Counter(instances[tasks == task].tolist())
        assert set(seen) == set(range(size))
        epochs, rest = divmod(50 * drawn, size)
        assert set(seen.values()) <= {epochs, epochs + 1}
        assert sum(count == epochs + 1 for count in seen.values()) == rest


def test_templates_are_of_their_task_and_even():
    tasks, _, templates = mixture().at(np.arange(400 * 24))
    for task, number in enumerate((1, 2, 4)):
        counts = np.bincount(templates[tasks == task], minlength=number)
        assert len(counts) == number
        assert (abs(counts / counts.sum() - 1 / number) < 0.03).all()


def test_a_draw_depends_on_its_coordinates_only():
    straight = mixture()
    steps = [np.stack(straight.draw(step)) for step in range(12)]
    assert (np.stack(mixture().draw(7)) == steps[7]).all()  # gone on from one integer
    for world in (2, 4):
        ranks = [np.stack(mixture().draw(7, rank, world)) for rank in range(world)]
        assert (np.stack(ranks, axis=2).reshape(3, -1) == steps[7]).all()
    assert (np.concatenate([np.stack(mixture(batch=48).draw(i)) for i in range(4)], axis=1)
            == np.concatenate(steps, axis=1)).all()  # fmt: skip
    assert not (np.stack(mixture(seed=1).draw(7)) == steps[7]).all()
