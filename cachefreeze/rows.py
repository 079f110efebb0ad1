"""Rows of a data set: how they are addressed, ordered and served."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

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


def epoch_order(rows: int, seed: int, epoch: int) -> Indices:
    """The order of the training rows: a function of (seed, epoch) and of nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def batches_of(order: Indices, batch_size: int) -> list[Indices]:
    """Cut into batches; the last one may be short."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
