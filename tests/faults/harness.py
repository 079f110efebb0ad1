"""Training loops in which something changes, run with the cache and without, and compared."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cachefreeze import ActivationCache

ROWS, BATCH, EPOCHS = 32, 8, 7

Tensor = torch.Tensor
Change = Callable[[Any], Any]


class Net(nn.Module):
    """A frozen body with a batch norm, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 64, 32), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(32, 4)
        self.body.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def images(rows: int = ROWS, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batches(x: Tensor, epoch: int, size: int = BATCH) -> Iterator[Tensor]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
    for places in order.split(size):
        yield x[places]


@dataclass
class Result:
    """What a run ends with.

    Attributes:
        weights: Everything that the model holds.
        losses: Loss of every step, and what a validation gave.
        served: Rows that were served in each epoch.
        messages: What the cache has told.
    """

    weights: dict[str, Tensor]
    losses: list[float]
    served: list[int] = field(default_factory=list)
    messages: tuple[str, ...] = ()


@dataclass
class Loop:
    """A loop that trains the head of a model, in which something changes.

    Attributes:
        make: Function that makes the model.
        changes: What is done to the model, by epoch, before the third step of it.
        x: Rows.
        step: What the loop does with a batch. None for a call of the model.
        epochs: Number of epochs.
        options: Options of the cache.
        size: Number of rows in a batch.
    """

    make: Callable[[], Any] = Net
    changes: dict[int, Change] = field(default_factory=dict)
    x: Tensor = field(default_factory=images)
    step: Callable[[Any, Tensor], Tensor] | None = None
    epochs: int = EPOCHS
    options: dict[str, Any] = field(default_factory=dict)
    size: int = BATCH

    def run(self, cached: bool, directory: "os.PathLike[str] | None" = None) -> Result:
        torch.manual_seed(0)
        model = self.make()
        cache = ActivationCache(model, directory=directory, **self.options) if cached else None
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
        result = Result({}, [])
        torch.manual_seed(1)
        for epoch in range(self.epochs):
            before = cache.stats.rows_served if cache is not None else 0
            for number, batch in enumerate(batches(self.x, epoch, self.size)):
                if number == 2 and epoch in self.changes:
                    self.changes[epoch](model)
                out = model(batch) if self.step is None else self.step(model, batch)
                loss = F.mse_loss(out, torch.zeros_like(out)) + out.sum() / 100
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                result.losses.append(loss.item())
            if cache is not None:
                result.served.append(cache.stats.rows_served - before)
        result.losses.append(float(torch.rand(())))  # random state
        result.weights = {
            name: tensor.detach().clone() for name, tensor in model.state_dict().items()
        }
        if cache is not None:
            cache.close()
            result.messages = cache.messages
        return result


def differs(one: Result, other: Result) -> str:
    """Says how two runs differ, or returns an empty string."""
    for number, (a, b) in enumerate(zip(one.losses, other.losses, strict=True)):
        if a != b:
            return f"loss {number} is {b!r} and not {a!r}"
    for name, tensor in one.weights.items():
        if not torch.equal(tensor, other.weights[name]):
            return f"{name} is another one"
    return ""
