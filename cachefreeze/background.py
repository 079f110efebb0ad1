"""Rows on their way from a device into a store, beside other work."""

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cachefreeze.device import host_memory
from cachefreeze.encoding import as_array
from cachefreeze.store import Description, Layout, Store, StoreWriter
from cachefreeze.streams import Mark, SideStream
from cachefreeze.tiers import Memory

# Chunks that wait for a thread, beside those that threads are at.
WAITING_CHUNKS = 2


class ChunkStream:
    """Encoded rows from a device, given to threads on the host a chunk at a time.

    `append` returns as soon as copies have been asked for. What it was given may be freed then, but
    not written over. Takes `threads + WAITING_CHUNKS` chunks of memory,
    and waits when all of them are in use.

    Args:
        layouts: of the splits.
        dtype: of the encoded rows.
        device: that they are on.
        put: is given split, number and rows of every chunk (fewer in the last one), in one of the
            threads. The rows are not there any more when it has returned.
        threads: at work on chunks.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        dtype: torch.dtype,
        device: torch.device,
        put: Callable[[str, int, Tensor], None],
        threads: int,
    ) -> None:
        self.layouts = dict(layouts)
        self.put = put
        most = max(layout.rows_per_chunk for layout in layouts.values())
        shape = next(iter(layouts.values())).row_shape
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        # Split, number, chunk, how many rows are in it, and when they will be there.
        self._whole: queue.SimpleQueue[tuple[str, int, Tensor, int, Mark]] = queue.SimpleQueue()
        self._side = SideStream(device)
        for _ in range(threads + WAITING_CHUNKS):
            self._free.put(host_memory((most, *shape), dtype, pinned=self._side.is_beside))
        self._chunk: Tensor | None = None
        self._next = dict.fromkeys(layouts, 0)
        self._failure: BaseException | None = None
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cachefreeze-chunks")

    def begin_at(self, split: str, row: int) -> None:
        """The next row of a split is this one, the first of a chunk."""
        self._next[split] = row

    def append(self, split: str, rows: Tensor) -> None:
        """The next rows of a split, all of them before those of another.

        Raises:
            OSError: whatever `put` has raised.
        """
        layout = self.layouts[split]
        self._side.follow()
        while len(rows):
            self._raise_failure()
            if self._chunk is None:
                self._chunk = self._free.get()
            number, held = divmod(self._next[split], layout.rows_per_chunk)
            part = rows[: layout.rows_per_chunk - held]
            self._side.to_host(part, self._chunk[held : held + len(part)])
            rows = rows[len(part) :]
            self._next[split] += len(part)
            held += len(part)
            if held == layout.rows_per_chunk or self._next[split] == layout.rows:
                chunk, self._chunk = self._chunk, None
                self._whole.put((split, number, chunk, held, self._side.mark()))
                try:
                    self._threads.submit(self._give_next)
                except RuntimeError:  # no thread can be started more, as when the interpreter ends
                    self._give_next()

    def finish(self) -> None:
        """Wait until all chunks have been put.

        Raises:
            OSError: whatever `put` has raised.
        """
        self._threads.shutdown(wait=True)
        self._raise_failure()

    def stop(self) -> None:
        """Put no more; returns when nothing is under way."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _give_next(self) -> None:
        """Each once, whoever comes: who could not start a thread may have left it its task."""
        try:
            split, number, chunk, rows, copied = self._whole.get_nowait()
        except queue.Empty:
            return
        try:
            if self._failure is None:
                copied.wait()
                self.put(split, number, chunk[:rows])
        except BaseException as error:  # told to whoever appends or finishes
            self._failure = error
        finally:
            self._free.put(chunk)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def chunks_into(
    writer: StoreWriter, dtype: torch.dtype, device: torch.device, threads: int
) -> ChunkStream:
    """A stream of rows into the chunks that a store lacks."""

    def put(split: str, number: int, rows: Tensor) -> None:
        writer.write_chunk(split, number, as_array(rows))

    stream = ChunkStream(writer.description.splits, dtype, device, put, threads)
    for split, held in writer.held.items():
        stream.begin_at(split, held)
    return stream


class WritingStore:
    """A store whose rows are in memory, and which is written from there in the background.

    To whoever serves the rows it is what a `Store` is that is never read. Until it has been written
    it keeps the memory. A process that ends without `close` ends when it has been written.

    Args:
        writer: of the store; what it holds already is not written again.
        memory: all rows, as far as the device has been asked for them.
        notes: see `StoreWriter.commit`.
        threads: that write.
    """

    def __init__(
        self,
        writer: StoreWriter,
        memory: Memory,
        notes: dict[str, float],
        threads: int,
    ) -> None:
        self.description: Description = writer.description
        self.folder = writer.folder
        self.notes = notes
        self.error: OSError | None = None
        self.told = False  # of the error
        self._writer = writer
        self._memory: Memory | None = memory
        self._threads = threads
        self._store: Store | None = None
        self._keep = False
        self._stopping = self._suspended = False
        # Of `_keep`: the thread and its owner may both find that the store is to be marked.
        self._ending = threading.Lock()
        # Made here, so that it follows what has been asked for by now, and nothing later.
        self._place = next(iter(memory.rows.values())).device
        self._side = SideStream(self._place)
        self._side.follow()
        self._thread = threading.Thread(target=self._write, name="cachefreeze-store")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has been written, or cannot be (`error`)."""
        return not self._thread.is_alive()

    @property
    def bytes(self) -> int:
        """Of its chunk files, once it is done; none if it cannot be written."""
        if self.error is not None:
            return 0
        return self._writer.bytes if self.done else self.description.bytes

    @property
    def kept(self) -> bool:
        """Whether it is to stay for later runs."""
        return self._keep

    def keep(self) -> None:
        """It is to stay for later runs."""
        with self._ending:
            self._keep = True
            if self._store is not None:
                self._store.keep()

    def wait(self, seconds: float | None = None) -> None:
        """Until it is `done`, or at most so long."""
        self._thread.join(seconds)

    def put_away(self) -> None:
        """Nothing of it is open for reading."""

    def close(self) -> None:
        """Wait until it has been written, and let go of it."""
        self.wait()
        if self._store is not None:
            self._store.close()

    def remove(self) -> None:
        """It goes, written or not."""
        self._stopping = True
        self.wait()
        if self._store is not None:
            self._store.remove()

    def suspend(self) -> None:
        """Write no more, and leave what was written to a later run."""
        self._suspended = self._stopping = True
        self.wait()

    def _write(self) -> None:
        """In a thread of its own."""
        try:
            self._write_chunks()
            store = None if self._stopping else self._writer.commit(self.notes)
            with self._ending:
                self._store = store
                if store is not None and self._keep:
                    store.keep()
            if store is None and self._suspended:
                self._writer.suspend()
            elif store is None:
                self._writer.abort()
        except BaseException as error:
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            self._writer.abort()
            if self.error is not error:
                raise  # with its traceback
            error.__traceback__ = None  # whose frames hold the rows
        finally:
            self._memory = None

    def _write_chunks(self) -> None:
        assert self._memory is not None
        dtype = next(iter(self._memory.rows.values())).dtype
        with self._side.current():
            chunks = chunks_into(self._writer, dtype, self._place, self._threads)
            try:
                for split, rows in self._memory.rows.items():
                    held = self._writer.held[split]
                    for part in rows[held:].split(self.description.splits[split].rows_per_chunk):
                        if self._stopping:
                            return
                        chunks.append(split, part)
                chunks.finish()
            finally:
                chunks.stop()


# What a cache holds: whole on disk, or in memory and on its way there.
HeldStore = Store | WritingStore
