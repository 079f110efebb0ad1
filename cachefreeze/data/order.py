"""The order of rows in an epoch, which depends only on seed and epoch, cut into full batches."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def epoch_order(rows: int, seed: int, epoch: int) -> Indices:
    """Returns the order of the training rows in an epoch.

    Args:
        rows: Number of rows.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
    """
    return np.random.default_rng([seed, epoch]).permutation(rows)


def full_batches(order: Indices, batch_size: int) -> list[Indices]:
    """Cuts an order into batches of one size.

    The last batch is filled up with rows from the start. Kernels are chosen by shape, so in batches
    of one size a row has the same bits in each, and every row can be served.

    Args:
        order: Row indices.
        batch_size: Number of rows in a batch. If there are fewer rows in all, they are one batch.
    """
    size = min(batch_size, len(order))
    count = -(-len(order) // size) if size else 0
    filled = np.resize(order, count * size)  # repeats from the start
    return [filled[start : start + size] for start in range(0, len(filled), size or 1)]


def all_rows(batches: Sequence[Indices]) -> Indices:
    """Returns the rows of all batches, one after another."""
    return np.concatenate([*batches, np.empty(0, np.int64)])
