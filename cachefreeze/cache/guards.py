"""Guards of a traced call: whether another call goes the same way."""

from typing import Any

from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.selection import Selection
from cachefreeze.keys import ExternalState
from cachefreeze.lineage import unloaded
from cachefreeze.lineage.operations import CONSTANT, INPUT
from cachefreeze.lineage.structure import matches


class Guards:
    """Says whether calls go the way of a traced one.

    Args:
        selection: What is kept of the traced pass.
        around: What code has read beside its arguments in the traced pass.
    """

    def __init__(self, selection: Selection, around: ExternalState) -> None:
        self._selection = selection
        self._trace = trace = selection.trace
        self._around = around
        # Python numbers that were taken from the batch decide the way through the model.
        self._escapes = [
            one
            for one in trace.operations
            if one.escapes and all(trace.values[n].kind in (INPUT, CONSTANT) for n in one.reads)
        ]

    def difference(self, given: Any) -> str:
        """Says in a few words what has changed since the traced pass, or returns nothing.

        Args:
            given: Arguments of a call.
        """
        return self._trace.signature.difference(given) or self._around.difference()

    def fit(self, call: ModuleCall) -> bool:
        """Says whether a call is one of this kind, and goes this way.

        It does as far as modules, hooks, attributes and python numbers taken from the batch tell.
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
        """Whether recorded operations make now what they made in the traced pass.

        Some of them are calls of modules, which read their attributes and modes of now.
        """
        return (
            not self._trace.signature.difference_of_modules()
            and not self._around.difference()
            and self._selection.kept.is_under_same_switches
            and not self._selection.frozen.gone
        )
