"""Kept values of a trace: their names, and the tables of their rows."""

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
from cachefreeze.lineage.devices import to_device

Tensor = torch.Tensor


@dataclass(eq=False)
class KeptValue:
    """One kept value.

    Attributes:
        number: Number of the value in the trace.
        lineage: Lineage of the value.
        layout: Layout of its rows. None until it is known.
        name: Hash of the lineage, the environment and the frozen bits.
    """

    number: int
    lineage: Lineage
    layout: RowLayout | None = None
    name: bytes = b""

    @property
    def table(self) -> bytes:
        """Name of the value's table. Rows and whole batches of a value are in different tables."""
        whole = self.layout is not None and self.layout.axis is None
        return xxhash.xxh3_128_digest(self.name + b"whole batches") if whole else self.name

    @property
    def group(self) -> tuple[int, ...]:
        """Positions of the inputs that the value depends on."""
        return self.lineage.inputs


class KeptValues:
    """Kept values of a trace, and their rows in memory and on disk.

    Args:
        shared: State that all parts of the cache share.
        trace: Trace of a forward pass.
        lineages: Lineage of each kept value, by number.
        frozen: Parameters and buffers that the kept values are made from.
        model: Name of the module, for messages.
        like: Kept values of a trace with rows of another length, if they are the same. The two
            share tables. None if there is no such trace.
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
        # The environment of the traced pass: waiting rows may be written after it has changed.
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
        """Whether the layouts of all kept values are known."""
        return all(one.layout is not None for one in self)

    @property
    def axes(self) -> dict[int, Axis]:
        """Axes of the rows, by number, for the kept values that can be split into rows."""
        layouts = {one.number: one.layout for one in self}
        return {n: one.axis for n, one in layouts.items() if one is not None and one.axis}

    @property
    def by_rows(self) -> bool:
        """Whether all kept values can be split into rows."""
        return all(one.layout is not None and one.layout.axis is not None for one in self)

    def update_names(self) -> list[Tensor]:
        """Computes the names again if frozen bits may have changed.

        Returns:
            Parameters and buffers that have changed since the last call of this method.
        """
        self._update_names()
        return self._frozen.take_moved()

    def _update_names(self) -> None:
        if not self._frozen.update():
            return
        if self._frozen.late:
            # Rows that were kept since the change belong to other bits than their name says.
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
        """Whether the environment is that of the traced pass."""
        return all(_around_device(device) == then for device, then in self._environments.items())

    def alike(self, group: tuple[int, ...]) -> bytes:
        """Returns a name for all that is made from a group, equal for inputs of the same kind."""
        if self.like is not None:
            return self.like.alike(group)
        return b"".join(sorted(one.lineage.digest for one in self if one.group == group))

    def find(self, keys: Keys) -> dict[int, np.ndarray]:
        """Returns the place of each row, or -1 if it is unknown, for each kept value by number."""
        places = {}
        for one in self:
            table = self._table(one)
            wanted = _keys_of(one, keys)
            places[one.number] = np.full(len(wanted), -1) if table is None else table.find(wanted)
        return places

    def find_ahead(self, group: tuple[int, ...], keys: np.ndarray) -> bool:
        """Returns whether all rows of a group are known. If so, starts to read them ahead."""
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
        """Reads the kept values of a batch.

        Args:
            keys: Keys of the rows.
            places: Places of the rows that `find` has returned. None of them may be -1.

        Returns:
            Kept values by number, or None if a row on disk is damaged or gone.
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
            chosen: Indices of the rows to keep. If None, all rows.
        """
        for one in self:
            assert one.layout is not None
            self._table(one)  # opens the rows on disk
            wanted, rows = _keys_of(one, keys), one.layout.split(kept[one.number])
            if chosen is not None and one.layout.axis is not None:
                wanted, rows = wanted[chosen], rows[to_device(chosen, rows.device)]
            self._shared.entries.write(one.table, wanted, rows)

    def write_waiting(self) -> None:
        """Writes all waiting rows to disk."""
        for one in self:
            table = self._shared.entries.table(one.table)
            if table is not None and table.writes is not None:
                table.writes.write()

    def publish(self) -> None:
        """Writes all rows to disk for other processes, and looks for theirs."""
        for one in self:
            table = self._shared.entries.table(one.table)
            if table is not None:
                table.publish()

    def withdraw(self) -> None:
        """Drops the rows of the kept values, also from disk if this run has written them."""
        for one in self:
            table = self._shared.entries.table(one.table)
            if table is not None and table.writes is not None:
                table.writes.withdraw()
        self.forget()

    def forget(self, wrong: bool = False) -> None:
        """Drops the rows of the kept values from memory.

        Args:
            wrong: Whether the rows are wrong. If True, those on disk are not used any more either.
        """
        self._shared.entries.forget([one.table for one in self], wrong)

    def count(self) -> dict[tuple[bytes, ...], int]:
        """Returns the number of rows that are kept, by the names of the tables that hold them."""
        counts: dict[tuple[bytes, ...], int] = {}
        for group in {one.group for one in self}:
            names = tuple(sorted(one.table for one in self if one.group == group))
            tables = [self._shared.entries.table(name) for name in names]
            counts[names] = max(table.rows_kept if table is not None else 0 for table in tables)
        return counts

    def rows_that_differ(self, number: int, computed: Tensor, stored: Tensor) -> str:
        """Returns which rows of a value differ, in words."""
        layout = next(one.layout for one in self if one.number == number)
        assert layout is not None
        return _rows_that_differ(layout.split(computed), layout.split(stored))

    @property
    def in_memory_only(self) -> str:
        """Name of a kept value that may not be written to the directory. Empty if there is none."""
        hidden = [one.number for one in self if not one.lineage.portable]
        there = self._shared.entries.directory is not None
        return self._trace.describe(hidden[0]) if hidden and there else ""

    @property
    def is_stored(self) -> bool:
        """Whether rows of all kept values may be on disk already."""
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
                functools.partial(self._frozen.check, dict(self._frozen.digests)),
            )
        return table

    def _about(self, one: KeptValue, layout: RowLayout) -> dict[str, Any]:
        """Describes a kept value for people who look into the directory."""
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
    """Returns which rows differ, in words.

    Args:
        computed: Computed rows, of shape (rows, elements of a row).
        stored: Kept rows, of the same shape.
    """
    count = len(computed)
    one, other = (bits_of(rows).reshape(count, -1) for rows in (computed, stored))
    different = (one != other).any(1).nonzero().flatten().tolist()
    return f"row {different[0]} and {len(different) - 1} others of the {count} rows of a batch"


def _keys_of(one: KeptValue, keys: Keys) -> np.ndarray:
    assert one.layout is not None
    return batch_key(keys[one.group]) if one.layout.axis is None else keys[one.group]


def _around_device(device: torch.device) -> tuple[Any, ...]:
    return (*environment(device), *machine())
