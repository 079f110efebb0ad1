"""Memory of rows: that of their device, and the host's where the device has no room."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from cachefreeze.cache.memory import has_address_limit
from cachefreeze.lineage.devices import (
    HostCopy,
    queue_of,
    send,
    send_beside,
    sending_memory,
    to_device,
)

Tensor = torch.Tensor

# Number of rows that are moved at a time.
_PIECE = 1024
# Number of batches that are gathered from host memory before they are asked for.
_AHEAD = 4


class RowMemory:
    """Rows by their places. The first ones are on a device, and further ones in host memory.

    On the CPU, memory for all rows that may be kept is reserved at once. The system provides it
    page by page as rows are written, so no row is copied when the memory grows.

    Args:
        numel: Number of elements of a row.
        dtype: Type of the elements.
        device: Device that the rows are used on.
        room: Largest number of rows.

    Attributes:
        device_room: Largest number of rows on the device. It has no effect any more once there are
            rows in host memory.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, room: int) -> None:
        self.device_room = room
        by_itself = device.type == "cpu" and queue_of(device) is None
        self._rows = (
            _reserve(room, numel, dtype)
            if by_itself
            else torch.empty((0, numel), dtype=dtype, device=device)
        )
        self._host: Tensor | None = None
        # Rows on their way from the device to host memory, each with the place of the first.
        self._under_way: deque[tuple[int, HostCopy]] = deque()
        self._ahead: dict[bytes, Future[Callable[[], Tensor]]] = {}

    @property
    def device(self) -> torch.device:
        """Device that the rows are used on."""
        return self._rows.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self._rows.dtype

    @property
    def numel(self) -> int:
        """Number of elements of a row."""
        return self._rows.shape[1]

    @property
    def on_device(self) -> int:
        """Number of rows that there is memory for on the device."""
        return len(self._rows)

    def grow(self, count: int, room: int) -> int:
        """Makes room for rows.

        Args:
            count: Number of rows to make room for.
            room: Largest number of rows at any time.

        Returns:
            Number of rows that there is room for.
        """
        if self._host is None and count > len(self._rows):
            most = min(room, self.device_room)
            size = min(max(count, 2 * len(self._rows)), most)
            if size > len(self._rows):
                try:
                    grown = self._rows.new_empty((size, self.numel))
                except (MemoryError, RuntimeError):
                    # The limit was set before somebody else took the memory, or `ulimit -v` later.
                    most = self.device_room = len(self._rows)
                else:
                    grown[: len(self._rows)] = self._rows
                    self._rows = grown
            if count > most and queue_of(self.device) is not None:
                self._host = _reserve(room - len(self._rows), self.numel, self.dtype)
        return len(self._rows) + (len(self._host) if self._host is not None else 0)

    def read(self, places: np.ndarray) -> Tensor:
        """Copies rows to new memory of the device.

        Returns:
            Rows, of shape (places, elements of a row).
        """
        border = len(self._rows)
        if places.max(initial=0) < border:
            return self._rows.index_select(0, to_device(places, self.device))
        in_host = places >= border
        ahead = self._ahead.pop(places.tobytes(), None)
        if ahead is None:
            self._arrive(places.max() - border)
            upper = send(self._gather(places[in_host] - border), self.device)
        else:
            upper = ahead.result()()
        if in_host.all():
            return upper
        found = self._rows.new_empty((len(places), self.numel))
        lower = self._rows.index_select(0, to_device(places[~in_host], self.device))
        found.index_copy_(0, to_device(np.flatnonzero(~in_host), self.device), lower)
        return found.index_copy_(0, to_device(np.flatnonzero(in_host), self.device), upper)

    def expect(self, places: np.ndarray) -> None:
        """Starts to gather rows of host memory that will be read soon, and to send them.

        A thread gathers them, and they are copied beside the other work of the device.
        """
        key, border = places.tobytes(), len(self._rows)
        if key in self._ahead or places.max(initial=0) < border:
            return
        while len(self._ahead) >= _AHEAD:  # these were not asked for
            self._ahead.pop(next(iter(self._ahead))).result()
        self._arrive(places.max() - border)
        in_host = places[places >= border] - border
        self._ahead[key] = _thread().submit(self._send_ahead, in_host)

    def write(self, start: int, rows: Tensor) -> None:
        """Writes rows to places that follow one another."""
        border = len(self._rows)
        count = min(max(border - start, 0), len(rows))
        if count:
            self._rows[start : start + count] = rows[:count]
        if count < len(rows):
            self._under_way.append((start + count - border, HostCopy(rows[count:])))
            self._arrive()

    def keep(self, stay: np.ndarray) -> None:
        """Moves the rows of some places to the front, in their order. The others are dropped."""
        for one in self._ahead.values():
            one.result()
        self._ahead = {}
        # In pieces from the front, so that no row is overwritten before it was moved.
        for start in range(0, len(stay), _PIECE):
            self.write(start, self.read(stay[start : start + _PIECE]))

    def _send_ahead(self, places: np.ndarray) -> Callable[[], Tensor]:
        return send_beside(self._gather(places), self.device)

    def _gather(self, places: np.ndarray) -> Tensor:
        assert self._host is not None
        memory = sending_memory((len(places), self.numel), self.dtype, self.device)
        return torch.index_select(self._host, 0, torch.from_numpy(places), out=memory)

    def _arrive(self, needed: int = -1) -> None:
        """Puts rows into host memory that have come from the device.

        Args:
            needed: Largest place in host memory that is read next. Rows up to there are waited for.
        """
        while self._under_way:
            start, copy = self._under_way[0]
            if start > needed and not copy.is_there:
                return
            self._under_way.popleft()
            assert self._host is not None
            rows = copy.get()
            self._host[start : start + len(rows)] = rows


_threads: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_threads.clear)


def _thread() -> ThreadPoolExecutor:
    """Returns a thread that gathers rows, one for all memories."""
    if not _threads:
        _threads.append(ThreadPoolExecutor(1, "cachefreeze rows"))
    return _threads[0]


def _reserve(room: int, numel: int, dtype: torch.dtype) -> Tensor:
    # Addresses that are reserved count under a limit of addresses.
    while room and not has_address_limit():
        try:
            # `torch.empty` would write to all of it if deterministic algorithms are on. NumPy would
            # ask for huge pages. Where memory is in pieces, the first write to those takes three
            # times as long.
            memory = torch.UntypedStorage(room * numel * dtype.itemsize)
        except (MemoryError, RuntimeError):
            # The system does not reserve that much. A smaller table grows by copying.
            room //= 2
        else:
            return torch.empty(0, dtype=dtype, device="cpu").set_(memory).view(room, numel)
    return torch.empty((0, numel), dtype=dtype, device="cpu")
