"""Reads and checks the chunk files of segments."""

import contextlib
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from cachefreeze.store.codecs import decompress, places
from cachefreeze.store.files import open_regular
from cachefreeze.store.format import CHECKSUM_BYTES, KEY_BYTES, Layout, SegmentError
from cachefreeze.store.journal import Chunk, Content

# Number of chunk files that stay open. To open a file takes as long as to read a row.
OPEN_FILES = max(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8, 256), 16)
# Size of one read while a chunk is checked. It fits into the cache of the processor.
_PIECE_BYTES = 2**18
# Largest number of buffers in one `preadv` call.
_MOST_BUFFERS = 1024


class Damaged(Exception):  # noqa: N818
    """A chunk file is damaged or cannot be read. The message is one sentence with the path."""


@dataclass(eq=False, slots=True)
class Source:
    """A chunk of values that rows are read from.

    Args:
        folder: Folder of the segment.
        layout: Division of the rows into chunks.
        chunk: Line of the journal for this chunk.

    Attributes:
        checked: Inode, size and time of the file whose checksum was right. None before the check.
    """

    folder: Path
    layout: Layout
    chunk: Chunk
    checked: tuple[int, int, int] | None = field(default=None, init=False)

    @property
    def path(self) -> str:
        """Path of the chunk file."""
        return f"{self.folder}/{self.layout.values_name(self.chunk.number)}"


class _Open(NamedTuple):
    number: int
    # Offset and length of each row, if rows are compressed.
    places: list[tuple[int, int]] | None


class Files:
    """Open chunk files. Several threads may use one object. They read one after another.

    Files are read by `pread` and not mapped: if the disk fails, `pread` raises an OSError, but a
    map ends the process.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Source, _Open] = OrderedDict()
        self._guard = threading.Lock()

    def read(self, source: Source, slots: list[int], positions: list[int], out: memoryview) -> None:
        """Copies rows of one chunk.

        Args:
            source: Chunk that holds the rows.
            slots: Numbers of the rows in the chunk, ascending.
            positions: Numbers of the rows in `out`, in the same order.
            out: Memory for all rows, one after another.

        Raises:
            Damaged: The file is damaged, or the disk fails.
        """
        with self._guard:
            try:
                file = self._file(source)
                size = source.layout.row.nbytes
                if file.places is None:
                    _read_rows(file.number, size, slots, positions, out)
                    return
                for slot, position in zip(slots, positions, strict=True):
                    start, length = file.places[slot]
                    frame = os.pread(file.number, length, start)
                    part = out[position * size : (position + 1) * size]
                    decompress(frame, np.frombuffer(part, np.uint8))
            except OSError as error:
                reason = error.strerror or str(error)
                raise Damaged(f"{source.path} cannot be read ({reason})") from error
            except SegmentError as error:
                raise Damaged(f"{source.path} {error}") from error

    def load(self, source: Source) -> np.ndarray:
        """Reads and checks all rows of one chunk. This takes no longer than the check alone.

        Returns:
            Rows, uint8 of shape (rows, row_bytes).

        Raises:
            Damaged: The file is damaged, or the disk fails.
        """
        layout, chunk = source.layout, source.chunk
        try:
            file = open_regular(source.path, os.O_RDONLY)
            try:
                length = min(os.fstat(file).st_size, layout.values_bytes)
                content = np.empty(length, dtype=np.uint8)
                check_values(file, source.path, layout, chunk, content)
                source.checked = _identity(file)
            finally:
                os.close(file)
            size = layout.row.nbytes
            if layout.codec == "raw":
                return content[: chunk.rows * size].reshape(chunk.rows, size)
            rows = np.empty((chunk.rows, size), dtype=np.uint8)
            tail = content[length - layout.index_bytes :].tobytes()
            for row, (start, count) in zip(
                rows, places(layout, chunk.rows, length, tail), strict=True
            ):
                decompress(content[start : start + count].tobytes(), row)
            return rows
        except OSError as error:
            raise Damaged(f"{source.path} cannot be read ({error.strerror or error})") from error
        except SegmentError as error:
            raise Damaged(f"{source.path} {error}") from error

    def expect(self, source: Source, slots: Sequence[int]) -> None:
        """Tells the system to read rows of one chunk ahead, if the system supports this.

        Args:
            source: Chunk that holds the rows. The whole file is read ahead if it was not checked
                yet.
            slots: Numbers of the rows in the chunk.
        """
        with self._guard, contextlib.suppress(OSError, AttributeError, Damaged, SegmentError):
            if source.checked is None:
                file = open_regular(source.path, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)
                return
            number, where = self._file(source)
            size = source.layout.row.nbytes
            for slot in slots:
                start, length = (slot * size, size) if where is None else where[slot]
                os.posix_fadvise(number, start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes all files."""
        with self._guard:
            for file in self._open.values():
                os.close(file.number)
            self._open.clear()

    def after_fork(self) -> None:
        """Makes a new lock in a forked process, since another thread may have held the old one."""
        self._guard = threading.Lock()

    def drop(self, source: Source) -> None:
        """Closes the file of a chunk that is no longer read."""
        with self._guard:
            file = self._open.pop(source, None)
            if file is not None:
                os.close(file.number)

    def _file(self, source: Source) -> "_Open":
        known = self._open.get(source)
        if known is not None:
            self._open.move_to_end(source)
            return known
        if len(self._open) >= OPEN_FILES:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest.number)
        file = open_regular(source.path, os.O_RDONLY)
        try:
            identity = _identity(file)
            # Checked again if the file was replaced since the last check.
            if source.checked != identity:
                check_values(file, source.path, source.layout, source.chunk)
                source.checked = identity
            where = None
            if source.layout.codec != "raw":
                size, length = identity[1], source.layout.index_bytes
                tail = os.pread(file, length, size - length)
                where = places(source.layout, source.chunk.rows, size, tail)
        except BaseException:
            os.close(file)
            raise
        found = self._open[source] = _Open(file, where)
        return found


