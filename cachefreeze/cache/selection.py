"""What is kept of a traced pass, and whether that is worth its while."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cachefreeze import lineage
from cachefreeze.cache import messages
from cachefreeze.cache.batch_inputs import BatchInputs
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.frozen_state import FrozenState
from cachefreeze.cache.kept_values import KeptValues
from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.row_axes import RowAxes, compute
from cachefreeze.keys import lineage_of
from cachefreeze.lineage import Axis, Cut, Plan, Trace

Tensor = torch.Tensor

# Share of a forward pass that must be frozen work for a cache to be worth its while.
LEAST_SHARE = 0.1
# Share of a forward pass for whose sake the user is told of modules in training mode.
_WORTH_TELLING = 0.05
# Bytes a second at which memory gives kept values back.
_READING_RATE = 2e9
# Seconds that finding the rows of one value takes. A value of the batch alone costs a key of its
# own inputs, labels perhaps, which come with other rows: it must be worth that.
_EACH, _EACH_OF_INPUTS = 2e-5, 2e-3


class Selection:
    """What is kept of a traced pass.

    Args:
        shared: What all traces of the cache have in common.
        trace: Trace of a pass.
        inputs: Tensors that the pass was given, by the numbers of their values.
        model: Name of the model, for people.
        like: What is kept of a pass on rows of another length, if it is the same. The same tables
            are used then.

    Attributes:
        trace: Trace of a pass.
        plan: Trace and cut.
        share: Share of the forward pass that is left out, from 0 to 1.
        batch: Inputs of a batch.
        rows: Number of rows in a batch.
        frozen: Parameters and buffers that the kept values are made from.
        kept: Kept values.
    """

    def __init__(
        self,
        shared: CacheState,
        trace: Trace,
        inputs: Mapping[int, Tensor],
        model: str,
        like: "Selection | None" = None,
    ) -> None:
        self._shared, self._model, self._like = shared, model, like
        self.trace = trace
        self._choose(inputs)

    def _choose(self, inputs: Mapping[int, Tensor]) -> None:
        shared, trace, like = self._shared, self.trace, self._like
        cut: Cut = like.plan.cut if like is not None else cheapest_cut(trace)
        self.plan: Plan = Plan(trace, cut)
        self.share = cut.seconds_saved / max(trace.kernel_seconds, 1e-12)
        lineages = {number: lineage_of(trace, number, self.plan.program) for number in cut.kept}
        groups = [one.inputs for one in lineages.values()]
        alike: BatchInputs | None = like.batch if like is not None else None
        self.batch: BatchInputs = BatchInputs(trace, inputs, groups, shared.exact, alike)
        self.rows = self.batch.rows
        self.frozen = FrozenState(shared, trace, lineages.values(), self._model)
        same: KeptValues | None = like.kept if like is not None else None
        self.kept: KeptValues = KeptValues(shared, trace, lineages, self.frozen, self._model, same)
        self._axes = RowAxes(self.plan, self.kept, self.batch, shared.layouts)
        self._places = lineage.module_outputs(trace, cut.kept)

    def keep_as_well(self, numbers: Iterable[int], inputs: Mapping[int, Tensor]) -> None:
        """Chooses again what is kept, with some values that are read after the call.

        Args:
            numbers: Numbers of those values.
            inputs: Inputs of a batch, by the numbers of their values.
        """
        self.trace.outputs += [(number, True) for number in numbers]
        self._choose(inputs)

    @property
    def mixes(self) -> str:
        """Operation that looks across the rows of a batch, for people. Empty if none does."""
        return self._axes.mixes

    @property
    def is_enough(self) -> bool:
        """Whether so much of the pass is left out that a cache is worth its while."""
        return bool(self.kept) and self.share >= LEAST_SHARE

    @property
    def may_be_enough(self) -> bool:
        """Whether other processes may have held up one operation, so that times make no sense."""
        operations = len(self.trace.operations)
        left_out = operations - len(self.plan.cut.runs)
        return bool(self.kept) and left_out > LEAST_SHARE * operations

    def why_not_enough(self) -> str:
        """Says why too little of the pass can be left out, to follow a colon."""
        states, values = self.trace.states, self.trace.values
        if all(state.trained for state in states if isinstance(state.tensor(), nn.Parameter)):
            # A call is not followed unless some parameter of it takes no gradient.
            return "what takes no gradient in it moves from call to call all the same"
        if any(values[number].requires_grad for number in self.trace.inputs):
            return "its input takes gradient"
        if self.share >= LEAST_SHARE:
            return "nothing in the call itself takes what its frozen work makes"
        return f"frozen work that could be left out is {self.share:.0%} of its forward pass"

    def begin(self) -> bool:
        """Names the tables of the kept values, and tells the user what limits the cache.

        Returns:
            Whether rows of every kept value may lie on the disk, from other runs.
        """
        tell, model = self._shared.tell, self._model
        self.kept.update_names()
        if hidden := self.kept.in_memory_only:
            tell(f"{model}: directory", messages.in_memory_only(model, hidden))
        if lineage.more_in_eval_mode(self.trace) > _WORTH_TELLING:
            limits = lineage.limits_of(self.trace, self.share)
            tell(f"{model}: modes", messages.left_out(model, self.share, limits[-1]))
        return self.kept.is_stored

    def look(self, at_all: bool = False) -> list[Tensor]:
        """Sees whether frozen bits have changed, and names the tables by those of now.

        Args:
            at_all: Whether all bits are hashed. If not, those that may have changed, and a tensor
                more if there is time for it.

        Returns:
            Parameters and buffers that have changed.
        """
        self.frozen.look()
        if at_all or self._shared.may_hash:
            self.frozen.look_again(at_all)
        return self.kept.update_names()

    @property
    def read_by_others(self) -> list[int]:
        """Returns the inputs, by number, that work reads which is not left out."""
        runs = (self.trace.operations[number] for number in self.plan.cut.runs)
        read = {number for operation in runs for number in operation.reads}
        return [number for number in self.trace.inputs if number in read]

    def joins(self) -> bool:
        """Says whether a value depends on several images, or the like, that were given apart.

        Rows of it would be pairs, which meet others in the next epoch. A text with its mask is no
        such case: these are whole numbers.
        """
        values = self.trace.values
        return any(
            sum(
                values[number].dtype.is_floating_point and len(values[number].shape) > 2
                for place in one.group
                for number in [self.trace.inputs[place]]
            )
            > 1
            for one in self.kept
        )

    def knows(self, rows: Sequence[np.ndarray]) -> bool:
        """Says whether the rows of a batch are known by one of the inputs that it is made of.

        Args:
            rows: Keys of the rows, for each of those inputs.
        """
        groups = {one.group for one in self.kept}
        others = {self.trace.inputs.index(number) for number in self.read_by_others}
        if not self.kept.settled or any(len(group) > 1 for group in groups):
            return self.kept.settled
        return any(
            len(keys) == self.rows and self.kept.find_ahead(group, keys)
            for group in groups
            for keys in rows
            if others.isdisjoint(group)
        )

    def settle(
        self,
        inputs: Mapping[int, Tensor],
        known: Mapping[int, tuple[Tensor, Axis]] | None = None,
    ) -> dict[int, Tensor] | None:
        """Finds where the rows are in the kept values, by recorded operations on a batch.

        Args:
            inputs: Inputs of a batch, by the numbers of their values.
            known: Values of that batch that need not be computed, by number, each with the axis of
                its rows.

        Returns:
            Kept values of that batch, by number, if all of them were computed on the way.
        """
        return self._axes.settle(inputs, known)

    def compute(
        self, inputs: Mapping[int, Tensor], known: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """Computes the kept values of a batch by recorded operations, without a forward pass.

        Args:
            inputs: Inputs of the batch, by the numbers of their values.
            known: Values of the batch that need not be computed, by number.
        """
        return compute(self.plan, inputs, known)

    # Rows of another length.

    @property
    def takes_other_lengths(self) -> bool:
        """Whether kept values can be taken from a pass on rows of another length as it is.

        Padding moves the last bits of some rows, and not of others: a few batches that are equal
        prove nothing. So only what is served by exact=False is shared between lengths.
        """
        return bool(self.batch.length) and self._places is not None and not self._shared.exact

    def capture_of_another_length(self, call: ModuleCall) -> tuple[Any, dict[int, Tensor] | None]:
        """Runs a plain pass on rows of another length, and takes what is kept if it can be taken.

        Args:
            call: Call that has the rows.

        Returns:
            Output of the module, and kept values by number, or None.
        """
        assert self._places is not None
        output, found = lineage.capture_outputs(
            self._places, call.module, *call.args, **call.kwargs
        )
        values = self.trace.values
        if len(found) < len(self.kept) or any(
            (tuple(tensor.shape), tensor.dtype) != (values[n].shape, values[n].dtype)
            for n, tensor in found.items()
        ):
            return output, None
        return output, found

    def is_like(self, trace: Trace) -> bool:
        """Says whether a pass on rows of another length made the same values by the same steps."""
        mine, values = self.trace, trace.values
        return (
            [one.name for one in mine.operations] == [one.name for one in trace.operations]
            and [one.makes for one in mine.operations] == [one.makes for one in trace.operations]
            and [one.kind for one in mine.operations] == [one.kind for one in trace.operations]
            and mine.inputs == trace.inputs
            and all(
                (values[n].shape, values[n].stride, values[n].dtype)
                == (mine.values[n].shape, mine.values[n].stride, mine.values[n].dtype)
                for n in self.plan.cut.kept
            )
        )


def cheapest_cut(trace: Trace) -> Cut:
    """Chooses what is kept of a pass in memory."""
    return lineage.minimum_cut(
        trace, reading_rate=_READING_RATE, each=_EACH, each_of_inputs=_EACH_OF_INPUTS
    )
