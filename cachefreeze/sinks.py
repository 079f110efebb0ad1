"""What a store is filled through: where its rows go first, and who writes its chunks."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from cachefreeze.background import ChunkStream, HeldStore, WritingStore, chunks_into
from cachefreeze.encoding import as_array
from cachefreeze.store import Store, StoreWriter
from cachefreeze.tiers import Memory

# At work on chunks, beside training.
WRITERS = 4


class Sink(Protocol):
    """Takes all rows of a store, as they are stored, split by split in their order.

    Attributes:
        held: rows of each split, the first ones, that need not be given.
        memory: all rows, if they are held there; to be read once they have all been given.
    """

    held: Mapping[str, int]
    memory: Memory | None

    def append(self, split: str, rows: Tensor) -> None:
        """The next rows of a split, (n, *row_shape), on the device.

        Raises:
            OSError: they cannot be written.
        """

    def commit(self, notes: dict[str, float]) -> HeldStore:
        """All have been given; see `StoreWriter.commit`."""

    def suspend(self) -> None:
        """Leave what was written to a later attempt."""

    def abort(self) -> None:
        """Leave nothing."""


def sink_for(
    writer: StoreWriter,
    dtype: torch.dtype,
    device: torch.device,
    memory: Memory | None,
    threads: int,
) -> Sink:
    """The sink that does what it can beside the device's work.

    Args:
        writer: of the store.
        dtype: of its encoded rows.
        device: that they are computed on.
        memory: for all of them, if there is room.
        threads: that may write beside the device's work. 0 has whoever gives the rows write them,
            which on a CPU is as fast: there the work and the writing share the cores.
    """
    if memory is not None:
        return MemorySink(writer, memory, device, max(threads, 1))
    if threads:
        return StreamSink(writer, dtype, device, threads)
    return DirectSink(writer)


class DirectSink:
    """Writes rows as they come."""

    memory: Memory | None = None

    def __init__(self, writer: StoreWriter) -> None:
        self.writer = writer
        self.held: Mapping[str, int] = writer.held

    def append(self, split: str, rows: Tensor) -> None:
        self.writer.append(split, as_array(rows))

    def commit(self, notes: dict[str, float]) -> Store:
        return self.writer.commit(notes)

    def suspend(self) -> None:
        self.writer.suspend()

    def abort(self) -> None:
        self.writer.abort()


class StreamSink:
    """Has threads write the rows while the next are computed."""

    memory: Memory | None = None

    def __init__(
        self, writer: StoreWriter, dtype: torch.dtype, device: torch.device, threads: int
    ) -> None:
        self.writer = writer
        self.held: Mapping[str, int] = writer.held
        self.chunks = chunks_into(writer, dtype, device, threads)

    def append(self, split: str, rows: Tensor) -> None:
        self.chunks.append(split, rows)

    def commit(self, notes: dict[str, float]) -> Store:
        self.chunks.finish()
        return self.writer.commit(notes)

    def suspend(self) -> None:
        self.chunks.stop()
        self.writer.suspend()

    def abort(self) -> None:
        self.chunks.stop()
        self.writer.abort()


class MemorySink:
    """Holds all rows in memory, and writes the store when they are there, in the background."""

    def __init__(
        self, writer: StoreWriter, memory: Memory, device: torch.device, threads: int
    ) -> None:
        self.writer = writer
        self.memory: Memory | None = memory
        self._rows = memory.rows
        self.threads = threads
        # What a killed run left on disk is not in memory.
        self.held: Mapping[str, int] = dict.fromkeys(memory.rows, 0)
        self._next = dict(self.held)
        self._to_host: ChunkStream | None = None
        if device.type == "cuda" and memory.tier == "host":
            layouts = writer.description.splits
            dtype = next(iter(memory.rows.values())).dtype
            self._to_host = ChunkStream(layouts, dtype, device, self._put, threads)

    def append(self, split: str, rows: Tensor) -> None:
        if self._to_host is not None:
            # Straight into memory that is not pinned, every copy would wait for the device.
            self._to_host.append(split, rows)
            return
        start = self._next[split]
        self._next[split] += len(rows)
        self._rows[split][start : start + len(rows)] = rows

    def commit(self, notes: dict[str, float]) -> WritingStore:
        if self._to_host is not None:
            self._to_host.finish()
        assert self.memory is not None
        return WritingStore(self.writer, self.memory, notes, self.threads)

    def suspend(self) -> None:
        self._stop()
        self.writer.suspend()

    def abort(self) -> None:
        self._stop()
        self.writer.abort()

    def _stop(self) -> None:
        if self._to_host is not None:
            self._to_host.stop()

    def _put(self, split: str, number: int, rows: Tensor) -> None:
        start = number * self.writer.description.splits[split].rows_per_chunk
        self._rows[split][start : start + len(rows)] = rows
