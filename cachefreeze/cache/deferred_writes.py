"""Writes rows to disk only after all frozen parameters were hashed again."""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from cachefreeze.lineage.devices import HostCopy
from cachefreeze.store import Rows

# Number of batches, and number of bytes, that wait for one hash of all frozen bits. A GPU computes
# batches so fast that more of them wait, or the hashes would take a large share of its time.
_MOST, _LARGE = 8, 1 << 23
_LONGER = 8

_Batch = tuple[np.ndarray, HostCopy]


class Check(Protocol):
    """Answer to the question whether frozen bits are those in the name of rows."""

    @property
    def is_there(self) -> bool:
        """Whether the answer is there."""
        ...

    def get(self) -> bool:
        """Returns the answer. Waits until it is there."""
        ...


class DeferredWrites:
    """Appends rows to those on disk, some batches at a time.

    Rows on disk have a name that contains the frozen bits. If these have changed unnoticed, later
    runs would find rows under a wrong name. So all bits are hashed before rows are written. This is
    done for some batches at once, because it takes as long as reading all parameters.

    Args:
        rows: Rows on disk.
        check: Function that asks whether the frozen bits are those in the name of the rows. If
            None, rows are written without a check.
    """

    def __init__(self, rows: Rows, check: Callable[[], Check] | None = None) -> None:
        self.rows = rows
        self._check = check
        self._waiting: list[_Batch] = []
        self._publishes = False
        # Batches whose check is under way, on a GPU.
        self._checked: deque[tuple[Check, list[_Batch]]] = deque()

    def append(self, keys: np.ndarray, rows: HostCopy) -> None:
        """Adds rows to those that wait, and writes them if they are many.

        Args:
            keys: Keys of the rows, of shape (rows, 2).
            rows: Bytes of the rows, which may still be on their way from a device.
        """
        self._waiting.append((keys, rows))
        size = sum(one.nbytes for _, one in self._waiting)
        times = _LONGER if rows.from_device else 1
        if self._check is None or len(self._waiting) >= _MOST * times or size >= _LARGE * times:
            self._begin()
        self._end(wait=not rows.from_device)

    def write(self) -> None:
        """Writes the rows that wait, or drops them if frozen bits have changed."""
        self._begin()
        self._end(wait=True)

    def _begin(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and self._check is not None:
            self._checked.append((self._check(), waiting))
        for keys, rows in waiting if self._check is None else ():
            self.rows.append(keys, rows.get().numpy())

    def _end(self, wait: bool) -> None:
        while self._checked and (wait or self._checked[0][0].is_there):
            check, waiting = self._checked.popleft()
            for keys, rows in waiting if check.get() else ():
                self.rows.append(keys, rows.get().numpy())
        if self._publishes and not self._checked:
            self._publishes = False
            self.rows.publish()

    def publish(self) -> None:
        """Writes the rows that wait here and in the store, so that other processes find them.

        If a check is under way on a GPU, this is done when `proceed` finds its answer.
        """
        self._publishes = True
        self._begin()
        self._end(wait=False)

    def proceed(self) -> None:
        """Writes the rows of which a check has ended."""
        if self._checked or self._publishes:
            self._end(wait=False)

    def withdraw(self) -> None:
        """Removes all rows that this run has written, and those that wait."""
        self._drop()
        self.rows.withdraw()

    def forget(self) -> None:
        """Marks all rows as wrong: none is served or written any more."""
        self._drop()
        self.rows.forget()

    def _drop(self) -> None:
        self._waiting = []
        self._checked.clear()