def _identity(file: int) -> tuple[int, int, int]:
    found = os.fstat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_rows(
    file: int, row_bytes: int, slots: list[int], positions: list[int], out: memoryview
) -> None:
    # Most batches have no neighbouring rows, and a search for them takes as long as a read.
    if slots[-1] - slots[0] >= 2 * len(slots):
        for slot, position in zip(slots, positions, strict=True):
            start = position * row_bytes
            part = out[start : start + row_bytes]
            if os.preadv(file, (part,), slot * row_bytes) != row_bytes:
                raise OSError("the file is too short")
        return
    start = 0
    while start < len(slots):
        end = start + 1
        while end < len(slots) and slots[end] == slots[end - 1] + 1 and end - start < _MOST_BUFFERS:
            end += 1
        parts = [out[one * row_bytes : (one + 1) * row_bytes] for one in positions[start:end]]
        if os.preadv(file, parts, slots[start] * row_bytes) != (end - start) * row_bytes:
            raise OSError("the file is too short")
        start = end


def check_values(
    file: int, path: str | Path, layout: Layout, chunk: Chunk, out: np.ndarray | None = None
) -> None:
    """Compares an open chunk file of values with its line in the journal.

    Args:
        file: Descriptor of the file.
        path: Path of the file, for messages.
        layout: Division of the rows into chunks.
        chunk: Line of the journal for this chunk.
        out: Memory for a copy of the file without its last checksum. If None, nothing is copied.

    Raises:
        Damaged: The size or the checksum of the file is wrong.
        OSError: The disk fails.
    """
    found, most = os.fstat(file).st_size, layout.values_bytes
    if layout.codec == "raw":
        if found != most:
            raise Damaged(f"{path} has {found} bytes instead of {most}")
    elif not layout.index_bytes < found <= most:
        raise Damaged(f"{path} has {found} bytes, which is no valid size")
    crc, tail = _checksums(file, path, found, out)
    if layout.codec != "raw":
        # The journal has the checksum of the whole file. The file itself ends with that of its
        # index.
        crc = tail = google_crc32c.extend(crc, tail.to_bytes(CHECKSUM_BYTES, "little"))
    if not crc == chunk.values == tail:
        raise Damaged(f"{path} has a wrong checksum")


def _checksums(
    file: int, path: str | Path, size: int, out: np.ndarray | None = None
) -> tuple[int, int]:
    """Returns the CRC32C of a file without its last bytes, and the CRC32C in these bytes."""
    content, offset, crc = size - CHECKSUM_BYTES, 0, 0
    buffer = np.empty(min(content, _PIECE_BYTES), dtype=np.uint8)
    while offset < content:
        length = min(content - offset, len(buffer))
        piece = buffer[:length] if out is None else out[offset : offset + length]
        count = os.preadv(file, [piece.data], offset)
        if not count:
            raise Damaged(f"{path} is too short")
        crc = google_crc32c.extend(crc, piece[:count])
        offset += count
    return crc, int.from_bytes(os.pread(file, CHECKSUM_BYTES, content), "little")


