"""Loss spikes: what a step's loss is held against, and when it is too far off.

The losses of the last steps of the same kind (an external batch is not a task batch) give a median and a spread that a
few bad values do not move. A step is a spike if its loss or gradient norm is not a number, or if its loss stands far
above that median, in units of the spread and in nats.
"""

import math
import statistics
from dataclasses import dataclass, field

from tlm.mixture import TASK

WINDOW = 64  # steps of a kind that are remembered
LEAST = 16  # before that many, the first is the measure
DEVIATIONS = 12.0  # robust standard deviations, 1.4826 x the median absolute deviation
NATS = 2.0  # and at least this far above the median: near zero loss a harmless batch is many deviations off
TWO_TEXTS = 32.0  # nats that two misread texts may cost, shared by the texts of their task batch
REWINDS = 3  # to one checkpoint: then the cause is not a batch
IN_ROW = 10  # bad steps one after the other that are skipped or logged: then the weights are the cause


@dataclass
class Spikes:
    """State of the watch over a stage; `vars` of it go into checkpoints."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    rewinds: int = 0  # since the last checkpoint
    in_row: int = 0

    def state(self) -> dict:
        return {**vars(self), "losses": {kind: list(values) for kind, values in self.losses.items()}}

    def judge(self, kind: str, loss: float, norm: float, texts: int) -> str | None:
        """What is wrong with a step of `kind`, in words; None if nothing is. Its loss is remembered.

        `texts`: in its smallest micro-batch. Two of four that a sure model misreads are no spike.
        """
        trouble, least = None, max(NATS, TWO_TEXTS / texts if TASK in kind else 0.0)
        seen = self.losses.setdefault(kind, [])
        if not math.isfinite(loss):
            trouble = f"the loss is {loss}"
        elif not math.isfinite(norm):
            trouble = f"the gradient norm is {norm}"
        elif len(seen) >= LEAST:
            median = statistics.median(seen)
            spread = 1.4826 * statistics.median(abs(value - median) for value in seen)
            if loss > median + max(DEVIATIONS * spread, least):
                trouble = f"the loss is {loss:.3f}, the median of the last {len(seen)} such steps {median:.3f}"
        elif seen and loss > seen[0] + 2 * least:
            trouble = f"the loss is {loss:.3f}, at the beginning it was {seen[0]:.3f}"
        if math.isfinite(loss):  # also of a spike: if losses stay up, the median follows
            seen.append(loss)
            del seen[:-WINDOW]
        self.in_row = self.in_row + 1 if trouble else 0
        return trouble

    def action(self, policy: str, finite: bool) -> str:
        """What to do about a bad step by `policy`: rewind, skip, log or stop. `finite`: whether there are numbers."""
        if policy == "rewind":
            self.rewinds += 1
            return "rewind" if self.rewinds <= REWINDS else "stop"
        if self.in_row > IN_ROW or (policy == "log" and not finite):
            return "stop"
        return policy
