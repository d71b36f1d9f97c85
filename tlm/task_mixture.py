"""Which task, instance and template each example of multitask training is: a pure function of (seed, step, rank).

A task's share follows its size, capped and flattened by a temperature (Raffel et al. 2020, arXiv 1910.10683, section
3.5.2), and no family takes more than its share. Shares become exact: every block of examples holds each task the same
number of times, in an order of its own, so that a short run sees what a long one does (as levanter's mixtures do).
A task runs through its instances in a new random order every time it comes to their end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tasks.errors import InputError
from tlm.mixture import order, uniforms


class Draw(NamedTuple):
    """All int64[n]: numbers of tasks, of instances within them, and of the tasks' templates."""

    tasks: np.ndarray
    instances: np.ndarray
    templates: np.ndarray


@dataclass(frozen=True)
class TaskMixture:
    """By task: its name, its instances, its templates, and how often it stands in a block; `batch` examples a step."""

    seed: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    templates: tuple[int, ...]
    counts: tuple[int, ...]
    batch: int

    def draw(self, step: int, rank: int = 0, world: int = 1) -> Draw:
        """What process `rank` of `world` sees at optimizer step `step` (from 0): every world-th example of it."""
        return self.at(np.arange(step * self.batch + rank, (step + 1) * self.batch, world))

    def at(self, positions: np.ndarray) -> Draw:
        """The examples at these places of the endless stream, int64[n]."""
        blocks, offsets = np.divmod(positions, self.block)
        orders = {block: order(self.seed, "block", int(block), self.block) for block in np.unique(blocks)}
        slots = np.array([orders[b][o] for b, o in zip(blocks, offsets, strict=True)], dtype=np.int64)
        tasks = np.searchsorted(self.ends, slots, side="right")
        counts, sizes = np.array(self.counts)[tasks], np.array(self.sizes)[tasks]
        uses = blocks * counts + slots - (self.ends[tasks] - counts)  # how often the task was seen before
        places = zip(tasks, *np.divmod(uses, sizes), strict=True)
        instances = [order(self.seed, self.names[t], int(epoch), self.sizes[t])[i] for t, epoch, i in places]
        templates = uniforms(self.seed, "template", 0, positions) * np.array(self.templates)[tasks]
        return Draw(tasks, np.array(instances, dtype=np.int64), templates.astype(np.int64))

    @property
    def block(self) -> int:
        return int(self.ends[-1])

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each task's slots end in a block, int64[T]."""
        return np.cumsum(self.counts)


def shares(
    sizes: Sequence[int],
    families: Sequence[str],
    task_cap: int | None = None,
    family_share: float = 1.0,
    temperature: float = 1.0,
) -> np.ndarray:
    """Each task's share of the mixture, float64[T], in sum 1.

    In proportion to min(size, task_cap) ** (1 / temperature): 1 keeps the sizes, a large one makes tasks equal. A
    family whose tasks take more than `family_share` together is scaled down to it, and the others grow. Raises
    InputError for a task without instances and where families are too few for `family_share`.
    """
    weights = np.array(sizes, dtype=np.float64)
    if not weights.all():
        raise InputError(f"{(weights == 0).sum()} of {len(weights)} tasks have no instance to train on; leave them out")
    names, numbers = np.unique(list(families), return_inverse=True)
    if family_share * len(names) < 1 - 1e-9:
        least = f"at least 1/{len(names)} = {1 / len(names):.3g}"
        raise InputError(f"family_share={family_share}: the mixture has {len(names)} families; it must be {least}")
    weights = np.minimum(weights, task_cap or np.inf) ** (1 / temperature)
    weights /= weights.sum()
    capped = np.zeros(len(names), dtype=bool)
    while True:
        totals = np.bincount(numbers, weights)
        over = ~capped & (totals > family_share * (1 + 1e-12))
        if not over.any():
            return weights
        capped |= over  # one that is capped stays so: the others only grow
        left = 1 - family_share * capped.sum()
        free = totals[~capped].sum()
        scale = np.where(capped, family_share / totals, left / free if free else 0)
        weights = weights * scale[numbers]


def block_counts(shares: np.ndarray, block: int) -> np.ndarray:
    """`block` places dealt out by shares, float64[T] -> int64[T]: at least one each, rounded by largest remainder.

    Raises InputError where there are more tasks than places.
    """
    if block < len(shares):
        raise InputError(f"block={block}: must be at least the number of tasks, {len(shares)}")
    certain = np.zeros(len(shares), dtype=bool)  # tasks that would have less than one place
    while True:
        left = block - certain.sum()
        due = np.where(certain, 1.0, shares * left / shares[~certain].sum() if left else 0)
        if not (due < 1).any():
            break
        certain |= due < 1
    counts = np.floor(due + 1e-9).astype(np.int64)
    rest = block - counts.sum()
    counts[np.argsort(counts - due, kind="stable")[:rest]] += 1
    return counts
