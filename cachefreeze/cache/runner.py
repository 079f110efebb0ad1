"""Runs calls of a module: plainly, to take kept values from them, or with kept values."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch

from cachefreeze import lineage
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.overhead import CallTimer, Kind
from cachefreeze.cache.selection import Selection

Tensor = torch.Tensor

# Number of passes in a row that may go another way than the traced one.
_MOST_LOST = 3
# Number of served passes after which the caller has read the same values again and again.
_OFTEN = 2


class Runner:
    """Runs the calls of one cached, and takes their time.

    Args:
        shared: What all traces of the cache have in common.
        selection: What is kept of the pass.

    Attributes:
        timer: Seconds of the calls.
        served: Number of batches that were served.
        left: Event at which the last followed pass left the way of the traced one, for people.
            Empty if it did not.
    """

    def __init__(self, shared: CacheState, selection: Selection) -> None:
        plan = selection.plan
        self._shared = shared
        self._selection = selection
        self._lost = 0
        self._reports: list[lineage.Report] = []
        self.timer = CallTimer(shared.overhead, plan.followed, plan.cut.seconds_saved)
        self.served = 0
        self.left = ""

    def run_plainly(self, call: ModuleCall) -> Any:
        """Runs a call as if there were no cache, to see how long it takes."""
        call.load()
        began = perf_counter()
        output = call.run()
        self.timer.note_plain(perf_counter() - began)
        self._shared.stats.rows_computed += self._selection.rows
        return output

    def capture(self, call: ModuleCall) -> tuple[Any, dict[int, Tensor] | None]:
        """Runs a call, and takes kept values from it.

        Returns:
            Output of the module, and kept values by number. None if the pass went another way.
        """
        call.load()
        beside = call.seconds
        output, kept, report = call.capture(self._selection.plan)
        self.timer.note(Kind.KEPT, call.seconds, beside)
        self._shared.stats.rows_computed += self._selection.rows
        self._count_lost(report.left if kept is None else "")
        return output, kept

    def replay(
        self, call: ModuleCall, inputs: Mapping[int, Tensor], kept: dict[int, Tensor]
    ) -> Any:
        """Runs a call with kept values in the place of frozen work.

        Args:
            call: Call.
            inputs: Inputs of the batch, by the numbers of their values.
            kept: Kept values, by number.
        """
        self.served += 1
        call.load([inputs[number] for number in self._selection.read_by_others])
        cost = call.seconds
        output, report = call.replay(self._selection.plan, kept)
        seconds = call.seconds
        self._shared.served_seconds += seconds
        self.timer.note(Kind.SERVED, seconds, cost)
        self._count_lost(report.left)
        stats = self._shared.stats
        if report.left:
            stats.rows_computed += self._selection.rows
        else:
            stats.rows_served += self._selection.rows
            stats.seconds_saved += self._selection.plan.cut.seconds_saved - cost
            self._reports.append(report)
        return output

    def _count_lost(self, left: str) -> None:
        self.left = left
        self._lost = self._lost + 1 if left else 0

    @property
    def is_lost(self) -> bool:
        """Whether so many passes in a row went another way that following them makes no sense."""
        return self._lost == _MOST_LOST

    def read_late(self) -> set[int]:
        """Finds values that the caller has read again and again after the call, by number."""
        read = [report.computed for report in self._reports]
        self._reports = self._reports[-1:] if len(read) < _OFTEN else []
        if len(read) < _OFTEN or not all(read):
            return set()
        known = {number for number, is_read in self._selection.trace.outputs if is_read}
        return {number for computed in read for number in computed} - known
