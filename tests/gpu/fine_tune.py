"""Fine-tunes a small network: `python -m tests.gpu.fine_tune DEVICE FOLDER PRECISION`.

It prints the number of rows that were served in the first epoch, and a hash of the weights. If
FOLDER is `none`, it runs without a cache.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import cachefreeze

ROWS, BATCH, EPOCHS = 64, 8, 4


class Net(nn.Module):
    """A frozen backbone with a batch norm, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 81, 64),
        )  # fmt: skip
        self.head: Any = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        cachefreeze.freeze(self.body)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def net(device: str) -> Net:
    torch.manual_seed(0)
    return Net().to(device)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images that are enlarged when they are loaded. It counts them."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        self.coarse = torch.randn(ROWS, 3, 10, 10, generator=random)
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.coarse)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded += 1
        return F.interpolate(self.coarse[index][None], size=40, mode="bicubic")[0], index % 4


def images() -> tuple[Tensor, Tensor]:
    items = [Pictures()[index] for index in range(ROWS)]
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


def batches(
    device: str, epoch: int, rows: int = ROWS, **form: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches of an epoch of the first rows, in an order of its own."""
    x, y = images()
    x, y = x.to(device, **form), y.to(device)
    for places in torch.randperm(rows, generator=torch.Generator().manual_seed(epoch)).split(BATCH):
        yield x[places.to(device)], y[places.to(device)]


@dataclass
class Trainer:
    """A loop on a network, with autocast and scaled gradients if they are asked for."""

    model: Net
    dtype: torch.dtype | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        self.use(next(self.model.parameters()).device.type)

    def use(self, device: str) -> None:
        """Goes on, on a device, with a new optimizer."""
        self.device = device
        self.model.to(device)
        self.optimizer = torch.optim.SGD(self.model.head.parameters(), lr=0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler(device, enabled=self.scaled)

    def epoch(self, found: Iterator[tuple[Tensor, Tensor]]) -> None:
        for x, y in found:
            self.optimizer.zero_grad()
            enabled = self.dtype is not None
            with torch.autocast(self.device, self.dtype or torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(self.model(x), y)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()


def digest(model: nn.Module) -> str:
    state = [one.detach().cpu().contiguous().numpy() for one in model.state_dict().values()]
    return hashlib.sha256(b"".join(one.tobytes() for one in state)).hexdigest()


def main() -> int:
    device, folder, precision = sys.argv[1:]
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision(precision)
    trainer, first = Trainer(net(device)), 0
    cache = None
    if folder != "none":
        cache = cachefreeze.ActivationCache(trainer.model, directory=folder)
    for epoch in range(EPOCHS):
        trainer.epoch(batches(device, epoch))
        if cache is not None and epoch == 0:
            first = cache.stats.rows_served
    if cache is not None:
        cache.close()
    print(first, digest(trainer.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
