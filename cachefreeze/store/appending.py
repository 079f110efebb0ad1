"""Collects rows into chunks, which a thread of its own writes."""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cachefreeze.store.budget import Budget
from cachefreeze.store.files import human_bytes
from cachefreeze.store.format import Layout
from cachefreeze.store.locks import refuse, remove
from cachefreeze.store.segment import Buffer, SegmentWriter

# Chunks that wait for the disk: more would hide a slow disk in memory.
MOST_WAITING = 2


class Writer:
    """The thread that writes the chunks of all sets of a directory.

    What fails stops it, and is told. It never raises.

    Args:
        directory: Folder that holds the sets.
        budget: Limit of the directory.
        tell: Function that takes a sentence for the user.

    Attributes:
        stopped: Whether nothing is written any more.
    """

    def __init__(self, directory: Path, budget: Budget, tell: Callable[[str], None]) -> None:
        self._directory = directory
        self._budget = budget
        self._tell = tell
        self._jobs: queue.Queue[tuple[Appender, Buffer] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self.stopped = False

    def put(self, appender: "Appender", buffer: Buffer) -> None:
        """Has a chunk written. Waits only while the queue is full.

        Args:
            appender: Set that the chunk belongs to.
            buffer: Rows of the chunk.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cachefreeze-store", daemon=True)
            self._thread.start()
        self._jobs.put((appender, buffer))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            appender, buffer = job
            if not self.stopped:
                self._write(appender, buffer)
            appender.give_back(buffer)
            # Not kept until the next job comes.
            del job, appender, buffer

    def _write(self, appender: "Appender", buffer: Buffer) -> None:
        try:
            if self._budget.make_room(appender.chunk_bytes):
                appender.write(buffer)
                return
            most = self._budget.max_bytes
            reason = "it may take half of the disk" if most is None else (
                f"it may take {human_bytes(most)}"
            )  # fmt: skip
            reason += ", and what lies there is in use"
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception as error:
            # A thread that died would let training wait for it for ever.
            reason = f"{type(error).__name__}: {error}"
        self.stop(f"no further rows are written to {self._directory} ({reason})")

    def stop(self, sentence: str) -> None:
        """Writes nothing from now on.

        Args:
            sentence: Reason, for the user.
        """
        if not self.stopped:
            self.stopped = True
            self._tell(sentence)

    def close(self) -> None:
        """Waits until all chunks are written."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            # The garbage collector may close a directory in any thread.
            if thread is not threading.current_thread():
                thread.join()
        self.stopped = True

    def leave_to_the_parent(self) -> None:
        """Writes nothing from now on, in a forked process that has no such thread."""
        self.stopped = True
        self._thread = None


class Appender:
    """Collects the new rows of one set. The segment is made with its first chunk.

    Args:
        folder: Folder of the set.
        layout: How the rows lie.
        about: What to say about the value, as plain JSON.
        writer: Thread that writes.
    """

    def __init__(
        self, folder: Path, layout: Layout, about: Mapping[str, Any], writer: Writer
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._about = about
        self._writer = writer
        self._guard = threading.Lock()
        # Held while the thread writes.
        self._writing = threading.Lock()
        self._buffer: Buffer | None = None
        self._free: list[Buffer] = []
        self._segment: SegmentWriter | None = None
        # Nothing more is appended; nothing more is written.
        self._ended = self._taken_back = False

    @property
    def chunk_bytes(self) -> int:
        """Bytes that a chunk takes on the disk at most."""
        return self._layout.values_bytes + self._layout.keys_bytes

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Copies rows, to be written with others as a chunk.

        Args:
            keys: Keys of the rows, of shape (n, 2).
            rows: Rows, uint8 of shape (n, row_bytes).
        """
        with self._guard:
            while len(rows) and not (self._ended or self._writer.stopped):
                try:
                    if self._buffer is None:
                        self._buffer = self._free.pop() if self._free else Buffer(self._layout)
                except MemoryError:
                    self._writer.stop("no further rows are written: no memory for a chunk of them")
                    return
                count = self._buffer.take(keys, rows)
                keys, rows = keys[count:], rows[count:]
                if self._buffer.is_full:
                    self._send()

    def flush(self) -> None:
        """Has the rows written that do not fill a chunk. Nothing is appended after it."""
        with self._guard:
            if self._buffer is not None and self._buffer.count and not self._writer.stopped:
                self._send()
            self._buffer = None
            self._ended = True

    def _send(self) -> None:
        buffer, self._buffer = self._buffer, None
        assert buffer is not None
        self._writer.put(self, buffer)

    def write(self, buffer: Buffer) -> None:
        """Writes a chunk, in the thread.

        Args:
            buffer: Rows of the chunk.

        Raises:
            OSError: the disk is full, or fails.
        """
        with self._writing:
            if self._taken_back:
                return
            if self._segment is None:
                self._segment = SegmentWriter(self._folder, self._layout, self._about)
            self._segment.write(buffer)

    def give_back(self, buffer: Buffer) -> None:
        """Takes back the memory of a chunk that was written."""
        buffer.count = 0
        if len(self._free) < MOST_WAITING and not self._ended:
            self._free.append(buffer)

    def close(self) -> None:
        """Gives back the lock on the segment, once everything is written."""
        with self._writing, contextlib.suppress(OSError):
            if self._segment is not None:
                self._segment.close()

    def leave_to_the_parent(self) -> None:
        """Drops what is not written, in a forked process: the parent writes it."""
        self._ended = self._taken_back = True
        self._buffer = self._segment = None
        self._free.clear()
        self._guard, self._writing = threading.Lock(), threading.Lock()

    def take_back(self, sentence: str) -> Path | None:
        """Removes the segment, and writes nothing from now on. Returns its folder.

        Args:
            sentence: Reason, for those who read it just now.
        """
        with self._guard:
            self._buffer = None
            self._ended = self._taken_back = True
        with self._writing:
            segment, self._segment = self._segment, None
        if segment is None:
            return None
        refuse(segment.folder, sentence)
        with contextlib.suppress(OSError):
            segment.close()
        remove(segment.folder)
        return segment.folder
