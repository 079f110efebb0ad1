"""Finds the axis of the rows in each kept value, by running recorded operations."""

from collections.abc import Mapping
from typing import Any

import torch

from cachefreeze import lineage
from cachefreeze.cache.batch_inputs import BatchInputs
from cachefreeze.cache.kept_values import KeptValue, KeptValues
from cachefreeze.cache.row_layout import RowLayout
from cachefreeze.lineage import Axes, Axis, Plan
from cachefreeze.lineage.operations import Operation

Tensor = torch.Tensor


class RowAxes:
    """Finds the layouts of kept values.

    Args:
        plan: Trace and cut.
        kept: Kept values.
        batch: Inputs of a batch.
        layouts: Layouts that were found before, by all that they depend on. New ones are added.

    Attributes:
        mixes: Name of an operation that mixes the rows of a batch. Empty if there is none.
    """

    def __init__(
        self,
        plan: Plan,
        kept: KeptValues,
        batch: BatchInputs,
        layouts: dict[tuple[Any, ...], RowLayout],
    ) -> None:
        self._plan = plan
        self._trace = plan.trace
        self._kept = kept
        self._batch = batch
        self._layouts = layouts
        self.mixes = ""

    def settle(
        self,
        inputs: Mapping[int, Tensor],
        known: Mapping[int, tuple[Tensor, Axis]],
    ) -> dict[int, Tensor] | None:
        """Sets the layout of each kept value.

        Args:
            inputs: Inputs of a batch, by number.
            known: Values of that batch that need not be computed, by number, with the axes of their
                rows.

        Returns:
            Kept values of that batch, by number, if all of them were computed here. Else None.
        """
        kept, like = self._kept, self._kept.like
        if like is not None and like.settled:
            for one, other in zip(kept, like, strict=True):
                one.layout = other.layout
            return None
        names = [self._name(one) for one in kept]
        found = None
        if not all(name in self._layouts for name in names):
            axes, mixed, found = self._axes(inputs, known)
            for one, name in zip(kept, names, strict=True):
                self._layouts[name] = self._layout(one, axes, one.number in mixed)
        for one, name in zip(kept, names, strict=True):
            one.layout = self._layouts[name]
        return found

    def _name(self, one: KeptValue) -> tuple[Any, ...]:
        """Returns all that the layout of a value depends on."""
        value, batch = self._trace.values[one.number], self._batch
        return one.lineage.digest, value.shape, value.stride, batch.rows, len(batch.with_rows)

    def _axes(
        self, inputs: Mapping[int, Tensor], known: Mapping[int, tuple[Tensor, Axis]]
    ) -> tuple[Axes, set[int], dict[int, Tensor] | None]:
        """Finds the axes of the rows, and the values that mix rows.

        Every operation is tried alone. In `torch.where((x > 9).any(), x / 2, x)` the rows are mixed
        in the middle, and the result may show it in one batch of a thousand.

        Returns:
            Axes, numbers of the kept values that mix rows, and the kept values if all were computed
            here.
        """
        program = self._plan.program
        numbers = [one.number for one in self._kept]
        given = {number: tensor for number, (tensor, _) in known.items()}
        if self._batch.rows < 2:
            found = compute(self._plan, inputs, given)
            return lineage.axes_of(program, found, inputs), set(), found
        axes = lineage.batch_axes(self._trace, *inputs.values(), known=known, wanted=numbers)
        found = {number: tensor.detach() for number, tensor in axes.found.items()}
        whole = found if len(found) == len(set(numbers)) else None
        # A model may loop over the rows of its batch.
        mixing = {n for n in axes.mixing if not _is_a_row(self._trace.operations[n])}
        mixed = {
            number
            for number in numbers
            if not mixing.isdisjoint(one.number for one in program.needed([number], known))
        }
        rest = [n for n in numbers if axes.axis(n) is None and n not in mixed]
        if rest:
            whole = whole or compute(self._plan, inputs, given)
            those = {number: whole[number] for number in rest}
            axes.fitting.update(lineage.axes_of(program, those, inputs).fitting)
        for number in sorted(mixing):
            operation = self._trace.operations[number]
            if mixed and operation.makes:
                self.mixes = self.mixes or self._trace.describe(operation.makes[0])
        return axes, mixed, whole

    def _layout(self, one: KeptValue, axes: Axes, is_mixed: bool) -> RowLayout:
        value = self._trace.values[one.number]
        reached = self._batch.has_rows(one.group)
        axis = axes.axis(one.number) if reached and not is_mixed else None
        count = 1 if axis is None else self._batch.rows
        return RowLayout(value.shape, value.stride, axis, count)


def compute(
    plan: Plan, inputs: Mapping[int, Tensor], known: Mapping[int, Tensor] | None = None
) -> dict[int, Tensor]:
    """Computes the kept values of a batch by recorded operations, without a forward pass.

    Args:
        plan: Trace and cut.
        inputs: Inputs of the batch, by number.
        known: Values of the batch that need not be computed, by number.
    """
    found = plan.program.run(list(plan.cut.kept), {**(known or {}), **inputs})
    return {number: tensor.detach() for number, tensor in found.items()}


def _is_a_row(operation: Operation) -> bool:
    """Returns whether an operation selects single rows of a batch."""
    if operation.name == "unbind":
        return True
    place = operation.args[1] if operation.name == "__getitem__" else None
    return isinstance(place[0] if isinstance(place, tuple) and place else place, int)
