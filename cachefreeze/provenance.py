"""What the rows at a boundary depend on, to the last bit."""

import hashlib
from collections.abc import Mapping

import torch

from cachefreeze.device import numerics
from cachefreeze.fingerprint import UNKNOWN, Sources, structure
from cachefreeze.models.units import Units
from cachefreeze.rows import PixelRows, Rows
from cachefreeze.store import FORMAT


class Provenance:
    """Where rows come from: data, units and arithmetic. The code of the units is taken as it is
    when this is made.

    Args:
        units: of the network.
        inputs: its input, of each split.
        device, autocast_dtype, batch_size, stored: see `PrefixCache`.
    """

    def __init__(
        self,
        units: Units,
        inputs: Mapping[str, Rows],
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        batch_size: int,
        stored: str | None,
    ) -> None:
        self.units = units
        self.inputs = inputs
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.batch_size = batch_size
        self.stored = stored
        self._sources = Sources(module for unit in units for module in unit.modules())

    def fingerprint(self, stop: int) -> tuple[str, bool]:
        """Of all that the rows at boundary `stop` depend on, and whether another run can come to
        the same."""
        knowable = True
        digest = hashlib.sha256()

        def add(*parts: object) -> None:
            nonlocal knowable
            text = repr(parts)
            knowable &= UNKNOWN not in text
            digest.update(text.encode() + b"\n")

        add("format", FORMAT)
        if stop == 0:
            for name, rows in sorted(self.inputs.items()):
                assert isinstance(rows, PixelRows)
                add("pixels", name, len(rows), rows.pixels_identity)
            return digest.hexdigest()[:32], knowable
        add("numerics", sorted(numerics(self.device).items()))
        add("precision", self.autocast_dtype, "batch size", self.batch_size)
        add("input is channels last", self.units.channels_last)
        if self.stored is not None:
            add("stored as", self.stored)
        for name, rows in sorted(self.inputs.items()):
            add("split", name, len(rows), rows.identity)
        for name, unit in self.units.named(stop):
            add("unit", name, structure(unit, self._sources))
        return digest.hexdigest()[:32], knowable

    def weights_version(self, stop: int) -> list[tuple[int, int, int]]:
        """Another one when a parameter or buffer before the boundary `stop` was replaced or written
        to (but for what goes through its `.data`, which torch does not count)."""
        tensors = (t for unit in self.units[:stop] for t in (*unit.parameters(), *unit.buffers()))
        return [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]
