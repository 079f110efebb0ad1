"""Rows that are served from a store by whoever asks for them. (`staging` has threads do it.)"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cachefreeze.encoding import Encoding
from cachefreeze.rows import Indices, PixelRows, Rows, all_rows
from cachefreeze.store import SplitReader
from cachefreeze.streams import sent

# Batches that the system is asked to have in memory before they are read.
READ_AHEAD = 2


class StoredRows:
    """Rows of one split, read when they are asked for."""

    def __init__(
        self, reader: SplitReader, encoding: Encoding, device: torch.device, identity: str
    ) -> None:
        self.reader = reader
        self.encoding = encoding
        self.device = device
        self.identity = identity

    def __len__(self) -> int:
        return self.reader.layout.rows

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        for rows in order[:READ_AHEAD]:
            self.reader.will_need(rows)
        for position, rows in enumerate(order):
            for coming in order[position + READ_AHEAD : position + READ_AHEAD + 1]:
                self.reader.will_need(coming)
            # A new tensor each time: whoever keeps a batch keeps its values.
            stored, room = self.encoding.empty(len(rows), self.reader.layout.row_shape)
            self.reader.read(rows, room)
            yield self.encoding.decode(stored, self.device)


class ResidentRows:
    """Rows of one split that lie in the training device's memory.

    Args:
        rows: all of them as they are stored, (rows, *row_shape), on the device.
        encoding: of the rows.
        identity: of the rows.
    """

    def __init__(self, rows: Tensor, encoding: Encoding, identity: str) -> None:
        self.rows = rows
        self.encoding = encoding
        self.identity = identity

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        places = sent(torch.from_numpy(all_rows(order)), self.rows.device)
        for indices in places.split([len(rows) for rows in order]):
            stored = torch.index_select(self.rows, 0, indices)
            yield self.encoding.decode(stored, self.rows.device)


class StoredPixels:
    """Network input from decoded pixels that are kept in a store."""

    def __init__(self, stored: Rows, inputs: PixelRows) -> None:
        self.stored = stored
        self.inputs = inputs
        self.identity = inputs.identity

    def __len__(self) -> int:
        return len(self.stored)

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        return map(self.inputs.from_pixels, self.stored.batches(order))
