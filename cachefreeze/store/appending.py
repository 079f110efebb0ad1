"""Collects new rows into chunks, which a thread writes."""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cachefreeze.store.budget import Budget
from cachefreeze.store.commits import REMOTE
from cachefreeze.store.files import human_bytes
from cachefreeze.store.format import Layout, is_folder
from cachefreeze.store.locks import refuse, remove
from cachefreeze.store.segment import Buffer, SegmentWriter

# Number of chunks that may wait for the disk. More of them would fill memory if the disk is slow.
MOST_WAITING = 2


class Writer:
    """Thread that writes the chunks of all sets of a directory.

    It raises no errors. After the first error it writes nothing more, and tells the user why.

    Args:
        directory: Folder that holds the sets.
        budget: Limit on the disk space of the directory.
        tell: Function called with each message for the user.
        written: Function called after each chunk that was written.

    Attributes:
        stopped: Whether nothing is written any more.
    """

    def __init__(
        self,
        directory: Path,
        budget: Budget,
        tell: Callable[[str], None],
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._budget = budget
        self._tell = tell
        self._written = written
        self._jobs: queue.Queue[tuple[Appender, Buffer] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self.stopped = False

    def put(self, appender: "Appender", buffer: Buffer) -> None:
        """Queues a chunk for writing. Waits only while the queue is full.

        Args:
            appender: Appender of the set that the chunk belongs to.
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
            # Otherwise these variables would keep the memory until the next chunk comes.
            del job, appender, buffer

    def _write(self, appender: "Appender", buffer: Buffer) -> None:
        try:
            if self._budget.make_room(appender.chunk_bytes):
                appender.write(buffer)
                self._written()
                return
            most = self._budget.max_bytes
            limit = "half of the space on the disk" if most is None else human_bytes(most)
            reason = f"its limit is {limit}, and its older rows are in use"
            if (self._directory / REMOTE).is_dir():
                reason += " or not in the object store yet"
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception as error:
            # If the thread ended by an error, training would wait for it without end.
            reason = f"{type(error).__name__}: {error}"
        self.stop(f"no further rows are written to {self._directory} ({reason})")

    def stop(self, sentence: str) -> None:
        """Writes nothing more."""
        if not self.stopped:
            self.stopped = True
            self._tell(sentence)

    def close(self) -> None:
        """Waits until all chunks are written."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            # The garbage collector may close a directory in any thread, also in this one.
            if thread is not threading.current_thread():
                thread.join()
        self.stopped = True

    def after_fork(self) -> None:
        """Writes nothing more, in a forked process that does not have the thread."""
        self.stopped = True
        self._thread = None


class Appender:
    """Collects the new rows of one set. It creates a segment for its first chunk.

    Args:
        folder: Folder of the set.
        layout: Division of the rows into chunks.
        about: Description of the value for people, as plain JSON.
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
        # Locked while the thread writes.
        self._writing = threading.Lock()
        self._buffer: Buffer | None = None
        self._free: list[Buffer] = []
        self._segment: SegmentWriter | None = None
        # Folders of the segments that end with a partly filled chunk.
        self._full: list[Path] = []
        # No rows are appended any more; no rows are written any more.
        self._ended = self._taken_back = False

    @property
    def chunk_bytes(self) -> int:
        """Largest disk space of a chunk, in bytes."""
        return self._layout.values_bytes + self._layout.keys_bytes

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Copies rows, to be written together with others as a chunk.

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
                    self._writer.stop("no further rows are written: there is no memory for a chunk")
                    return
                count = self._buffer.take(keys, rows)
                keys, rows = keys[count:], rows[count:]
                if self._buffer.is_full:
                    self._send()

    def publish(self) -> None:
        """Queues the rows that do not fill a chunk yet, so that other processes find them."""
        with self._guard:
            if self._buffer is not None and self._buffer.count and not self._writer.stopped:
                self._send()

    def flush(self) -> None:
        """Queues the last rows for writing. No rows are appended afterwards."""
        self.publish()
        with self._guard:
            self._buffer = None
            self._ended = True

    def _send(self) -> None:
        buffer, self._buffer = self._buffer, None
        assert buffer is not None
        self._writer.put(self, buffer)

    def write(self, buffer: Buffer) -> None:
        """Writes a chunk. Only the thread calls this.

        Raises:
            OSError: The disk is full or fails.
        """
        with self._writing:
            if self._taken_back:
                return
            try:
                segment = self._write(buffer)
            except OSError:
                # If this process was stopped for long, another machine took it for dead.
                if self._segment is None or is_folder(self._segment.folder):
                    raise
                if not is_folder(self._folder.parent):
                    raise
                self._end_segment()
                segment = self._write(buffer)
            if not buffer.is_full:  # it is the last chunk of its segment
                self._full.append(segment.folder)
                self._end_segment()

    def _write(self, buffer: Buffer) -> SegmentWriter:
        if self._segment is None:
            self._segment = SegmentWriter(self._folder, self._layout, self._about)
        self._segment.write(buffer)
        return self._segment

    def _end_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()

    def give_back(self, buffer: Buffer) -> None:
        """Takes back the memory of a chunk that was written, for the next chunk."""
        buffer.count = 0
        if len(self._free) < MOST_WAITING and not self._ended:
            self._free.append(buffer)

    def close(self) -> None:
        """Releases the lock on the segment. Called after all chunks are written."""
        with self._writing, contextlib.suppress(OSError):
            if self._segment is not None:
                self._segment.close()

    def after_fork(self) -> None:
        """Drops the unwritten rows in a forked process. The parent process writes them."""
        self._ended = self._taken_back = True
        self._buffer = self._segment = None
        self._free.clear()
        self._guard, self._writing = threading.Lock(), threading.Lock()

    def take_back(self, sentence: str) -> list[Path]:
        """Removes the written segments and writes nothing more. Returns their folders.

        Args:
            sentence: Reason, for processes that read the segment now.
        """
        with self._guard:
            self._buffer = None
            self._ended = self._taken_back = True
        with self._writing:
            segment, self._segment = self._segment, None
            folders, self._full = self._full, []
        if segment is not None:
            folders.append(segment.folder)
        for folder in folders:
            refuse(folder, sentence)
        if segment is not None:
            with contextlib.suppress(OSError):
                segment.close()
        for folder in folders:
            remove(folder)
        return folders
