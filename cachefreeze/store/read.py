"""Reading a store."""

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

from cachefreeze.rows import Indices
from cachefreeze.store.folder import Lock, is_committed, remove_store
from cachefreeze.store.format import (
    CHECKSUM_BYTES,
    Layout,
    open_without_following,
    read_description,
    read_manifest,
)

# Chunk files kept open for each split; opening one for a single row costs a fifth of the speed. An
# eighth of what the process may have, for there are two splits, and two stores at a change.
OPEN_CHUNKS = max(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8, 4096), 16)


class Store:
    """A committed store, open for reading. `open_store` and `StoreWriter.commit` make one."""

    def __init__(self, folder: Path, lock: Lock) -> None:
        self.folder = folder
        self._lock = lock
        self.description = read_description(folder)
        manifest = read_manifest(folder, self.description)
        self.notes = manifest.notes
        self.readers = {
            name: SplitReader(folder / name, layout, manifest.checksums[name])
            for name, layout in self.description.splits.items()
        }

    def damage(self) -> Iterator[str]:
        """Reads everything; yields one sentence for each chunk that is not what was written."""
        for name, reader in self.readers.items():
            for sentence in reader.damage():
                yield f"{name}: {sentence}"

    def close(self) -> None:
        """Done reading; the store stays."""
        for reader in self.readers.values():
            reader.close()
        self._lock.release()

    def remove(self) -> bool:
        """Done reading; the store goes, unless others read it. Returns whether it went."""
        self.close()
        return remove_store(self.folder)


class SplitReader:
    """Reads rows of one split from its chunk files."""

    def __init__(self, folder: Path, layout: Layout, checksums: Sequence[int]) -> None:
        self.folder = folder
        self.layout = layout
        self.checksums = checksums
        self._open: dict[int, int] = {}

    def read(self, indices: Indices, out: NDArray[np.uint8]) -> None:
        """Copy rows into `out`, (n, row_bytes).

        Raises:
            OSError: a chunk is missing or cut short, or the disk fails.
        """
        size = self.layout.row_bytes
        for position, (chunk, row) in enumerate(self._places(indices)):
            if os.preadv(self._file(chunk), (out[position],), row * size) != size:
                raise OSError(f"{self._path(chunk)} is cut short")

    def will_need(self, indices: Indices) -> None:
        """Ask the system to have these rows in memory soon: five times the speed when they are
        not, a percent of a step when they are."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        size = self.layout.row_bytes
        for chunk, row in self._places(indices):
            os.posix_fadvise(self._file(chunk), row * size, size, os.POSIX_FADV_WILLNEED)

    def damage(self) -> Iterator[str]:
        """One sentence for each chunk whose bytes are not those that were written."""
        for chunk, expected in enumerate(self.checksums):
            path = self._path(chunk)
            try:
                with open(path, "rb", opener=open_without_following) as file:
                    size = os.fstat(file.fileno()).st_size
                    right = self.layout.chunk_file_bytes
                    if size != right:
                        yield f"{path.name} has {size} bytes instead of {right}"
                        continue
                    content = np.fromfile(file, np.uint8)
            except OSError as error:
                yield f"{path.name} cannot be read ({error.strerror})"
                continue
            stored = int.from_bytes(content[-CHECKSUM_BYTES:].tobytes(), "little")
            if not CRC32C.checksum(content[:-CHECKSUM_BYTES]) == stored == expected:
                yield f"{path.name} has a wrong checksum"

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)
        self._open.clear()

    def _places(self, indices: Indices) -> Iterator[tuple[int, int]]:
        chunks, rows = np.divmod(indices, self.layout.rows_per_chunk)
        return zip(chunks.tolist(), rows.tolist(), strict=True)

    def _path(self, chunk: int) -> Path:
        return self.folder / self.layout.chunk_name(chunk)

    def _file(self, chunk: int) -> int:
        file = self._open.get(chunk)
        if file is None:
            if len(self._open) >= OPEN_CHUNKS:
                os.close(self._open.pop(next(iter(self._open))))
            file = self._open[chunk] = open_without_following(self._path(chunk), os.O_RDONLY)
        return file


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
