"""Time that caching costs a training loop, kept below a small share of the loop's time.

To follow a call takes some milliseconds of Python, however large its tensors are. For short calls
that are never served, this would be too much. At first the cost of a call is estimated from above,
by the number of its operations. For long calls this estimate is low enough. Only if it is not, some
calls run without the cache and are timed.
"""

from collections import deque
from enum import Enum
from time import perf_counter

# Share of a loop's time that caching may cost, and seconds that it may cost beside that.
_SHARE, _FREE_SECONDS = 0.01, 1.0
# Largest share of a call's time that noting its rows may take while calls run without the cache.
_NOTING_SHARE = 0.01
# Upper bound of the seconds that it takes to follow one operation or module call.
_EACH_EVENT = 5e-5
# Number of calls that are timed without the cache, and number of the latest other calls that they
# are compared with. The fastest of each counts, because other processes may delay any call.
_PLAIN, _LATEST = 3, 16
# Share of the frozen work's time in the traced pass that counts as saved until it is measured.
_SURELY_SAVED = 0.5


class Kind(Enum):
    """Kinds of calls: values were kept, or served, or only the rows were noted."""

    KEPT = "kept"
    SERVED = "served"
    NOTED = "noted"


class Overhead:
    """Seconds that caching has cost a loop, over all modules of a cache.

    Attributes:
        calls: Seconds that calls have lost so far, less those that they have saved.
        once: Seconds of work that is not done at every call.
    """

    def __init__(self) -> None:
        self.calls = self.once = 0.0
        self._began = perf_counter()

    @property
    def is_over(self) -> bool:
        """Whether more time was lost than is allowed."""
        return self.calls + self.once > self._allowed

    @property
    def calls_are_over(self) -> bool:
        """Whether calls alone have lost more time than is allowed. Other time is spent anyway."""
        return self.calls > self._allowed

    @property
    def _allowed(self) -> float:
        return _FREE_SECONDS + _SHARE * (perf_counter() - self._began)


class CallTimer:
    """Seconds of the calls of one trace.

    Args:
        overhead: Seconds that all traces of the cache have lost.
        events: Largest number of operations and module calls that are followed in one call.
        frozen_seconds: Seconds of the frozen work in the traced pass.
    """

    def __init__(self, overhead: Overhead, events: int, frozen_seconds: float) -> None:
        self._overhead = overhead
        self._bound = _EACH_EVENT * events
        self._frozen = frozen_seconds
        self._plain: list[float] = []
        self._latest = {kind: deque[float](maxlen=_LATEST) for kind in Kind}
        self._beside = dict.fromkeys(Kind, 0.0)
        self._counts = dict.fromkeys(Kind, 0)
        self._lost = 0.0

    def wants_plain(self, kind: Kind) -> bool:
        """Returns whether the next call must run without the cache, to be timed.

        Args:
            kind: Kind that the call would have with the cache.
        """
        if len(self._plain) == _PLAIN or not self._overhead.calls_are_over:
            return False
        return self._counts[kind] > 0 and self._cost(kind) > 0

    @property
    def pauses(self) -> bool:
        """Whether calls of which values would only be kept run without the cache for now."""
        return len(self._plain) == _PLAIN and self._overhead.calls_are_over

    @property
    def may_note(self) -> bool:
        """Whether noting the rows of a call that runs without the cache takes almost no time."""
        noted = self._latest[Kind.NOTED]
        return len(noted) < _LATEST or min(noted) <= _NOTING_SHARE * self.plain_seconds

    @property
    def plain_seconds(self) -> float:
        """Seconds of the fastest call without the cache. It must have been measured."""
        return min(self._plain)

    def seconds(self, kind: Kind) -> float:
        """Returns the seconds of the fastest of the latest calls of a kind."""
        return min(self._latest[kind])

    @property
    def loses(self) -> bool:
        """Whether served calls were found to take as long as calls without the cache."""
        return (
            self.pauses
            and len(self._latest[Kind.SERVED]) == _LATEST
            and self.seconds(Kind.SERVED) >= self.plain_seconds
        )

    def note_plain(self, seconds: float) -> None:
        """Adds a call that ran without the cache. Only the first few count."""
        if len(self._plain) < _PLAIN:
            self._plain.append(seconds)
            if len(self._plain) == _PLAIN:
                self._count()

    def note(self, kind: Kind, seconds: float, beside: float) -> None:
        """Adds a call.

        Args:
            kind: Kind of the call.
            seconds: Seconds of the whole call, or of noting its rows.
            beside: Seconds of it before the module ran.
        """
        self._latest[kind].append(seconds)
        self._counts[kind] += 1
        self._beside[kind] += beside
        self._count()

    def note_once(self, seconds: float) -> None:
        """Adds seconds of work that is not done at every call."""
        self._overhead.once += seconds

    def _count(self) -> None:
        lost = sum(self._counts[kind] * self._cost(kind) for kind in Kind if self._counts[kind])
        self._overhead.calls += lost - self._lost
        self._lost = lost

    def _cost(self, kind: Kind) -> float:
        """Returns the seconds that a call of a kind loses."""
        beside = self._beside[kind] / self._counts[kind]
        if kind is Kind.NOTED:
            return beside
        measured = len(self._plain) == _PLAIN
        if kind is Kind.SERVED:
            if measured:
                return self.seconds(kind) - self.plain_seconds
            # A kernel of the traced pass may have been delayed: no work is longer than a call.
            frozen = min([self._frozen, *self._latest[Kind.KEPT]])
            return beside + self._bound - _SURELY_SAVED * frozen
        most = beside + self._bound
        return min(most, self.seconds(kind) - self.plain_seconds) if measured else most
