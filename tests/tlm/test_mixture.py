import numpy as np
import pytest
import torch
from scipy import stats

from tlm.mixture import EXTERNAL, TASK, Mixture, uniforms
from tlm.objectives import Objective, Source


def mixture(**changes):
    settings = dict(seed=3, sizes={EXTERNAL: 40, TASK: 10}, batch={EXTERNAL: 8, TASK: 4}, external_per_task=3)
    return Mixture(**(settings | changes))


def test_rho1_external_micro_batches_come_before_each_task_one():
    sources = [micro.source for step in range(8) for micro in mixture().draw(step)]
    assert sources == [EXTERNAL, EXTERNAL, EXTERNAL, TASK] * 2


def test_the_source_is_chosen_for_each_micro_batch_of_a_step():
    assert [m.source for m in mixture(accumulation=4).draw(1)] == [EXTERNAL, EXTERNAL, EXTERNAL, TASK]


def test_without_external_text_all_is_task():
    only = mixture(sizes={TASK: 10}, batch={TASK: 4}, external_per_task=0)
    assert {m.source for step in range(5) for m in only.draw(step)} == {TASK}


def test_every_epoch_holds_each_example_once_in_another_order():
    m = mixture(sizes={TASK: 10}, batch={TASK: 4}, external_per_task=0)
    stream = np.concatenate([m.draw(step)[0].examples for step in range(5)])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert list(stream[:10]) != list(stream[10:])


def test_accumulation_sees_the_examples_of_one_large_batch():
    small = mixture(sizes={TASK: 100}, batch={TASK: 8}, external_per_task=0, accumulation=4)
    large = mixture(sizes={TASK: 100}, batch={TASK: 32}, external_per_task=0)
    for step in range(5):
        assert np.array_equal(np.concatenate([m.examples for m in small.draw(step)]), large.draw(step)[0].examples)


def test_draws_depend_on_seed_and_step_alone():
    assert np.array_equal(mixture().draw(17)[0].examples, mixture().draw(17)[0].examples)
    assert not np.array_equal(mixture().draw(17)[0].examples, mixture(seed=4).draw(17)[0].examples)


def sizes(mixture, steps):
    """Examples in each micro-batch of each step."""
    return [[len(micro.examples) for micro in mixture.draw(step)] for step in range(steps)]


def test_a_ramp_by_hand():
    """A quarter of 8 and 3/4 of it over 4 steps, rounded up: 2, 3.5, 5, 6.5; then 8."""
    only = dict(sizes={TASK: 100}, batch={TASK: 8}, external_per_task=0)
    assert sizes(mixture(**only, ramp_steps=4), 6) == [[2], [4], [5], [7], [8], [8]]
    assert sizes(mixture(**only, ramp_steps=4, accumulation=2), 5) == [[2, 2], [4, 4], [5, 5], [7, 7], [8, 8]]
    assert sizes(mixture(**only), 3) == [[8], [8], [8]]
    assert mixture(**only, ramp_steps=4).smallest == 2
    assert mixture(**only).smallest == 8


def test_a_ramp_of_both_sources_by_hand():
    """External batches grow to 8 and task batches to 4; the fourth step is the task's."""
    assert sizes(mixture(ramp_steps=8), 10) == [[2], [3], [4], [3], [5], [6], [7], [4], [8], [8]]
    assert mixture(ramp_steps=8).smallest == 1


RAMPS = [
    dict(ramp_steps=0),
    dict(ramp_steps=7),
    dict(ramp_steps=7, accumulation=3),
    dict(ramp_steps=30, accumulation=2, external_per_task=1),
    dict(ramp_steps=11, sizes={TASK: 10}, batch={TASK: 4}, external_per_task=0),
]


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_leaves_no_gap_and_every_epoch_holds_each_example_once(ramp):
    m = mixture(**ramp)
    micros = [micro for step in range(60) for micro in m.draw(step)]
    for source, size in m.sizes.items():
        positions = np.concatenate([micro.positions for micro in micros if micro.source == source])
        examples = np.concatenate([micro.examples for micro in micros if micro.source == source])
        assert np.array_equal(positions, np.arange(len(positions)))
        epochs = len(examples) // size
        assert epochs >= 2
        assert all(sorted(examples[e * size : (e + 1) * size]) == list(range(size)) for e in range(epochs))


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_resumed_in_the_middle_sees_what_it_would_have(ramp):
    through = mixture(**ramp)
    seen = {step: through.draw(step) for step in range(20)}
    for step in (13, 5, 19, 0):
        for a, b in zip(mixture(**ramp).draw(step), seen[step], strict=True):
            assert a.source == b.source
            assert np.array_equal(a.positions, b.positions)
            assert np.array_equal(a.examples, b.examples)


def test_without_a_ramp_positions_are_those_of_equal_batches():
    """What runs before there were ramps saw, to the bit."""
    for step in (0, 1, 2, 3, 10_000_003):
        (micro,) = mixture().draw(step)
        nth, batch = (step // 4, 4) if step % 4 == 3 else (step - step // 4, 8)
        assert np.array_equal(micro.positions, np.arange(nth * batch, (nth + 1) * batch))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_out_a_ramps_batches(world):
    """Every step's examples, over the ranks of 1, 2 and 4 processes, are those of one; each rank has some."""
    m = mixture(batch={EXTERNAL: 32, TASK: 16}, ramp_steps=6, accumulation=2)
    objective = Objective(
        {EXTERNAL: Source(lambda i: np.array([2, i, 3]), np.full(40, 3)),
         TASK: Source(lambda i: np.array([2, 100 + i, 3]), np.full(10, 3), np.arange(10))},
        0.0, None,
    )  # fmt: skip
    for step in range(8):
        shares = [objective.step(m.draw(step), rank, world) for rank in range(world)]
        for micro, *ranks in zip(m.draw(step), *shares, strict=True):
            assert all(len(share.batch) for share in ranks)
            tokens = torch.cat([share.batch.tokens.reshape(-1, 3)[:, 1] for share in ranks])
            assert sorted(tokens.tolist()) == sorted(micro.examples + 100 * (micro.source == TASK))


def test_uniforms_are_uniform_and_independent():
    draws = np.concatenate([uniforms(1, "external/a", position, np.arange(100)) for position in range(300)])
    assert stats.kstest(draws, "uniform").pvalue > 0.001
    neighbours = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    streams = np.corrcoef(draws[:100], uniforms(1, "external/b", 0, np.arange(100)))[0, 1]
    assert abs(neighbours) < 0.02
    assert abs(streams) < 0.4


def test_uniforms_do_not_depend_on_what_is_drawn_beside_them():
    assert np.array_equal(uniforms(5, "task/a", 9, np.arange(50))[10:20], uniforms(5, "task/a", 9, np.arange(10, 20)))
