"""What the user sees while work goes on: a bar with time left on a terminal, a few plain lines elsewhere."""

import sys
import time
from contextlib import contextmanager


class Progress:
    """One line at a time. `quiet` shows nothing (every process but the first)."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.bar = self.task = None
        self.last_line = 0.0

    @contextmanager
    def phase(self, name: str, total: int | None = None):
        """A piece of work of `total` steps (None: unknown until `update` says)."""
        if self.quiet:
            yield self
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        start = time.perf_counter()
        self.name, self.last_line = name, start
        columns = [
            TextColumn("{task.description:<12}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        ]  # fmt: skip
        with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as self.bar:
            self.task = self.bar.add_task(name, total=total, note="")
            yield self
        self.bar = None
        console.print(f"{name:<12} {time.perf_counter() - start:6.1f} s", highlight=False)

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """How far the phase is. Without a terminal a line a minute shows that it lives."""
        if self.quiet or self.bar is None:
            return
        self.bar.update(self.task, completed=done, total=total, note=note)
        now = time.perf_counter()
        if self.bar.disable and now - self.last_line > 60:
            self.last_line = now
            print(f"{self.name}: {done} of {total} {note}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)
