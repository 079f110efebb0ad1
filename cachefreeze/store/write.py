"""Writing a store."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
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

    def commit(self) -> Store:
        """Declare the store complete: from here on it may be read, by this run and by others."""
        metadata = ["zarr.json", *(f"{name}/zarr.json" for name in self._splits)]
        manifest = {
            "format": FORMAT,
            "fingerprint": self.description.fingerprint,
            "sha256": {name: sha256((self.folder / name).read_bytes()) for name in metadata},
            "crc32c": {name: split.finish() for name, split in self._splits.items()},
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
    """Collects rows into chunks, and writes each when it is whole."""

    def __init__(self, group: zarr.Group, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        images = len(layout.row_shape) == 3
        self.array = group.create_array(
            folder.name,
            shape=(layout.rows, *layout.row_shape),
            chunks=(layout.rows_per_chunk, *layout.row_shape),
            dtype=layout.dtype,
            filters=None,
            compressors=[Crc32cCodec()],
            fill_value=FILL_VALUES[layout.dtype],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("row", "y", "x", "channel") if images else None,
            # Without it zarr looks through every chunk for fill values, at a fifth of the speed,
            # and leaves out chunks that are all fill: they would look like missing ones.
            config={"write_empty_chunks": True},
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
                self._write_chunk(self.chunk[:held])

    def _write_chunk(self, rows: NDArray[Any]) -> None:
        self.array[self.written - len(rows) : self.written] = rows
        with (self.folder / self.layout.chunk_name(len(self.checksums))).open("rb") as file:
            file.seek(-CHECKSUM_BYTES, os.SEEK_END)
            self.checksums.append(int.from_bytes(file.read(), "little"))

    def finish(self) -> list[int]:
        assert self.written == self.layout.rows, "a store was committed before all rows were in"
        return self.checksums
