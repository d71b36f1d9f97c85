"""Being asked to stop: the step in hand is finished and a checkpoint written before the process ends."""

import signal
import threading


class Stopped(Exception):
    """The run has been stopped by signal `number`, and its checkpoint is on disk."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """While open, SIGTERM and the first Ctrl-C are noted in `number` and end nothing; a second Ctrl-C does."""

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "StopSignals":
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            self.old = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number: int, frame) -> None:
        if self.number == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
