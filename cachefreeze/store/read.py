"""Reading a store."""

import contextlib
import os
import resource
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

from cachefreeze.files import human_bytes, open_regular
from cachefreeze.rows import Indices
from cachefreeze.store.codecs import CHECKSUM_BYTES, codec_for
from cachefreeze.store.folder import Lock, is_committed, kept_since, mark_kept, remove_store
from cachefreeze.store.format import (
    Layout,
    Manifest,
    read_description,
    read_manifest,
)

# Chunk files kept open for each split; opening one for a single row costs a fifth of the speed. An
# eighth of what the process may have, for there are two splits, and two stores at a change.
OPEN_CHUNKS = max(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8, 4096), 16)


class Store:
    """A committed store, open for reading. `open_store` and `StoreWriter.commit` make one.

    Attributes:
        bytes: of its chunk files, as its manifest lists them.
        notes: the writer's.
        readers: one for each split.
    """

    def __init__(self, folder: Path, lock: Lock) -> None:
        self.folder = folder
        self._lock = lock
        self.description = read_description(folder)
        manifest = read_manifest(folder, self.description)
        self.bytes = sum(map(sum, manifest.sizes.values()))
        self.notes = manifest.notes
        self.readers = {
            name: split_reader(folder / name, layout, manifest)
            for name, layout in self.description.splits.items()
        }

    def load(self, before_each: Callable[[], None] = lambda: None) -> None:
        """Decode all rows into memory, see `Description.memory_bytes`; nothing to do for raw ones.

        Finds whatever `damage` finds: one of the two is enough. Calls `before_each` chunk.

        Raises:
            OSError: a chunk is not what was written, the disk fails, or the memory does not do.
        """
        for reader in self.readers.values():
            reader.load(before_each)

    def damage(self, before_each: Callable[[], None] = lambda: None) -> Iterator["Damage"]:
        """Reads everything; yields every chunk that is not what was written. Calls `before_each`
        chunk, which may end it by raising."""
        for reader in self.readers.values():
            yield from reader.damage(before_each)

    @property
    def kept(self) -> bool:
        """Whether it is to stay for later runs."""
        return kept_since(self.folder) is not None

    def keep(self) -> None:
        """It is to stay for later runs, and is in use now. Where that cannot be written down, it
        is as it was."""
        with contextlib.suppress(OSError):
            mark_kept(self.folder)

    def put_away(self) -> None:
        """Let go of files and memory, and still keep others from removing the store."""
        for reader in self.readers.values():
            reader.close()

    def close(self) -> None:
        """Done reading; the store stays, and the memory that its rows took is free."""
        self.put_away()
        self._lock.release()

    def remove(self) -> bool:
        """Done reading; the store goes, unless others read it. Returns whether it went."""
        self.close()
        return remove_store(self.folder)


@dataclass(frozen=True)
class Damage:
    """A chunk whose bytes are not those that were written, and how that shows."""

    split: str
    chunk: int
    reason: str

    def __str__(self) -> str:
        return f"{self.split}: {self.reason}"


