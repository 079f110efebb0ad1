"""When a device did something: moments in its work, and the seconds between them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from cachefreeze.device import synchronize

Item = TypeVar("Item")


class Moments:
    """Moments in the work that a device is given.

    On a CUDA device a moment is an event in the current stream, which comes when all that was asked
    for before it has been done; taking one waits for nothing. On a CPU it is the time of day, and
    elsewhere that time once the device has done its work, which has to be waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def free(self) -> bool:
        """Whether taking a moment costs nothing worth mentioning."""
        return self.device.type in ("cpu", "cuda")

    def now(self) -> Any:
        """The present one."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()

    def has_come(self, moment: Any) -> bool:
        """Whether `seconds` up to it need not wait."""
        return bool(moment.query()) if isinstance(moment, torch.cuda.Event) else True

    def seconds(self, start: Any, end: Any) -> float:
        """From one to another; waits until that one has come."""
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        return float(end - start)

    def wait(self) -> None:
        """Until the device has done what it was asked for so far."""
        moment = self.now()
        self.seconds(moment, moment)


class Lapses:
    """Stretches of a device's work that are told of once they are over, so that nobody waits."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self._open: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    def add(self, start: Any, end: Any, tell: Callable[[float], None]) -> None:
        """`tell` is called with the seconds between, here or in a later call of this object."""
        self._open.append((start, end, tell))
        self.collect()

    def collect(self, *, wait: bool = False) -> None:
        """Tell of those that are over; with `wait`, of all."""
        while self._open and (wait or self.moments.has_come(self._open[0][1])):
            start, end, tell = self._open.popleft()
            tell(self.moments.seconds(start, end))


class DeviceClock:
    """Counts the seconds that an iterator takes to give its items, the device's work for them
    included."""

    def __init__(self, device: torch.device) -> None:
        self._lapses = Lapses(Moments(device))
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """So far; waits for the work of the last item."""
        self._lapses.collect(wait=True)
        return self._seconds

    def around(self, items: Iterable[Item]) -> Iterator[Item]:
        moments = self._lapses.moments
        mark = moments.now()
        for item in items:
            self._lapses.add(mark, moments.now(), self._add)
            yield item
            mark = moments.now()

    def _add(self, seconds: float) -> None:
        self._seconds += seconds
