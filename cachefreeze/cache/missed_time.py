"""Time of work that became frozen after a trace was made, and that still runs."""

import math

from cachefreeze.lineage import Trace

# Time of a new trace, of finding its rows and of comparing them, in passes through all kernels.
_NEW_TRACE = 4


class MissedTime:
    """Time that a trace misses because more has become frozen since it was made.

    A new trace would leave out this work, too. It is made when the work has taken as long as the
    new trace takes. So at most twice the time of the better choice is spent.

    Args:
        trace: Trace of a forward pass.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._each = self._sum = 0.0
        self._most = math.inf

    @property
    def is_enough(self) -> bool:
        """Whether the time is enough for a new trace."""
        return self._sum >= self._most

    def look(self) -> None:
        """Sums up the work of each call that has become frozen."""
        self._each = self._trace.newly_frozen_seconds()
        self._most = _NEW_TRACE * self._trace.kernel_seconds

    def count(self) -> None:
        """Counts one call."""
        self._sum += self._each

    def end(self) -> None:
        """Asks for a new trace, because this one does not fit any more."""
        self._sum = math.inf
