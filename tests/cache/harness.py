"""Small models, batches and comparisons for the tests of the cache."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cachefreeze import ActivationCache

ROWS, BATCH = 24, 8


class Net(nn.Module):
    """A frozen body with a batch norm, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 32),
        )  # fmt: skip
        self.head = nn.Linear(32, 4)
        self.body.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images(rows: int = ROWS, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batches(x: torch.Tensor, epoch: int, size: int = BATCH) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(epoch)
    for places in torch.randperm(len(x), generator=generator).split(size):
        yield x[places]


def served(cache: ActivationCache, call: Callable[[], Any]) -> int:
    """Returns how many rows are served in a call."""
    before = cache.stats.rows_served
    call()
    return cache.stats.rows_served - before


def warm(
    cache: ActivationCache, model: Callable[..., Any], x: torch.Tensor, epochs: int = 3
) -> None:
    """Runs passes until batches of these rows are served."""
    for epoch in range(epochs):
        for batch in batches(x, epoch):
            model(batch)
    assert served(cache, lambda: model(next(batches(x, 99)))) == BATCH, str(cache)


def plainly(model: nn.Module, *args: Any) -> Any:
    """Runs a pass of a copy, which has no cache."""
    return copy.deepcopy(model)(*args)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert torch.equal(one, other), float((one - other).abs().max())
