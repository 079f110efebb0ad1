"""Rows of one kind of value, in memory and on disk."""

from time import monotonic

import numpy as np
import torch

from cachefreeze.cache.deferred_writes import DeferredWrites
from cachefreeze.cache.memory import has_address_limit
from cachefreeze.lineage.devices import HostCopy, to_device
from cachefreeze.store.index import Index, first_ones

Tensor = torch.Tensor


# Places of rows on disk are counted from here.
BELOW = 1 << 40
# Seconds after which rows that other processes have written are looked for again. The time doubles
# from the first to the second number after each epoch, when other processes write theirs.
_SOON, _LATE = 0.01, 2.0


class RowTable:
    """Rows of one kind of value, found by key.

    Keys have shape (n, 2), places (n,), and rows (n, elements of a row). Time is counted in
    batches, so `now` is the number of the present batch.

    On the CPU, memory for all rows that may be kept is reserved at once. The system provides it
    page by page as rows are written, so no row is copied when the table grows.

    Args:
        row_numel: Number of elements of a row.
        dtype: Type of the elements.
        device: Device that the rows are kept on.
        room: Largest number of rows in memory.
        writes: Writer of the same rows on disk. None if they are kept in memory only.

    Attributes:
        room: Largest number of rows in memory at present. It is lower on a GPU with little memory.
        most: Largest number of rows in memory at any time.
        row_bytes: Number of bytes of a row.
        below: Rows on disk. None if rows are kept in memory only.
    """

    def __init__(
        self,
        row_numel: int,
        dtype: torch.dtype,
        device: torch.device,
        room: int,
        writes: DeferredWrites | None = None,
    ) -> None:
        self.writes = writes
        self.below = writes.rows if writes is not None else None
        self._looked, self._wait = monotonic(), _SOON
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
        """Number of rows in memory or on disk. Most rows are in both."""
        return max(len(self), len(self.below) if self.below is not None else 0)

    @property
    def nbytes(self) -> int:
        """Number of bytes of memory of the rows and of the index."""
        beside = self._index.nbytes + self._used.nbytes
        return len(self) * self.row_bytes + beside + (self.below.nbytes if self.below else 0)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place of each row, or -1 if it is unknown."""
        places = self._index.find(keys)
        if self.writes is not None:
            self.writes.proceed()
        if self.below is not None and (missing := np.flatnonzero(places < 0)).size:
            if monotonic() - self._looked > self._wait:
                self.below.refresh()
                self._looked, self._wait = monotonic(), min(2 * self._wait, _LATE)
            lower = self.below.find(keys[missing])
            places[missing] = np.where(lower < 0, -1, lower + BELOW)
        return places

    def read(self, places: np.ndarray, now: int) -> Tensor | None:
        """Copies rows out of the table.

        Returns:
            Rows, of shape (n, elements of a row), or None if a row on disk is damaged or gone.
        """
        if places.max(initial=0) < BELOW:
            self._used[places] = now
            return self._rows.index_select(0, to_device(places, self._rows.device))
        lower = places >= BELOW
        found = torch.empty((len(places), self._rows.shape[1]), dtype=self._rows.dtype)
        memory = found.view(torch.uint8).numpy()
        assert self.below is not None
        # Rows in memory have the place -1 on disk.
        good = self.below.read(np.where(lower, places - BELOW, -1), memory)
        if not good[lower].all():
            return None
        found = to_device(found, self._rows.device)
        if not lower.all():
            upper = np.flatnonzero(~lower)
            self._used[places[upper]] = now
            rows = self._rows[to_device(places[upper], self._rows.device)]
            found[to_device(upper, found.device)] = rows
        return found

    def write(self, keys: np.ndarray, rows: Tensor, now: int) -> int:
        """Adds the rows that are not in the table yet.

        Returns:
            Number of rows that were not in the table. Those that do not fit in memory are on disk
            only, or are dropped if there is no disk.
        """
        places = self.find(keys)
        missing = np.flatnonzero(places < 0)
        missing = missing[first_ones(keys[missing])]
        if self.writes is not None and missing.size:
            taken = rows[to_device(missing, rows.device)]
            self.writes.append(keys[missing], HostCopy(taken.view(torch.uint8)))
        self._put(keys, rows, missing, now)
        return len(missing)

    def publish(self) -> None:
        """Writes all rows to disk, and looks more often for those of others for a while."""
        if self.writes is not None:
            self.writes.publish()
            self._wait = _SOON

    def chunks(self, places: np.ndarray) -> list[int]:
        """Returns the chunks on disk that contain rows, each once."""
        if self.below is None or places.max(initial=0) < BELOW:
            return []
        return self.below.chunks(places[places >= BELOW] - BELOW)

    def load_chunk(self, chunk: int, now: int) -> None:
        """Copies the rows of a chunk from disk into memory."""
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
        new = new[: self.room - len(self)]
        if not new.size:
            return
        places = self._index.add(keys[new])
        if places[-1] >= len(self._used):
            grown = np.zeros(max(2 * len(self._used), places[-1] + 1), dtype=np.uint32)
            grown[: len(self._used)] = self._used
            self._used = grown
        self._used[places] = now
        if new.size == len(rows):
            self._rows[places[0] : places[-1] + 1] = rows
        else:
            self._rows[places[0] : places[-1] + 1] = rows[to_device(new, rows.device)]

    def _grow(self, count: int) -> None:
        if count > len(self._rows):
            size = min(max(count, 2 * len(self._rows)), self.room)
            try:
                grown = self._rows.new_empty((size, self._rows.shape[1]))
            except (MemoryError, RuntimeError):
                # The limit was set before somebody else took the memory, or `ulimit -v` later.
                self.room = self.most = len(self._rows)
                return
            grown[: len(self._rows)] = self._rows
            self._rows = grown

    def used(self) -> np.ndarray:
        """Returns the number of the batch that has used each row in memory last."""
        return self._used[: len(self)]

    def forget(self, before: int) -> int:
        """Drops rows from memory. Returns their number.

        Args:
            before: Number of a batch. Rows that were used last before it are dropped.
        """
        stay = np.flatnonzero(self.used() >= before)
        dropped = len(self) - len(stay)
        if dropped:
            # In pieces from the front, so that no row is overwritten before it was moved.
            for start in range(0, len(stay), _PIECE):
                piece = to_device(stay[start : start + _PIECE], self._rows.device)
                self._rows[start : start + len(piece)] = self._rows.index_select(0, piece)
            self._used = self._used[stay]
            self._index.keep(stay)
        return dropped


_PIECE = 1024


def _reserve(room: int, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Addresses that are reserved count under a limit of addresses.
    while room and device.type == "cpu" and not has_address_limit():
        try:
            # `torch.empty` would write to all of it if deterministic algorithms are on.
            memory = np.empty((room, numel * dtype.itemsize), dtype=np.uint8)
        except MemoryError:
            # The system does not reserve that much. A smaller table grows by copying.
            room //= 2
        else:
            return torch.from_numpy(memory).view(dtype)
    return torch.empty((0, numel), dtype=dtype, device=device)
