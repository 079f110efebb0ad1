"""The kept values of a pass: their names, and the tables that their rows are in."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from cachefreeze.cache.batch_inputs import Keys
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.frozen_state import FrozenState
from cachefreeze.cache.row_layout import RowLayout
from cachefreeze.cache.row_table import RowTable
from cachefreeze.keys import Lineage, batch_key, environment, machine
from cachefreeze.keys.bits import bits_of
from cachefreeze.lineage import Axis, Trace

Tensor = torch.Tensor


@dataclass(eq=False)
class KeptValue:
    """A kept value.

    Attributes:
        number: Number of the value in the trace.
        lineage: How it is made.
        layout: How it is taken apart into rows. None until that is known.
        name: Name of its table, which says how it is made and from which bits.
    """

    number: int
    lineage: Lineage
    layout: RowLayout | None = None
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


class KeptValues:
    """The kept values of a pass, and their rows in memory and on the disk.

    Args:
        shared: What all traces of the cache have in common.
        trace: Trace of a pass.
        lineages: How each kept value is made, by number.
        frozen: Parameters and buffers that the kept values are made from.
        model: Name of the model, for people.
        like: Kept values of a pass on rows of another length, if they are the same. The same tables
            are used then.
    """

    def __init__(
        self,
        shared: CacheState,
        trace: Trace,
        lineages: Mapping[int, Lineage],
        frozen: FrozenState,
        model: str,
        like: "KeptValues | None" = None,
    ) -> None:
        self._shared = shared
        self._trace = trace
        self._frozen = frozen
        self._model = model
        self._values = [KeptValue(number, lineage) for number, lineage in lineages.items()]
        self.like = like
        # Of the traced pass: rows that waited may be written under other switches.
        self._environments = {
            device: _around_device(device) for device in {value.device for value in trace.values}
        }

    def __len__(self) -> int:
        """Returns the number of kept values."""
        return len(self._values)

    def __iter__(self) -> Iterator[KeptValue]:
        """Yields the kept values in the order of the cut."""
        return iter(self._values)

    @property
    def settled(self) -> bool:
        """Whether it is known where the rows are in the kept values."""
        return all(one.layout is not None for one in self)

    @property
    def axes(self) -> dict[int, Axis]:
        """Axes of the rows in those kept values that can be taken apart into rows, by number."""
        layouts = {one.number: one.layout for one in self}
        return {n: one.axis for n, one in layouts.items() if one is not None and one.axis}

    @property
    def by_rows(self) -> bool:
        """Whether every kept value can be taken apart into rows."""
        return all(one.layout is not None and one.layout.axis is not None for one in self)

    def update_names(self) -> list[Tensor]:
        """Names the tables by the frozen bits of now.

        Returns:
            Tensors whose bits are others than at the last time.
        """
        self._update_names()
        return self._frozen.take_moved()

    def _update_names(self) -> None:
        if not self._frozen.update():
            return
        if self._frozen.late:
            # Rows that were kept since are of other bits than their name says.
            self._shared.entries.forget([one.table for one in self if one.name])
        if self.like is not None:
            self.like._update_names()
            for one, other in zip(self, self.like, strict=True):
                one.name = other.name
        else:
            for one in self:
                one.name = self._name_of(one)

    def _name_of(self, one: KeptValue) -> bytes:
        name = xxhash.xxh3_128(one.lineage.digest + repr(self._around(one)).encode())
        for number in one.lineage.states:
            name.update(self._frozen.digests[number])
        return name.digest()

    def _around(self, one: KeptValue) -> tuple[Any, ...]:
        return self._environments[self._trace.values[one.number].device]

    @property
    def is_under_same_switches(self) -> bool:
        """Whether torch's switches are those of the traced pass."""
        return all(_around_device(device) == then for device, then in self._environments.items())

    def alike(self, group: tuple[int, ...]) -> bytes:
        """Names what is made from some inputs, so that two inputs of one kind have one name."""
        if self.like is not None:
            return self.like.alike(group)
        return b"".join(sorted(one.lineage.digest for one in self if one.group == group))

    # Rows.

    def find(self, keys: Keys) -> dict[int, np.ndarray]:
        """Returns the place of each row in the table of each kept value, -1 for unknown ones."""
        places = {}
        for one in self:
            table = self._table(one)
            wanted = _keys_of(one, keys)
            places[one.number] = np.full(len(wanted), -1) if table is None else table.find(wanted)
        return places

    def find_ahead(self, group: tuple[int, ...], keys: np.ndarray) -> bool:
        """Says whether all rows are there that are made from some input, and reads them ahead."""
        entries = self._shared.entries
        for one in self:
            if one.group == group:
                wanted, table = _keys_of(one, {group: keys}), self._table(one)
                places = table.find(wanted) if table is not None else None
                if places is None or (places < 0).any():
                    return False
                entries.prefetch(one.table, places)
        return True

    def read(self, keys: Keys, places: Mapping[int, np.ndarray]) -> dict[int, Tensor] | None:
        """Reads the kept values of a batch, by number.

        Args:
            keys: Keys of the rows.
            places: What `find` has returned, without a row that is unknown.

        Returns:
            Kept values, or None if a row on the disk is damaged or gone.
        """
        found = {}
        for one in self:
            assert one.layout is not None
            place = places[one.number]
            rows = self._shared.entries.read(one.table, _keys_of(one, keys), place)
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
        for one in self:
            assert one.layout is not None
            self._table(one)  # opened, if it is kept on the disk
            wanted, rows = _keys_of(one, keys), one.layout.split(kept[one.number])
            if chosen is not None and one.layout.axis is not None:
                wanted, rows = wanted[chosen], rows[torch.from_numpy(chosen)]
            self._shared.entries.write(one.table, wanted, rows)

    def write_waiting(self) -> None:
        """Has everything written to the disk that waits for it."""
        for one in self:
            table = self._shared.entries.table(one.table)
            if table is not None and table.writes is not None:
                table.writes.write()

    def withdraw(self) -> None:
        """Drops the rows of the kept values, and those that this run has written to the disk."""
        for one in self:
            table = self._shared.entries.table(one.table)
            if table is not None and table.writes is not None:
                table.writes.withdraw()
        self.forget()

    def forget(self, wrong: bool = False) -> None:
        """Drops the rows of the kept values from memory.

        Args:
            wrong: Whether they are not what the model computes. Then those on the disk go, too.
        """
        self._shared.entries.forget([one.table for one in self], wrong)

    def count(self) -> dict[tuple[bytes, ...], int]:
        """Returns the number of rows that are kept now, by the names of the tables they are in."""
        counts: dict[tuple[bytes, ...], int] = {}
        for group in {one.group for one in self}:
            names = tuple(sorted(one.table for one in self if one.group == group))
            tables = [self._shared.entries.table(name) for name in names]
            counts[names] = max(table.rows_kept if table is not None else 0 for table in tables)
        return counts

    def rows_that_differ(self, number: int, computed: Tensor, stored: Tensor) -> str:
        """Names the first row in which a computed and a stored value differ, for people."""
        layout = next(one.layout for one in self if one.number == number)
        assert layout is not None
        return _rows_that_differ(layout.split(computed), layout.split(stored))

    # The directory.

    @property
    def in_memory_only(self) -> str:
        """Name of a kept value that may not go to the directory, for people. Empty if none."""
        hidden = [one.number for one in self if not one.lineage.portable]
        there = self._shared.entries.directory is not None
        return self._trace.describe(hidden[0]) if hidden and there else ""

    @property
    def is_stored(self) -> bool:
        """Whether rows of every kept value may lie on the disk, from other runs."""
        entries = self._shared.entries
        return all(one.lineage.portable and entries.has(one.name) for one in self)

    def _table(self, one: KeptValue) -> RowTable | None:
        entries = self._shared.entries
        table = entries.table(one.table)
        if table is None and one.layout is not None and one.lineage.portable:
            value = self._trace.values[one.number]
            table = entries.open(
                one.table,
                one.layout.dims,
                value.dtype,
                value.device,
                self._about(one, one.layout),
                functools.partial(self._frozen.is_as, dict(self._frozen.digests)),
            )
        return table

    def _about(self, one: KeptValue, layout: RowLayout) -> dict[str, Any]:
        """Says what a kept value is, for who looks into the directory."""
        value, axis = self._trace.values[one.number], layout.axis
        return {
            "value": self._trace.describe(one.number),
            "model": self._model,
            "shape": list(value.shape),
            "stride": list(value.stride),
            "dtype": str(value.dtype).removeprefix("torch."),
            "rows": None if axis is None else [axis.dim, axis.outer, axis.inner],
            "parameters": len(one.lineage.states),
            "environment": [str(part) for part in self._around(one)],
        }


def _rows_that_differ(computed: Tensor, stored: Tensor) -> str:
    """Names the first row in which two values differ, for people.

    Args:
        computed: Rows that were computed, of shape (rows, elements of a row).
        stored: The same rows, as they were kept.
    """
    count = len(computed)
    one, other = (bits_of(rows).reshape(count, -1) for rows in (computed, stored))
    different = (one != other).any(1).nonzero().flatten().tolist()
    return f"row {different[0]} of the batch and {len(different) - 1} others of its {count}"


def _keys_of(one: KeptValue, keys: Keys) -> np.ndarray:
    assert one.layout is not None
    return batch_key(keys[one.group]) if one.layout.axis is None else keys[one.group]


def _around_device(device: torch.device) -> tuple[Any, ...]:
    return (*environment(device), *machine())
