"""Runs to be made, queued over processes of one thread each, by whoever needs many: benches and `tlm compare`.

They are ordinary run folders: they go on where they were stopped, and are never done twice; a lock on a run's log keeps
two queues from the same run.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import InputError
from tlm.config import PretrainConfig, TrainConfig, load, validate
from tlm.progress import Progress
from tlm.run import Run
from tlm.signals import Stopped, StopSignals

PROGRAM = [sys.executable, "-m", "tlm"]
STARTS = 5  # of a run that is killed again and again
POLL_SECONDS = 1
CONFIGS = {"train": TrainConfig, "pretrain": PretrainConfig}


@dataclass(frozen=True)
class Planned:
    """A run to be made: `tlm VERB` with these settings makes `folder`, its `file` last."""

    task: str
    seed: int
    folder: Path
    settings: list[str]
    flops: float = 0.0  # its budget
    verb: str = "train"
    file: str = "summary.json"

    @property
    def finished(self) -> bool:
        return (self.folder / self.file).exists()

    def share_done(self) -> float:
        path = self.folder / "metrics.jsonl"
        if self.finished or not self.flops or not path.exists():
            return float(self.finished)
        spent = re.findall(rb'"flops": (\d+)', path.read_bytes()[-4096:])
        return min(1.0, int(spent[-1]) / self.flops) if spent else 0.0


def task_name(spec: str) -> str:
    """A task's name as part of paths, and before the colon in settings."""
    return Path(spec.rstrip("/")).name.split(".")[0].replace("hf:", "")


def tasks_by_name(given: Sequence[str], *more: str) -> dict[str, str]:
    """Name -> what was given as A,B or [A,B]; `more` are no lists. Raises InputError where two have one name."""
    specs = [*(spec for listed in given for spec in listed.split(",") if spec), *more]
    tasks = {task_name(spec): spec for spec in specs}
    if len(tasks) < len(specs):
        raise InputError(f"task=[{', '.join(specs)}]: two of them have one name; rename a folder or file")
    return tasks


def check_settings(what: str, settings: Sequence[str], fixed: Sequence[str], tasks: Sequence[str] = ()) -> None:
    """Raises InputError for what is neither key=value nor TASK:key=value of `tasks`, or sets one of the keys `fixed`,
    in which `data.` is a whole group."""
    for setting in settings:
        name, equals, _ = setting.partition("=")
        task, colon, key = name.rpartition(":")
        if not equals:
            raise InputError(f"{what}=[{setting}]: must be key=value{', or TASK:key=value' if tasks else ''}")
        if colon and task not in tasks:
            mend = f"use one of {', '.join(tasks)}" if tasks else "leave it out"
            raise InputError(f"{what}=[{setting}]: {task} is none of the tasks that can be named here; {mend}")
        if key in fixed or f"{key.split('.')[0]}." in fixed:
            raise InputError(
                f"{what}=[{setting}]: {key} is not to be set here, as it follows from the rest; leave it out"
            )


def settings_of(settings: Sequence[str], task: str | None) -> list[str]:
    """Those that hold for the task, without its name: key=value and TASK:key=value."""
    found = []
    for setting in settings:
        name = setting.partition("=")[0].rpartition(":")[0]
        if name in ("", task):
            found.append(setting.removeprefix(f"{name}:"))
    return found


def planned(
    task: str, seed: int, folder: Path, settings: Sequence[str], flops: float = 0.0, verb: str = "train"
) -> Planned:
    """Raises InputError where the settings are wrong, or the folder holds something else."""
    Run(folder, validate(load(CONFIGS[verb], list(settings))))
    return Planned(task, seed, folder, settings, flops, verb)


def queue(
    runs: Sequence[Planned],
    jobs: int,
    progress: Progress,
    more: Callable[[], Sequence[Planned]] | None = None,
    failed: dict[Path, str] | None = None,
    flops: float | None = None,
) -> None:
    """Makes all that are not finished. Raises InputError if one fails, or Stopped, once the others have checkpoints.

    `more`: asked whenever a run has ended for all runs that are made or can be made by now, in the order to make them.
    `failed`: takes why a run failed, by its folder; the others go on. `flops`: of all runs, those to come included.
    """
    runs = list(runs)
    waiting, starts, active = deque(run for run in runs if not run.finished), Counter(), {}
    begun, done_before = time.perf_counter(), flops_done(runs)
    flops = flops or sum(run.flops for run in runs)
    with progress.phase("runs", len(runs)), StopSignals() as signals:
        try:
            while waiting or active:
                for _ in range(len(waiting)):
                    run = waiting.popleft()
                    process = start(run) if len(active) < jobs and not run.finished else None
                    if process:
                        active[process] = run
                        starts[run.folder] += 1
                    elif not run.finished:  # no process is free, or another bench is at it
                        waiting.append(run)
                time.sleep(POLL_SECONDS)
                if signals.number:
                    raise Stopped(signals.number)
                for process in [process for process in active if process.poll() is not None]:
                    run = active.pop(process)
                    try:
                        if again(run, process.returncode, starts[run.folder]):
                            waiting.append(run)
                    except InputError as error:
                        if failed is None:
                            raise
                        failed[run.folder] = str(error)
                        progress.say(f"failed: {error}")
                    if more:
                        runs = list(more())
                        taken = {run.folder for run in active.values()} | set(failed or ())
                        waiting = deque(run for run in runs if not run.finished and run.folder not in taken)
                done = flops_done(runs)
                note = " ".join(run.folder.name for run in active.values())
                if done > done_before:
                    left = (time.perf_counter() - begun) * max(0.0, flops - done) / (done - done_before)
                    note = f"about {left / 60:.0f} minutes left: {note}"
                progress.update(sum(run.finished for run in runs), len(runs), note)
        finally:
            for process in active:
                process.terminate()
            for process in active:
                process.wait()


def flops_done(runs: Sequence[Planned]) -> float:
    return sum(run.flops * run.share_done() for run in runs)


def start(run: Planned) -> subprocess.Popen | None:
    """The process, or None if it is under way: whoever has its log open, this bench dead or alive, has the lock."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(run), "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return subprocess.Popen(
            [*PROGRAM, run.verb, *run.settings],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def log_of(run: Planned) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def again(run: Planned, status: int, starts: int) -> bool:
    """Whether a process that has ended has to be started again: it was killed. Raises InputError if it failed."""
    if status == 0:
        shutil.rmtree(run.folder / "ckpt", ignore_errors=True)  # ten times the model's size, and of no more use
        return False
    killed = status < 0 or status > 128
    if killed and starts < STARTS:
        return True
    said = log_of(run).read_text(errors="replace").strip().splitlines()
    why = f"was killed {starts} times" if killed else f"failed: {said[-1] if said else f'exit status {status}'}"
    raise InputError(f"{run.folder}: {why} (see {log_of(run)})")
