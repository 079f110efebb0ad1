"""What the rows at a boundary depend on, to the last bit."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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

    def weights(self, stop: int) -> "Weights":
        """Those before the boundary `stop`, as they are now."""
        units = self.units[:stop]
        return Weights([t for unit in units for t in (*unit.parameters(), *unit.buffers())])


class Weights:
    """Tells whether any of some tensors was replaced or written to since. (Not what is written
    through a tensor's `.data`: torch does not count that.)"""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # With their memory, so that no other tensor can come to lie there.
        self._seen = [(tensor, tensor.detach(), tensor._version) for tensor in tensors]

    def are(self, others: "Weights") -> bool:
        """Whether these are the same tensors with the same content."""
        return len(self._seen) == len(others._seen) and all(
            tensor is other and memory.data_ptr() == there.data_ptr() and version == count
            for (tensor, memory, version), (other, there, count) in zip(
                self._seen, others._seen, strict=True
            )
        )
