"""What is checked of the rows that are served, and what was found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cachefreeze.keys.bits import bits_of
from cachefreeze.store.files import human_bytes

Tensor = torch.Tensor

# How much is checked beyond what must be.
VERIFY = ("off", "sample", "all")


@dataclass
class Report:
    """What was checked of kept rows, and what was found.

    Attributes:
        verify: How much is checked: "off", "sample" or "all".
        batches_compared: Batches that could be served and were computed and compared.
        rows_compared: Rows of them.
        rows_served: Rows that were served.
        bytes_hashed: Bytes of frozen parameters and buffers that were hashed.
        seconds: Seconds that comparing and hashing beyond what must be has taken.
        changes: Number of times that frozen bits were found to be others than before.
        found: Sentences about rows that differed, and about changes that were found late.
    """

    verify: str = "sample"
    batches_compared: int = 0
    rows_compared: int = 0
    rows_served: int = 0
    bytes_hashed: int = 0
    seconds: float = 0.0
    changes: int = 0
    found: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Says what was checked and found, in a few lines."""
        times = f"{self.changes} times" if self.changes != 1 else "once"
        moved = f"changed {times}" if self.changes else "never changed"
        checked = (
            f"verify={self.verify!r}: {self.rows_compared:,} rows in {self.batches_compared:,} "
            f"batches were computed and compared, beside {self.rows_served:,} served ones; "
            f"{human_bytes(self.bytes_hashed)} of frozen weights were hashed, which {moved}; "
            f"{self.seconds:.1f} s."
        )
        found = [f"- {sentence}" for sentence in self.found]
        return "\n".join([checked, *(found or ["No row differed."])])


def rows_that_differ(computed: Tensor, stored: Tensor) -> str:
    """Names the first row in which two values differ, for people.

    Args:
        computed: Rows that were computed, of shape (rows, elements of a row).
        stored: The same rows, as they were kept.
    """
    count = len(computed)
    one, other = (bits_of(rows).reshape(count, -1) for rows in (computed, stored))
    different = (one != other).any(1).nonzero().flatten().tolist()
    return f"row {different[0]} of the batch and {len(different) - 1} others of its {count}"


class Unwritten:
    """Rows on their way to the disk: they are written once frozen bits are found to be the same.

    A change that no look has seen yet would be found by later runs under a name that is not its
    own. So all bits are hashed before some batches are written, and not for each of them.

    Args:
        rows: Rows on the disk, to which everything else is handed on.
        is_same: Function that says whether the bits are those in the name of the rows.
    """

    def __init__(self, rows: Any, is_same: Callable[[], bool]) -> None:
        self._rows = rows
        self._is_same = is_same
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        """Returns the number of rows on the disk."""
        return len(self._rows)

    def __getattr__(self, name: str) -> Any:
        """Hands on to the rows on the disk."""
        return getattr(self._rows, name)

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Has rows written with those that follow."""
        self._waiting.append((keys, rows))
        if len(self._waiting) >= _MOST or sum(one.nbytes for _, one in self._waiting) >= _LARGE:
            self.write()

    def write(self) -> None:
        """Writes the rows that wait, or drops them if bits have changed."""
        waiting, self._waiting = self._waiting, []
        if waiting and self._is_same():
            for keys, rows in waiting:
                self._rows.append(keys, rows)

    def withdraw(self) -> None:
        """Removes what was written here, and writes nothing more."""
        self._waiting = []
        self._rows.withdraw()

    def forget(self) -> None:
        """Serves and writes none of these rows any more."""
        self._waiting = []
        self._rows.forget()


# Number of batches, and bytes, that wait for one hash of all frozen bits.
_MOST, _LARGE = 8, 1 << 23
