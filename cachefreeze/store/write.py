"""Writing a store."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from cachefreeze.files import human_bytes, write_atomically
from cachefreeze.store.codecs import CHECKSUM_BYTES, codec_for
from cachefreeze.store.folder import Lock, remove_locked
from cachefreeze.store.format import FILL_VALUES, FORMAT, Description, Layout, sha256
from cachefreeze.store.read import Store

# Of one write call. From 2 MiB on Linux fills the page cache with pages of 2 MiB; in smaller pieces
# it takes memory that was in use a moment ago, which is faster in a virtual machine.
WRITE_BYTES = 2**20


class StoreTooLarge(OSError):  # noqa: N818
    """The chunk files of a store would take more than they may."""

    def __init__(self, max_bytes: float) -> None:
        super().__init__(errno.ENOSPC, f"it would take more than {human_bytes(max_bytes)}")


class StoreWriter:
    """Writes a new store; nothing reads it before `commit`.

    Args:
        cache_dir: prepared by `prepare_cache_dir`.
        description: of the store; what an earlier writer left under its fingerprint is removed.
        max_bytes: that its chunk files may take; the metadata beside them are a few kB.

    Attributes:
        bytes: of the chunk files written so far.

    Raises:
        BlockingIOError: another process is writing or reading a store of this fingerprint.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, cache_dir: Path, description: Description, max_bytes: float = float("inf")
    ) -> None:
        self.description = description
        self.max_bytes = max_bytes
        self.bytes = 0
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
                name: _SplitWriter(group, self.folder / name, layout, self._reserve)
                for name, layout in description.splits.items()
            }
        except BaseException:
            self.abort()
            raise

    def append(self, split: str, rows: NDArray[Any]) -> None:
        """The next rows of a split, (n, *row_shape), in the order of their indices.

        Raises:
            StoreTooLarge: the next chunk file would exceed `max_bytes`; it is not written.
            OSError: the disk is full, or fails.
        """
        self._splits[split].append(rows)

    def _reserve(self, size: int) -> None:
        if self.bytes + size > self.max_bytes:
            raise StoreTooLarge(self.max_bytes)
        self.bytes += size

    def commit(self, notes: dict[str, float] | None = None) -> Store:
        """Declare the store complete: from here on it may be read, by this run and by others.

        `notes` are numbers that came up on the way and are worth keeping.
        """
        metadata = ["zarr.json", *(f"{name}/zarr.json" for name in self._splits)]
        for split in self._splits.values():
            assert split.written == split.layout.rows, "committed before all rows were in"
        manifest = {
            "format": FORMAT,
            "fingerprint": self.description.fingerprint,
            "sha256": {name: sha256((self.folder / name).read_bytes()) for name in metadata},
            "crc32c": {name: split.checksums for name, split in self._splits.items()},
            "bytes": {
                name: split.sizes for name, split in self._splits.items() if split.layout.compressed
            },
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

    `reserve` is told the size of every chunk file before it is written, and may refuse it.
    """

    def __init__(
        self, group: zarr.Group, folder: Path, layout: Layout, reserve: Callable[[int], None]
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.codec = codec_for(layout.codec, layout.dtype)
        self.reserve = reserve
        images = len(layout.row_shape) == 3
        group.create_array(
            folder.name,
            shape=(layout.rows, *layout.row_shape),
            chunks=(layout.rows_per_chunk, *layout.row_shape),
            dtype=layout.dtype,
            filters=None,
            compressors=[*self.codec.zarr, Crc32cCodec()],
            fill_value=FILL_VALUES[layout.dtype],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("row", "y", "x", "channel") if images else None,
        )
        self.chunk = np.empty((layout.rows_per_chunk, *layout.row_shape), layout.dtype)
        self.written = 0
        self.checksums: list[int] = []
        self.sizes: list[int] = []

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
        content = self.codec.encode(self.chunk)
        size = len(content) + CHECKSUM_BYTES
        self.reserve(size)
        checksum = CRC32C.checksum(content)
        path = self.folder / self.layout.chunk_name(len(self.checksums))
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("wb", buffering=0) as file:
            for start in range(0, len(content), WRITE_BYTES):
                _write_all(file, content[start : start + WRITE_BYTES].data)
            _write_all(file, memoryview(checksum.to_bytes(CHECKSUM_BYTES, "little")))
        temporary.rename(path)
        self.checksums.append(checksum)
        self.sizes.append(size)


def _write_all(file: FileIO, content: memoryview) -> None:
    # A nearly full disk takes a part first, and says why at the next attempt.
    while content:
        content = content[file.write(content) :]
