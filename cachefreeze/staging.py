"""Rows that threads gather ahead of time, and copy to the device beside its work."""

import queue
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.encoding import Encoding
from cachefreeze.rows import Indices

# Batches that are on their way while one is trained on, at the least.
BATCHES_AHEAD = 4
THREADS = 4


def default_threads(device: torch.device) -> int:
    """Threads that work beside the device: none beside a CPU, whose cores all compute."""
    return THREADS if device.type == "cuda" else 0


class RowReader(Protocol):
    """Reads stored rows, for several threads at a time; see `SplitReader`, and `MemoryReader`."""

    def read(self, indices: Indices, out: NDArray[np.uint8]) -> None: ...
    def will_need(self, indices: Indices) -> None: ...


@dataclass
class _Station:
    """Pinned memory that one batch at a time is copied from: a copy from any other memory waits for
    the device."""

    pinned: Tensor | None = None
    room: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    copied: Any = None


class StagedRows:
    """Rows of one split, on the training device.

    The order of an epoch is known, so the next batches are read by threads and copied in a stream
    of their own while the device is at work. Host memory: a batch for each thread; device memory:
    `ahead` batches and those in use.

    Args:
        reader: of the stored rows; it stays open.
        row_shape: as they are stored.
        rows: how many there are.
        encoding: of the rows.
        device: of training.
        identity: of the rows.
        threads: that gather.
        ahead: batches on their way.
    """

    def __init__(
        self,
        reader: RowReader,
        row_shape: tuple[int, ...],
        rows: int,
        encoding: Encoding,
        device: torch.device,
        identity: str,
        *,
        threads: int = THREADS,
        ahead: int = BATCHES_AHEAD,
    ) -> None:
        self.reader = reader
        self.row_shape = row_shape
        self.rows = rows
        self.encoding = encoding
        self.device = device
        self.identity = identity
        self.threads = threads
        self.ahead = ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stations: queue.SimpleQueue[_Station] = queue.SimpleQueue()
        for _ in range(threads):
            self._stations.put(_Station())

    def __len__(self) -> int:
        return self.rows

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        if len(order) == 1:  # nothing is known of the next: threads would only cost time
            yield self._arrived(*self._fetch(order[0]))
            return
        coming: deque[Future[tuple[Tensor, Any]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="cachefreeze-rows")
        try:
            for number in range(-self.ahead, len(order)):
                asked = number + self.ahead
                if asked < len(order):
                    later = order[asked + self.ahead : asked + self.ahead + 1]
                    coming.append(pool.submit(self._fetch, order[asked], later))
                if number >= 0:
                    yield self._arrived(*coming.popleft().result())
        finally:
            # Nobody may read any more from what is closed next.
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, rows: Indices, later: Sequence[Indices] = ()) -> tuple[Tensor, Any]:
        """A batch on the device, and when its copy will have come there."""
        station = self._stations.get()
        try:
            for each in later:
                self.reader.will_need(each)
            if self._stream is None:
                stored, room = self.encoding.empty(len(rows), self.row_shape)
                self.reader.read(rows, room)
                return stored, None
            return self._copied(station, rows, self._stream)
        finally:
            self._stations.put(station)

    def _copied(
        self, station: _Station, rows: Indices, stream: torch.cuda.Stream
    ) -> tuple[Tensor, Any]:
        if station.copied is not None:
            station.copied.synchronize()  # what lies there may not be overwritten before
        if station.pinned is None or len(station.pinned) < len(rows):
            station.pinned, station.room = self.encoding.empty(
                len(rows), self.row_shape, pinned=True
            )
        self.reader.read(rows, station.room[: len(rows)])
        with torch.cuda.stream(stream):
            stored = station.pinned[: len(rows)].to(self.device, non_blocking=True)
            station.copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            station.copied.record(stream)
        return stored, station.copied

    def _arrived(self, stored: Tensor, copied: Any) -> Tensor:
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            # Its memory was taken in the other stream, which must not use it again too early.
            stored.record_stream(stream)
        return self.encoding.decode(stored, self.device)
