"""Collects the rows of a trace: as whole batches until rows come again, and then row by row."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from cachefreeze import lineage
from cachefreeze.cache import messages
from cachefreeze.cache.batch_inputs import Keys
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.guards import Guards
from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.row_history import RowHistory
from cachefreeze.cache.selection import Selection
from cachefreeze.cache.shallower_cut import ShallowerCut, shallower_cut
from cachefreeze.lineage.devices import runs_behind
from cachefreeze.lineage.unloaded import keys_of, with_keys
from cachefreeze.plan.overhead import CallTimer

Tensor = torch.Tensor

# Number of batches after which the user is told that no row has come again.
_FIRST_NOTE = 8
# Number of batches that wait in memory if there is a directory.
_FEW_WAITING = 8
# Number of inputs of smaller batches that may wait to be joined.
_MOST_SMALLER = 16


class Before(Protocol):
    """Trace that was made when less was frozen."""

    selection: Selection
    history: RowHistory

    @property
    def batches_of_an_epoch(self) -> int:
        """Number of batches before rows came again, of this trace or an earlier one."""
        ...

    def known(self, given: Iterable[Tensor]) -> dict[int, Tensor] | None:
        """Returns the kept values of a batch, or None if some of its rows are unknown."""
        ...


class Earlier:
    """Kept values of an earlier trace, from which those of the present trace are computed.

    Args:
        before: Trace that was made when less was frozen.
        extension: Values that both traces have in common.
    """

    def __init__(self, before: Before, extension: lineage.Extension) -> None:
        self._before = before
        self._extension = extension

    @property
    def is_proven(self) -> bool:
        """Whether enough batches of the earlier trace were compared."""
        return self._before.history.is_proven

    @property
    def batches_of_an_epoch(self) -> int:
        """Number of batches before rows came again, when less was frozen."""
        return self._before.batches_of_an_epoch

    def values(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Reads the rows of a batch.

        Returns:
            Values by their number in the present trace, or None if some rows are unknown.
        """
        kept = self._before.known(inputs.values())
        return None if kept is None else self._extension.values(kept)

    def with_axes(self, inputs: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, lineage.Axis]]:
        """Reads the rows of a batch. Returns each value with the axis of its rows."""
        axes = self._extension.values(self._before.selection.kept.axes)
        found = self.values(inputs) or {}
        return {number: (found[number], axes[number]) for number in axes.keys() & found}


def earlier_values(before: Before, selection: Selection, shared: CacheState) -> Earlier | None:
    """Returns the kept values of an earlier trace if those of the present trace can be computed."""
    extension = lineage.Extension(before.selection.plan, selection.plan)
    # Values computed from rounded rows would differ too much.
    exact = shared.entries.codec != "int8"
    return Earlier(before, extension) if extension.is_complete and exact else None


@dataclass(eq=False)
class _Batch:
    """Batch that is not split into rows yet.

    Attributes:
        keys: Keys of its rows.
        kept: Kept values, by number.
    """

    keys: Keys
    kept: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept.values())


