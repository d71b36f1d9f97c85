"""Which examples each step sees: a pure function of (seed, step, rank), so that resuming needs one integer.

Sources follow the paper (arXiv 2111.04130, section 3.2): `external_per_task` external micro-batches, then one task
micro-batch, and so on. Each source runs through its examples in a new random order every epoch. A draw returns what the
whole world sees; a rank takes every world-th example, so 1, 2 and 4 processes see the same batches in total. Batches
may start small and grow, as the largest useful batch does in training (McCandlish et al. 2018, arXiv 1812.06162).
"""

import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

EXTERNAL, TASK = "external", "task"
LEAST_TEXTS = {EXTERNAL: 1, TASK: 4}  # of a micro-batch whose size is given in tokens


@dataclass(frozen=True)
class MicroBatch:
    """`examples`: int64[n] indices into the source; `positions`: int64[n], their places in its endless stream."""

    source: str
    examples: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Mixture:
    """Sizes and micro-batch sizes (in examples, over all processes) by source; accumulation is micro-batches a step.

    Over the first `ramp_steps` steps micro-batches grow linearly from a quarter of `batch` (rounded up).
    """

    seed: int
    sizes: dict[str, int]
    batch: dict[str, int]
    external_per_task: int
    accumulation: int = 1
    ramp_steps: int = 0

    def draw(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step` (from 0), one after the other."""
        first = step * self.accumulation
        return [self.micro_batch(first + i) for i in range(self.accumulation)]

    def micro_batch(self, index: int) -> MicroBatch:
        tasks_before = index // self.cycle
        if index % self.cycle == self.cycle - 1:
            source, nth = TASK, tasks_before
        else:
            source, nth = EXTERNAL, index - tasks_before
        positions = np.arange(self.examples_before(source, nth), self.examples_before(source, nth + 1))
        return MicroBatch(source, self.examples_at(source, positions), positions)

    @property
    def cycle(self) -> int:
        """The pattern of sources repeats after this many micro-batches; the last is the task's, if there is one."""
        if TASK not in self.sizes:
            return sys.maxsize
        return self.external_per_task + 1 if self.sizes.get(EXTERNAL) else 1

    def examples_before(self, source: str, nth: int) -> int:
        """Examples in the `nth` first micro-batches of a source: the ramp's from its table, then all of one size."""
        table = self.ramp[source]
        ramped = min(nth, len(table) - 1)
        return int(table[ramped]) + (nth - ramped) * self.batch[source]

    @cached_property
    def ramp(self) -> dict[str, np.ndarray]:
        """By source, the examples before each of its micro-batches that begin in the ramp, and before the next."""
        index = np.arange(self.ramp_steps * self.accumulation)
        steps, is_task = index // self.accumulation, index % self.cycle == self.cycle - 1
        share = self.ramp_steps + 3 * steps  # of 4 * ramp_steps; in whole numbers, so that every machine rounds alike
        return {
            source: np.cumsum([0, *-(-full * share[is_task == (source == TASK)] // (4 * self.ramp_steps))])
            for source, full in self.batch.items()
        }

    @property
    def smallest(self) -> int:
        """Examples in the smallest micro-batch of all."""
        smallest = min(self.batch.values())
        return -(-smallest // 4) if self.ramp_steps else smallest

    def examples_at(self, source: str, positions: np.ndarray) -> np.ndarray:
        size = self.sizes[source]
        epochs, offsets = np.divmod(positions, size)
        orders = {epoch: order(self.seed, source, int(epoch), size) for epoch in np.unique(epochs)}
        return np.array([orders[e][o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64)


@lru_cache(maxsize=8)
def order(seed: int, source: str, epoch: int, size: int) -> np.ndarray:
    """The random order of a source's examples in one epoch: int64[size]."""
    key = np.random.SeedSequence([seed, *source.encode(), epoch])
    return np.random.Generator(np.random.PCG64(key)).permutation(size)


def uniforms(seed: int, stream: str, position: int, tokens: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1) that depend on nothing but their coordinates: float64[n] for `tokens` (int[n]).

    A counter-based generator (SplitMix64's finaliser, Steele et al. 2014): what is masked in an example does not depend
    on which micro-batch or process the example falls into.
    """
    with np.errstate(over="ignore"):
        x = mix64(stream_key(seed, stream) + np.uint64(position))
        x = mix64(x + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache
def stream_key(seed: int, stream: str) -> np.uint64:
    return np.random.SeedSequence([seed, *stream.encode()]).generate_state(1, np.uint64)[0]


def mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
