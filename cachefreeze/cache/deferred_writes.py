"""Writes rows to disk only after all frozen parameters were hashed again."""

from collections.abc import Callable

import numpy as np

from cachefreeze.store import Rows

# Number of batches, and number of bytes, that wait for one hash of all frozen bits.
_MOST, _LARGE = 8, 1 << 23


class DeferredWrites:
    """Appends rows to those on disk, some batches at a time.

    Rows on disk have a name that contains the frozen bits. If these have changed unnoticed, later
    runs would find rows under a wrong name. So all bits are hashed before rows are written. This is
    done for some batches at once, because it takes as long as reading all parameters.

    Args:
        rows: Rows on disk.
        is_same: Function that returns whether the frozen bits are those in the name of the rows. If
            None, rows are written at once.
    """

    def __init__(self, rows: Rows, is_same: Callable[[], bool] | None = None) -> None:
        self.rows = rows
        self._is_same = is_same
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Adds rows to those that wait, and writes them if they are many."""
        self._waiting.append((keys, rows))
        size = sum(one.nbytes for _, one in self._waiting)
        if self._is_same is None or len(self._waiting) >= _MOST or size >= _LARGE:
            self.write()

    def write(self) -> None:
        """Writes the rows that wait, or drops them if frozen bits have changed."""
        waiting, self._waiting = self._waiting, []
        if waiting and (self._is_same is None or self._is_same()):
            for keys, rows in waiting:
                self.rows.append(keys, rows)

    def publish(self) -> None:
        """Writes the rows that wait here and in the store, so that other processes find them."""
        self.write()
        self.rows.publish()

    def withdraw(self) -> None:
        """Removes all rows that this run has written, and those that wait."""
        self._waiting = []
        self.rows.withdraw()

    def forget(self) -> None:
        """Marks all rows as wrong: none is served or written any more."""
        self._waiting = []
        self.rows.forget()
