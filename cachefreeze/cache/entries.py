"""Kept rows: a table for every kind of value, in memory and on the disk below it."""

import math
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np
import torch
import xxhash

from cachefreeze.cache.codec import GROUP, can_be_rounded, decode, encode, encoded_numel
from cachefreeze.device import free_device_memory
from cachefreeze.store import Directory, Row, Rows
from cachefreeze.store.index import Index, first_ones

Tensor = torch.Tensor


# Places from here on are those of rows on the disk.
_BELOW = 1 << 40
# Seconds after which rows that others have written are looked for again.
_LOOK_AGAIN = 2.0
# Bytes of a row. To find a compressed row takes 16 bytes of the file, and a frame has a head.
_LEAST_COMPRESSED = 1024


class Table:
    """Rows of one kind of value, by key.

    Memory of the CPU is asked for once, as much as the limit allows, and the system gives it page
    by page as rows are written: no row is copied because the table has grown.

    Args:
        row_numel: Number of elements of a row.
        dtype: Type of the elements.
        device: Device that the rows are kept on.
        room: Largest number of rows.
        below: The same rows on the disk, if they are kept there.

    Attributes:
        room: Largest number of rows now.
        most: Largest number of rows ever.
        row_bytes: Bytes of a row.
        below: The same rows on the disk, if they are kept there.
    """

    def __init__(
        self,
        row_numel: int,
        dtype: torch.dtype,
        device: torch.device,
        room: int,
        below: Rows | None = None,
    ) -> None:
        self.below = below
        self._looked = monotonic()
        self._index = Index()
        self.room = self.most = room
        self._rows = _reserve(room, row_numel, dtype, device)
        self._used = np.zeros(0, dtype=np.uint32)
        self.row_bytes = max(row_numel * dtype.itemsize, 1)

    def __len__(self) -> int:
        """Returns the number of rows in memory."""
        return len(self._index)

    @property
    def device(self) -> torch.device:
        """Device that the rows are kept on."""
        return self._rows.device

    @property
    def rows_kept(self) -> int:
        """Number of rows that are kept, in memory or on the disk. Most of them lie in both."""
        return max(len(self), len(self.below) if self.below is not None else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the rows and of what they are found by."""
        beside = self._index.nbytes + self._used.nbytes
        return len(self) * self.row_bytes + beside + (self.below.nbytes if self.below else 0)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place of each row, or -1.

        Args:
            keys: Keys of the rows, of shape (n, 2).
        """
        places = self._index.find(keys)
        if self.below is not None and (missing := np.flatnonzero(places < 0)).size:
            if monotonic() - self._looked > _LOOK_AGAIN:
                self.below.refresh()
                self._looked = monotonic()
            lower = self.below.find(keys[missing])
            places[missing] = np.where(lower < 0, -1, lower + _BELOW)
        return places

    def read(self, places: np.ndarray, now: int) -> Tensor | None:
        """Copies rows out of the table.

        Args:
            places: Places of the rows.
            now: Time at which they are used, as a number that grows.

        Returns:
            Rows, of shape (n, elements of a row), or None if one on the disk is damaged or gone.
        """
        if places.max(initial=0) < _BELOW:
            self._used[places] = now
            chosen = torch.from_numpy(places)
            return self._rows.index_select(0, chosen.to(self._rows.device))
        lower = places >= _BELOW
        found = torch.empty((len(places), self._rows.shape[1]), dtype=self._rows.dtype)
        memory = found.view(torch.uint8).numpy()
        assert self.below is not None
        # Places of rows in memory are none on the disk.
        good = self.below.read(np.where(lower, places - _BELOW, -1), memory)
        if not good[lower].all():
            return None
        found = found.to(self._rows.device)
        if not lower.all():
            upper = np.flatnonzero(~lower)
            self._used[places[upper]] = now
            rows = self._rows[torch.from_numpy(places[upper]).to(self._rows.device)]
            found[torch.from_numpy(upper).to(found.device)] = rows
        return found

    def write(self, keys: np.ndarray, rows: Tensor, now: int) -> int:
        """Copies those rows into the table that are not there yet.

        Args:
            keys: Keys of the rows, of shape (n, 2).
            rows: Rows, of shape (n, elements of a row).
            now: Time of the writing, as a number that grows.

        Returns:
            Number of rows that were not there. Those that have no room in memory are left out of
            it.
        """
        places = self.find(keys)
        missing = np.flatnonzero(places < 0)
        missing = missing[first_ones(keys[missing])]
        if self.below is not None and missing.size:
            taken = rows[torch.from_numpy(missing).to(rows.device)].cpu()
            self.below.append(keys[missing], taken.view(torch.uint8).numpy())
        self._put(keys, rows, missing, now)
        return len(missing)

    def chunks(self, places: np.ndarray) -> list[int]:
        """Returns the chunks on the disk that rows lie in, each once.

        Args:
            places: Places of the rows.
        """
        if self.below is None or places.max(initial=0) < _BELOW:
            return []
        return self.below.chunks(places[places >= _BELOW] - _BELOW)

    def raise_up(self, chunk: int, now: int) -> None:
        """Copies the rows of a chunk from the disk into memory.

        Args:
            chunk: What `chunks` has returned.
            now: Time of the writing, as a number that grows.
        """
        assert self.below is not None
        loaded = self.below.load(chunk)
        if loaded is not None:
            keys, memory = loaded
            rows = torch.from_numpy(memory).view(self._rows.dtype)
            self._put(keys, rows, np.flatnonzero(self._index.find(keys) < 0), now)

    def _put(self, keys: np.ndarray, rows: Tensor, new: np.ndarray, now: int) -> None:
        new = new[: self.room - len(self)]
        if not new.size:
            return
        self._grow(len(self) + len(new))
        places = self._index.add(keys[new])
        if places[-1] >= len(self._used):
            grown = np.zeros(max(2 * len(self._used), places[-1] + 1), dtype=np.uint32)
            grown[: len(self._used)] = self._used
            self._used = grown
        self._used[places] = now
        if new.size == len(rows):
            self._rows[places[0] : places[-1] + 1] = rows
        else:
            self._rows[places[0] : places[-1] + 1] = rows[torch.from_numpy(new).to(rows.device)]

    def _grow(self, count: int) -> None:
        if count > len(self._rows):
            size = min(max(count, 2 * len(self._rows)), self.room)
            grown = self._rows.new_empty((size, self._rows.shape[1]))
            grown[: len(self._rows)] = self._rows
            self._rows = grown

    def used(self) -> np.ndarray:
        """Returns when each row was used last."""
        return self._used[: len(self)]

    def forget(self, before: int) -> int:
        """Drops the rows that were not used since some time. Returns their number.

        Args:
            before: Rows last used before this time are dropped.
        """
        stay = np.flatnonzero(self.used() >= before)
        dropped = len(self) - len(stay)
        if dropped:
            # Piece by piece from the front: no piece is written before it was read.
            for start in range(0, len(stay), _PIECE):
                piece = torch.from_numpy(stay[start : start + _PIECE]).to(self._rows.device)
                self._rows[start : start + len(piece)] = self._rows.index_select(0, piece)
            self._used = self._used[stay]
            self._index.keep(stay)
        return dropped


_PIECE = 1024


def _reserve(room: int, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    while room and device.type == "cpu":
        try:
            # Not `torch.empty`, which writes to all of it where algorithms must be deterministic.
            memory = np.empty((room, numel * dtype.itemsize), dtype=np.uint8)
        except MemoryError:
            # The system does not promise that much. What there is grows by copies.
            room //= 2
        else:
            return torch.from_numpy(memory).view(dtype)
    return torch.empty((0, numel), dtype=dtype, device=device)


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

    def prefetch(self, name: bytes, keys: np.ndarray) -> None:
        """Has the system read rows of one kind of value ahead, where they lie on the disk only.

        It takes half a millisecond for a batch. Where rows are known some steps before they are
        read, a disk that is slower than memory works meanwhile.

        Args:
            name: Hash of how the value is made.
            keys: Keys of the rows, of shape (n, 2), in the order in which they are read.
        """
        table = self._tables.get(name)
        if table is not None and table.below is not None:
            places = table.find(keys)
            table.below.expect(places[places >= _BELOW] - _BELOW)

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
        lower = places[places >= _BELOW]
        table.below.expect(lower - _BELOW)
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
