"""Runs the calls of a trace without the cache, to take values from them, or with kept values."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cachefreeze import lineage
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.selection import Selection
from cachefreeze.lineage.devices import Mark
from cachefreeze.plan.overhead import CallTimer, Kind

Tensor = torch.Tensor

# Number of passes in a row that take another path than the traced one before caching stops.
MOST_LOST = 3
# Number of served passes in a row after which skipped values that the user's code reads are kept.
_OFTEN = 2


@dataclass
class _Timed:
    """Call that has ended for the host. Its device may still work on it.

    Attributes:
        kind: Kind of the call. None for a call without the cache.
        began: Moment at which it began.
        ran: Moment at which the module ran, after all work of the cache before it.
        ended: Moment at which it ended.
        skipped: Whether frozen work was skipped.
    """

    kind: Kind | None
    began: Mark
    ran: Mark
    ended: Mark
    skipped: bool = False


class Runner:
    """Runs the calls of one trace, and measures them.

    Args:
        shared: State that all parts of the cache share.
        selection: Values that are kept.

    Attributes:
        timer: Seconds of the calls.
        device: Device that the kept values are made on, whose time the calls take.
        served: Number of batches that were served.
        left: Place at which the last pass left the path of the traced one, for messages. Empty if
            it did not.
    """

    def __init__(self, shared: CacheState, selection: Selection) -> None:
        plan = selection.plan
        self._shared = shared
        self._selection = selection
        self._lost = 0
        self._reports: list[lineage.Report] = []
        self._timed: deque[_Timed] = deque()
        values = selection.trace.values
        devices = (values[number].device for number in plan.cut.kept)
        self.device: torch.device = next(devices, torch.device("cpu"))
        self.timer = CallTimer(shared.overhead, plan.followed, plan.cut.seconds_saved)
        self.served = 0
        self.left = ""

    def run_plainly(self, call: ModuleCall) -> Any:
        """Runs a call without the cache, and measures it."""
        self._shared.offloading.bring_back()
        call.load()
        began = call.now()
        output = call.run()
        self._note(_Timed(None, began, began, call.now()))
        self._shared.stats.rows_computed += self._selection.rows
        return output

    def capture(self, call: ModuleCall) -> tuple[Any, dict[int, Tensor] | None]:
        """Runs a call, and takes the kept values from it.

        Returns:
            Output of the module, and kept values by number, or None if the pass took another path.
        """
        self._shared.offloading.bring_back()
        call.load()
        ran = call.now()
        output, kept, report = call.capture(self._selection.plan)
        self._note(_Timed(Kind.KEPT, call.began, ran, call.now()))
        self._shared.stats.rows_computed += self._selection.rows
        self._count_lost(report.left if kept is None else "")
        return output, kept

    def replay(
        self, call: ModuleCall, inputs: Mapping[int, Tensor], kept: dict[int, Tensor]
    ) -> Any:
        """Runs a call with kept values in place of frozen work."""
        self.served += 1
        call.load([inputs[number] for number in self._selection.read_by_others])
        ran = call.now()
        output, report = call.replay(self._selection.plan, kept)
        self._note(_Timed(Kind.SERVED, call.began, ran, call.now(), not report.left))
        self._count_lost(report.left)
        stats = self._shared.stats
        if report.left:
            stats.rows_computed += self._selection.rows
        else:
            stats.rows_served += self._selection.rows
            self._reports.append(report)
            self._shared.offloading.note_served()
        return output

    def note_rows(self, began: Mark, ended: Mark) -> None:
        """Counts the time in which the rows of a call without the cache were noted."""
        self._note(_Timed(Kind.NOTED, began, ended, ended))

    def _note(self, timed: _Timed) -> None:
        """Adds a call, and counts those that their device has ended."""
        self._timed.append(timed)
        while self._timed and self._timed[0].ended.is_past():
            one = self._timed.popleft()
            seconds = one.ended.seconds_since(one.began)
            before = one.ran.seconds_since(one.began)
            if one.kind is None:
                self.timer.note_plain(seconds)
                continue
            self.timer.note(one.kind, seconds, before)
            if one.kind is Kind.SERVED:
                self._shared.served_seconds += seconds
            if one.skipped:
                saved = self._selection.plan.cut.seconds_saved
                self._shared.stats.seconds_saved += saved - before

    def _count_lost(self, left: str) -> None:
        self.left = left
        self._lost = self._lost + 1 if left else 0

    @property
    def is_lost(self) -> bool:
        """Whether so many passes in a row took another path that caching stops."""
        return self._lost == MOST_LOST

    def read_late(self) -> set[int]:
        """Returns the numbers of skipped values that the user's code has read in several passes."""
        read = [report.computed for report in self._reports]
        self._reports = self._reports[-1:] if len(read) < _OFTEN else []
        if len(read) < _OFTEN or not all(read):
            return set()
        known = {number for number, is_read in self._selection.trace.outputs if is_read}
        return {number for computed in read for number in computed} - known