class RowCollector:
    """Collects the rows of one trace.

    Args:
        shared: State that all parts of the cache share.
        name: Name of the module, for messages.
        selection: Values that are kept.
        history: History of the rows.
        guards: Guards of the trace.
        timer: Seconds of the trace's calls.
        example: Inputs of the traced pass, by number.
        earlier: Kept values of an earlier trace, from which those of this one can be computed. None
            if there are none.
    """

    def __init__(
        self,
        shared: CacheState,
        name: str,
        selection: Selection,
        history: RowHistory,
        guards: Guards,
        timer: CallTimer,
        example: dict[int, Tensor],
        earlier: Earlier | None,
    ) -> None:
        self._shared = shared
        self._name = name
        self._selection = selection
        self._history = history
        self._guards = guards
        self._timer = timer
        self._example = example
        self._earlier: Earlier | ShallowerCut | None = earlier
        self._batches: list[_Batch] = []
        self._smaller: list[dict[int, Tensor]] = []
        self._has_traced = False
        self._written = 0

    @property
    def waits(self) -> bool:
        """Whether there are batches that are not split into rows yet."""
        return bool(self._batches)

    @property
    def has_rows(self) -> bool:
        """Whether anything is kept."""
        return self._selection.kept.settled or self.waits

    @property
    def batches_of_an_epoch(self) -> int:
        """Number of batches before rows came again, of this trace or an earlier one."""
        before = self._earlier.batches_of_an_epoch if self._earlier is not None else 0
        return max(self._history.epoch, before)

    def look_on_disk(self, inputs: Mapping[int, Tensor]) -> None:
        """Looks for rows of another run, from which those of this one can be computed."""
        if self._earlier is None:
            self._earlier = shallower_cut(self._shared, self._selection, inputs)

    def note(self, keys: Keys) -> bool:
        """Adds the rows of a batch to the history. Returns whether half of them had come before."""
        alike = self._selection.kept.alike
        return self._history.note([(alike(group), wanted) for group, wanted in keys.items()])

    def lie_on_disk(self, keys: Keys, stored: bool) -> bool:
        """Returns whether half of a batch's rows are on disk, from this process and others.

        Args:
            keys: Keys of the rows.
            stored: Whether there were rows on disk when the trace was made.
        """
        kept, there = self._selection.kept, self._shared.entries.directory is not None
        if not stored and not (there and self._history.came_again):
            return False
        if not kept.settled:
            self.split()
        self.publish()
        return all(2 * (place >= 0).sum() >= len(place) for place in kept.find(keys).values())

    def publish(self) -> None:
        """Writes rows to disk once an epoch, where other processes find them."""
        again = self._history.again or self._history.came_again
        if not again or self._shared.entries.directory is None:
            return
        if self._history.may_publish(self.batches_of_an_epoch):
            self._selection.kept.publish()

    def keys_of_traced(self) -> Keys:
        """Returns the keys of the batch of the traced pass, which is kept next."""
        self._has_traced = True
        return self._selection.batch.keys(self._example)

    def stored(self, keys: Keys) -> dict[int, np.ndarray]:
        """Returns the places of a batch's rows if all of them are on disk. Else an empty dict."""
        if not self._selection.kept.settled:
            self.split()
        places = self._selection.kept.find(keys)
        return {} if unknown(places) else places

    def keep(self, keys: Keys, kept: dict[int, Tensor]) -> tuple[str, str]:
        """Keeps a batch, split into rows if their axes are known.

        Returns:
            Reason to stop caching, to follow a colon, and a further sentence. Both are empty if
            caching goes on.
        """
        shared, batch = self._shared, _Batch(keys, kept)
        if self._selection.kept.settled:
            self._selection.kept.write(keys, kept)
            self._written += batch.nbytes
            if shared.most_useless < self._written:
                share = self._history.share_again
                return self.withdraw(messages.useless_rows_reason(share, self._written))
            return "", ""
        self._batches.append(batch)
        shared.held += batch.nbytes
        limit = shared.entries.max_bytes
        if shared.entries.directory is not None:
            if len(self._batches) == _FEW_WAITING or shared.held > limit:
                self.split()
        elif shared.held > limit:
            shared.entries.make_room(0, shared.held)
        batches = self._history.batches
        rows = batches * self._selection.rows
        if shared.held > limit:
            more = "If the data set is larger than that, a larger max_bytes helps."
            return messages.full_reason(rows, limit), more
        if batches >= _FIRST_NOTE and _is_power_of_two(batches):
            shared.note(f"{self._name}: rows", messages.no_row_again(self._name, rows))
        return "", ""

    def withdraw(self, why: str) -> tuple[str, str]:
        """Removes rows that hardly ever come again.

        Returns:
            The same reason, and a further sentence.
        """
        self._selection.kept.withdraw()
        return why, messages.why_hardly_known(self._selection.row_axes.mixes)

    def settle(self, inputs: Mapping[int, Tensor] | None = None) -> None:
        """Splits all batches into rows, now that rows come again.

        Args:
            inputs: Inputs of a batch, by number, with which the axes of the rows are found. If
                None, those of the traced pass.
        """
        self._shared.messages.pop(f"{self._name}: rows", None)
        self._shared.messages.pop(f"{self._name}: overhead", None)
        is_proven = self._earlier is not None and self._earlier.is_proven
        self._history.begin(self._shared.probation, is_proven, self._selection.is_steady)
        if not self._selection.kept.settled:
            self.split(inputs)
        self.fill_up()

    def drop(self) -> None:
        """Drops the batches that are not split into rows yet."""
        self._has_traced = False
        self._shared.held -= sum(batch.nbytes for batch in self._batches)
        self._batches = []

    def stop(self) -> None:
        """Drops everything that waits."""
        self.drop()
        self._smaller = []

    def split(self, inputs: Mapping[int, Tensor] | None = None) -> None:
        """Finds the axes of the rows, and splits the batches into rows.

        Args:
            inputs: Inputs of a batch, by number. If None, those of the traced pass.
        """
        selection, kept, began = self._selection, self._selection.kept, perf_counter()
        inputs = self._example if inputs is None else inputs
        writes = self._batches or not self._has_traced
        if writes and self._shared.entries.directory is not None:
            # Rows on disk outlive this run, so all bits are hashed before. A GPU hashes them when
            # the rows are written, and the host does not wait.
            host = (one for one in selection.frozen.tensors if not runs_behind(one))
            self._shared.weights.suspect(host)
            if kept.update_names():
                self.drop()
        known = self._earlier.with_axes(inputs) if self._earlier is not None else {}
        found = selection.row_axes.settle(inputs, known)
        if not self._has_traced:
            keys = selection.batch.keys(inputs)
            if unknown(kept.find(keys)):
                given = {number: tensor for number, (tensor, _) in known.items()}
                kept.write(keys, found or selection.compute(inputs, given))
        # The rows of the traced batch are not needed any more.
        self._example = selection.batch.shared_of(self._example)
        for batch in self._batches:
            kept.write(batch.keys, batch.kept)
            self._shared.held -= batch.nbytes
            batch.kept = {}
        self._batches = []
        self._timer.note_once(perf_counter() - began)

    def write_all(self) -> None:
        """Splits batches that still wait into rows, so that these are written to disk."""
        if self._batches and self._guards.is_as_traced():
            self.split()

    def put_aside(self, inputs: Mapping[int, Tensor]) -> None:
        """Copies the inputs of a batch. Its rows are computed when rows come again."""
        if sum(map(len, self._smaller)) < _MOST_SMALLER:
            self._smaller.append(
                {n: with_keys(one.detach().clone(), keys_of(one)) for n, one in inputs.items()}
            )

    def put_smaller_aside(self, inputs: Mapping[int, Tensor]) -> bool:
        """Copies the inputs of a smaller batch if its rows fit into batches of the usual size.

        Returns:
            Whether its rows fit.
        """
        if not self._selection.batch.takes(inputs, self._example):
            return False
        self.put_aside(inputs)
        return True

    def fill_up(self) -> None:
        """Joins the batches that were put aside, and computes their rows."""
        selection = self._selection
        batches, self._smaller = self._smaller, []
        if not batches or not selection.kept.by_rows or not self._guards.is_as_traced():
            return
        for whole, real in selection.batch.merge(batches):
            keys = selection.batch.keys(whole)
            places = selection.kept.find(keys)
            if any((place[:real] < 0).any() for place in places.values()):
                selection.kept.write(keys, selection.compute(whole), np.arange(real))

    def values_of_before(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Reads the rows of a batch that an earlier trace has kept, as `Earlier.values` does."""
        return None if self._earlier is None else self._earlier.values(inputs)

    def known(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Returns the kept values of a batch, or None if some of its rows are unknown.

        If only an earlier trace knows the rows, the kept values are computed from its rows.
        """
        selection = self._selection
        if not selection.kept.settled:
            self.split()
        keys = selection.batch.keys(inputs)
        places = selection.kept.find(keys)
        if not unknown(places):
            return selection.kept.read(keys, places)
        earlier = self.values_of_before(inputs)
        return None if earlier is None else selection.compute(inputs, earlier)

    def fill(self, call: ModuleCall) -> None:
        """Keeps the rows of a batch without a forward pass."""
        selection = self._selection
        inputs = call.inputs(selection.trace.inputs)
        keys = selection.batch.keys(inputs)
        if not self._history.again:
            self.note(keys)
        if not selection.kept.settled:
            self.split()
        if unknown(selection.kept.find(keys)):
            inputs = call.loaded(selection.trace.inputs)
            values = selection.compute(inputs, self.values_of_before(inputs))
            selection.kept.write(keys, values)
            self._shared.stats.rows_computed += selection.rows


def unknown(places: Mapping[int, np.ndarray]) -> bool:
    """Returns whether any row of a batch is unknown."""
    return any((place < 0).any() for place in places.values())


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
