"""Data sets that count their loads, and a loop with the cache's loader or with torch's."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    WeightedRandomSampler,
)

from cachefreeze import ActivationCache

ROWS, BATCH, SIDE = 24, 8, 24


Tensor = torch.Tensor


class Net(nn.Module):
    """A frozen body and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 4)
        self.body.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Pictures(Dataset[Any]):
    """Items that are made by their numbers, and counted as they are loaded."""

    def __init__(self, rows: int = ROWS) -> None:
        self.targets = [number % 4 for number in range(rows)]
        self.loads = 0
        self.transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def picture(self, index: int) -> Tensor:
        self.loads += 1
        x = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(index))
        return x if self.transform is None else self.transform(x)

    def __getitem__(self, index: int) -> Any:
        return self.picture(index), self.targets[index]


class Named(Pictures):
    """The same as a dictionary with a name, a mask and a pair."""

    def __getitem__(self, index: int) -> Any:
        x = self.picture(index)
        mask = x[0, :4, :4] > 0
        return {"x": x, "name": f"picture {index}", "more": (self.targets[index], mask)}


class Files(Dataset[Any]):
    """Items that lie in JPEG files, as in torchvision's `ImageFolder`."""

    def __init__(self, folder: Path) -> None:
        self.samples = [
            (str(path), number % 4) for number, path in enumerate(sorted(folder.glob("*.jpg")))
        ]
        self.loads = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        path, target = self.samples[index]
        with Image.open(path) as image:
            array = np.array(image.convert("RGB"), dtype=np.float32) / 255
        return torch.from_numpy(array).permute(2, 0, 1).contiguous(), target


def save_picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


Edit = Callable[[int, Any], None]


Change = Callable[[Tensor], Tensor]


class Run:
    """A training loop, with the cache's loader or with torch's.

    Attributes:
        losses: Loss of every step.
        batches: Labels and names of every batch.
        loads: Number of items that were loaded in each epoch, if the data set counts them.
        state: Weights and random state afterwards.
        messages: Sentences of the cache.
    """

    def __init__(
        self,
        cached: bool,
        dataset: Any,
        epochs: int = 5,
        *,
        directory: Path | None = None,
        edit: Edit | None = None,
        change: Change = lambda x: x,
        close_after: int | None = None,
        arguments: Callable[[Any], dict[str, Any]] = lambda dataset: {"shuffle": True},
        seed: int = 0,
        verify: str = "sample",
    ) -> None:
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(seed)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        cache = ActivationCache(model, directory=directory, verify=verify) if cached else None
        options = {"batch_size": BATCH, **arguments(dataset)}
        if "batch_sampler" in options:
            del options["batch_size"]
        loader = DataLoader(dataset, **options)
        if cache is not None:
            for seeded in (torch.manual_seed, random.seed, np.random.seed):
                seeded(seed)
            model.load_state_dict(Net().state_dict())
            loader = cache.loader(dataset, **{**options, **arguments(dataset)})
            if "batch_sampler" in options:
                loader = cache.loader(dataset, **options)
        self.losses: list[float] = []
        self.batches: list[Any] = []
        self.loads: list[int] = []
        for epoch in range(epochs):
            if edit is not None:
                edit(epoch, dataset)
            before = getattr(dataset, "loads", 0)
            for batch in loader:
                x, y, rest = parts(batch)
                self.batches.append((y.tolist(), rest))
                loss = F.cross_entropy(model(change(x.to("cpu"))), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.losses.append(loss.item())
            self.loads.append(getattr(dataset, "loads", 0) - before)
            if cache is not None and epoch == close_after:
                cache.close()
        self.state = (
            [one.detach().clone() for one in model.parameters()],
            torch.get_rng_state(), random.getstate(), repr(np.random.get_state()),
        )  # fmt: skip
        self.messages = "" if cache is None else " ".join(cache.messages)
        self.served = 0 if cache is None else cache.stats.rows_served
        if cache is not None:
            cache.close()


def parts(batch: Any) -> tuple[Tensor, Tensor, Any]:
    if isinstance(batch, dict):
        y, mask = batch["more"]
        return batch["x"], y, (batch["name"], mask.tolist())
    x, y = batch
    return x, y, None


def same(make: Callable[[], Any], **options: Any) -> Run:
    """Runs a loop both ways, and compares them to the last bit. Returns the cached one."""
    plain = Run(False, make(), **{**options, "directory": None})
    cached = Run(True, make(), **options)
    assert cached.batches == plain.batches
    assert cached.losses == plain.losses
    for one, other in zip(cached.state[0], plain.state[0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(cached.state[1], plain.state[1])
    assert cached.state[2:] == plain.state[2:]
    return cached


def weighted(dataset: Any) -> dict[str, Any]:
    weights = [1.0 + number for number in range(len(dataset))]
    return {"sampler": WeightedRandomSampler(weights, len(dataset))}


def with_generator(dataset: Any) -> dict[str, Any]:
    return {"shuffle": True, "generator": torch.Generator().manual_seed(3)}


def fours(dataset: Any) -> dict[str, Any]:
    return {"shuffle": True, "batch_size": 4}


def batches_of_numbers(dataset: Any) -> dict[str, Any]:
    order = list(range(len(dataset)))
    return {"batch_sampler": [order[start::3] for start in range(3)]}


ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "shuffled": lambda dataset: {"shuffle": True},
    "in order": lambda dataset: {},
    "short last batch": lambda dataset: {"shuffle": True, "batch_size": 7},
    "without the last": lambda dataset: {"shuffle": True, "batch_size": 7, "drop_last": True},
    "generator": with_generator,
    "weighted": weighted,
    "batch sampler": batches_of_numbers,
    "pinned": lambda dataset: {"shuffle": True, "pin_memory": True},
    "workers": lambda dataset: {"shuffle": True, "num_workers": 2},
    "workers that stay": lambda dataset: {
        "shuffle": True, "num_workers": 2, "persistent_workers": True,
    },
}  # fmt: skip
