"""What took how long."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Adds what is done inside to `seconds[what]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] += time.perf_counter() - start


class Clock:
    """Counts the seconds that an iterator takes to give its items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, items: Iterable[Item]) -> Iterator[Item]:
        mark = time.perf_counter()
        for item in items:
            self.seconds += time.perf_counter() - mark
            yield item
            mark = time.perf_counter()
