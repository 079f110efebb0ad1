"""Writes a segment, chunk by chunk."""

import errno
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from cachefreeze.store.codecs import compress
from cachefreeze.store.files import PARTIAL, open_regular, remove_tree, sync_folder
from cachefreeze.store.format import (
    CHECKSUM_BYTES,
    JOURNAL,
    KEY_BYTES,
    LOCK,
    NEW,
    SLOT_DIGITS,
    USED,
    Head,
    Layout,
    is_folder,
    metadata,
    slots_offset,
)
from cachefreeze.store.journal import LINE_BYTES, MOST_CHUNKS, Chunk, Content
from cachefreeze.store.leases import is_shared
from cachefreeze.store.locks import Gone, Lock, share

# Largest size of one write call. In a virtual machine, larger calls take new pages and are slower.
_WRITE_BYTES = 2**20
_ATTEMPTS = 5


class Buffer:
    """Memory for the rows and keys of one chunk.

    Args:
        layout: Division of the rows into chunks.
    """

    def __init__(self, layout: Layout) -> None:
        self.values = np.zeros((layout.chunk_rows, layout.row.nbytes), dtype=np.uint8)
        self.keys = np.zeros((layout.chunk_rows, 2), dtype=np.uint64)
        self.count = 0

    def take(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Copies as many rows as fit. Returns their number.

        Args:
            keys: Keys of the rows, of shape (n, 2).
            rows: Rows, uint8 of shape (n, row_bytes).
        """
        count = min(len(rows), len(self.values) - self.count)
        part = slice(self.count, self.count + count)
        self.values[part] = rows[:count]
        self.keys[part] = keys[:count]
        self.count += count
        return count

    @property
    def is_full(self) -> bool:
        """Whether the chunk is full."""
        return self.count == len(self.values)

    def clear_rest(self) -> None:
        """Sets the unused rows to zero."""
        self.values[self.count :] = 0
        self.keys[self.count :] = 0


class SegmentWriter:
    """Creates a segment and writes its chunks. It is the only writer of this segment.

    Args:
        folder: Folder of the set.
        layout: Division of the rows into chunks.
        about: Description of the value for people, as plain JSON.

    Attributes:
        folder: Folder of the segment.

    Raises:
        OSError: The segment cannot be created.
    """

    def __init__(self, folder: Path, layout: Layout, about: Mapping[str, Any]) -> None:
        self._layout = layout
        self._chunks = 0
        self._slots = 0
        self._files: list[int] = []
        self._lock: Lock | None = None
        for attempt in range(_ATTEMPTS):
            new = folder / f"{NEW}{uuid.uuid4().hex}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not is_folder(folder):
                    raise OSError(errno.ENOTDIR, f"{folder} is a link")
                self.folder = self._make(new, about)
                return
            except FileNotFoundError:  # another process removed the empty folder of the set
                self._close_files()
                if attempt == _ATTEMPTS - 1:
                    raise
            except BaseException:
                self._close_files()
                remove_tree(new)
                raise

    def _make(self, new: Path, about: Mapping[str, Any]) -> Path:
        contents = _make_files(new, self._layout, about)
        folder = new.with_name(uuid.uuid4().hex)
        self._lock = _locked(new, folder)
        self._journal = os.open(new / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self._files.append(self._journal)
        self._metadata = []
        for part in ("values/zarr.json", "keys/zarr.json"):
            file = os.open(new / part, os.O_WRONLY | os.O_NOFOLLOW)
            self._files.append(file)
            self._metadata.append((file, slots_offset(contents[part])))
        # A rename replaces nothing but an empty folder.
        new.rename(folder)
        sync_folder(folder.parent)
        return folder

    def write(self, buffer: Buffer) -> None:
        """Writes a chunk. Readers see it once its line is in the journal.

        Args:
            buffer: Rows of the chunk. Only the last chunk of a segment may be partly filled.

        Raises:
            OSError: The disk is full or fails, the journal cannot number more chunks, or another
                process has removed the segment.
        """
        self._lock_again()
        layout, number = self._layout, self._chunks
        if number == MOST_CHUNKS:
            raise OSError(errno.EFBIG, "the segment is full: its journal cannot number more chunks")
        if not buffer.is_full:
            buffer.clear_rest()
        values, keys = (
            self.folder / name(number) for name in (layout.values_name, layout.keys_name)
        )
        if layout.codec == "raw":
            checksum = self._write_rows(values, buffer.values, buffer.count * layout.row.nbytes)
        else:
            content = compress(layout, buffer.values[: buffer.count])
            checksum = google_crc32c.value(content)
            _write_chunk(values, [(0, memoryview(content))])
        keys_checksum = self._write_rows(keys, buffer.keys, buffer.count * KEY_BYTES)
        line = Chunk(number, buffer.count, checksum, keys_checksum).line(self.folder.name)
        _write_all(self._journal, memoryview(line))
        if is_shared(self.folder.parent.parent):
            os.fsync(self._journal)  # a network file system keeps the line back until then
        self._chunks += 1
        self._slots += buffer.count
        # Written in place with one call and within one sector, so a crash cannot leave half a
        # number.
        for file, offset in self._metadata:
            os.pwrite(file, f"{self._slots:>{SLOT_DIGITS}}".encode(), offset)

    def _lock_again(self) -> None:
        assert self._lock is not None, "the segment is not closed"
        if self._lock.is_lost:
            lock, self._lock = self._lock, _locked(self.folder)
            lock.release()

    def _write_rows(self, path: Path, content: np.ndarray, used: int) -> int:
        flat = content.reshape(-1).view(np.uint8)
        checksum = google_crc32c.value(flat)
        tail = memoryview(checksum.to_bytes(CHECKSUM_BYTES, "little"))
        # A partly filled chunk has a hole in the file between its rows and its checksum.
        _write_chunk(path, [(0, flat[:used].data), (len(flat), tail)])
        return checksum

    def close(self) -> None:
        """Ends the segment. From now on, other processes may remove it."""
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


def _locked(folder: Path, final: Path | None = None) -> Lock:
    try:
        return share(folder, final)
    except Gone as error:
        raise FileNotFoundError(errno.ENOENT, f"{folder} was removed") from error


def _make_files(new: Path, layout: Layout, about: Mapping[str, Any]) -> dict[str, str]:
    for part in ("", "values", "keys"):
        (new / part).mkdir()
    contents = metadata(new.parent.name, layout, about, 0)
    for name, content in contents.items():
        _write_file(new / name, [(0, memoryview(content.encode()))])
    for name in (JOURNAL, LOCK, USED):
        _write_file(new / name, [])
    return contents


def add_chunk(folder: Path, head: Head, chunk: Chunk, content: Content | None) -> bool:
    """Adds a chunk that lies elsewhere, in a segment of the same name, to a local segment.

    The segment is made if it does not exist. Only one process at a time may call this for one
    segment.

    Args:
        folder: Folder of the segment.
        head: Metadata of the segment.
        chunk: Line of the journal for this chunk.
        content: Files of the chunk, which are checked. None if they cannot be had. Later chunks can
            follow all the same, and the rows of this one are unknown.

    Returns:
        Whether the chunk is there now. False if chunks before it are missing, or if another process
        removes the segment.

    Raises:
        OSError: The disk is full or fails.
    """
    layout = head.layout
    if not is_folder(folder):
        _make_segment(folder, head)
    try:
        lock = share(folder)
    except Gone:
        return False
    try:
        journal = open_regular(folder / JOURNAL, os.O_RDWR)
        try:
            lines = os.fstat(journal).st_size // LINE_BYTES
            if lines < chunk.number:
                return False
            if content is not None:
                names = layout.values_name(chunk.number), layout.keys_name(chunk.number)
                used = chunk.rows * layout.row.nbytes, chunk.rows * KEY_BYTES
                holes = layout.codec == "raw", True
                for name, one, size, hole in zip(names, content, used, holes, strict=True):
                    parts = _parts(one, size) if hole else [(0, memoryview(one))]
                    _write_chunk(folder / name, parts)
            if lines == chunk.number:
                os.ftruncate(journal, lines * LINE_BYTES)
                os.lseek(journal, 0, os.SEEK_END)
                _write_all(journal, memoryview(chunk.line(folder.name)))
                _count_slots(folder, head, chunk)
        finally:
            os.close(journal)
    finally:
        lock.release()
    return True


def _count_slots(folder: Path, head: Head, chunk: Chunk) -> None:
    # All chunks but the last one are full.
    slots = chunk.number * head.layout.chunk_rows + chunk.rows
    contents = metadata(folder.parent.name, head.layout, head.about, 0)
    for name in ("values/zarr.json", "keys/zarr.json"):
        file = open_regular(folder / name, os.O_WRONLY)
        try:
            os.pwrite(file, f"{slots:>{SLOT_DIGITS}}".encode(), slots_offset(contents[name]))
        finally:
            os.close(file)


def _make_segment(folder: Path, head: Head) -> None:
    folder.parent.mkdir(exist_ok=True)
    new = folder.with_name(f"{NEW}{uuid.uuid4().hex}")
    try:
        _make_files(new, head.layout, head.about)
        new.rename(folder)
    except BaseException:
        remove_tree(new)
        raise


def _parts(content: bytes, used: int) -> list[tuple[int, memoryview]]:
    # The rest of a partly filled chunk is a hole in the file.
    size, memory = len(content) - CHECKSUM_BYTES, memoryview(content)
    return [(0, memory[:used]), (size, memory[size:])]


def _write_chunk(path: Path, parts: Sequence[tuple[int, memoryview]]) -> None:
    partial = path.with_name(f"{path.name}{PARTIAL}")
    partial.unlink(missing_ok=True)  # a killed process may have left it
    try:
        # Not synced, since that takes four times as long. Only a power failure can lose the
        # content, and the checksum in the journal shows it then.
        _write_file(partial, parts, sync=False)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_file(path: Path, parts: Sequence[tuple[int, memoryview]], sync: bool = True) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        for offset, content in parts:
            os.lseek(file, offset, os.SEEK_SET)
            _write_all(file, content)
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


def _write_all(file: int, content: memoryview) -> None:
    # A nearly full disk writes a part first, and fails with a reason at the next call.
    while content:
        content = content[os.write(file, content[:_WRITE_BYTES]) :]
