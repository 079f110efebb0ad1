"""Rows that heads are trained on: one pass of a frozen network over a data set, through a cache."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.cache.memory import free_memory
from cachefreeze.errors import UserError

# Share of the free memory that rows may take. Beyond, they lie in a file without a name.
_SHARE = 0.5
# Called with the number of images of each batch.
Tick = Any


@dataclass(frozen=True)
class Rows:
    """Outputs of a frozen network for a data set.

    Attributes:
        values: Rows of each view, (views, N, ...).
        targets: Labels, (N,) int64, or shares of each class, (N, ..., classes).
    """

    values: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def plain(self) -> Tensor:
        """Rows of the first view, (N, ...)."""
        return self.values[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode without gradient, and puts it back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(one, one.requires_grad) for one in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, was in asked:
            parameter.requires_grad_(was)


@torch.no_grad()
def collect(
    call: Any, loader: Iterable[Any], count: int, views: int, device: torch.device, tick: Tick
) -> Rows:
    """Runs a network over all views of a data set.

    Args:
        call: Function that makes rows of a batch of inputs.
        loader: Batches of inputs and targets, in the order of the data set. Each pass gives the
            next view.
        count: Number of rows.
        views: Number of views.
        device: Device of the network.
        tick: Function that is called with the number of rows of each batch.

    Raises:
        UserError: Items are no pairs, or inputs are not all of one size.
    """
    values: Tensor | None = None
    targets: Tensor | None = None
    for view in range(views):
        place = 0
        for batch in _batches(loader):
            x, y = _pair(batch)
            rows = call(x.to(device))
            if not isinstance(rows, Tensor) or len(rows) != len(x):
                raise UserError(
                    "the model must return a tensor with a row for each input, and returned "
                    f"{type(rows).__name__}: wrap it in a module that returns such a tensor."
                )
            if values is None or targets is None:
                values = _room((views, count, *rows.shape[1:]), rows.dtype)
                targets = torch.empty((count, *y.shape[1:]), dtype=y.dtype)
            new = min(len(rows), count - place)  # the last batch may be filled up with others
            values[view, place : place + new] = rows[:new].cpu()
            targets[place : place + new] = y[:new]
            place += new
            tick(new)
    if values is None or targets is None:
        raise UserError("the data set is empty: there is nothing to train heads on.")
    return Rows(values, targets)


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as error:
        if "equal size" not in str(error) and "same size" not in str(error):
            raise
        raise UserError(
            "images are of several sizes, and a batch needs one: resize them in the data set's "
            "transform, such as by torchvision's Resize and CenterCrop."
        ) from error


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not is_pair or not all(isinstance(one, Tensor) for one in batch):
        raise UserError(
            "labels are missing: items of the data set must be pairs of an input and its label."
        )
    return batch[0], batch[1]


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns memory for rows, or a file that is gone with it."""
    size = torch.Size(shape).numel()
    if size * dtype.itemsize < _SHARE * free_memory():
        return torch.empty(shape, dtype=dtype)
    handle, name = tempfile.mkstemp(prefix="cachefreeze-rows-")
    os.close(handle)
    try:
        return torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
    except RuntimeError as error:
        raise UserError(
            f"there is no space for {size * dtype.itemsize / 1e9:.1f} GB of rows in memory, "
            f"nor in {Path(name).parent}: use fewer images, views or blocks."
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)
