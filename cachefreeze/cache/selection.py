"""What is kept of a traced pass: values, their keys, their rows, and the tables they are in."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from cachefreeze import lineage
from cachefreeze.cache.layout import Layout
from cachefreeze.cache.lengths import mask_of, own_lengths
from cachefreeze.cache.shared import Shared
from cachefreeze.cache.table import Table
from cachefreeze.cache.verify import Unwritten, rows_that_differ
from cachefreeze.keys import (
    Lineage,
    Look,
    batch_key,
    environment,
    lineage_of,
    machine,
    row_keys,
    same_bits,
)
from cachefreeze.lineage import Axes, Axis, Cut, Plan, Trace, unloaded
from cachefreeze.lineage.operations import Operation

Tensor = torch.Tensor
Keys = dict[tuple[int, ...], np.ndarray]

# Bytes a second at which memory gives kept values back.
_READING_RATE = 2e9
# Seconds that finding the rows of one value takes. A value of the batch alone costs a key of its
# own inputs, labels perhaps, which come with other rows: it must be worth that.
_EACH, _EACH_OF_INPUTS = 2e-5, 2e-3


@dataclass(eq=False)
class Kept:
    """A kept value.

    Attributes:
        number: Number of the value in the trace.
        lineage: How it is made.
        layout: How it is taken apart into rows. None until that is known.
        name: Name of its table, which says how it is made and from which bits.
    """

    number: int
    lineage: Lineage
    layout: Layout | None = None
    name: bytes = b""

    @property
    def table(self) -> bytes:
        """Name of its table. Rows and whole batches of one value have tables of their own."""
        whole = self.layout is not None and self.layout.axis is None
        return xxhash.xxh3_128_digest(self.name + b"whole batches") if whole else self.name

    @property
    def group(self) -> tuple[int, ...]:
        """Places of the inputs that the value depends on."""
        return self.lineage.inputs


class Selection:
    """What is kept of a traced pass.

    Args:
        shared: What all routes of the cache have in common.
        trace: Trace of a pass.
        inputs: Tensors that the pass was given, by the numbers of their values.
        model: Name of the model, for people.
        like: What is kept of a pass on rows of another length, if it is the same. The same tables
            are used then.

    Attributes:
        trace: Trace of a pass.
        plan: Trace and cut.
        share: Share of the forward pass that is left out, from 0 to 1.
        rows: Number of rows in a batch.
        kept: Kept values.
        frozen: Parameters and buffers that the kept values are made from.
        mixes: Operation that looks across the rows of a batch, for people. Empty if none does.
        late: Whether frozen bits were found to have changed without a look that has seen it.
    """

    def __init__(
        self,
        shared: Shared,
        trace: Trace,
        inputs: Mapping[int, Tensor],
        model: str,
        like: "Selection | None" = None,
    ) -> None:
        self._shared = shared
        self._model = model
        # Of the traced pass: rows that waited may be written under other switches.
        self._environments = {
            device: _around_device(device) for device in {value.device for value in trace.values}
        }
        self.trace = trace
        self.mixes = ""
        self.rows, self._with_rows = lineage.rows_of(inputs)
        self._mask = mask_of(inputs, self._with_rows)
        self._like = like
        self._padding: dict[int, float] = like._padding if like is not None else {}
        cut: Cut = like.plan.cut if like is not None else cheapest_cut(trace)
        self.plan: Plan = Plan(trace, cut)
        self.share = cut.seconds_saved / max(trace.kernel_seconds, 1e-12)
        self.kept = [
            Kept(number, lineage_of(trace, number, self.plan.program)) for number in cut.kept
        ]
        states = {state.value: state for state in trace.states}
        self._states = {
            number: states[number].tensor for one in self.kept for number in one.lineage.states
        }
        self._places = lineage.module_outputs(trace, cut.kept)
        self._digests: dict[int, bytes] = {}
        self._moved: list[Tensor] = []
        self._named_at = -1
        self._look: Look | None = None
        self.late = False

    @property
    def length(self) -> int:
        """Length that the rows of the traced batch are padded to. 0 if no mask shows their own."""
        if self._mask is None or not all(
            any(self.trace.inputs[place] == self._mask for place in one.group) for one in self.kept
        ):
            return 0
        return self.trace.values[self._mask].shape[1]

    def capture_of_another_length(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[int, Tensor] | None]:
        """Runs a plain pass on rows of another length, and takes what is kept if it can be taken.

        Returns:
            Output of the module, and kept values by number, or None.
        """
        assert self._places is not None
        output, found = lineage.capture_outputs(self._places, module, *args, **kwargs)
        values = self.trace.values
        if len(found) < len(self.kept) or any(
            (tuple(tensor.shape), tensor.dtype) != (values[n].shape, values[n].dtype)
            for n, tensor in found.items()
        ):
            return output, None
        return output, found

    @property
    def takes_other_lengths(self) -> bool:
        """Whether kept values can be taken from a pass on rows of another length as it is.

        Padding moves the last bits of some rows, and not of others: a few batches that are equal
        prove nothing. So only what is served by exact=False is shared between lengths.
        """
        return bool(self.length) and self._places is not None and not self._shared.exact

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

    @property
    def frozen(self) -> list[Tensor]:
        """Returns the parameters and buffers that the kept values are made from."""
        found = [reference() for reference in self._states.values()]
        return [tensor for tensor in found if tensor is not None]

    @property
    def gone(self) -> bool:
        """Whether a parameter or buffer that a kept value is made from was replaced."""
        return any(reference() is None for reference in self._states.values())

    @property
    def read_by_others(self) -> list[int]:
        """Returns the inputs, by number, that work reads which is not left out."""
        runs = (self.trace.operations[number] for number in self.plan.cut.runs)
        read = {number for operation in runs for number in operation.reads}
        return [number for number in self.trace.inputs if number in read]

    def knows(self, rows: Sequence[np.ndarray]) -> bool:
        """Says whether the rows of a batch are known by one of the inputs that it is made of.

        Args:
            rows: Keys of the rows, for each of those inputs.
        """
        groups = {one.group for one in self.kept}
        others = {self.trace.inputs.index(number) for number in self.read_by_others}
        if not self.settled or any(len(group) > 1 for group in groups):
            return self.settled
        return any(
            len(keys) == self.rows and self._holds(group, keys)
            for group in groups
            for keys in rows
            if others.isdisjoint(group)
        )

    def _holds(self, group: tuple[int, ...], keys: np.ndarray) -> bool:
        """Says whether all rows are there that are made from some input, and reads them ahead."""
        entries = self._shared.entries
        for one in self.kept:
            if one.group == group:
                wanted, table = self._keys_of(one, {group: keys}), self._table(one)
                places = table.find(wanted) if table is not None else None
                if places is None or (places < 0).any():
                    return False
                entries.prefetch(one.table, places)
        return True

    @property
    def settled(self) -> bool:
        """Whether it is known where the rows are in the kept values."""
        return all(one.layout is not None for one in self.kept)

    @property
    def axes(self) -> dict[int, Axis]:
        """Axes of the rows in those kept values that can be taken apart into rows, by number."""
        layouts = {one.number: one.layout for one in self.kept}
        return {n: one.axis for n, one in layouts.items() if one is not None and one.axis}

    @property
    def by_rows(self) -> bool:
        """Whether every kept value can be taken apart into rows."""
        return all(one.layout is not None and one.layout.axis is not None for one in self.kept)

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

    def look(self) -> None:
        """Sees whether frozen bits may have changed, and has them hashed again if so."""
        weights = self._shared.weights
        if self._named_at != weights.changes or self._look is None or not self._look.is_same():
            weights.look(self.frozen)

    def name(self) -> list[Tensor]:
        """Names the tables by the frozen bits of now.

        Returns:
            Tensors whose bits are others than at the last time.
        """
        self._name()
        moved, self._moved = self._moved, []
        return moved

    def _name(self) -> None:
        weights = self._shared.weights
        if weights.changes == self._named_at:
            return
        for number, reference in self._states.items():
            tensor = reference()
            digest = b"" if tensor is None else weights.digest(tensor)
            if tensor is not None and self._digests.get(number, digest) != digest:
                self._moved.append(tensor)
                self.late = self.late or weights.has_changed_unseen(tensor)
            self._digests[number] = digest
        if self.late:
            # Rows that were kept since are of other bits than their name says.
            self._shared.entries.forget([one.table for one in self.kept if one.name])
        if self._like is not None:
            self._like._name()
            for one, other in zip(self.kept, self._like.kept, strict=True):
                one.name = other.name
        else:
            for one in self.kept:
                one.name = self._name_of(one)
        self._named_at = weights.changes
        self._look = weights.take_look(self.frozen)

    def _name_of(self, one: Kept) -> bytes:
        name = xxhash.xxh3_128(one.lineage.digest + repr(self._around(one)).encode())
        for number in one.lineage.states:
            name.update(self._digests[number])
        return name.digest()

    def _around(self, one: Kept) -> tuple[Any, ...]:
        return self._environments[self.trace.values[one.number].device]

    def rows_kept(self) -> dict[tuple[bytes, ...], int]:
        """Returns the number of rows that are kept now, by the names of the tables they are in."""
        counts: dict[tuple[bytes, ...], int] = {}
        for group in {one.group for one in self.kept}:
            names = tuple(sorted(one.table for one in self.kept if one.group == group))
            tables = [self._shared.entries.table(name) for name in names]
            counts[names] = max(table.rows_kept if table is not None else 0 for table in tables)
        return counts

    def alike(self, group: tuple[int, ...]) -> bytes:
        """Names what is made from some inputs, so that two inputs of one kind have one name."""
        if self._like is not None:
            return self._like.alike(group)
        return b"".join(sorted(one.lineage.digest for one in self.kept if one.group == group))

    def withdraw(self) -> None:
        """Drops the rows of the kept values, and those that this run has written to the disk."""
        for one in self.kept:
            table = self._shared.entries.table(one.table)
            if table is not None and isinstance(table.below, Unwritten):
                table.below.withdraw()
        self.forget()

    def forget(self, wrong: bool = False) -> None:
        """Drops the rows of the kept values from memory.

        Args:
            wrong: Whether they are not what the model computes. Then those on the disk go, too.
        """
        self._shared.entries.forget([one.table for one in self.kept], wrong)

    def keys(self, inputs: Mapping[int, Tensor]) -> Keys:
        """Hashes the rows of a batch, for each set of inputs that a kept value depends on.

        Args:
            inputs: Inputs of the batch, by the numbers of their values.
        """
        return {
            group: self._keys_in(group, inputs)
            for group in dict.fromkeys(one.group for one in self.kept)
        }

    def _keys_in(self, group: tuple[int, ...], inputs: Mapping[int, Tensor]) -> np.ndarray:
        numbers = [self.trace.inputs[place] for place in group]
        rows = {number: inputs[number] for number in numbers if number in self._with_rows}
        shared = [inputs[number] for number in numbers if number not in self._with_rows]
        unloaded.load_in(shared)
        if self._shared.exact or self._mask is None or not self.length:
            return row_keys([_named(one) for one in rows.values()], shared, self.rows)
        unloaded.load_in(list(rows.values()))
        mask = inputs[self._mask]
        padded = {n: one for n, one in rows.items() if one.shape[1:2] == mask.shape[1:]}
        lengths = own_lengths(mask, padded, self._padding)
        return row_keys(list(rows.values()), shared, self.rows, lengths, mask.shape[1])

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
        known = known or {}
        if self._like is not None and self._like.settled:
            for one, other in zip(self.kept, self._like.kept, strict=True):
                one.layout = other.layout
            return None
        layouts = self._shared.layouts
        names = [self._layout_name(one) for one in self.kept]
        found = None
        if not all(name in layouts for name in names):
            axes, mixed, found = self._axes(inputs, known)
            for one, name in zip(self.kept, names, strict=True):
                layouts[name] = self._layout(one, axes, one.number in mixed)
        for one, name in zip(self.kept, names, strict=True):
            one.layout = layouts[name]
        return found

    def _layout_name(self, one: Kept) -> tuple[Any, ...]:
        """Says what the layout of a value depends on: how it is made, and of how many rows."""
        value = self.trace.values[one.number]
        return one.lineage.digest, value.shape, value.stride, self.rows, len(self._with_rows)

    def _axes(
        self, inputs: Mapping[int, Tensor], known: Mapping[int, tuple[Tensor, Axis]]
    ) -> tuple[Axes, set[int], dict[int, Tensor] | None]:
        """Finds the axes of the rows in kept values, and those made by looking across rows.

        Every operation is tried by itself: where rows are looked across in the middle, such as in
        `torch.where((x > 9).any(), x / 2, x)`, the end may show it in one batch of a thousand.

        Returns:
            Axes, numbers of the kept values for which rows were looked across, and the kept values
            if all of them were computed on the way.
        """
        program = self.plan.program
        numbers = [one.number for one in self.kept]
        given = {number: tensor for number, (tensor, _) in known.items()}
        if self.rows < 2:
            found = self.compute(inputs, given)
            return lineage.axes_of(program, found, inputs), set(), found
        axes = lineage.batch_axes(self.trace, *inputs.values(), known=known, wanted=numbers)
        found = {number: tensor.detach() for number, tensor in axes.found.items()}
        whole = found if len(found) == len(set(numbers)) else None
        # A model may go through its rows one by one.
        mixing = {n for n in axes.mixing if not _is_a_row(self.trace.operations[n])}
        mixed = {
            number
            for number in numbers
            if not mixing.isdisjoint(one.number for one in program.needed([number], known))
        }
        rest = [n for n in numbers if axes.axis(n) is None and n not in mixed]
        if rest:
            whole = whole or self.compute(inputs, given)
            those = {number: whole[number] for number in rest}
            axes.fitting.update(lineage.axes_of(program, those, inputs).fitting)
        for number in sorted(mixing):
            operation = self.trace.operations[number]
            if mixed and operation.makes:
                self.mixes = self.mixes or self.trace.describe(operation.makes[0])
        return axes, mixed, whole

    def compute(
        self, inputs: Mapping[int, Tensor], known: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """Computes the kept values of a batch by recorded operations, without a forward pass.

        Args:
            inputs: Inputs of the batch, by the numbers of their values.
            known: Values of the batch that need not be computed, by number.
        """
        numbers = [one.number for one in self.kept]
        found = self.plan.program.run(numbers, {**(known or {}), **inputs})
        return {number: tensor.detach() for number, tensor in found.items()}

    def _layout(self, one: Kept, axes: Axes, is_mixed: bool) -> Layout:
        value = self.trace.values[one.number]
        reached = any(self.trace.inputs[place] in self._with_rows for place in one.group)
        axis = axes.axis(one.number) if reached and not is_mixed else None
        count = 1 if axis is None else self.rows
        return Layout(value.shape, value.stride, axis, count)

    def _table(self, one: Kept) -> Table | None:
        entries = self._shared.entries
        table = entries.table(one.table)
        if table is None and one.layout is not None and one.lineage.portable:
            value = self.trace.values[one.number]
            table = entries.open(
                one.table, one.layout.dims, value.dtype, value.device, self._about(one, one.layout)
            )
            if table is not None and table.below is not None:
                same = functools.partial(self._bits_are, dict(self._digests))
                table.below = Unwritten(table.below, same)  # type: ignore[assignment]
        return table

    def _bits_are(self, digests: Mapping[int, bytes]) -> bool:
        """Says whether frozen bits, all of them hashed again, are certain ones."""
        weights, tensors = self._shared.weights, self.frozen
        weights.suspect(tensors)
        return len(tensors) == len(digests) and all(
            weights.digest(tensor) == digests[number]
            for number, reference in self._states.items()
            for tensor in [reference()]
            if tensor is not None
        )

    def write_waiting(self) -> None:
        """Has everything written to the disk that waits for it."""
        for one in self.kept:
            table = self._shared.entries.table(one.table)
            if table is not None and isinstance(table.below, Unwritten):
                table.below.write()

    def rows_that_differ(self, number: int, computed: Tensor, stored: Tensor) -> str:
        """Names the first row in which a computed and a stored value differ, for people."""
        layout = next(one.layout for one in self.kept if one.number == number)
        assert layout is not None
        return rows_that_differ(layout.split(computed), layout.split(stored))

    def look_again(self) -> None:
        """Hashes as many frozen bits as there is time for, each in its turn."""
        weights = self._shared.weights
        if self._look is not None and weights.changes == self._named_at:
            seconds = weights.hash_some(self._look, self._shared.seconds_to_hash)
            self._shared.report.seconds += seconds
            self._shared.hash_seconds += seconds

    def _about(self, one: Kept, layout: Layout) -> dict[str, Any]:
        """Says what a kept value is, for who looks into the directory."""
        value, axis = self.trace.values[one.number], layout.axis
        return {
            "value": self.trace.describe(one.number),
            "model": self._model,
            "shape": list(value.shape),
            "stride": list(value.stride),
            "dtype": str(value.dtype).removeprefix("torch."),
            "rows": None if axis is None else [axis.dim, axis.outer, axis.inner],
            "parameters": len(one.lineage.states),
            "environment": [str(part) for part in self._around(one)],
        }

    @property
    def is_under_same_switches(self) -> bool:
        """Whether torch's switches are those of the traced pass."""
        return all(_around_device(device) == then for device, then in self._environments.items())

    @property
    def in_memory_only(self) -> str:
        """Name of a kept value that may not go to the directory, for people. Empty if none."""
        hidden = [one.number for one in self.kept if not one.lineage.portable]
        there = self._shared.entries.directory is not None
        return self.trace.describe(hidden[0]) if hidden and there else ""

    @property
    def is_stored(self) -> bool:
        """Whether rows of every kept value may lie on the disk, from other runs."""
        entries = self._shared.entries
        return all(one.lineage.portable and entries.has(one.name) for one in self.kept)

    def find(self, keys: Keys) -> dict[int, np.ndarray]:
        """Returns the place of each row in the table of each kept value, -1 for unknown ones."""
        places = {}
        for one in self.kept:
            table = self._table(one)
            wanted = self._keys_of(one, keys)
            places[one.number] = np.full(len(wanted), -1) if table is None else table.find(wanted)
        return places

    def read(self, keys: Keys, places: Mapping[int, np.ndarray]) -> dict[int, Tensor] | None:
        """Reads the kept values of a batch, by number.

        Args:
            keys: Keys of the rows.
            places: What `find` has returned, without a row that is unknown.

        Returns:
            Kept values, or None if a row on the disk is damaged or gone.
        """
        found = {}
        for one in self.kept:
            assert one.layout is not None
            place = places[one.number]
            rows = self._shared.entries.read(one.table, self._keys_of(one, keys), place)
            if rows is None:
                return None
            found[one.number] = one.layout.join(rows)
        return found

    def write(
        self, keys: Keys, kept: Mapping[int, Tensor], chosen: np.ndarray | None = None
    ) -> None:
        """Keeps the rows of a batch.

        Args:
            keys: Keys of the rows.
            kept: Kept values of the batch, by number.
            chosen: Numbers of the rows to keep. None for all.
        """
        for one in self.kept:
            assert one.layout is not None
            self._table(one)  # opened, if it is kept on the disk
            wanted, rows = self._keys_of(one, keys), one.layout.split(kept[one.number])
            if chosen is not None and one.layout.axis is not None:
                wanted, rows = wanted[chosen], rows[torch.from_numpy(chosen)]
            self._shared.entries.write(one.table, wanted, rows)

    def _keys_of(self, one: Kept, keys: Keys) -> np.ndarray:
        assert one.layout is not None
        return batch_key(keys[one.group]) if one.layout.axis is None else keys[one.group]

    def merge(self, batches: list[dict[int, Tensor]]) -> list[tuple[dict[int, Tensor], int]]:
        """Joins the rows of smaller batches to whole ones, the last filled up with its own rows.

        Args:
            batches: Inputs of the batches, by the numbers of their values.

        Returns:
            Inputs of each whole batch, and how many of its rows are rows of the smaller ones.
        """
        joined = {
            number: torch.cat([batch[number] for batch in batches])
            if number in self._with_rows
            else batches[0][number]
            for number in batches[0]
        }
        total = next(len(joined[number]) for number in joined if number in self._with_rows)
        found = []
        for start in range(0, total, self.rows):
            real = min(self.rows, total - start)
            places = torch.arange(start, start + self.rows).clamp(max=total - 1)
            whole = {
                number: tensor[places] if number in self._with_rows else tensor
                for number, tensor in joined.items()
            }
            found.append((whole, real))
        return found

    def shared_of(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Returns the inputs that all rows of a batch share."""
        return {n: tensor for n, tensor in inputs.items() if n not in self._with_rows}

    def takes(self, inputs: Mapping[int, Tensor], example: Mapping[int, Tensor]) -> bool:
        """Says whether the rows of a smaller batch may stand in a whole one."""
        read = {self.trace.inputs[place] for one in self.kept for place in one.group}
        for number, tensor in inputs.items():
            value = self.trace.values[number]
            if number not in read:
                continue
            if number in self._with_rows:
                if tuple(tensor.shape[1:]) != value.shape[1:] or tensor.dtype != value.dtype:
                    return False
            elif not same_bits(tensor, example[number]):
                return False
        return True


def _named(tensor: Tensor) -> Tensor | np.ndarray:
    """Returns the hashes of the rows of a tensor that is not loaded yet."""
    return tensor.unloaded_keys if unloaded.is_unloaded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def _around_device(device: torch.device) -> tuple[Any, ...]:
    return (*environment(device), *machine())


def cheapest_cut(trace: Trace) -> Cut:
    """Chooses what is kept of a pass in memory."""
    return lineage.minimum_cut(
        trace, reading_rate=_READING_RATE, each=_EACH, each_of_inputs=_EACH_OF_INPUTS
    )


def _is_a_row(operation: Operation) -> bool:
    """Says whether an operation takes a batch apart into single rows."""
    if operation.name == "unbind":
        return True
    place = operation.args[1] if operation.name == "__getitem__" else None
    return isinstance(place[0] if isinstance(place, tuple) and place else place, int)
