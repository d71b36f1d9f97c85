"""The next step's batches, made in a thread while this step computes, so that nothing waits for data."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Ahead:
    """`make(index)`, with `make(index + 1)` begun at the same time. `make` must be a pure function of the index."""

    def __init__(self, make: Callable[[int], Any]):
        self.make, self.pool = make, ThreadPoolExecutor(1)
        self.begun: dict[int, Future] = {}

    def __call__(self, index: int) -> Any:
        made = self.begun.pop(index, None) or self.pool.submit(self.make, index)
        result = made.result()
        self.begun = {index + 1: self.pool.submit(self.make, index + 1)}
        return result

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)
