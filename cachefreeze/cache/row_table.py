"""Rows of one kind of value, in memory and on disk."""

from time import monotonic

import numpy as np
import torch

from cachefreeze.cache.deferred_writes import DeferredWrites
from cachefreeze.cache.row_memory import RowMemory
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

    Args:
        row_numel: Number of elements of a row.
        dtype: Type of the elements.
        device: Device that the rows are kept on.
        room: Largest number of rows in memory.
        writes: Writer of the same rows on disk. None if they are kept in memory only.

    Attributes:
        room: Largest number of rows in memory.
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
        self.room = room
        self._rows = RowMemory(row_numel, dtype, device, room)
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
            return self._rows.read(places)
        lower = places >= BELOW
        found = torch.empty((len(places), self._rows.numel), dtype=self._rows.dtype)
        memory = found.view(torch.uint8).numpy()
        assert self.below is not None
        # Rows in memory have the place -1 on disk.
        good = self.below.read(np.where(lower, places - BELOW, -1), memory)
        if not good[lower].all():
            return None
        found = to_device(found, self.device)
        if not lower.all():
            upper = np.flatnonzero(~lower)
            self._used[places[upper]] = now
            found[to_device(upper, self.device)] = self._rows.read(places[upper])
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

    def bound_on_device(self, most: int) -> None:
        """Limits the rows on a GPU. Further ones are kept in host memory."""
        self._rows.device_room = most

    @property
    def rows_on_device(self) -> int:
        """Number of rows that there is memory for on their device."""
        return self._rows.on_device

    def expect(self, places: np.ndarray) -> None:
        """Starts to read rows in advance: those on disk, and those in host memory for a GPU."""
        if places.max(initial=0) < BELOW:
            self._rows.expect(places)
        elif self.below is not None:
            self.below.expect(places[places >= BELOW] - BELOW)

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
        there = self._rows.grow(len(self) + len(new), self.room)
        if there < len(self) + len(new):
            self.room = there
        new = new[: self.room - len(self)]
        if not new.size:
            return
        places = self._index.add(keys[new])
        if places[-1] >= len(self._used):
            grown = np.zeros(max(2 * len(self._used), places[-1] + 1), dtype=np.uint32)
            grown[: len(self._used)] = self._used
            self._used = grown
        self._used[places] = now
        chosen = rows if new.size == len(rows) else rows[to_device(new, rows.device)]
        self._rows.write(places[0], chosen)

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
            self._rows.keep(stay)
            self._used = self._used[stay]
            self._index.keep(stay)
        return dropped
