"""Rows that threads gather ahead of time, and copy to the device beside its work."""

import queue
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.encoding import Encoding
from cachefreeze.rows import Indices
from cachefreeze.streams import Mark, SideStream

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

    pinned: Tensor = field(default_factory=lambda: torch.empty(0))
    room: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    copied: Mark = field(default_factory=Mark)


class StagedRows:
    """Rows of one split, on the training device.

    The order of an epoch is known, so the next batches are read by threads and copied in a stream
    of their own while the device is at work. Host memory: a batch for each thread; device memory:
    `ahead` batches, and those of the steps that the device has yet to do.

    Args:
        reader: of the stored rows; it stays open.
        row_shape: as they are stored.
        rows: how many there are.
        encoding: of the rows.
        device: of training.
        identity: of the rows.
        threads: that gather; 0 has whoever asks for rows do it.
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
        self._side = SideStream(device)
        self._stations: queue.SimpleQueue[_Station] = queue.SimpleQueue()
        for _ in range(max(threads, 1)):
            self._stations.put(_Station())

    def __len__(self) -> int:
        return self.rows

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        for stored in self.stored(order):
            yield self.encoding.decode(stored, self.device)

    def stored(self, order: Sequence[Indices]) -> Generator[Tensor]:
        """The same as they are stored."""
        if len(order) == 1 or not self.threads:
            for rows in order:  # nothing is known of the next, or nobody to ask for it
                yield _arrived(self._fetch(rows))
            return
        coming: deque[Future[tuple[Tensor, Mark]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="cachefreeze-rows")
        try:
            for number in range(-self.ahead, len(order)):
                asked = number + self.ahead
                if asked < len(order):
                    later = order[asked + self.ahead : asked + self.ahead + 1]
                    coming.append(pool.submit(self._fetch, order[asked], later))
                if number >= 0:
                    yield _arrived(coming.popleft().result())
        finally:
            # Nobody may read any more from what is closed next.
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, rows: Indices, later: Sequence[Indices] = ()) -> tuple[Tensor, Mark]:
        """A batch, and when it will be there: on the device, if that copies beside its work."""
        for each in later:
            self.reader.will_need(each)
        if not self._side.is_beside:
            stored, room = self.encoding.empty(len(rows), self.row_shape)
            self.reader.read(rows, room)
            return stored, Mark()
        station = self._stations.get()
        try:
            station.copied.wait()  # what lies there may not be overwritten before
            if len(station.pinned) < len(rows):
                station.pinned, station.room = self.encoding.empty(
                    len(rows), self.row_shape, pinned=True
                )
            self.reader.read(rows, station.room[: len(rows)])
            stored, station.copied = self._side.to_device(station.pinned[: len(rows)])
            return stored, station.copied
        finally:
            self._stations.put(station)


def _arrived(fetched: tuple[Tensor, Mark]) -> Tensor:
    stored, there = fetched
    there.hand_over(stored)
    return stored
