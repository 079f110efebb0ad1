"""Training loops, and the batches that they run on."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as pictures

from cachefreeze import ActivationCache
from cachefreeze.keys import same_bits
from gpu_cases.networks import Loss

# Number of batches whose frozen results are computed in advance.
_FEATURES = 8


@dataclass
class OnDevice:
    """Batches of rows that lie on the device, in an order that depends on the epoch alone.

    Attributes:
        x: Inputs of all rows.
        y: Labels of all rows.
        batch: Number of rows in a batch.
    """

    x: Tensor
    y: Tensor
    batch: int

    def opened(self, cache: ActivationCache | None) -> "OnDevice":
        """Returns batches for a run. The cache sees them when the model is called."""
        return self

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(number))
        for places in order.to(self.x.device).split(self.batch):
            yield self.x[places], self.y[places]


class Resized(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, each resized when it is loaded, as images from files are.

    Args:
        x: Images of whole numbers, (rows, 3, height, width).
        y: Labels.
        size: Height and width that images are resized to.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = pictures.resize(self.x[index], [self.size, self.size], antialias=True)
        return image, self.y[index]


@dataclass
class FromLoader:
    """Batches of a DataLoader, in pinned memory if they go to a GPU.

    Attributes:
        dataset: Data set on the host.
        batch: Number of rows in a batch.
        workers: Number of processes that load rows.
        device: Device that batches are moved to.
        loader: DataLoader of this run. None before `opened`.
    """

    dataset: Resized
    batch: int
    workers: int
    device: torch.device
    loader: Any = None

    def opened(self, cache: ActivationCache | None) -> "FromLoader":
        """Returns batches for a run, from the cache's own loader if there is a cache."""
        make: Any = DataLoader if cache is None else cache.loader
        loader = make(
            self.dataset, batch_size=self.batch, shuffle=True, num_workers=self.workers,
            pin_memory=self.device.type == "cuda", persistent_workers=self.workers > 0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return FromLoader(self.dataset, self.batch, self.workers, self.device, loader)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of the next epoch."""
        for x, y in self.loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


Batches = OnDevice | FromLoader


class Loop:
    """A training loop as people write it.

    Args:
        model: Model to train.
        loss: Function of the model's output and the labels.
        device: Device of the model.
        dtype: Type of autocast. None for no autocast.
        scaled: Whether gradients are scaled, as for float16.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        device: torch.device,
        dtype: torch.dtype | None = None,
        scaled: bool = False,
    ) -> None:
        self.model, self.loss, self.device, self.dtype = model, loss, device, dtype
        trained = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def step(self, call: Any, x: Tensor, y: Tensor) -> None:
        """Trains on one batch.

        Args:
            call: Module that is called: the whole model, or its trained part.
            x: Inputs of the module.
            y: Labels.
        """
        enabled = self.dtype is not None
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=enabled):
            loss = self.loss(call(x), y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def epoch(self, batches: Batches, number: int) -> None:
        """Trains on all batches of an epoch."""
        for x, y in batches.epoch(number):
            self.step(self.model, x, y)

    def features(self, batches: Batches) -> list[tuple[Tensor, Tensor]]:
        """Returns the results of the frozen part for the first batches, on the device."""
        found, enabled = [], self.dtype is not None
        for x, y in islice(batches.opened(None).epoch(0), _FEATURES):
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=enabled),
            ):
                found.append((self.model.frozen(x), y))  # type: ignore[operator]
        return found


@contextmanager
def deterministic(notes: set[str]) -> Iterator[None]:
    """Lets torch use deterministic algorithms, and notes the operations that have none."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
    for one in found:
        text = str(one.message)
        if "deterministic" in text:
            notes.add(text.split(". ")[0])


def seed_all(seed: int) -> None:
    """Sets the seeds of all generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def difference(one: nn.Module, other: nn.Module) -> float | None:
    """Returns the largest difference of two models' weights, or None if all bits are equal."""
    differences = [
        float((a.double() - b.double()).abs().max())
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        if not same_bits(a, b)
    ]
    return max(differences) if differences else None
