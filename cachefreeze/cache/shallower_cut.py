"""Rows on disk of an earlier run that froze less, from which those of a deeper cut are computed."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cachefreeze import lineage
from cachefreeze.cache.batch_inputs import BatchInputs
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.frozen_state import FrozenState
from cachefreeze.cache.kept_values import KeptValues
from cachefreeze.cache.row_layout import RowLayout
from cachefreeze.cache.selection import Selection
from cachefreeze.keys import lineage_of
from cachefreeze.lineage.operations import FROZEN, Value
from cachefreeze.plan.costs import LEAST_SHARE

Tensor = torch.Tensor

# Largest number of sets on disk, and of values of the trace, that are looked at. A set takes a
# third of a millisecond, and a value some milliseconds.
_MOST_SETS, _MOST_VALUES = 64, 32
# Bytes a second at which rows are read from disk.
_READING_RATE = 1e9
# Smallest share of the first batch whose rows must be there.
_LEAST_ROWS = 0.5


class ShallowerCut:
    """Rows on disk of values that lie before the kept values of a trace.

    Args:
        shared: State that all parts of the cache share.
        selection: Kept values of the trace.
        inputs: Inputs of a batch, by number.
        numbers: Numbers of the values before them.

    Attributes:
        kept: Those of the values whose names are known to other processes.
        is_proven: Whether enough batches were compared. They are compared as those of the trace.
        batches_of_an_epoch: Number of batches before rows came again, which is not known.
    """

    is_proven = False
    batches_of_an_epoch = 0

    def __init__(
        self,
        shared: CacheState,
        selection: Selection,
        inputs: Mapping[int, Tensor],
        numbers: Iterable[int],
    ) -> None:
        trace, program = selection.trace, selection.plan.program
        lineages = {number: lineage_of(trace, number, program) for number in numbers}
        lineages = {number: one for number, one in lineages.items() if one.portable}
        groups = [one.inputs for one in lineages.values()]
        self._selection = selection
        self._frozen = FrozenState(shared, trace, lineages.values(), "")
        self._batch = BatchInputs(trace, inputs, groups, shared.exact, selection.batch)
        self.kept = KeptValues(shared, trace, lineages, self._frozen, "")
        self.kept.update_names()

    def take_layouts(self, told: Mapping[bytes, Mapping[str, Any]]) -> bool:
        """Takes over the layouts of rows that their writers have described, by name.

        Returns:
            Whether all descriptions make sense.
        """
        for one in self.kept:
            value = self._selection.trace.values[one.number]
            one.layout = _layout(value, told[one.name].get("rows"), self._batch.rows)
        return self.kept.settled

    def share_of(self, inputs: Mapping[int, Tensor]) -> float:
        """Returns the share of a batch's rows that are there."""
        places = self.kept.find(self._batch.keys(inputs)).values()
        return min(float((place >= 0).mean()) for place in places)

    def values(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Reads the rows of a batch.

        Returns:
            Values by number, or None if some rows are unknown or damaged.
        """
        now = self._selection.frozen.digests
        if any(now.get(number) != digest for number, digest in self._frozen.digests.items()):
            return None  # weights have changed since the names were made
        keys = self._batch.keys(inputs)
        places = self.kept.find(keys)
        if any((place < 0).any() for place in places.values()):
            return None
        return self.kept.read(keys, places)

    def with_axes(self, inputs: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, lineage.Axis]]:
        """Reads the rows of a batch. Returns each value with the axis of its rows."""
        axes, found = self.kept.axes, self.values(inputs) or {}
        return {number: (tensor, axes[number]) for number, tensor in found.items()}


def shallower_cut(
    shared: CacheState, selection: Selection, inputs: Mapping[int, Tensor]
) -> ShallowerCut | None:
    """Looks on disk for rows of values from which the kept values can be computed.

    Args:
        shared: State that all parts of the cache share.
        selection: Values that are kept.
        inputs: Inputs of a batch, by number.

    Returns:
        These rows, or None if there are none, if less than half of the batch is among them, or if
        they save too little time.
    """
    directory = shared.entries.directory
    # Values computed from rounded rows would differ too much.
    if directory is None or shared.entries.codec == "int8":
        return None
    sets = dict(directory.newest_sets(_MOST_SETS))
    own = {one.name for one in selection.kept}
    if not sets.keys() - own:
        return None
    there = ShallowerCut(shared, selection, inputs, _alike(selection, list(sets.values()))).kept
    found = [one.number for one in there if one.name in sets]
    numbers, seconds = lineage.way_from(selection.plan, found)
    trace = selection.trace
    reading = sum(trace.values[number].nbytes for number in numbers) / _READING_RATE
    is_new = not set(numbers) <= set(selection.plan.cut.kept)
    if not is_new or seconds < LEAST_SHARE * trace.kernel_seconds + reading:
        return None
    cut = ShallowerCut(shared, selection, inputs, numbers)
    return cut if cut.take_layouts(sets) and cut.share_of(inputs) >= _LEAST_ROWS else None


def _alike(selection: Selection, told: list[dict[str, Any]]) -> list[int]:
    """Returns the values that look like those on disk. Only their names tell whether they are."""
    values = selection.trace.values
    wanted = [
        (one.get("dtype"), one.get("shape"), one.get("stride"), one.get("parameters"))
        for one in told
        if one.get("rows") is not None
    ]
    made = [
        number
        for operation in selection.plan.program.needed(selection.plan.cut.kept, ())
        for number in operation.makes
    ]
    found = [
        number
        for number in made
        for one in [values[number]]
        if one.kind == FROZEN
        and one.plain
        and (
            str(one.dtype).removeprefix("torch."), list(one.shape), list(one.stride),
            one.state.bit_count(),
        ) in wanted
    ]  # fmt: skip
    return found[-_MOST_VALUES:]


def _layout(value: Value, told: Any, rows: int) -> RowLayout | None:
    """Returns the layout of a value whose axis is as the writer of a set has described it.

    None if the description makes no sense.
    """
    try:
        dim, outer, inner = told
        fits = min(dim + 1, outer, inner) >= 1 and outer * rows * inner == value.shape[dim]
    except (IndexError, TypeError, ValueError):
        return None
    axis = lineage.Axis(dim, inner, outer)
    return RowLayout(value.shape, value.stride, axis, rows) if fits else None
