"""Kept rows: a table for every kind of value, in memory and on the disk below it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from cachefreeze.cache.codec import GROUP, can_be_rounded, decode, encode, encoded_numel
from cachefreeze.cache.memory import free_device_memory
from cachefreeze.cache.table import BELOW, Table
from cachefreeze.store import Directory, Row, Rows

Tensor = torch.Tensor

# Bytes of a row. To find a compressed row takes 16 bytes of the file, and a frame has a head.
_LEAST_COMPRESSED = 1024


class Entries:
    """All kept rows, under one limit. The rows that were not used for longest go first.

    Args:
        max_bytes: Largest number of bytes of memory, with what rows are found by.
        directory: Folder that rows are kept in as well, if they are.
        codec: How rows are kept, one of `codec.CODECS`: "zstd" on the disk, "int8" everywhere.
    """

    def __init__(
        self, max_bytes: int, directory: Directory | None = None, codec: str = "raw"
    ) -> None:
        self.max_bytes = max_bytes
        self.codec = codec
        self.directory = directory
        # Sentences of the directory, also once it is closed.
        self.messages = directory.messages if directory is not None else []
        self.now = 0
        self.dropped = 0
        self._tables: dict[bytes, Table] = {}
        # Bytes that rows may take of the memory of a device other than the CPU.
        self._shares: dict[torch.device, int] = {}
        # Elements of a row and their type, of the tables whose rows are rounded.
        self._rounded: dict[bytes, tuple[int, torch.dtype]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(table.nbytes for table in self._tables.values())

    def table(self, name: bytes) -> Table | None:
        """Returns the table of one kind of value, if there is one."""
        return self._tables.get(name)

    def open(
        self,
        name: bytes,
        dims: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        about: Mapping[str, Any],
    ) -> Table | None:
        """Returns the table of one kind of value, with its rows on the disk below it.

        Args:
            name: Hash of how the value is made.
            dims: Sizes of a row in the order of memory.
            dtype: Type of the elements.
            device: Device that the rows are kept on.
            about: What to say about the value, as plain JSON.

        Returns:
            The table, or None if nothing is kept on the disk.
        """
        if self.directory is None or name in self._tables:
            return self._tables.get(name)
        numel, stored = math.prod(dims), name
        row, written = Row(dims, str(dtype).removeprefix("torch.")), "raw"
        if self._rounds(dtype):
            row, stored = Row((encoded_numel(numel),), "int8"), _rounded_name(name)
            about = {**about, "codec": f"int8: a float32 scale for each {GROUP}, then the numbers"}
        elif self.codec == "zstd" and row.nbytes >= _LEAST_COMPRESSED:
            written = "zstd"
        try:
            below = self.directory.rows(stored, row, about, written)
        except ValueError:  # zarr has no such type
            return None
        return self._make(name, numel, dtype, device, below)

    def has(self, name: bytes) -> bool:
        """Returns whether there may be rows of one kind of value on the disk.

        Args:
            name: Hash of how the value is made.
        """
        if self.directory is None:
            return False
        rounded = self.codec == "int8" and self.directory.has(_rounded_name(name))
        return rounded or self.directory.has(name)

    def _rounds(self, dtype: torch.dtype) -> bool:
        return self.codec == "int8" and can_be_rounded(dtype)

    def _make(
        self,
        name: bytes,
        numel: int,
        dtype: torch.dtype,
        device: torch.device,
        below: Rows | None = None,
    ) -> Table:
        if self._rounds(dtype):
            self._rounded[name] = numel, dtype
            numel, dtype = encoded_numel(numel), torch.int8
        room = self.max_bytes // (max(numel * dtype.itemsize, 1) + _BESIDE)
        table = self._tables[name] = Table(numel, dtype, device, room, below)
        return table

    def _bound(self, table: Table) -> None:
        """Leaves most of the memory of a GPU to training. Further rows lie on the disk only."""
        device = table.device
        if device.type == "cpu":
            return
        if device not in self._shares:
            self._shares[device] = free_device_memory(device) // 4
        tables = [one for one in self._tables.values() if one.device == device]
        taken = sum(len(one) * one.row_bytes for one in tables)
        left = max(self._shares[device] - taken, 0)
        table.room = min(table.most, len(table) + left // table.row_bytes)

    def read(self, name: bytes, keys: np.ndarray, places: np.ndarray) -> Tensor | None:
        """Copies rows of one kind of value. Those on the disk come into memory if they have room.

        Args:
            name: Hash of how the value is made.
            keys: Keys of the rows, of shape (n, 2).
            places: Their places.

        Returns:
            Rows, of shape (n, elements of a row), or None if one is damaged or gone.
        """
        table = self._tables[name]
        if chunks := table.chunks(places):
            places = self._raise_up(table, keys, places, chunks)
            if (places < 0).any():
                return None
        rows = table.read(places, self.now)
        if rows is None or name not in self._rounded:
            return rows
        return decode(rows, *self._rounded[name])

    def prefetch(self, name: bytes, places: np.ndarray) -> None:
        """Has the system read rows of one kind of value ahead, where they lie on the disk only.

        It takes half a millisecond for a batch. Where rows are known some steps before they are
        read, a disk that is slower than memory works meanwhile.

        Args:
            name: Hash of how the value is made.
            places: Places of the rows, as they were found, in the order in which they are read.
        """
        table = self._tables.get(name)
        if table is not None and table.below is not None:
            table.below.expect(places[places >= BELOW] - BELOW)

    def _raise_up(
        self, table: Table, keys: np.ndarray, places: np.ndarray, chunks: list[int]
    ) -> np.ndarray:
        """Copies chunks into memory that have room there. Returns where the rows are then.

        A chunk is read as a whole when its first row is asked for, for its checksum is one of all.
        """
        assert table.below is not None
        self._bound(table)
        room = (self.max_bytes - self.nbytes) // table.below.chunk_bytes
        if room <= 0:
            return places
        lower = places[places >= BELOW]
        table.below.expect(lower - BELOW)
        for chunk in chunks[:room]:
            table.raise_up(chunk, self.now)
        return table.find(keys)

    def write(self, name: bytes, keys: np.ndarray, rows: Tensor) -> int:
        """Keeps rows of one kind of value.

        Args:
            name: Hash of how the value is made.
            keys: Keys of the rows, of shape (n, 2).
            rows: Rows, of shape (n, elements of a row).

        Returns:
            Number of rows that were not there before. Rows that cannot be rounded are not kept.
        """
        table = self._tables.get(name)
        if table is None:
            table = self._make(name, rows.shape[1], rows.dtype, rows.device)
        if name in self._rounded:
            # Masks are often infinite. Such rows are computed each time.
            finite = rows.isfinite().all(dim=1) & rows.float().isfinite().all(dim=1)
            keys, rows = keys[finite.cpu().numpy()], encode(rows[finite])
        self._bound(table)
        self.make_room(len(rows) * (table.row_bytes + _BESIDE))
        return table.write(keys, rows, self.now)

    def make_room(self, nbytes: int, held: int = 0) -> None:
        """Drops rows until so many bytes more have room.

        Args:
            nbytes: Bytes that are to be kept.
            held: Bytes that are kept elsewhere under the same limit.
        """
        while self._tables and self.nbytes + held + nbytes > self.max_bytes:
            used = np.concatenate([table.used() for table in self._tables.values()])
            if not used.size:
                return
            # An eighth at a time, for dropping costs a walk over all rows.
            oldest = np.partition(used, len(used) // 8)[len(used) // 8]
            for name, table in list(self._tables.items()):
                self.dropped += table.forget(int(oldest) + 1)
                if not len(table) and table.below is None:
                    del self._tables[name]

    def forget(self, names: Sequence[bytes], wrong: bool = False) -> None:
        """Drops all rows of some kinds of values from memory.

        Args:
            names: Hashes of how the values are made.
            wrong: Whether they are not what the model computes. Then those on the disk go, too.
        """
        for name in names:
            table = self._tables.pop(name, None)
            if wrong and table is not None and table.below is not None:
                table.below.forget()

    def close(self) -> None:
        """Frees all memory, and writes to the disk what is not there yet."""
        self._tables = {}
        self.max_bytes = 0
        if self.directory is not None:
            self.directory.close()
            self.directory = None


def _rounded_name(name: bytes) -> bytes:
    # A run that is exact never finds rounded rows.
    return xxhash.xxh3_128_digest(name + b"int8")


# Bytes of a row's key, its place in the index, and its time.
_BESIDE = 56
