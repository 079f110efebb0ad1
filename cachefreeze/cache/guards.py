"""Guards of a trace: checks that another call takes the same path."""

from typing import Any

from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.selection import Selection
from cachefreeze.keys import ExternalState
from cachefreeze.lineage import unloaded
from cachefreeze.lineage.operations import CONSTANT, INPUT
from cachefreeze.lineage.structure import matches


class Guards:
    """Checks that calls take the path of the traced one.

    Args:
        selection: Values that are kept of the trace.
        around: State outside of the call that its result depends on.
    """

    def __init__(self, selection: Selection, around: ExternalState) -> None:
        self._selection = selection
        self._trace = trace = selection.trace
        self._around = around
        # Operations that turn the batch into Python numbers, which may decide the path.
        self._escapes = [
            one
            for one in trace.operations
            if one.escapes and all(trace.values[n].kind in (INPUT, CONSTANT) for n in one.reads)
        ]

    def difference(self, given: Any) -> str:
        """Returns in a few words what has changed since the trace was made, or nothing."""
        return self._trace.signature.difference(given) or self._around.difference()

    def fit(self, call: ModuleCall) -> bool:
        """Returns whether a call takes the path of the traced one.

        Modules, hooks, attributes, and Python numbers made from the batch are compared.
        """
        if self.difference(call.given):
            return False
        if not self._escapes:
            return True
        inputs = call.inputs(self._trace.inputs)
        unloaded.load_in([inputs[n] for one in self._escapes for n in one.reads if n in inputs])
        program = self._selection.plan.program
        return all(
            matches(one.output, program.result(one, inputs), lambda tensor: -1)
            for one in self._escapes
        )

    def is_as_traced(self) -> bool:
        """Returns whether recorded operations still compute what they did in the traced pass.

        Some of them are module calls, which read the present attributes and modes of their module.
        """
        return (
            not self._trace.signature.difference_of_modules()
            and not self._around.difference()
            and self._selection.kept.is_under_same_switches
            and not self._selection.frozen.gone
        )
