"""Kept rows of all kinds of values, in memory and on disk."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from cachefreeze.cache.codec import GROUP, can_be_rounded, decode, encode, encoded_numel
from cachefreeze.cache.deferred_writes import Check, DeferredWrites
from cachefreeze.cache.memory import free_device_memory
from cachefreeze.cache.row_table import RowTable
from cachefreeze.lineage.devices import queue_of
from cachefreeze.store import Directory, Row

Tensor = torch.Tensor

# Smallest row, in bytes, that is compressed. A compressed row takes 16 bytes more in the index of
# the file, and has a header.
_LEAST_COMPRESSED = 1024
# Number of bytes of a row's key, its place in the index, and its time of use.
_BESIDE = 56


class Entries:
    """All kept rows under one limit. The least recently used rows are dropped first.

    The name of a table is a hash of how its values are made. Keys have shape (n, 2), places (n,),
    and rows (n, elements of a row).

    Args:
        max_bytes: Largest number of bytes of memory, including the index.
        directory: Directory that rows are written to. None if they are kept in memory only.
        codec: Format of kept rows, one of `codec.CODECS`. "zstd" is used on disk, "int8"
            everywhere.

    Attributes:
        messages: Sentences of the directory for the user. They stay after `close`.
        now: Number of the present batch. Tables note it as the last use of a row.
        dropped: Number of rows that were dropped to make room.
    """

    def __init__(
        self, max_bytes: int, directory: Directory | None = None, codec: str = "raw"
    ) -> None:
        self.max_bytes = max_bytes
        self.codec = codec
        self.directory = directory
        self.messages = directory.messages if directory is not None else []
        self.now = 0
        self.dropped = 0
        self._tables: dict[bytes, RowTable] = {}
        # Number of bytes that rows may take on each device other than the CPU.
        self._shares: dict[torch.device, int] = {}
        # Number of elements of a row, and their dtype, for each table of rounded rows.
        self._rounded: dict[bytes, tuple[int, torch.dtype]] = {}

    @property
    def nbytes(self) -> int:
        """Number of bytes of memory of everything that is kept."""
        return sum(table.nbytes for table in self._tables.values())

    def table(self, name: bytes) -> RowTable | None:
        """Returns the table of that name, or None if there is none."""
        return self._tables.get(name)

    def open(
        self,
        name: bytes,
        dims: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        about: Mapping[str, Any],
        check: Callable[[], Check] | None = None,
    ) -> RowTable | None:
        """Returns the table of one kind of value, together with its rows on disk.

        Args:
            name: Hash of how the value is made.
            dims: Shape of a row, its dimensions in the order of memory.
            dtype: Type of the elements.
            device: Device that the rows are kept on.
            about: Description of the value for people, as plain JSON.
            check: Function that asks whether the frozen bits are those in the name. It is called
                before rows are written to disk. If None, rows are written at once.

        Returns:
            Table, or None if nothing is kept on disk.
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
        return self._make(name, numel, dtype, device, DeferredWrites(below, check))

    def has(self, name: bytes) -> bool:
        """Returns whether there may be rows of one kind of value on disk."""
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
        writes: DeferredWrites | None = None,
    ) -> RowTable:
        if self._rounds(dtype):
            self._rounded[name] = numel, dtype
            numel, dtype = encoded_numel(numel), torch.int8
        room = self.max_bytes // (max(numel * dtype.itemsize, 1) + _BESIDE)
        table = self._tables[name] = RowTable(numel, dtype, device, room, writes)
        return table

    def _bound(self, table: RowTable) -> None:
        """Limits the rows on a GPU to a quarter of its free memory. Others are in host memory."""
        device = table.device
        if device.type == "cpu" and queue_of(device) is None:
            return
        if device not in self._shares:
            self._shares[device] = free_device_memory(device) // 4
        tables = [one for one in self._tables.values() if one.device == device]
        taken = sum(one.rows_on_device * one.row_bytes for one in tables if one is not table)
        table.bound_on_device(max(self._shares[device] - taken, 0) // table.row_bytes)

    def read(self, name: bytes, keys: np.ndarray, places: np.ndarray) -> Tensor | None:
        """Copies rows of one kind of value. Rows on disk are brought into memory if there is room.

        Returns:
            Rows, of shape (n, elements of a row), or None if one is damaged or gone.
        """
        table = self._tables[name]
        if chunks := table.chunks(places):
            places = self._load_chunks(table, keys, places, chunks)
            if (places < 0).any():
                return None
        rows = table.read(places, self.now)
        if rows is None or name not in self._rounded:
            return rows
        return decode(rows, *self._rounded[name])

    def prefetch(self, name: bytes, places: np.ndarray) -> None:
        """Reads rows in advance: from disk, or from host memory for a GPU.

        To ask the system for rows from disk takes half a millisecond for a batch. Rows are often
        known some steps before they are used, and a slow disk can read them in the meantime.

        Args:
            name: Hash of how the value is made.
            places: Places of the rows, in the order in which they will be read.
        """
        table = self._tables.get(name)
        if table is not None:
            table.expect(places)

    def _load_chunks(
        self, table: RowTable, keys: np.ndarray, places: np.ndarray, chunks: list[int]
    ) -> np.ndarray:
        """Brings as many chunks into memory as there is room for. Returns the new places of rows.

        A chunk is read as a whole when its first row is used, because its checksum covers all of
        it.
        """
        assert table.below is not None
        self._bound(table)
        room = (self.max_bytes - self.nbytes) // table.below.chunk_bytes
        if room <= 0:
            return places
        table.expect(places)
        for chunk in chunks[:room]:
            table.load_chunk(chunk, self.now)
        return table.find(keys)

    def write(self, name: bytes, keys: np.ndarray, rows: Tensor) -> int:
        """Keeps rows of one kind of value.

        Returns:
            Number of rows that were new. Rows that cannot be rounded are not kept.
        """
        table = self._tables.get(name)
        if table is None:
            table = self._make(name, rows.shape[1], rows.dtype, rows.device)
        if name in self._rounded:
            # Attention masks often contain infinity. Such rows are computed each time.
            finite = rows.isfinite().all(dim=1) & rows.float().isfinite().all(dim=1)
            keys, rows = keys[finite.cpu().numpy()], encode(rows[finite])
        self._bound(table)
        self.make_room(len(rows) * (table.row_bytes + _BESIDE))
        return table.write(keys, rows, self.now)

    def make_room(self, nbytes: int, held: int = 0) -> None:
        """Drops rows until there is room.

        Args:
            nbytes: Number of bytes that are needed.
            held: Number of bytes that are kept elsewhere under the same limit.
        """
        while self._tables and self.nbytes + held + nbytes > self.max_bytes:
            used = np.concatenate([table.used() for table in self._tables.values()])
            if not used.size:
                return
            # An eighth of the rows at a time, because dropping moves all others.
            oldest = np.partition(used, len(used) // 8)[len(used) // 8]
            for name, table in list(self._tables.items()):
                self.dropped += table.forget(int(oldest) + 1)
                if not len(table) and table.below is None:
                    del self._tables[name]

    def forget(self, names: Sequence[bytes], wrong: bool = False) -> None:
        """Drops all rows of some kinds of values from memory.

        Args:
            names: Hashes of how the values are made.
            wrong: Whether the rows are wrong. If True, those on disk are not used any more either.
        """
        for name in names:
            table = self._tables.pop(name, None)
            if wrong and table is not None and table.writes is not None:
                table.writes.forget()

    def close(self) -> None:
        """Frees all memory, and writes waiting rows to disk."""
        self._tables = {}
        self.max_bytes = 0
        if self.directory is not None:
            self.directory.close()
            self.directory = None


def _rounded_name(name: bytes) -> bytes:
    # Rounded rows have another name, so that an exact run never finds them.
    return xxhash.xxh3_128_digest(name + b"int8")
