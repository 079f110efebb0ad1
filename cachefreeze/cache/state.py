"""What becomes of the batches of a cached."""

from enum import Enum


class State(Enum):
    """What becomes of a batch.

    Until a row comes again, batches are kept as they are. Then they are taken apart into rows, and
    the first batches that could be served are computed and compared. Then batches are served. A
    cached that rests leaves its model alone, one by parts leaves it to the frozen modules inside;
    a stale one must be traced anew, and so must an undecided one, whose times make no sense.
    """

    KEEPING = "keeping"
    PROBATION = "probation"
    SERVING = "serving"
    RESTING = "resting"
    BY_PARTS = "by parts"
    UNDECIDED = "undecided"
    STALE = "stale"
