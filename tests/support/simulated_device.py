"""A device that runs behind the host, simulated in CPU memory.

Work itself is done at once, in the order in which it is started. But a copy to the host arrives
only when the device has reached it: before that, host memory holds other numbers. So whoever reads
a copy too early gets wrong results. Host memory that is written to before the device has copied
from it is found as well.
"""

import traceback
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch

Tensor = torch.Tensor
FOREIGN = 0xA5


class SimulatedMark:
    """Moment in the work of the device."""

    def __init__(self, queue: "SimulatedQueue", number: int) -> None:
        self._queue, self._number, self._at = queue, number, perf_counter()

    def is_past(self) -> bool:
        """Returns whether the device has reached the moment."""
        return self._number <= self._queue.reached

    def wait(self) -> None:
        """Lets the device go on until the moment, and counts that the host has waited."""
        place = traceback.extract_stack()[-3]
        self._queue.waits.append(f"{place.filename}:{place.lineno}")
        self._queue.advance(self._number)

    def seconds_since(self, earlier: "SimulatedMark") -> float:
        """Returns the seconds between two moments. Fails if one is not past."""
        past = self.is_past() and earlier.is_past()
        assert past, "a time was asked for before it was known"
        return self._at - earlier._at


class SimulatedQueue:
    """Work of the device.

    Args:
        lag: Number of moments that the device is behind the host if nobody waits.

    Attributes:
        waits: Lines that have waited for the device.
        faults: Host memory that was changed before the device had read it.
        reached: Number of the last moment that the device has reached.
    """

    def __init__(self, lag: int) -> None:
        self.waits: list[str] = []
        self.faults: list[str] = []
        self.reached = 0
        self._lag = lag
        self._started = 0
        self._under_way: list[tuple[int, Callable[[], None]]] = []
        self._host: dict[int, Tensor] = {}

    def mark(self, device: torch.device) -> SimulatedMark:
        """Returns the moment at which the device has done all that was started so far."""
        self._started += 1
        self.advance(self._started - self._lag)
        return SimulatedMark(self, self._started)

    def advance(self, number: int) -> None:
        """Lets the device go on until a moment."""
        self.reached = max(self.reached, number)
        while self._under_way and self._under_way[0][0] <= self.reached:
            self._under_way.pop(0)[1]()

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns host memory that holds other numbers."""
        memory = torch.empty(shape, dtype=dtype)
        if memory.numel():
            memory.view(-1).view(torch.uint8).fill_(FOREIGN)
        self._host[memory.data_ptr()] = memory
        return memory

    def start_copy(self, target: Tensor, source: Tensor) -> None:
        """Starts a copy. It is done when the device has reached it."""
        there = source.clone()
        if source.data_ptr() in self._host:
            target.copy_(there)

            self._under_way.append((self._started + 1, lambda: self._check(source, there)))
        else:
            self._under_way.append((self._started + 1, lambda: target.copy_(there)))

    def _check(self, memory: Tensor, there: Tensor) -> None:
        if not np.array_equal(_bits(memory), _bits(there)):
            self.faults.append("host memory was changed before the device had read it")

    def send_beside(self, memory: Tensor, device: torch.device) -> Callable[[], Tensor]:
        """Starts a copy. It holds other numbers until the device is told to wait for it."""
        there, found = memory.clone(), torch.empty_like(memory)
        if found.numel():
            found.view(-1).view(torch.uint8).fill_(FOREIGN)

        def take() -> Tensor:
            self._check(memory, there)
            return found.copy_(there)

        return take


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().reshape(-1).view(np.uint8)
