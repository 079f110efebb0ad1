"""Runs recorded operations again, without the Python code of the model.

Late values and the values of a new cut are computed this way, and batch axes are searched.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from cachefreeze.lineage.known import buffer_of
from cachefreeze.lineage.modes import under
from cachefreeze.lineage.operations import Operation, Trace
from cachefreeze.lineage.structure import bound, fill

Tensor = torch.Tensor


class Program:
    """The operations of a trace, which can be run again.

    Args:
        trace: Trace of a pass.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        # Operations that make or write a tensor on each buffer, in order. If a tensor is written to
        # while another one on its buffer exists, all of them are run together.
        self._touching: dict[int, list[int]] = defaultdict(list)
        self._tangled: set[int] = set()
        for operation in trace.operations:
            for storage in {trace.values[number].storage for number in operation.makes}:
                self._touching[storage].append(operation.number)
            storages = [trace.values[old].storage for old, _ in operation.writes]
            self._tangled |= {one for one in storages if storages.count(one) > 1}
        self._orders: dict[Any, list[Operation]] = {}

    def needed(self, targets: Collection[int], given: Collection[int]) -> list[Operation]:
        """Returns the operations that are needed to make some values, in order.

        Args:
            targets: Numbers of the values to make.
            given: Numbers of the values that exist already.
        """
        again: set[int] = set()
        while True:
            found = self._closure(targets, given, again)
            written = {
                self._trace.values[old].storage
                for one in found
                for old, _ in self._trace.operations[one].writes
            }
            more = (written & self._tangled) - again
            if not more:
                return [self._trace.operations[one] for one in sorted(found)]
            # Tensors that share a written buffer are made together, so that they share a buffer
            # again.
            again |= more

    def _closure(
        self, targets: Collection[int], given: Collection[int], again: Collection[int]
    ) -> set[int]:
        values, operations = self._trace.values, self._trace.operations
        wanted, found = list(targets), set[int]()
        while wanted:
            number = wanted.pop()
            value = values[number]
            if value.operation < 0 or (number in given and value.storage not in again):
                continue
            more = [value.operation]
            if value.storage in again:
                more = [one for one in self._touching[value.storage] if one <= value.operation]
            for one in more:
                if one not in found:
                    found.add(one)
                    wanted += operations[one].reads
        return found

    def run(self, targets: Sequence[int], given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Computes values from other values.

        Args:
            targets: Numbers of the values to compute.
            given: Tensors by number of their values. They are not written to.

        Returns:
            Tensors by number. Tensors that shared a buffer in the pass share one here.
        """
        key = (frozenset(targets), frozenset(given))
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = self.needed(targets, given.keys())
        found = dict(given)
        keep = {*targets, *given}
        last = {number: one.number for one in order for number in _touched(one)}
        for operation in order:
            self.run_one(operation, found, given)
            for number in _touched(operation):
                # Frees memory as early as the pass itself did.
                if last[number] == operation.number and number not in keep:
                    found.pop(number, None)
        return {number: found[number] for number in targets}

    def result(self, operation: Operation, given: Mapping[int, Tensor]) -> Any:
        """Runs one operation after all operations that it needs, and returns its result."""
        made = [one for one in operation.reads if self._trace.values[one].operation >= 0]
        found = self.run(made, given)
        return self.run_one(operation, {**given, **found}, {**given, **found})

    def run_one(
        self, operation: Operation, found: dict[int, Tensor], given: Mapping[int, Tensor]
    ) -> Any:
        """Runs one operation.

        Args:
            operation: Operation to run.
            found: Tensors by number. The tensors that the operation makes are added.
            given: Tensors that must not be written to, by number.

        Returns:
            Result of the operation.
        """
        if operation.writes:
            others = {buffer_of(tensor) for tensor in given.values()}
            for old, _ in operation.writes:
                if old in found and buffer_of(found[old]) in others:
                    found[old] = copy_of(found[old])
        args = fill(operation.args, lambda number: self._tensor(number, found))
        kwargs = fill(operation.kwargs, lambda number: self._tensor(number, found))
        with under(operation.modes):
            result = operation.func(*args, **kwargs)
        found.update(bound(operation.output, result))
        for old, new in operation.writes:
            if new not in found and old in found:
                found[new] = found[old]
        return result

    def _tensor(self, number: int, found: Mapping[int, Tensor]) -> Tensor:
        return found[number] if number in found else self.state(number)

    def state(self, number: int) -> Tensor:
        """Returns a parameter or buffer by the number of its value.

        Raises:
            RuntimeError: The parameter or buffer was deleted or written to.
        """
        for state in self._trace.states:
            if state.value == number:
                tensor = state.tensor()
                if tensor is not None:
                    return tensor
                raise RuntimeError(
                    f"A value that was left out cannot be computed: `{state.name}` was deleted. "
                    "Keep the model as long as its outputs are used."
                )
        raise RuntimeError(
            f"A value that was left out cannot be computed: it needs the value of "
            f"{self._trace.describe(number)}, which was written to after the call. Use the "
            "output before that."
        )


def _touched(operation: Operation) -> tuple[int, ...]:
    """Returns the values that an operation reads or writes to, also through another tensor."""
    return (*operation.reads, *(old for old, _ in operation.writes))


def copy_of(tensor: Tensor) -> Tensor:
    """Copies a tensor to a new buffer, with its strides and its `requires_grad`."""
    copied = with_strides(tensor, tensor.stride())
    return copied.requires_grad_(tensor.requires_grad) if tensor.requires_grad else copied


def with_strides(tensor: Tensor, stride: tuple[int, ...], off_line: int = 0) -> Tensor:
    """Copies a tensor to a new buffer, with given strides.

    Args:
        tensor: Tensor to copy.
        stride: Strides in elements. Along a dimension with stride 0, the tensor must be constant.
        off_line: Offset of the first element from a multiple of 16 bytes.
    """
    with torch.no_grad():
        source = tensor.detach()
        for place, step in enumerate(stride):
            if not step:
                source = source.narrow(place, 0, min(1, source.shape[place]))
        copied = torch.empty_strided(source.shape, stride, dtype=source.dtype, device=source.device)
        if off_line and copied.numel():
            first = off_line // source.element_size()
            memory = copied.new_empty(first + copied.untyped_storage().nbytes())
            copied = memory.as_strided(source.shape, stride, first)
        copied.copy_(source)
        return copied.expand(tensor.shape) if source.shape != tensor.shape else copied
