"""Where the rows of a store are served from: the device's memory, the host's, or the disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.device import free_device_memory, memory_for_rows
from cachefreeze.encoding import Encoding, as_bytes
from cachefreeze.rows import Indices
from cachefreeze.store import Description

# From the fastest to the one with the most room.
TIERS = ("device", "host", "disk")
# Of the device's free memory, when rows are kept for the first time: what they may take.
DEVICE_SHARE = 0.6


@dataclass(eq=False)
class Memory:
    """All rows of a store in memory, as they are stored: (rows, *row_shape) for each split."""

    tier: str
    rows: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())


class Tiers:
    """Says where rows go, and finds the room.

    `auto` on a GPU is the first tier that has room for all rows of a store. On a CPU it is the
    disk: the page cache is memory, and reading from there costs as much as copying a tensor's rows.

    Args:
        device: of training.
        tier: `auto` or one of `TIERS` (`asked`, from here on); where there is no room there, the
            next.
        device_bytes: that rows may take of the device's memory, old ones and new ones together;
            None is `DEVICE_SHARE` of what is free when it is asked for the first time, so do that
            after a training step.
    """

    def __init__(
        self, device: torch.device, tier: str = "auto", device_bytes: float | None = None
    ) -> None:
        self.device = device
        self.asked = tier
        if tier == "auto":
            tier = "device" if device.type == "cuda" else "disk"
        self.ladder = TIERS[TIERS.index(tier) :]
        self._device_bytes = device_bytes
        # Rows on the device, for as long as anybody serves from them.
        self._taken: list[ReferenceType[Tensor]] = []

    @property
    def device_bytes(self) -> float:
        """That rows may take of the device's memory."""
        if self._device_bytes is None:
            self._device_bytes = DEVICE_SHARE * free_device_memory(self.device)
        return self._device_bytes

    def first_with_room(self, needed: float, *, beside: float = 0.0) -> str:
        """The tier that so many bytes would go to, with so many others on the device."""
        return next(tier for tier in self.ladder if needed <= self._room(tier, beside))

    def now_with_room(self, about: Description) -> str:
        """The tier that the rows of a store would go to now."""
        return self.first_with_room(_bytes_of(about), beside=self._taken_bytes)

    def memory_for(self, about: Description, encoding: Encoding) -> Memory | None:
        """Room for all rows of a store, not filled; None if they are to come from the disk."""
        shapes = {split: (each.rows, *each.row_shape) for split, each in about.splits.items()}
        for tier in self.ladder:
            if tier == "disk":
                break
            if _bytes_of(about) > self._room(tier, self._taken_bytes):
                continue
            place = self.device if tier == "device" else torch.device("cpu")
            memory = _allocated(tier, shapes, encoding.tensor_type, place)
            if memory is not None:
                if tier == "device":
                    self._taken += map(ref, memory.rows.values())
                return memory
        return None

    def _room(self, tier: str, beside: float) -> float:
        if tier == "device":
            return self.device_bytes - beside
        return memory_for_rows() if tier == "host" else float("inf")

    @property
    def _taken_bytes(self) -> int:
        alive = [(each, rows) for each in self._taken if (rows := each()) is not None]
        self._taken = [each for each, _ in alive]
        return sum(rows.nbytes for _, rows in alive)


def _bytes_of(about: Description) -> int:
    return sum(each.rows * each.row_bytes for each in about.splits.values())


def _allocated(
    tier: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, place: torch.device
) -> Memory | None:
    """Memory, or None if there is none."""
    try:
        rows = {name: torch.empty(s, dtype=dtype, device=place) for name, s in shapes.items()}
    except RuntimeError as error:
        # On a CPU the allocator raises a plain RuntimeError.
        if isinstance(error, torch.OutOfMemoryError) or "CPUAllocator" in str(error):
            return None
        raise
    return Memory(tier, rows)


class MemoryReader:
    """Reads rows of one split from the host's memory.

    Args:
        rows: (rows, *row_shape), on the CPU.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = as_bytes(rows)

    def read(self, indices: Indices, out: NDArray[np.uint8]) -> None:
        """Copy rows into `out`, (n, row_bytes)."""
        assert not len(indices) or 0 <= indices.min() <= indices.max() < len(self.rows)
        # Other modes than "clip" go through a buffer, at a third of the speed.
        np.take(self.rows, indices, axis=0, out=out, mode="clip")

    def will_need(self, indices: Indices) -> None:
        """Nothing to do: they are there."""
