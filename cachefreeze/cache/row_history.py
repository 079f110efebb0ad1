"""History of the rows of one kind of call: whether rows come again, and how many were compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cachefreeze.store.index import Index, distinct

_LEAST_PROBATION, _MOST_PROBATION = 2, 8
# Batches of known rows are too rare if they are fewer than one in so many. Smallest number of
# batches after which this is decided.
_RARE, _FEW = 50, 16


@dataclass(eq=False)
class RowHistory:
    """History of rows. Traces that differ only in the length of padded rows share one.

    Attributes:
        seen: Keys of all rows until rows come again, by the kind of value that is made from them.
        again: Whether rows have come again.
        batches: Number of batches.
        after: Number of batches since rows have come again.
        known: Number of those batches that had only known rows.
        passed: Number of batches that were compared.
        wanted: Number of batches that are compared before any is served.
        follows_proven: Whether the values from which the rows are computed were compared already.
        epoch: Number of batches before rows came again.
        came_again: Whether any row of the last batch had come before.
        published: Number of batches when rows were written for other processes last.
        traces: Number of traces.
        left_alone: Number of batches of which nothing was kept, to save time.
        rows: Number of rows that came.
        rows_again: Number of those rows that had come before.
        broken: Whether padding was found to change rows by more than rounding.
    """

    seen: dict[bytes, Index] = field(default_factory=dict)
    again: bool = False
    batches: int = 0
    after: int = 0
    known: int = 0
    passed: int = 0
    wanted: int = 0
    follows_proven: bool = False
    epoch: int = 0
    came_again: bool = False
    published: int = 0
    traces: int = 0
    left_alone: int = 0
    rows: int = 0
    rows_again: int = 0
    broken: bool = False

    def note(self, keys: Sequence[tuple[bytes, np.ndarray]]) -> bool:
        """Adds the rows of a batch. Returns whether half of any input's rows had come before.

        A few such rows prove nothing: in mixup, some rows are mixed with themselves.

        Args:
            keys: Pair for each input: a name of what is made from it, and the keys of its rows.
        """
        found = []
        for kind, wanted in keys:
            index = self.seen.setdefault(kind, Index())
            found.append((index, wanted, wanted[index.find(wanted) < 0]))
        self.count(*((len(wanted), len(wanted) - len(new)) for _, wanted, new in found[:1]))
        self.came_again = any(len(new) < len(wanted) for _, wanted, new in found)
        for index, _, new in found:
            # The two images of a pair may be the same row.
            index.add(distinct(new if len(found) == 1 else new[index.find(new) < 0]))
        return any(2 * len(new) <= len(wanted) for _, wanted, new in found)

    def count(self, *batches: tuple[int, int]) -> None:
        """Counts rows, given as pairs: number of rows, and number of those that had come before."""
        for rows, again in batches:
            self.rows += rows
            self.rows_again += again

    @property
    def share_again(self) -> str:
        """Share of the rows that had come before, for messages."""
        return f"{self.rows_again / max(self.rows, 1):.1%} of {self.rows:,} rows had come before"

    def begin(
        self, probation: int | None, is_proven: bool = False, is_steady: bool = False
    ) -> None:
        """Notes that rows have come again.

        Args:
            probation: Number of batches to compare. If None, one is enough if both of the following
                are true, and two if one of them is. Otherwise a quarter of the batches before are
                compared, at least 2 and at most 8.
            is_proven: Whether the values from which the rows are computed were compared already.
            is_steady: Whether all skipped kernels are known to give a row the same bits at any
                place in a batch.
        """
        if not self.again:
            self.again, self.epoch, self.seen = True, self.batches - 1, {}
            if is_proven and is_steady:
                chosen = 1
            elif is_proven or is_steady:
                chosen = _LEAST_PROBATION
            else:
                chosen = min(max(self.epoch // 4, _LEAST_PROBATION), _MOST_PROBATION)
            self.wanted = chosen if probation is None else probation
            self.follows_proven = is_proven

    def may_publish(self, epoch: int) -> bool:
        """Returns whether an epoch has passed since the last time that this method returned True.

        After eight epochs this becomes rarer, since each time hashes all frozen bits and may make a
        file.

        Args:
            epoch: Number of batches of an epoch. 0 if it is not known: then it counts as 16.
        """
        if self.batches - self.published < max(epoch or _FEW, self.published // 8):
            return False
        self.published = self.batches
        return True

    @property
    def is_proven(self) -> bool:
        """Whether enough batches were compared."""
        return self.again and self.passed >= self.wanted

    @property
    def hardly_known(self) -> bool:
        """Whether batches of known rows are rare, an epoch after the first one."""
        # Rows of batches of which nothing was kept are kept when they come the next time.
        return (
            self.after >= max(_FEW, self.epoch + self.left_alone)
            and self.known * _RARE < self.after
        )
