"""Contestants that take turns, each in a process of its own; what they took, as rows of JSON and as a table.

Turns are taken in rounds, in an order that moves on by one each round, so that what else the machine does meets all
contestants. Processes are forked from one server that has imported and done nothing else, so that one's memory is not
another's and no thread is lost in a fork.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tlm.engine import quiet
from tlm.progress import Progress

LEAST_ROUNDS = 3  # a median needs them, whatever time is given

# Starts a contestant. It yields once when it has imported what it needs and allocated nothing yet, and then, each time
# it is asked, what its next turn took, such as seconds.
Contestant = Callable[[], Iterator]


@dataclass
class Record:
    """What one contestant did, its first turn, which warms up, left out."""

    turns: list = field(default_factory=list)
    peak_memory: int | None = None  # bytes above what it held after its imports; None where the system does not say


def contest(
    title: str,
    contestants: dict[str, Contestant],
    seconds: float,
    threads: int,
    preload: list[str],
    progress: Progress,
    least_rounds: int = LEAST_ROUNDS,
) -> dict[str, Record]:
    """Rounds for about `seconds`, at least `least_rounds`.

    `preload` names modules that the server imports, which only saves time. Raises InputError if a process is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    records, names, done = {name: Record() for name in contestants}, list(contestants), 0
    with contextlib.ExitStack() as stack, progress.phase(title, round(seconds)):
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in names}

        def ask(name: str, function: Callable, *arguments: Any) -> Any:
            elapsed = time.perf_counter() - start if done else 0.0
            progress.update(round(min(elapsed, seconds)), round(seconds), f"round {done}: {name}")
            try:
                return pools[name].submit(function, *arguments).result()
            except BrokenProcessPool:
                raise InputError(
                    f"{title}: the process of {name} was killed, probably for want of memory; ask for something smaller"
                ) from None

        for name in names:
            ask(name, enter, contestants[name], threads)
        start = time.perf_counter()
        while done < least_rounds or time.perf_counter() - start < seconds:
            for name in names:
                records[name].turns.append(ask(name, turn))
            names.append(names.pop(0))
            done += 1
        for name in names:
            records[name].peak_memory = ask(name, memory_risen)
    return records


# --- in a contestant's process --------------------------------------------------------------------------------------


def enter(contestant: Contestant, threads: int) -> None:
    """Import, note the memory, warm up."""
    import torch

    global TURNS, MEMORY_BEFORE
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c reaches all processes; the first one ends the others
    threading.Thread(target=end_with_first_process, daemon=True).start()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)  # a launcher's: each contestant is alone
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    TURNS = contestant()
    turn()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # what importing took for a moment is no peak of the work
    MEMORY_BEFORE = resident("VmRSS")
    turn()


def end_with_first_process() -> None:
    """However it ends: one that was killed tells nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)


def turn() -> Any:
    with quiet():
        return next(TURNS)


def memory_risen() -> int | None:
    return resident("VmHWM") - MEMORY_BEFORE if MEMORY_BEFORE else None


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far; 0 where there is no /proc (not Linux).

    Mapped files are left out: they are library code, read in as it is first used, which stays and would count as work.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = {field: value.split()[0] for field, value in (line.split(":\t") for line in lines) if "kB" in value}
    return 1024 * (int(kilobytes[name]) - int(kilobytes["RssFile"]))


# --- what came of it ------------------------------------------------------------------------------------------------


def row(bench: str, case: str, engine: str, metric: str, value: float, unit: str, runs: int) -> dict:
    return dict(bench=bench, case=case, engine=engine, metric=metric, value=value, unit=unit, runs=runs)


def show(rows: list[dict], lines: str, columns: str) -> None:
    """Prints a table for each value of the one of case, engine and metric that is neither `lines` nor `columns`."""
    from rich.console import Console
    from rich.table import Table

    (third,) = {"case", "engine", "metric"} - {lines, columns}
    for title in distinct(rows, third):
        group = [row for row in rows if row[third] == title]
        cells = {(row[lines], row[columns]): SHOWN[row["unit"]](row["value"]) for row in group}
        table = Table(title=f"{title}, {max(row['runs'] for row in group)} rounds", title_justify="left", box=None)
        table.add_column(lines, no_wrap=True)
        headers = distinct(group, columns)
        for header in headers:
            table.add_column(header, justify="right")
        for line in distinct(group, lines):
            table.add_row(line, *(cells.get((line, header), "") for header in headers))
        Console().print(table)


def distinct(rows: list[dict], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


SHOWN: dict[str, Callable[[float], str]] = {
    "queries/s": lambda v: f"{v:,.0f}/s",
    "documents/s": lambda v: f"{v:,.0f}/s",
    "MB/s": lambda v: f"{v:,.1f} MB/s",
    "tokens/s": lambda v: f"{v:,.0f}/s",
    "x": lambda v: f"{v:.2f} x",
    "share": lambda v: f"{v:.0%}",
    "percent": lambda v: f"{v:.1%}",
    "MB": lambda v: f"{v:.2f} MB",
    "choices/s": lambda v: f"{v:,.0f}/s",
    "texts/s": lambda v: f"{v:,.0f}/s",
    "us": lambda v: f"{v:,.0f} µs",
    "number": lambda v: f"{v:.2f}",
    "s": lambda v: f"{1e3 * v:,.1f} ms",
    "bytes": lambda v: f"{v / 1e6:,.0f} MB",
    "count": lambda v: f"{v:,}",
    "TFLOP/s": lambda v: f"{v:,.1f} TFLOP/s",
    "dB": lambda v: f"{v:.1f} dB",
    "FLOP/s": lambda v: f"{v / 1e9:,.0f} GFLOP/s",
}
