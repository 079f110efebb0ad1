"""What is known of the rows of a kind of call: whether they come again, and what was compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cachefreeze.store.index import Index, distinct

_LEAST_PROBATION, _MOST_PROBATION = 2, 8
# Wholly known batches must be more than one in so many, among at least so many.
_RARE, _FEW = 50, 16


@dataclass(eq=False)
class RowHistory:
    """What traces have in common that differ in nothing but the length that rows are padded to.

    Attributes:
        seen: Rows that came, until rows come again, by what is made from them.
        again: Whether rows have come again.
        batches: Number of batches.
        after: Number of batches since rows have come again.
        known: Number of those all of whose rows were known.
        passed: Number of batches that were compared.
        wanted: Number of batches that are compared before any is served.
        epoch: Number of batches before rows came again.
        traces: Number of traces.
        left_alone: Number of batches that nothing was kept of, for the sake of time.
        rows: Number of rows that came.
        rows_again: Number of those that had come before.
        broken: Whether padding was found to change rows by more than rounding.
    """

    seen: dict[bytes, Index] = field(default_factory=dict)
    again: bool = False
    batches: int = 0
    after: int = 0
    known: int = 0
    passed: int = 0
    wanted: int = 0
    epoch: int = 0
    traces: int = 0
    left_alone: int = 0
    rows: int = 0
    rows_again: int = 0
    broken: bool = False

    def note(self, keys: Sequence[tuple[bytes, np.ndarray]]) -> bool:
        """Notes the rows of a batch. Says whether half of those of one input were there before.

        A stray one proves nothing: in mixup, some rows are mixed with themselves.

        Args:
            keys: Keys of the rows, each with a name of what is made from them.
        """
        found = []
        for kind, wanted in keys:
            index = self.seen.setdefault(kind, Index())
            found.append((index, wanted, wanted[index.find(wanted) < 0]))
        self.count(*((len(wanted), len(wanted) - len(new)) for _, wanted, new in found[:1]))
        for index, _, new in found:
            # Left and right of a pair may be one row.
            index.add(distinct(new if len(found) == 1 else new[index.find(new) < 0]))
        return any(2 * len(new) <= len(wanted) for _, wanted, new in found)

    def count(self, *batches: tuple[int, int]) -> None:
        """Counts the rows of batches, and those of them that had come before."""
        for rows, again in batches:
            self.rows += rows
            self.rows_again += again

    @property
    def share_again(self) -> str:
        """Share of the rows that had come before, for people."""
        return f"{self.rows_again / max(self.rows, 1):.1%} of {self.rows:,} rows had come before"

    def begin(self, probation: int | None, is_known: bool = False) -> None:
        """Notes that rows have come again.

        Args:
            probation: Number of batches to compare. None for a quarter of those before.
            is_known: Whether what rows are made from was compared before, when less was frozen.
        """
        if not self.again:
            self.again, self.epoch, self.seen = True, self.batches - 1, {}
            few = min(max(self.epoch // 4, _LEAST_PROBATION), _MOST_PROBATION)
            few = _LEAST_PROBATION if is_known else few
            self.wanted = few if probation is None else probation

    @property
    def is_proven(self) -> bool:
        """Whether as many batches were compared as had to be."""
        return self.again and self.passed >= self.wanted

    @property
    def hardly_known(self) -> bool:
        """Whether hardly a batch had only rows that came before, an epoch after the first one."""
        # Rows of batches that were left alone are kept when they come the next time.
        return (
            self.after >= max(_FEW, self.epoch + self.left_alone)
            and self.known * _RARE < self.after
        )