class SplitReader(ABC):
    """Reads rows of one split. `split_reader` makes the right one.

    Args:
        checksums: CRC32C of every chunk's encoded bytes.
        sizes: of every chunk file, in bytes.
    """

    def __init__(
        self, folder: Path, layout: Layout, checksums: Sequence[int], sizes: Sequence[int]
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.checksums = checksums
        self.sizes = sizes

    @abstractmethod
    def load(self, before_each: Callable[[], None] = lambda: None) -> None:
        """Decode all rows into memory, if they have to be: see `Store.load`."""

    @abstractmethod
    def read(self, indices: Indices, out: NDArray[np.uint8]) -> None:
        """Copy rows into `out`, (n, row_bytes).

        Raises:
            OSError: a chunk is missing or cut short, or the disk fails.
        """

    @abstractmethod
    def will_need(self, indices: Indices) -> None:
        """Ask the system to have these rows in memory soon."""

    def damage(self, before_each: Callable[[], None] = lambda: None) -> Iterator[Damage]:
        """Every chunk whose bytes are not those that were written."""
        for chunk in range(len(self.checksums)):
            before_each()
            try:
                self._content(chunk)
            except OSError as error:
                yield Damage(self.folder.name, chunk, str(error))

    def chunk(self, number: int) -> NDArray[np.uint8]:
        """All rows of a chunk, (rows, row_bytes), once they are known to be those that were
        written.

        Raises:
            OSError: they are not.
        """
        layout = self.layout
        rows = np.empty((layout.rows_per_chunk, layout.row_bytes), np.uint8)
        self._decode_chunk(number, rows.reshape(-1))
        return rows[: layout.rows - number * layout.rows_per_chunk]

    def _decode_chunk(self, chunk: int, out: NDArray[np.uint8]) -> None:
        try:
            codec_for(self.layout.codec, self.layout.dtype).decode(self._content(chunk), out)
        except ValueError as error:
            raise OSError(f"{self.chunk_path(chunk).name} is damaged: {error}") from error

    @abstractmethod
    def close(self) -> None:
        """Let go of files and memory."""

    def chunk_path(self, chunk: int) -> Path:
        return self.folder / self.layout.chunk_name(chunk)

    def _content(self, chunk: int) -> NDArray[np.uint8]:
        """The encoded bytes of a chunk, once they are known to be those that were written.

        Raises:
            OSError: they are not; a sentence.
        """
        path, right = self.chunk_path(chunk), self.sizes[chunk]
        try:
            with open(path, "rb", opener=open_regular) as file:
                size = os.fstat(file.fileno()).st_size
                content = np.fromfile(file, np.uint8, right) if size == right else None
        except OSError as error:
            raise OSError(f"{path.name} cannot be read ({error.strerror})") from error
        if content is None:
            raise OSError(f"{path.name} has {size} bytes instead of {right}")
        content, checksum = np.split(content, [-CHECKSUM_BYTES])
        stored = int.from_bytes(checksum.tobytes(), "little")
        if not CRC32C.checksum(content) == stored == self.checksums[chunk]:
            raise OSError(f"{path.name} has a wrong checksum")
        return content


class RawReader(SplitReader):
    """Reads rows straight from the chunk files, which hold them as they are. Several threads may
    read with one."""

    def __init__(
        self, folder: Path, layout: Layout, checksums: Sequence[int], sizes: Sequence[int]
    ) -> None:
        super().__init__(folder, layout, checksums, sizes)
        # By chunk, and how many threads read from each just now: it must not be closed under their
        # hands, for its number may be another file's a moment later.
        self._open: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._files = threading.Lock()

    def load(self, before_each: Callable[[], None] = lambda: None) -> None:
        """Nothing to do: the page cache is their memory."""

    def read(self, indices: Indices, out: NDArray[np.uint8]) -> None:
        size = self.layout.row_bytes
        for position, (chunk, row) in enumerate(self._places(indices)):
            file = self._borrow(chunk)
            try:
                if os.preadv(file, (out[position],), row * size) != size:
                    raise OSError(f"{self.chunk_path(chunk)} is cut short")
            finally:
                self._give_back(chunk, file)

    def will_need(self, indices: Indices) -> None:
        """Five times the speed when they are not in memory, a percent of a step when they are."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        size = self.layout.row_bytes
        for chunk, row in self._places(indices):
            file = self._borrow(chunk)
            try:
                os.posix_fadvise(file, row * size, size, os.POSIX_FADV_WILLNEED)
            finally:
                self._give_back(chunk, file)

    def close(self) -> None:
        with self._files:
            for chunk in list(self._open):
                self._close(chunk)

    def __del__(self) -> None:
        self.close()  # what a thread that came late has opened

    def _places(self, indices: Indices) -> Iterator[tuple[int, int]]:
        chunks, rows = np.divmod(indices, self.layout.rows_per_chunk)
        return zip(chunks.tolist(), rows.tolist(), strict=True)

    def _borrow(self, chunk: int) -> int:
        """A chunk's open file, until it is given back."""
        with self._files:
            file = self._open.get(chunk)
            if file is None:
                if len(self._open) >= OPEN_CHUNKS:
                    self._close(next(iter(self._open)))
                file = self._open[chunk] = open_regular(self.chunk_path(chunk), os.O_RDONLY)
            self._users[file] = self._users.get(file, 0) + 1
            return file

    def _give_back(self, chunk: int, file: int) -> None:
        with self._files:
            self._users[file] -= 1
            if not self._users[file]:
                del self._users[file]
                if self._open.get(chunk) != file:
                    os.close(file)

    def _close(self, chunk: int) -> None:
        """Close a chunk's file, or leave that to the last who gives it back."""
        file = self._open.pop(chunk)
        if file not in self._users:
            os.close(file)


class DecodedReader(SplitReader):
    """Reads rows of a compressed split from memory, where all of them are decoded once.

    To decode a chunk for every row would cost a hundred times the row.
    """

    # (rows, row_bytes); None until loaded.
    _rows: NDArray[np.uint8] | None = None

    def __init__(
        self, folder: Path, layout: Layout, checksums: Sequence[int], sizes: Sequence[int]
    ) -> None:
        super().__init__(folder, layout, checksums, sizes)
        self._decoding = threading.Lock()

    def load(self, before_each: Callable[[], None] = lambda: None) -> None:
        with self._decoding:  # whoever comes second finds them there
            if self._rows is None:
                self._rows = self._decode(before_each)

    def read(self, indices: Indices, out: NDArray[np.uint8]) -> None:
        self.load()
        assert self._rows is not None
        assert not len(indices) or 0 <= indices.min() <= indices.max() < self.layout.rows
        # Other modes than "clip" go through a buffer, at a third of the speed.
        np.take(self._rows, indices, axis=0, out=out, mode="clip")

    def will_need(self, indices: Indices) -> None:
        """Nothing to do: they are all there, or `read` loads them."""

    def close(self) -> None:
        self._rows = None

    def _decode(self, before_each: Callable[[], None]) -> NDArray[np.uint8]:
        layout = self.layout
        try:
            # One piece: a large one goes back to the system when it is freed, small ones may not.
            memory = np.empty((layout.chunks, layout.chunk_bytes), np.uint8)
        except MemoryError as error:
            size = human_bytes(layout.memory_bytes)
            raise OSError(f"its rows take {size} of memory, more than there is") from error
        for chunk, out in enumerate(memory):
            before_each()
            self._decode_chunk(chunk, out)
        return memory.reshape(-1, layout.row_bytes)


def split_reader(folder: Path, layout: Layout, manifest: Manifest) -> SplitReader:
    """The reader of a split in `folder`, whose name is that of the split."""
    reader = DecodedReader if layout.compressed else RawReader
    return reader(folder, layout, manifest.checksums[folder.name], manifest.sizes[folder.name])


def open_store(cache_dir: Path, fingerprint: str) -> Store | None:
    """The committed store of this fingerprint, or None if there is none.

    Its chunks are not verified yet: `Store.damage` does that.

    Raises:
        BlockingIOError: another process is writing it.
        StoreError: its metadata are not those of a store of ours.
    """
    folder = cache_dir / fingerprint
    if not is_committed(folder):
        return None
    try:
        lock = Lock(folder, exclusive=False)
    except FileNotFoundError:
        return None
    try:
        return Store(folder, lock)
    except BaseException:
        lock.release()
        raise
