"""Collects the rows of a trace: in whole batches until rows come again, and by row afterwards."""

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
from cachefreeze.cache.overhead import CallTimer
from cachefreeze.cache.row_history import RowHistory
from cachefreeze.cache.selection import Selection

Tensor = torch.Tensor

# Number of batches after which it is noted that no row has come again.
_FIRST_NOTE = 8
# Number of batches that wait in memory where there is a directory for their rows.
_FEW_WAITING = 8
# Largest number of smaller batches whose inputs wait to be computed in whole ones.
_MOST_SMALLER = 16


class Before(Protocol):
    """A cached from when less was frozen."""

    selection: Selection
    history: RowHistory

    @property
    def batches_of_an_epoch(self) -> int:
        """Number of batches before rows came again, of this cached or one before it."""
        ...

    def known(self, given: Iterable[Tensor]) -> dict[int, Tensor] | None:
        """Returns the kept values of a batch, or None if some of its rows are not known."""
        ...


class Earlier:
    """Kept values from when less was frozen, by which those of now are computed.

    Args:
        before: CachedTrace from when less was frozen.
        extension: Values that both traces have in common.
    """

    def __init__(self, before: Before, extension: lineage.Extension) -> None:
        self._before = before
        self._extension = extension

    @property
    def is_proven(self) -> bool:
        """Whether as many batches of those values were compared as had to be."""
        return self._before.history.is_proven

    @property
    def batches_of_an_epoch(self) -> int:
        """Number of batches before rows came again, when less was frozen."""
        return self._before.batches_of_an_epoch

    def values(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Reads the rows of a batch, if they are all there.

        Args:
            inputs: Inputs of the batch, by the numbers of their values.

        Returns:
            Values of the later trace, by number. Those that are kept can be computed from them.
        """
        kept = self._before.known(inputs.values())
        return None if kept is None else self._extension.values(kept)

    def with_axes(self, inputs: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, lineage.Axis]]:
        """Reads the rows of a batch, each value with the axis of its rows."""
        axes = self._extension.values(self._before.selection.kept.axes)
        found = self.values(inputs) or {}
        return {number: (found[number], axes[number]) for number in axes.keys() & found}


def earlier_values(before: Before, selection: Selection, shared: CacheState) -> Earlier | None:
    """Returns the kept values of an earlier cached, if they lead to those of a later one.

    Args:
        before: CachedTrace from when less was frozen.
        selection: What is kept of a pass now.
        shared: What all traces of the cache have in common.
    """
    extension = lineage.Extension(before.selection.plan, selection.plan)
    # What is made of rounded rows is too far from what is computed.
    exact = shared.entries.codec != "int8"
    return Earlier(before, extension) if extension.is_complete and exact else None


@dataclass(eq=False)
class _Batch:
    """A batch that is not taken apart into rows yet.

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
    """Collects the rows of one cached.

    Args:
        shared: What all traces of the cache have in common.
        name: Name of the module, for people.
        selection: What is kept of the pass.
        history: What is known of the rows.
        guards: Guards of the traced call.
        timer: Seconds of the cached's calls.
        example: Inputs of the traced pass, by the numbers of their values.
        earlier: Kept values from when less was frozen, if they lead to those of now.
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
        self._earlier = earlier
        self._batches: list[_Batch] = []
        self._smaller: list[dict[int, Tensor]] = []
        self._has_traced = False
        self._written = 0

    @property
    def waits(self) -> bool:
        """Whether batches are kept that are not taken apart into rows yet."""
        return bool(self._batches)

    @property
    def has_rows(self) -> bool:
        """Whether rows are kept."""
        return self._selection.kept.settled or self.waits

    @property
    def batches_of_an_epoch(self) -> int:
        """Number of batches before rows came again, of this cached or one before it."""
        before = self._earlier.batches_of_an_epoch if self._earlier is not None else 0
        return max(self._history.epoch, before)

    def note(self, keys: Keys) -> bool:
        """Notes the rows of a batch. Says whether half of them were there before."""
        alike = self._selection.kept.alike
        return self._history.note([(alike(group), wanted) for group, wanted in keys.items()])

    def lie_on_disk(self, keys: Keys) -> bool:
        """Says whether half of the rows of a batch are there from other runs."""
        kept = self._selection.kept
        if not kept.settled:
            self.split()
        return all(2 * (place >= 0).sum() >= len(place) for place in kept.find(keys).values())

    def keep_traced(self, kept: dict[int, Tensor]) -> tuple[str, str]:
        """Keeps the batch of the traced pass, as `keep` does.

        Args:
            kept: Kept values, by number.
        """
        self._has_traced = True
        return self.keep(self._selection.batch.keys(self._example), kept)

    def keep(self, keys: Keys, kept: dict[int, Tensor]) -> tuple[str, str]:
        """Keeps a batch as it is until rows come again, or in rows if it is known how.

        Args:
            keys: Keys of its rows.
            kept: Kept values, by number.

        Returns:
            Reason why nothing more is kept, to follow a colon, and a further sentence. Both are
            empty if there is none.
        """
        shared, batch = self._shared, _Batch(keys, kept)
        if self._selection.kept.settled:
            self._selection.kept.write(keys, kept)
            self._written += batch.nbytes
            if shared.most_useless < self._written:
                share = self._history.share_again
                return self.withdraw(messages.useless_rows(share, self._written))
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
            return messages.too_many_rows(rows, limit)
        if batches >= _FIRST_NOTE and _is_power_of_two(batches):
            shared.note(f"{self._name}: rows", messages.no_row_again(self._name, rows))
        return "", ""

    def withdraw(self, why: str) -> tuple[str, str]:
        """Removes rows that hardly anybody asks for.

        Args:
            why: Reason, to follow a colon.

        Returns:
            That reason, and a further sentence.
        """
        self._selection.kept.withdraw()
        return why, messages.why_hardly_known(self._selection.mixes)

    def settle(self, inputs: Mapping[int, Tensor] | None = None) -> None:
        """Takes what was kept apart into rows, now that rows come again.

        Args:
            inputs: Inputs of some batch, by which the place of the rows is found. If None, those of
                the traced pass.
        """
        self._shared.messages.pop(f"{self._name}: rows", None)
        self._shared.messages.pop(f"{self._name}: overhead", None)
        is_known = self._earlier is not None and self._earlier.is_proven
        self._history.begin(self._shared.probation, is_known)
        if not self._selection.kept.settled:
            self.split(inputs)
        self.fill_up()

    def drop(self) -> None:
        """Forgets the batches that are not taken apart into rows yet."""
        self._has_traced = False
        self._shared.held -= sum(batch.nbytes for batch in self._batches)
        self._batches = []

    def stop(self) -> None:
        """Forgets all that waits."""
        self.drop()
        self._smaller = []

    def split(self, inputs: Mapping[int, Tensor] | None = None) -> None:
        """Finds where the rows are in kept values, and takes the batches apart.

        Args:
            inputs: Inputs of some batch. If None, those of the traced pass.
        """
        selection, kept, began = self._selection, self._selection.kept, perf_counter()
        inputs = self._example if inputs is None else inputs
        if self._shared.entries.directory is not None:
            # What gets to the disk stays: all bits are looked at before.
            self._shared.weights.suspect(selection.frozen.tensors)
            if kept.update_names():
                self.drop()
        known = self._earlier.with_axes(inputs) if self._earlier is not None else {}
        found = selection.settle(inputs, known)
        if not self._has_traced:
            keys = selection.batch.keys(inputs)
            if unknown(kept.find(keys)):
                given = {number: tensor for number, (tensor, _) in known.items()}
                kept.write(keys, found or selection.compute(inputs, given))
        # What is left of the traced batch are the inputs that all rows share.
        self._example = selection.batch.shared_of(self._example)
        for batch in self._batches:
            kept.write(batch.keys, batch.kept)
            self._shared.held -= batch.nbytes
            batch.kept = {}
        self._batches = []
        self._timer.note_once(perf_counter() - began)

    def write_all(self) -> None:
        """Takes apart what is kept in batches still, so that it gets to the disk."""
        if self._batches and self._guards.is_as_traced():
            self.split()

    # Batches whose inputs alone are kept, until their rows may be computed in whole batches.

    def put_aside(self, inputs: Mapping[int, Tensor]) -> None:
        """Copies the inputs of a batch, to compute its rows once rows come again.

        Args:
            inputs: Inputs of the batch, by the numbers of their values.
        """
        if sum(map(len, self._smaller)) < _MOST_SMALLER:
            self._smaller.append({number: one.detach().clone() for number, one in inputs.items()})

    def put_smaller_aside(self, inputs: Mapping[int, Tensor]) -> bool:
        """Puts a batch aside that is smaller than others. Says whether its rows fit to theirs.

        Args:
            inputs: Inputs of the batch, by the numbers of their values.
        """
        if not self._selection.batch.takes(inputs, self._example):
            return False
        self.put_aside(inputs)
        return True

    def fill_up(self) -> None:
        """Computes the rows of batches that were put aside, in whole ones."""
        selection = self._selection
        batches, self._smaller = self._smaller, []
        if not batches or not selection.kept.by_rows or not self._guards.is_as_traced():
            return
        for whole, real in selection.batch.merge(batches):
            keys = selection.batch.keys(whole)
            places = selection.kept.find(keys)
            if any((place[:real] < 0).any() for place in places.values()):
                selection.kept.write(keys, selection.compute(whole), np.arange(real))

    # Rows without a pass.

    def values_of_before(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Reads the rows of a batch from when less was frozen, as `Earlier.values` does."""
        return None if self._earlier is None else self._earlier.values(inputs)

    def known(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Returns the kept values of a batch, or None if some of its rows are not known.

        Rows that are known only from when still less was frozen are computed from those.

        Args:
            inputs: Inputs of the batch, by the numbers of their values.
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
        """Keeps the rows of a batch without a forward pass.

        Args:
            call: Call that has the batch.
        """
        selection = self._selection
        inputs = call.inputs(selection.trace.inputs)
        keys = selection.batch.keys(inputs)
        if not self._history.again:
            self.note(keys)
        if not selection.kept.settled:
            self.split()
        if unknown(selection.kept.find(keys)):
            call.load()
            values = selection.compute(inputs, self.values_of_before(inputs))
            selection.kept.write(keys, values)
            self._shared.stats.rows_computed += selection.rows


def unknown(places: Mapping[int, np.ndarray]) -> bool:
    """Whether some row of a batch is unknown.

    Args:
        places: Place of each row in the table of each kept value, -1 for unknown ones.
    """
    return any((place < 0).any() for place in places.values())


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
