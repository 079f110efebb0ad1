"""States of a cached trace."""

from enum import Enum


class State(Enum):
    """What happens to the batches of a trace.

    - `KEEPING`: No row has come again. Batches are kept as they are.
    - `PROBATION`: Rows come again. Batches that could be served are computed and compared.
    - `SERVING`: Batches of known rows are served.
    - `RESTING`: Calls run without the cache, for good.
    - `BY_PARTS`: Frozen modules inside are cached by themselves.
    - `UNDECIDED`: The measured times make no sense, so the next call is traced again.
    - `STALE`: The trace is not valid any more, so the next call is traced again.
    """

    KEEPING = "keeping"
    PROBATION = "probation"
    SERVING = "serving"
    RESTING = "resting"
    BY_PARTS = "by parts"
    UNDECIDED = "undecided"
    STALE = "stale"
