"""Time of work that became frozen after a trace was made, and that still runs."""

import math
from collections.abc import Iterable

import torch

from cachefreeze.cache.cache_state import CacheState
from cachefreeze.lineage import Trace
from cachefreeze.lineage.devices import queue_of
from cachefreeze.plan.costs import GPU_WRITE_RATE, WRITE_RATE

# Time of a new trace, of finding the axes of its rows and of comparing a batch, in passes through
# all kernels.
_NEW_TRACE = 4


class MissedTime:
    """Time that a trace misses because more has become frozen since it was made.

    A new trace would leave out this work, too. It is made when the work has taken as long as the
    new trace takes, and the writing of its rows. So at most twice the time of the better choice is
    spent.

    Args:
        trace: Trace of a forward pass.
        kept: Numbers of the kept values. Those of a new trace are taken to be as large.
    """

    def __init__(self, trace: Trace, kept: Iterable[int]) -> None:
        self._trace = trace
        values = [trace.values[number] for number in kept]
        self._writing = sum(
            one.nbytes / (WRITE_RATE if queue_of(one.device) is None else GPU_WRITE_RATE)
            for one in values
        )
        self._each = self._sum = 0.0
        self._most = math.inf

    def is_enough(self, shared: CacheState) -> bool:
        """Returns whether a new trace is made: in a fill, or for the missed time.

        Args:
            shared: State that all parts of the cache share.
        """
        waits = shared.waits_for_fill and torch.is_grad_enabled()
        most = math.inf if waits else self._most
        return shared.filling is not None or self._sum >= most

    def look(self, batches: int) -> None:
        """Sums up the work of each call that has become frozen.

        Args:
            batches: Number of batches of an epoch, whose rows a new trace would write.
        """
        self._each = self._trace.newly_frozen_seconds()
        self._most = _NEW_TRACE * self._trace.kernel_seconds + batches * self._writing

    def count(self) -> None:
        """Counts one call."""
        self._sum += self._each

    def end(self) -> None:
        """Asks for a new trace, because this one does not fit any more."""
        self._sum = math.inf
