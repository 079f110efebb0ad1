"""Rows on their way to the disk: they are written once frozen bits are found to be the same."""

from collections.abc import Callable

import numpy as np

from cachefreeze.store import Rows

# Number of batches, and bytes, that wait for one hash of all frozen bits.
_MOST, _LARGE = 8, 1 << 23


class DeferredWrites:
    """Appends rows to those on the disk, some batches at a time.

    A change of frozen bits that no look has seen yet would be found by later runs under a name that
    is not its own. So all bits are hashed before some batches are written, and not for each of
    them.

    Args:
        rows: Rows on the disk.
        is_same: Function that says whether the bits are those in the name of the rows. If None,
            nothing waits.

    Attributes:
        rows: Rows on the disk.
    """

    def __init__(self, rows: Rows, is_same: Callable[[], bool] | None = None) -> None:
        self.rows = rows
        self._is_same = is_same
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Has rows written with those that follow."""
        self._waiting.append((keys, rows))
        size = sum(one.nbytes for _, one in self._waiting)
        if self._is_same is None or len(self._waiting) >= _MOST or size >= _LARGE:
            self.write()

    def write(self) -> None:
        """Writes the rows that wait, or drops them if bits have changed."""
        waiting, self._waiting = self._waiting, []
        if waiting and (self._is_same is None or self._is_same()):
            for keys, rows in waiting:
                self.rows.append(keys, rows)

    def withdraw(self) -> None:
        """Removes what was written here, and writes nothing more."""
        self._waiting = []
        self.rows.withdraw()

    def forget(self) -> None:
        """Serves and writes none of these rows any more."""
        self._waiting = []
        self.rows.forget()
