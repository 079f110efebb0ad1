"""Chooses the values of a trace that are kept."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cachefreeze import lineage
from cachefreeze.cache import messages
from cachefreeze.cache.agreed_costs import agreed_seconds
from cachefreeze.cache.batch_inputs import BatchInputs
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.frozen_state import FrozenState
from cachefreeze.cache.kept_values import KeptValues
from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.row_axes import RowAxes, compute
from cachefreeze.keys import lineage_of
from cachefreeze.lineage import Cut, Plan, Trace
from cachefreeze.lineage.devices import queue_of
from cachefreeze.plan.costs import LEAST_SHARE

Tensor = torch.Tensor

# Smallest share of a forward pass that is worth telling the user of modules in training mode.
_WORTH_TELLING = 0.05
# Bytes a second at which kept values are read from memory, and from that of a GPU.
_READING_RATE, _DEVICE_RATE = 2e9, 2e11
# Seconds that finding the rows of one value takes. A value that depends on no parameter needs a key
# of its own inputs, such as labels, that may come with other rows each time: this costs more.
_EACH, _EACH_OF_INPUTS = 2e-5, 2e-3


class Selection:
    """Values of a trace that are kept.

    Args:
        shared: State that all parts of the cache share.
        trace: Trace of a forward pass.
        inputs: Inputs of the traced pass, by number.
        model: Name of the module, for messages.
        like: Selection of a trace with rows of another length, if it is the same. The two share
            tables. None if there is no such trace.

    Attributes:
        plan: Trace and cut.
        share: Share of the forward pass that is skipped, from 0 to 1.
        batch: Inputs of a batch.
        rows: Number of rows in a batch.
        frozen: Parameters and buffers that the kept values are made from.
        kept: Kept values.
        row_axes: Finder of the rows in kept values.
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
        directory = shared.entries.directory
        cut: Cut = (
            like.plan.cut
            if like is not None
            else cheapest_cut(trace, agreed_seconds(trace, directory))
        )
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
        self.row_axes = RowAxes(self.plan, self.kept, self.batch, shared.layouts)
        self._places = lineage.module_outputs(trace, cut.kept)

    def keep_as_well(self, numbers: Iterable[int], inputs: Mapping[int, Tensor]) -> None:
        """Chooses again, so that some more values are kept.

        Args:
            numbers: Numbers of values that the user's code reads after the call.
            inputs: Inputs of a batch, by number.
        """
        self.trace.outputs += [(number, True) for number in numbers]
        self._choose(inputs)

    @property
    def is_enough(self) -> bool:
        """Whether enough of the forward pass is skipped for a cache to help."""
        return bool(self.kept) and self.share >= LEAST_SHARE

    @property
    def may_be_enough(self) -> bool:
        """Whether many operations are skipped, although they took little time in this trace.

        Other processes may have delayed the trace, so another one decides.
        """
        operations = len(self.trace.operations)
        left_out = operations - len(self.plan.cut.runs)
        return bool(self.kept) and left_out > LEAST_SHARE * operations

    @property
    def is_steady(self) -> bool:
        """Whether all skipped kernels are known to give a row the same bits at any place."""
        runs = self.plan.cut.runs
        return torch.get_num_threads() == 1 and all(
            one.steady for one in self.trace.operations if one.number not in runs
        )

    def why_not_enough(self) -> str:
        """Returns why too little of the forward pass can be skipped, to follow a colon."""
        states, values = self.trace.states, self.trace.values
        if all(state.trained for state in states if isinstance(state.tensor(), nn.Parameter)):
            # Some parameter takes no gradient, or else this call would not have been traced.
            return "its parameters without gradient change from call to call"
        if any(values[number].requires_grad for number in self.trace.inputs):
            return "its input takes gradient"
        if self.share >= LEAST_SHARE:
            return "nothing in the call itself takes the results of its frozen work"
        return f"only {self.share:.0%} of its forward pass is frozen work that could be left out"

    def begin(self) -> bool:
        """Computes the names of the kept values, and tells the user what limits the cache.

        Returns:
            Whether rows of all kept values may be on disk already.
        """
        tell, model = self._shared.tell, self._model
        self.kept.update_names()
        if hidden := self.kept.in_memory_only:
            tell(f"{model}: directory", messages.in_memory_only(model, hidden))
        if lineage.more_in_eval_mode(self.trace) > _WORTH_TELLING:
            limits = lineage.limits_of(self.trace, self.share)
            tell(f"{model}: modes", messages.skipped(model, self.share, limits[-1]))
        return self.kept.is_stored

    def look(self) -> list[Tensor]:
        """Checks whether frozen bits have changed, and computes the names again if so.

        A tensor is hashed if a quick check shows a change, and others as there is time.

        Returns:
            Parameters and buffers that have changed.
        """
        self.frozen.look()
        if self._shared.seconds_to_hash > 0:
            self.frozen.look_again()
        return self.kept.update_names()

    @property
    def read_by_others(self) -> list[int]:
        """Numbers of the inputs that are read by work that is not skipped."""
        runs = (self.trace.operations[number] for number in self.plan.cut.runs)
        read = {number for operation in runs for number in operation.reads}
        return [number for number in self.trace.inputs if number in read]

    @property
    def states_read(self) -> set[int]:
        """Parameters and buffers, by `id`, that are read by work that is not skipped."""
        runs = (self.trace.operations[number] for number in self.plan.cut.runs)
        read = {number for operation in runs for number in operation.reads}
        return {one for one, number in self.plan.states.items() if number in read}

    def joins(self) -> bool:
        """Returns whether a kept value depends on several inputs such as two images.

        Its rows would be pairs, and each epoch pairs the images anew. A text and its mask belong
        together: these inputs are integers.
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
        """Returns whether the rows of a batch are known.

        Args:
            rows: Keys of the rows, for each tensor that the batch consists of.
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

    def compute(
        self, inputs: Mapping[int, Tensor], known: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """Computes the kept values of a batch by recorded operations, without a forward pass.

        Args:
            inputs: Inputs of the batch, by number.
            known: Values of the batch that need not be computed, by number.
        """
        self._shared.offloading.bring_back()
        return compute(self.plan, inputs, known)

    @property
    def takes_other_lengths(self) -> bool:
        """Whether kept values can be taken from passes with rows of another length.

        Padding changes the last bits of some rows only, so equal bits in a few batches prove
        nothing. Therefore lengths share rows only with `exact=False`.
        """
        return bool(self.batch.length) and self._places is not None and not self._shared.exact

    def capture_of_another_length(self, call: ModuleCall) -> tuple[Any, dict[int, Tensor] | None]:
        """Runs a call with rows of another length, and takes the kept values from it.

        Returns:
            Output of the module, and kept values by number, or None if their shapes differ.
        """
        assert self._places is not None
        self._shared.offloading.bring_back()
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
        """Returns whether the same operations made the same values for rows of another length."""
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


def cheapest_cut(trace: Trace, seconds: Sequence[float] | None = None) -> Cut:
    """Chooses the cut that saves most time if kept values are in memory.

    Args:
        trace: Trace of a pass.
        seconds: Seconds of each operation. If None, those that were measured in the pass.
    """
    on_device = any(queue_of(value.device) is not None for value in trace.values)
    return lineage.minimum_cut(
        trace,
        reading_rate=_DEVICE_RATE if on_device else _READING_RATE,
        each=_EACH,
        each_of_inputs=_EACH_OF_INPUTS,
        seconds=seconds,
    )
