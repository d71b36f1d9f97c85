import numpy as np
from scipy import stats

from tlm.mixture import EXTERNAL, TASK, Mixture, uniforms


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


def test_uniforms_are_uniform_and_independent():
    draws = np.concatenate([uniforms(1, "external/a", position, np.arange(100)) for position in range(300)])
    assert stats.kstest(draws, "uniform").pvalue > 0.001
    neighbours = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    streams = np.corrcoef(draws[:100], uniforms(1, "external/b", 0, np.arange(100)))[0, 1]
    assert abs(neighbours) < 0.02
    assert abs(streams) < 0.4


def test_uniforms_do_not_depend_on_what_is_drawn_beside_them():
    assert np.array_equal(uniforms(5, "task/a", 9, np.arange(50))[10:20], uniforms(5, "task/a", 9, np.arange(10, 20)))
