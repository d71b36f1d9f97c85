"""`tlm bench resume`: one small run undisturbed, and runs that are killed again and again at random instants.

However often a run is killed, by SIGKILL and at whatever it is doing, the same command has to bring it to the same end:
losses, weights and scores equal to the bit. Checkpoints are written at every step, so that many kills hit one.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import InputError
from tlm.benches.rounds import row, show
from tlm.config import BenchConfig
from tlm.progress import Progress
from tlm.run import environment, read_json, write_json

SMALL = [
    "model.hidden=32", "model.layers=2", "model.heads=2", "model.intermediate=64", "model.max_length=64",
    "retrieval.max_documents=2000", "joint.steps=60", "joint.batch_tokens=512", "joint.eval_every=30",
    "finetune.steps=40", "finetune.batch_tokens=512", "finetune.eval_every=20", "finetune.dropout=0.1",
    "checkpoint_seconds=0",
]  # fmt: skip
CLOCKS = ("seconds", "tokens_per_second", "mfu")  # of a line in metrics.jsonl


@dataclass(frozen=True)
class End:
    """All of a finished run that the clock does not decide."""

    metrics: list[dict]
    weights: bytes
    scores: tuple

    @staticmethod
    def of(run: Path) -> "End":
        summary = read_json(run / "summary.json")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return End(
            [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines],
            (run / "model" / "model.safetensors").read_bytes(),
            (summary["dev"], summary["test"], summary["cost"]["flops"], summary["cost"]["tokens"]),
        )


def bench(config: BenchConfig) -> int:
    """Kills runs `config.kills` times; exit status 1 if one did not come to the same end."""
    progress, instants = Progress(), random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        start(config, out, "first").wait()  # fills the cache, so that the next is timed without it
        begin = time.perf_counter()
        whole = start(config, out, "whole")
        if whole.wait():
            raise InputError(f"the run itself fails: {last_words(out, 'whole')}")
        seconds, undisturbed = time.perf_counter() - begin, End.of(out / "whole")

        kills, finished, same = 0, 0, 0
        with progress.phase("kills", config.kills):
            while kills < config.kills:
                name = f"killed-{finished}"
                process = start(config, out, name)
                try:
                    process.wait(instants.uniform(0, seconds))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                if process.returncode == 0:
                    finished, same = finished + 1, same + (End.of(out / name) == undisturbed)
                elif process.returncode > 0:
                    raise InputError(f"{name}: does not go on after a kill: {last_words(out, name)}")
                progress.update(kills, config.kills, f"{finished} runs finished, {same} the same to the bit")
        last = f"killed-{finished}"
        if start(config, out, last).wait():
            raise InputError(f"{last}: does not go on after the last kill: {last_words(out, last)}")
        finished, same = finished + 1, same + (End.of(out / last) == undisturbed)
    rows = [
        row("resume", "SIGKILL at random instants", "tlm", metric, value, "count", 1)
        for metric, value in (("kills", kills), ("runs finished", finished), ("the same to the bit", same))
    ]
    if config.out:
        write_json(Path(config.out), {"machine": environment(), "rows": rows})
    show(rows, "case", "metric")
    return int(same < finished)


def start(config: BenchConfig, out: Path, name: str) -> subprocess.Popen:
    given = [f"task={config.task}", *([f"corpus={config.corpus}"] if config.corpus else [])]
    settings = [f"out={out}", f"run={name}", f"cache={config.cache}", f"seed={config.seed}", "threads=1"]
    with open(out / f"{name}.err", "w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "tlm", "train", *given, *settings, *SMALL],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def last_words(out: Path, name: str) -> str:
    """What the run said as it failed."""
    return (out / f"{name}.err").read_text().strip().rpartition("\n")[2].removeprefix("tlm: ")