def read_keys(path: Path, layout: Layout, chunk: Chunk) -> np.ndarray:
    """Returns the keys of a chunk, of shape (rows, 2).

    Args:
        path: Path of the chunk file of keys.
        layout: Division of the rows into chunks.
        chunk: Line of the journal for this chunk.

    Raises:
        Damaged: The file is damaged, or the disk fails.
    """
    try:
        file = open_regular(path, os.O_RDONLY)
        try:
            found = os.fstat(file).st_size
            # The size is compared before the file is read. There are at most 4096 keys.
            content = os.pread(file, layout.keys_bytes, 0) if found == layout.keys_bytes else b""
        finally:
            os.close(file)
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error
    if len(content) != layout.keys_bytes:
        raise Damaged(f"{path} has {found} bytes instead of {layout.keys_bytes}")
    keys, tail = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if not google_crc32c.value(keys) == chunk.keys == int.from_bytes(tail, "little"):
        raise Damaged(f"{path} has a wrong checksum")
    return np.frombuffer(keys[: chunk.rows * KEY_BYTES], dtype=np.uint64).reshape(-1, 2)


def is_hole(folder: Path, layout: Layout, chunk: Chunk) -> bool:
    """Returns whether both files of a chunk are missing.

    So it is with a chunk whose rows an object store has in another segment, or has damaged.

    Args:
        folder: Folder of the segment.
        layout: Division of the rows into chunks.
        chunk: Line of the journal for this chunk.
    """
    names = layout.values_name(chunk.number), layout.keys_name(chunk.number)
    return not any(os.path.lexists(folder / name) for name in names)


def read_chunk(folder: Path, layout: Layout, chunk: Chunk) -> Content:
    """Returns the checked contents of the two files of a chunk.

    Args:
        folder: Folder of the segment.
        layout: Division of the rows into chunks.
        chunk: Line of the journal for this chunk.

    Raises:
        Damaged: A file is damaged, or the disk fails.
    """
    names = layout.values_name(chunk.number), layout.keys_name(chunk.number)
    most = layout.values_bytes, layout.keys_bytes
    try:
        values, keys = (_read_file(folder / name, n) for name, n in zip(names, most, strict=True))
    except OSError as error:
        raise Damaged(f"{folder / names[0]} cannot be read ({error.strerror})") from error
    content = Content(values, keys)
    check_content(folder, layout, chunk, content)
    return content


def _read_file(path: Path, most: int) -> bytes:
    with open(path, "rb", opener=open_regular) as file:
        return file.read(min(os.fstat(file.fileno()).st_size, most + 1))


def check_content(folder: str | Path, layout: Layout, chunk: Chunk, content: Content) -> None:
    """Compares the contents of the two files of a chunk with its line in the journal.

    Args:
        folder: Folder or URL of the segment, for messages.
        layout: Division of the rows into chunks.
        chunk: Line of the journal for this chunk.
        content: Contents of the files.

    Raises:
        Damaged: The size or the checksum of a file is wrong.
    """
    raw, path = layout.codec == "raw", f"{folder}/{layout.values_name(chunk.number)}"
    if chunk.rows > layout.chunk_rows:
        raise Damaged(f"{path} has more rows than a chunk can have")
    least = layout.values_bytes if raw else layout.index_bytes + 1
    if not least <= len(content.values) <= layout.values_bytes:
        raise Damaged(f"{path} has {len(content.values)} bytes, and not {layout.values_bytes}")
    # Of a compressed file, the journal has the checksum of all bytes.
    _check_bytes(path, content.values, chunk.values, raw)
    check_keys(folder, layout, chunk, content.keys)


def check_keys(folder: str | Path, layout: Layout, chunk: Chunk, content: bytes) -> None:
    """Compares the content of a chunk file of keys with its line in the journal.

    Args:
        folder: Folder or URL of the segment, for messages.
        layout: Division of the rows into chunks.
        chunk: Line of the journal for this chunk.
        content: Content of the file.

    Raises:
        Damaged: The size or the checksum is wrong.
    """
    path = f"{folder}/{layout.keys_name(chunk.number)}"
    if len(content) != layout.keys_bytes:
        raise Damaged(f"{path} has {len(content)} bytes, and not {layout.keys_bytes}")
    _check_bytes(path, content, chunk.keys, True)


def _check_bytes(path: str, content: bytes, expected: int, has_tail: bool) -> None:
    memory = np.frombuffer(content, dtype=np.uint8)
    found = google_crc32c.value(memory[:-CHECKSUM_BYTES] if has_tail else memory)
    tail = int.from_bytes(content[-CHECKSUM_BYTES:], "little") if has_tail else expected
    if not found == expected == tail:
        raise Damaged(f"{path} has a wrong checksum")
