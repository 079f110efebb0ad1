"""Compares kept values with computed ones, and decides what follows from a difference."""

from collections.abc import Callable, Mapping

import torch

from cachefreeze.cache import messages
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.row_history import RowHistory
from cachefreeze.cache.selection import Selection
from cachefreeze.keys import same_bits

Tensor = torch.Tensor

# Number of served batches after which one is compared, and factor by which this number grows if
# there is no time for more.
_SAMPLE, _GROWTH = 16, 4


class Comparison:
    """Comparisons of one trace.

    Args:
        shared: State that all parts of the cache share.
        name: Name of the module, for messages.
        selection: Values that are kept.
        history: History of the rows.

    Attributes:
        batches: Number of batches that were compared since frozen bits last changed.
    """

    def __init__(
        self, shared: CacheState, name: str, selection: Selection, history: RowHistory
    ) -> None:
        self._shared = shared
        self._name = name
        self._selection = selection
        self._history = history
        self._next_sample = 0
        self.batches = 0

    @property
    def is_proven(self) -> bool:
        """Whether enough batches were compared, at least one of them by this trace."""
        return self.batches > 0 and self._history.passed >= self._history.wanted

    def begin_again(self) -> None:
        """Requires as many comparisons as at the beginning."""
        self._history.passed = self.batches = 0

    def is_due(self, served: int) -> bool:
        """Returns whether the next batch is compared although it could be served."""
        # The rows of an earlier trace, from which these are made, were samples already.
        first = _SAMPLE * (_GROWTH if self._history.follows_proven else 1)
        if self._shared.report.verify == "off" or served < max(self._next_sample, first):
            return False
        # Every 16th batch if there is time for it, or else at growing distances.
        further = _SAMPLE if self._shared.may_compare else (_GROWTH - 1) * served
        self._next_sample = served + further
        return True

    def check(
        self,
        computed: Mapping[int, Tensor],
        stored: Mapping[int, Tensor],
        look_at_all: Callable[[], bool],
        followed: bool = False,
    ) -> tuple[str, str]:
        """Compares a batch bit by bit, and counts it if the stored values may be served.

        Args:
            computed: Computed values, by number.
            stored: Stored values of the same rows, by number.
            look_at_all: Function that hashes all frozen bits, and returns whether any have changed.
                It is called if values differ.
            followed: Whether the values were computed in the traced pass. Another batch is needed
                then, since passes must not depend on being followed.

        Returns:
            Reason to stop caching, to follow a colon, and a further sentence. Both are empty if
            caching goes on.
        """
        report = self._shared.report
        report.batches_compared += 1
        report.rows_compared += self._selection.rows
        numbers = [one.number for one in self._selection.kept]
        different = [n for n in numbers if not same_bits(computed[n], stored[n])]
        if different and look_at_all():
            return "", ""
        for number in different:
            why, more = self._judge(number, computed[number], stored[number])
            if why:
                return why, more
        self.batches += not followed
        self._history.passed += 1
        return "", ""

    def _judge(self, number: int, computed: Tensor, stored: Tensor) -> tuple[str, str]:
        """Decides about a value that differs. If it may not be served, its rows are dropped."""
        shared, history = self._shared, self._history
        name = self._selection.trace.describe(number)
        far = (computed.double() - stored.double()).abs().max().item()
        size = computed.double().abs().max().item()
        close = far <= shared.closeness(computed) * size
        if close and not shared.exact:
            shared.find(
                f"{self._name}: {name} differs",
                messages.rounding_served(name, far, size),
            )
            return "", ""
        row = self._selection.kept.rows_that_differ(number, computed, stored)
        self._selection.kept.forget(wrong=True)
        if history.traces > 1:
            history.broken = True
            shared.find(
                f"{self._name}: padding",
                messages.padding_differs(self._name, name, far, size),
            )
            return "", ""
        why = messages.differs_reason(name, far, size, row)
        more = messages.why_rows_differ(close)
        shared.report.found.append(f"{self._name}: {why}. {more}")
        return why, more
