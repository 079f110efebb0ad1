"""Finds the frozen work of any model by following one forward pass, and leaves it out later.

`trace` follows a pass, `crossing_cut` and `minimum_cut` choose what is kept of it, `capture` takes
the kept values from a plain pass, and `replay` runs a pass with kept values in the place of frozen
work. This package knows no store, no data set and no training loop.
"""

from cachefreeze.lineage.cut import Cut, crossing_cut, minimum_cut
from cachefreeze.lineage.operations import Trace
from cachefreeze.lineage.plan import Plan
from cachefreeze.lineage.replayer import Report, capture, replay
from cachefreeze.lineage.tracer import trace

__all__ = [
    "Cut",
    "Plan",
    "Report",
    "Trace",
    "capture",
    "crossing_cut",
    "minimum_cut",
    "replay",
    "trace",
]
