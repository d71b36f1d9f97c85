"""What a run costs: FLOPs (exact, and by the paper's rule), tokens, seconds by phase, peak memory.

The paper's rule (Kaplan et al. 2020 as used in arXiv 2111.04130, table 1): 6 FLOPs a token and parameter, embeddings
included, of the joint stage alone, counting batch x length tokens a step. The exact count takes what is really
computed: matrix products and attention three times (forward, and twice backward; once for frozen weights), the head
only where tokens are masked, the optimizer's own products, both stages, and the start of the embeddings.

Energy is all charged seconds at the mean power that the processor's own counters (RAPL) read while the process ran.
Where they may not be read, as on most machines by any but root, it is at WATTS, and called estimated.
"""

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

WATTS = 15.0  # of a busy core of a server with its share of memory and fans: a guess within a factor of two
COUNTERS = Path("/sys/class/powercap")
SUMMED = ("flops", "flops_paper", "tokens", "energy_joules", "money")  # of a cost


def paper_flops(parameters: int, tokens: int) -> int:
    """6ND."""
    return 6 * parameters * tokens


class Power:
    """Mean watts of the machine's processors since it was made, other processes' work included. The counters, in
    microjoules, run over in an hour or less, so they have to be looked at (`sample`) more often."""

    def __init__(self, folder: Path | None = None):
        self.zones = {}  # path of each package's counter -> where it begins anew, its last value
        self.joules, self.began = 0.0, time.perf_counter()
        for zone in sorted((folder or COUNTERS).glob("intel-rapl:[0-9]")):
            try:
                self.zones[zone / "energy_uj"] = [int((zone / name).read_text()) for name in
                                                  ("max_energy_range_uj", "energy_uj")]  # fmt: skip
            except (OSError, ValueError):
                self.zones = {}
                return

    def sample(self) -> None:
        for path, zone in self.zones.items():
            now = int(path.read_text())
            self.joules += (now - zone[1]) % zone[0] / 1e6
            zone[1] = now

    def watts(self) -> float | None:
        """None where nothing can be read."""
        self.sample()
        return self.joules / (time.perf_counter() - self.began) if self.zones else None


POWER = Power()


@dataclass
class Ledger:
    """Adds up over a run and over its restarts: `state()` goes into each checkpoint, `Ledger(**state)` comes back."""

    flops: int = 0
    tokens: int = 0
    joint_tokens: int = 0
    external_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - start)

    def add_seconds(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        POWER.sample()

    def state(self) -> dict:
        return {**vars(self), "seconds": dict(self.seconds)}

    def cost(self, parameters: int, price_per_hour: float = 0.0) -> dict:
        """The `cost` entry of a run's summary. `money`: all seconds at the price of the machine an hour."""
        watts, seconds = POWER.watts(), sum(self.seconds.values())
        return {
            "flops": int(self.flops),
            "flops_paper": paper_flops(parameters, self.joint_tokens),
            "tokens": int(self.tokens),
            "seconds": {name: round(s, 3) for name, s in self.seconds.items()},
            "peak_rss_bytes": peak_rss_bytes(),
            "energy_joules": round((WATTS if watts is None else watts) * seconds, 1),
            "energy_is_estimated": watts is None,
            "money": round(price_per_hour * seconds / 3600, 4),
        }


def add_costs(costs: Sequence[dict]) -> dict:
    """`cost` entries of summaries as one: sums, seconds by phase, the largest memory."""
    phases = dict.fromkeys(phase for cost in costs for phase in cost["seconds"])
    return {name: sum(cost.get(name, 0) for cost in costs) for name in SUMMED} | {
        "seconds": {phase: round(sum(cost["seconds"].get(phase, 0.0) for cost in costs), 3) for phase in phases},
        "peak_rss_bytes": max((cost["peak_rss_bytes"] for cost in costs), default=0),
        "energy_is_estimated": any(cost.get("energy_is_estimated", True) for cost in costs),
    }


class Meter:
    """Counts what the steps of a stage do; `read` gives means and rates since the last reading and fills the ledger."""

    COUNTED = ("steps", "loss", "mlm", "masked", "task", "texts", "tokens", "external_tokens", "flops")

    def __init__(self, ledger: Ledger, peak_flops: float):
        """`peak_flops`: FLOP/s of the machine's matrix products, for the utilisation (MFU)."""
        self.ledger, self.peak_flops = ledger, peak_flops

    def begin(self, stage: str) -> None:
        self.stage, self.sums, self.since = stage, dict.fromkeys(self.COUNTED, 0.0), time.perf_counter()

    @contextmanager
    def paused(self, phase: str):
        """What happens in here is not training: its seconds go to `phase`."""
        start = time.perf_counter()
        with self.ledger.phase(phase):
            yield
        self.since += time.perf_counter() - start

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.sums[name] += amount

    def total(self, reduce) -> dict[str, float]:
        """What was added since the last reading; `reduce` sums a list of numbers over all processes."""
        return dict(zip(self.COUNTED, reduce([self.sums[name] for name in self.COUNTED]), strict=True))

    def read(self, reduce) -> dict:
        """Losses as means, rates, and the ledger's totals."""
        s, seconds, ledger = self.total(reduce), time.perf_counter() - self.since, self.ledger
        self.begin(self.stage)
        ledger.add_seconds(self.stage, seconds)
        ledger.flops += int(s["flops"])
        ledger.tokens += int(s["tokens"])
        ledger.external_tokens += int(s["external_tokens"])
        ledger.joint_tokens += int(s["tokens"]) if self.stage == "joint" else 0
        return {
            "loss": s["loss"] / s["steps"] if s["steps"] else None,
            "mlm_loss": s["mlm"] / s["masked"] if s["masked"] else None,
            "task_loss": s["task"] / s["texts"] if s["texts"] else None,
            "tokens": ledger.tokens,
            "flops": ledger.flops,
            "seconds": round(sum(ledger.seconds.values()), 3),
            "tokens_per_second": round(s["tokens"] / seconds, 1),
            "mfu": round(s["flops"] / seconds / self.peak_flops, 4),
        }

    def state(self, reduce) -> dict:
        """For a checkpoint at any step: the ledger, and what is not yet in it."""
        return {
            "ledger": self.ledger.state(),
            "sums": self.total(reduce),
            "elapsed": time.perf_counter() - self.since,
        }

    def restore(self, state: dict, first: bool) -> None:
        """`first`: whether this is the first process, which answers for all that was added before."""
        self.ledger = Ledger(**state["ledger"])
        self.sums = state["sums"] if first else dict.fromkeys(self.COUNTED, 0.0)
        self.since = time.perf_counter() - state["elapsed"]


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
