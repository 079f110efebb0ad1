"""Finds the frozen work of a model in one forward pass, and leaves it out of later ones.

`trace` runs a forward pass and records it. `crossing_cut` and `minimum_cut` choose the values to
keep. `capture` copies these values from a plain pass, and `replay` runs a pass with kept values in
the place of frozen work. `batch_axes` finds the rows in each value, `Extension` relates the kept
values of two plans, and `explain` describes all of it in text. This package knows no store, no data
set and no training loop.

Words: an operation is one call of a torch function. A value is a tensor between two writes to it.
Work is frozen if it depends on the batch and on frozen parameters alone. It is live if it is not
trained but must run every time, for example since it draws random numbers. A late value is a tensor
in the place of a skipped result. docs/lineage.md explains the method.
"""

from cachefreeze.lineage.axes import Axes, Axis, axes_of, batch_axes, leave_mixing, rows_of
from cachefreeze.lineage.cut import Cut, crossing_cut, minimum_cut
from cachefreeze.lineage.explanation import Explanation, explain, limits_of, more_in_eval_mode
from cachefreeze.lineage.extension import Extension, way_from
from cachefreeze.lineage.module_outputs import capture_outputs, module_outputs
from cachefreeze.lineage.modules import compiled_functions
from cachefreeze.lineage.operations import Trace
from cachefreeze.lineage.plan import Plan
from cachefreeze.lineage.replayer import Report, capture, replay
from cachefreeze.lineage.tracer import trace

__all__ = [
    "Axes",
    "Axis",
    "Cut",
    "Explanation",
    "Extension",
    "Plan",
    "Report",
    "Trace",
    "axes_of",
    "batch_axes",
    "capture",
    "capture_outputs",
    "compiled_functions",
    "crossing_cut",
    "explain",
    "leave_mixing",
    "limits_of",
    "minimum_cut",
    "module_outputs",
    "more_in_eval_mode",
    "replay",
    "rows_of",
    "trace",
    "way_from",
]
