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
    """Reads stored rows; see `SplitReader`, and `MemoryReader`."""

    def read(self, indices: Indices, out: NDArray[np.uint8]) -> None: ...
    def will_need(self, indices: Indices) -> None: ...
    def another(self) -> "RowReader": ...
    def close(self) -> None: ...


@dataclass
class _Station:
    """What one batch at a time is gathered with: a reader of its own and, for a GPU, pinned memory
    to copy from (a copy from any other memory waits for the device)."""

    reader: RowReader
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
        threads: that gather, each with a reader of its own.
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

    def __len__(self) -> int:
        return self.rows

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        stations: queue.SimpleQueue[_Station] = queue.SimpleQueue()
        opened = [_Station(self.reader.another()) for _ in range(min(self.threads, len(order)))]
        for station in opened:
            stations.put(station)
        coming: deque[Future[tuple[Tensor, Any]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="cachefreeze-rows")
        try:
            for number in range(-self.ahead, len(order)):
                asked = number + self.ahead
                if asked < len(order):
                    later = order[asked + self.ahead : asked + self.ahead + 1]
                    coming.append(pool.submit(self._fetch, stations, order[asked], later))
                if number >= 0:
                    yield self._arrived(*coming.popleft().result())
        finally:
            # Nobody may read from what is closed next.
            pool.shutdown(wait=True, cancel_futures=True)
            for station in opened:
                station.reader.close()

    def _fetch(
        self, stations: "queue.SimpleQueue[_Station]", rows: Indices, later: Sequence[Indices]
    ) -> tuple[Tensor, Any]:
        """In a thread: a batch on the device, and when its copy will have come there."""
        station = stations.get()
        try:
            for each in later:
                station.reader.will_need(each)
            if self._stream is None:
                stored, room = self.encoding.empty(len(rows), self.row_shape)
                station.reader.read(rows, room)
                return stored, None
            return self._copied(station, rows, self._stream)
        finally:
            stations.put(station)

    def _copied(
        self, station: _Station, rows: Indices, stream: torch.cuda.Stream
    ) -> tuple[Tensor, Any]:
        if station.pinned is None or len(station.pinned) < len(rows):
            station.pinned, station.room = self.encoding.empty(
                len(rows), self.row_shape, pinned=True
            )
        if station.copied is not None:
            station.copied.synchronize()  # what lies there may not be overwritten before
        station.reader.read(rows, station.room[: len(rows)])
        with torch.cuda.stream(stream):
            stored = station.pinned[: len(rows)].to(self.device, non_blocking=True)
            station.copied = stream.record_event()
        return stored, station.copied

    def _arrived(self, stored: Tensor, copied: Any) -> Tensor:
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            # Its memory was taken in the other stream, which must not use it again too early.
            stored.record_stream(stream)
        return self.encoding.decode(stored, self.device)
