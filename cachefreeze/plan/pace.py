"""What following a loop costs, kept within a small share of the loop's time.

A call is followed at a cost of some milliseconds of python, whatever its size. Where calls are
short and nothing comes of it, that is more than a loop may lose. What a call costs is bounded from
above at first: that takes no measurement, and for long calls the bound is enough. Only where it is
not, some calls run plainly to be compared.
"""

from collections import deque
from enum import Enum
from time import perf_counter

# A loop may lose this share of its time, and so many seconds.
_SHARE, _FREE_SECONDS = 0.01, 1.0
# Share of a call that may go into noting the rows of it when it is left alone.
_NOTING_SHARE = 0.01
# Largest number of seconds that an event costs that is followed.
_EACH_EVENT = 5e-5
# Number of calls that are timed plainly, and of the latest others that they are compared with. The
# fastest of each count: other processes may hold up any.
_PLAIN, _LATEST = 3, 16
# Share of the frozen work's seconds in the traced pass that is counted as saved, until measured.
_SURELY_SAVED = 0.5


class Kind(Enum):
    """What was done with a call: its values were kept or served, or its rows were noted only."""

    KEPT = "kept"
    SERVED = "served"
    NOTED = "noted"


class Pace:
    """Seconds that a loop has lost by being followed, for all modules of a cache.

    Attributes:
        calls: Seconds that were lost by following calls so far, less those that were saved.
        once: Seconds that went into what is not done at every call.
    """

    def __init__(self) -> None:
        self.calls = self.once = 0.0
        self._began = perf_counter()

    @property
    def is_over(self) -> bool:
        """Whether more was lost than a loop may lose."""
        return self.calls + self.once > self._allowed

    @property
    def calls_are_over(self) -> bool:
        """Whether that much was lost by calls alone: what was spent once is not won back."""
        return self.calls > self._allowed

    @property
    def _allowed(self) -> float:
        return _FREE_SECONDS + _SHARE * (perf_counter() - self._began)


class Meter:
    """Seconds of the calls of one kind of pass: plain, kept and served.

    Args:
        pace: What all passes have lost together.
        events: Number of events that are followed in a call, at most.
        frozen_seconds: Seconds of the frozen work in the traced pass.
    """

    def __init__(self, pace: Pace, events: int, frozen_seconds: float) -> None:
        self._pace = pace
        self._bound = _EACH_EVENT * events
        self._frozen = frozen_seconds
        self._plain: list[float] = []
        self._latest = {kind: deque[float](maxlen=_LATEST) for kind in Kind}
        self._beside = dict.fromkeys(Kind, 0.0)
        self._counts = dict.fromkeys(Kind, 0)
        self._lost = 0.0

    def wants_plain(self, kind: Kind) -> bool:
        """Says whether a call must run plainly, to be timed beside those of a kind.

        Args:
            kind: What would be done with the call.
        """
        if len(self._plain) == _PLAIN or not self._pace.calls_are_over:
            return False
        return self._counts[kind] > 0 and self._cost(kind) > 0

    @property
    def pauses(self) -> bool:
        """Whether calls whose values would only be kept are left alone for now."""
        return len(self._plain) == _PLAIN and self._pace.calls_are_over

    @property
    def may_note(self) -> bool:
        """Whether noting the rows of a call that is left alone costs next to nothing."""
        noted = self._latest[Kind.NOTED]
        return len(noted) < _LATEST or min(noted) <= _NOTING_SHARE * self.plain_seconds

    @property
    def plain_seconds(self) -> float:
        """Seconds of the fastest plain call, once that was measured."""
        return min(self._plain)

    def seconds(self, kind: Kind) -> float:
        """Returns the seconds of the fastest of the latest calls of a kind."""
        return min(self._latest[kind])

    @property
    def loses(self) -> bool:
        """Whether served calls were found to take as long as plain ones."""
        return (
            self.pauses
            and len(self._latest[Kind.SERVED]) == _LATEST
            and self.seconds(Kind.SERVED) >= self.plain_seconds
        )

    def note_plain(self, seconds: float) -> None:
        """Notes a call that ran plainly."""
        self._plain.append(seconds)
        if len(self._plain) == _PLAIN:
            self._count()

    def note(self, kind: Kind, seconds: float, beside: float) -> None:
        """Notes a call that was followed.

        Args:
            kind: What was done with it.
            seconds: Seconds of the whole call, or of noting its rows.
            beside: Seconds of it before the module ran.
        """
        self._latest[kind].append(seconds)
        self._counts[kind] += 1
        self._beside[kind] += beside
        self._count()

    def note_once(self, seconds: float) -> None:
        """Notes seconds that something has cost that is not done at every call."""
        self._pace.once += seconds

    def _count(self) -> None:
        lost = sum(self._counts[kind] * self._cost(kind) for kind in Kind if self._counts[kind])
        self._pace.calls += lost - self._lost
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
            return beside + self._bound - _SURELY_SAVED * self._frozen
        most = beside + self._bound
        return min(most, self.seconds(kind) - self.plain_seconds) if measured else most
