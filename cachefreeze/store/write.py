"""Writing a store."""

import json
import os
import shutil
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from cachefreeze.files import write_atomically
from cachefreeze.store.folder import Lock, remove_locked
from cachefreeze.store.format import (
    CHECKSUM_BYTES,
    FILL_VALUES,
    FORMAT,
    Description,
    Layout,
    sha256,
)
from cachefreeze.store.read import Store

# Of one write call. From 2 MiB on Linux fills the page cache with pages of 2 MiB; in smaller pieces
# it takes memory that was in use a moment ago, which is faster in a virtual machine.
WRITE_BYTES = 2**20


class StoreWriter:
    """Writes a new store; nothing reads it before `commit`.

    Args:
        cache_dir: prepared by `prepare_cache_dir`.
        description: of the store; what an earlier writer left under its fingerprint is removed.

    Raises:
        BlockingIOError: another process is writing or reading a store of this fingerprint.
        OSError: the folder cannot be written.
    """

    def __init__(self, cache_dir: Path, description: Description) -> None:
        self.description = description
        self.folder = cache_dir / description.fingerprint
        self.folder.mkdir(exist_ok=True)
        self._lock = Lock(self.folder, exclusive=True)
        try:
            # The marker first: it must never stand over rows that are half removed.
            (self.folder / "COMMITTED").unlink(missing_ok=True)
            for entry in os.scandir(self.folder):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.name != "lock":
                    os.unlink(entry.path)
            attributes = {"cachefreeze": {"format": FORMAT, **asdict(description)}}
            group = zarr.create_group(self.folder, attributes=attributes)
            self._splits = {
                name: _SplitWriter(group, self.folder / name, layout)
                for name, layout in description.splits.items()
            }
        except BaseException:
            self.abort()
            raise

    def append(self, split: str, rows: NDArray[Any]) -> None:
        """The next rows of a split, (n, *row_shape), in the order of their indices."""
        self._splits[split].append(rows)

    def commit(self, notes: dict[str, float] | None = None) -> Store:
        """Declare the store complete: from here on it may be read, by this run and by others.

        `notes` are numbers that came up on the way and are worth keeping.
        """
        metadata = ["zarr.json", *(f"{name}/zarr.json" for name in self._splits)]
        manifest = {
            "format": FORMAT,
            "fingerprint": self.description.fingerprint,
            "sha256": {name: sha256((self.folder / name).read_bytes()) for name in metadata},
            "crc32c": {name: split.finish() for name, split in self._splits.items()},
            "notes": notes or {},
        }
        content = json.dumps(manifest).encode()
        write_atomically(self.folder / "manifest.json", content)
        write_atomically(self.folder / "COMMITTED", sha256(content).encode())
        self._lock.share()
        return Store(self.folder, self._lock)

    def abort(self) -> None:
        """Remove what was written so far."""
        remove_locked(self.folder, self._lock)


class _SplitWriter:
    """Collects rows into chunks, and writes each when it is whole.

    zarr makes the array; the chunk files, whose format is as plain as can be, are written here: by
    way of zarr's event loop and codecs it took twice the time.
    """

    def __init__(self, group: zarr.Group, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        images = len(layout.row_shape) == 3
        group.create_array(
            folder.name,
            shape=(layout.rows, *layout.row_shape),
            chunks=(layout.rows_per_chunk, *layout.row_shape),
            dtype=layout.dtype,
            filters=None,
            compressors=[Crc32cCodec()],
            fill_value=FILL_VALUES[layout.dtype],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("row", "y", "x", "channel") if images else None,
        )
        self.chunk = np.empty((layout.rows_per_chunk, *layout.row_shape), layout.dtype)
        self.written = 0
        self.checksums: list[int] = []

    def append(self, rows: NDArray[Any]) -> None:
        while len(rows):
            held = self.written % self.layout.rows_per_chunk
            part = rows[: self.layout.rows_per_chunk - held]
            self.chunk[held : held + len(part)] = part
            held += len(part)
            self.written += len(part)
            rows = rows[len(part) :]
            if held == self.layout.rows_per_chunk or self.written == self.layout.rows:
                self.chunk[held:] = FILL_VALUES[self.layout.dtype]
                self._write_chunk()

    def _write_chunk(self) -> None:
        content = self.chunk.reshape(-1).view(np.uint8)
        checksum = CRC32C.checksum(content)
        path = self.folder / self.layout.chunk_name(len(self.checksums))
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("wb", buffering=0) as file:
            for start in range(0, len(content), WRITE_BYTES):
                _write_all(file, content[start : start + WRITE_BYTES].data)
            _write_all(file, memoryview(checksum.to_bytes(CHECKSUM_BYTES, "little")))
        temporary.rename(path)
        self.checksums.append(checksum)

    def finish(self) -> list[int]:
        assert self.written == self.layout.rows, "a store was committed before all rows were in"
        return self.checksums


def _write_all(file: FileIO, content: memoryview) -> None:
    # A nearly full disk takes a part first, and says why at the next attempt.
    while content:
        content = content[file.write(content) :]
