"""Kept rows in memory: a table for every kind of value, and a limit for all of them together."""

from collections.abc import Sequence

import numpy as np
import torch

from cachefreeze.segments.index import Index, first_ones

Tensor = torch.Tensor


class Table:
    """Rows of one kind of value, by key.

    Memory of the CPU is asked for once, as much as the limit allows, and the system gives it page
    by page as rows are written: no row is copied because the table has grown.

    Args:
        row_numel: Number of elements of a row.
        dtype: Type of the elements.
        device: Device that the rows are kept on.
        room: Largest number of rows.

    Attributes:
        room: Largest number of rows.
        row_bytes: Bytes of a row.
    """

    def __init__(self, row_numel: int, dtype: torch.dtype, device: torch.device, room: int) -> None:
        self._index = Index()
        self.room = room
        self._rows = _reserve(room, row_numel, dtype, device)
        self._used = np.zeros(0, dtype=np.uint32)
        self.row_bytes = max(row_numel * dtype.itemsize, 1)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and of what they are found by."""
        return len(self) * self.row_bytes + self._index.nbytes + self._used.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place of each row, or -1.

        Args:
            keys: Keys of the rows, of shape (n, 2).
        """
        return self._index.find(keys)

    def read(self, places: np.ndarray, now: int) -> Tensor:
        """Copies rows out of the table.

        Args:
            places: Places of the rows.
            now: Time at which they are used, as a number that grows.
        """
        self._used[places] = now
        chosen = torch.from_numpy(places)
        if self._rows.device.type != "cpu":
            chosen = chosen.to(self._rows.device)
        return self._rows.index_select(0, chosen)

    def write(self, keys: np.ndarray, rows: Tensor, now: int) -> int:
        """Copies those rows into the table that are not there yet.

        Args:
            keys: Keys of the rows, of shape (n, 2).
            rows: Rows, of shape (n, elements of a row).
            now: Time of the writing, as a number that grows.

        Returns:
            Number of rows that were written. Rows that have no room are left out.
        """
        new = np.flatnonzero(self.find(keys) < 0)
        new = new[first_ones(keys[new])][: self.room - len(self)]
        if not new.size:
            return 0
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
        return int(new.size)

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
    if device.type != "cpu":
        return torch.empty((0, numel), dtype=dtype, device=device)
    while True:
        try:
            # Not `torch.empty`, which writes to all of it where algorithms must be deterministic.
            memory = np.empty((room, numel * dtype.itemsize), dtype=np.uint8)
        except MemoryError:
            # The system does not promise that much. What there is grows by copies.
            room //= 2
        else:
            return torch.from_numpy(memory).view(dtype)


class Entries:
    """All kept rows, under one limit. The rows that were not used for longest go first.

    Args:
        max_bytes: Largest number of bytes, with what rows are found by.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.now = 0
        self.dropped = 0
        self._tables: dict[bytes, Table] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(table.nbytes for table in self._tables.values())

    def table(self, name: bytes) -> Table | None:
        """Returns the table of one kind of value, if there is one."""
        return self._tables.get(name)

    def write(self, name: bytes, keys: np.ndarray, rows: Tensor) -> int:
        """Keeps rows of one kind of value.

        Args:
            name: Hash of how the value is made.
            keys: Keys of the rows, of shape (n, 2).
            rows: Rows, of shape (n, elements of a row).

        Returns:
            Number of rows that were not there before.
        """
        table = self._tables.get(name)
        if table is None:
            numel = rows.shape[1]
            size = max(numel * rows.element_size(), 1)
            room = self.max_bytes // (size + _BESIDE)
            table = Table(numel, rows.dtype, rows.device, room)
            self._tables[name] = table
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
                self._tables.clear()
                return
            # An eighth at a time, for dropping costs a walk over all rows.
            oldest = np.partition(used, len(used) // 8)[len(used) // 8]
            for name, table in list(self._tables.items()):
                self.dropped += table.forget(int(oldest) + 1)
                if not len(table):
                    del self._tables[name]

    def forget(self, names: Sequence[bytes]) -> None:
        """Drops all rows of some kinds of values."""
        for name in names:
            self._tables.pop(name, None)


# Bytes of a row's key, its place in the index, and its time.
_BESIDE = 40
