"""Rows of a data set: how they are addressed, ordered and served."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Indices = NDArray[np.int64]


class Rows(Protocol):
    """The rows of one split at one boundary: network input, or activations from a store."""

    @property
    def identity(self) -> str:
        """Changes whenever the bits of any row may have changed."""

    def __len__(self) -> int: ...

    def batches(self, order: Sequence[Indices]) -> "Iterator[Tensor]":
        """One tensor (n, ...) on the training device for each array of n row indices."""


@runtime_checkable
class PixelRows(Rows, Protocol):
    """Rows at boundary 0 that are decoded from something: the pixels can be kept instead."""

    @property
    def pixels_identity(self) -> str:
        """Changes whenever a decoded pixel may have changed."""

    def pixels(self, order: Sequence[Indices]) -> "Iterator[Tensor]":
        """Decoded pixels, uint8 (n, C, H, W), for each array of n row indices."""

    def from_pixels(self, pixels: "Tensor") -> "Tensor":
        """What `batches` gives for rows with these pixels, to the last bit."""


def epoch_order(rows: int, seed: int, epoch: int) -> Indices:
    """The order of the training rows: a function of (seed, epoch) and of nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def all_rows(order: Sequence[Indices]) -> Indices:
    """The rows of all batches, one after another."""
    return np.concatenate([*order, np.empty(0, np.int64)])


def batches_of(order: Indices, batch_size: int) -> list[Indices]:
    """Cut into batches; the last one may be short."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
