"""Compares loops of several processes with the same loops without the cache: weights and times.

    python scripts/parity.py [--processes 1 2 4] [--repeats 3] [--loops head adapters ...]

Each loop runs under DistributedDataParallel on gloo, with one thread in each process: without the
cache, with a new directory, and with the same directory again. The three take turns. Weights are
compared to the last bit, in every process. The times with the cache are shares of those without.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision.models import resnet18

from cachefreeze import ActivationCache, FreezeOutLR, freeze, param_groups
from cachefreeze.models.wrn import wrn

# Rows of all processes together, and rows of a step of all of them.
ROWS, BATCH, CLASSES = 256, 32, 10
HOW = ("plain", "first", "again")


class Head(nn.Module):
    """A frozen ResNet-18 and a trained linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*list(resnet18().children())[:-1])
        freeze(self.body)
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        return self.head(self.body(x).flatten(1))


class Adapters(nn.Module):
    """Eight frozen layers over 16 tokens. The last two have trained adapters of rank 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(768, 256)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
            for _ in range(8)
        )
        self.requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(256, 4, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(4, 256, bias=False) for _ in range(2))
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        x = self.embed(x.reshape(len(x), 16, 768))
        for number, block in enumerate(self.blocks):
            y = block(x)
            if number >= 6:
                y = y + self.up[number - 6](self.down[number - 6](x))
            x = x + y
        return self.head(x.mean(1))


class Segmenter(nn.Module):
    """A frozen body whose early and late maps both go to a trained dense head."""

    def __init__(self) -> None:
        super().__init__()
        body = resnet18()
        self.early = nn.Sequential(body.conv1, body.bn1, body.relu, body.layer1)
        self.late = nn.Sequential(body.layer2, body.layer3)
        for one in (self.early, self.late):
            freeze(one)
        self.join = nn.Sequential(nn.Conv2d(320, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of each pixel of the early map."""
        early = self.early(x)
        late = F.interpolate(self.late(early), size=early.shape[-2:])
        return self.head(self.join(torch.cat([early, late], dim=1)))


# For each loop: its model, sizes of its images, epochs.
LOOPS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "head": (Head, 48, 4),
    "adapters": (Adapters, 64, 5),
    "segmentation": (Segmenter, 48, 4),
    "freezeout": (lambda: wrn(CLASSES, depth=10, width=1), 32, 8),
}


class Ran(NamedTuple):
    """What a process has seen of one run.

    Args:
        weights: Hash of everything that the model holds at the end.
        seconds: Seconds by the clock.
        processor: Seconds of the processor.
        served: Number of rows that were served.
    """

    weights: str
    seconds: float
    processor: float
    served: int


def train(name: str, directory: Path | None) -> Ran:
    """Trains once."""
    make, size, epochs = LOOPS[name]
    torch.manual_seed(0)
    model = make()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, size, size, generator=generator)
    labels = torch.randint(CLASSES, (ROWS, size // 2, size // 2), generator=generator)
    data = TensorDataset(images, labels)
    sampler = DistributedSampler[tuple[Tensor, ...]](data, seed=3)
    loader = DataLoader(data, BATCH // dist.get_world_size(), sampler=sampler)
    cache = None if directory is None else ActivationCache(model, directory=directory)
    freezing = name == "freezeout"
    groups = param_groups(model, images[:2]) if freezing else None
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(groups or trained, lr=0.05, momentum=0.9)
    scheduler = FreezeOutLR(optimizer, model, epochs * len(loader), t0=0.2) if freezing else None
    frontier = scheduler.frontier if scheduler else None
    dist.barrier()
    began, used = time.perf_counter(), time.process_time()
    wrapped = DistributedDataParallel(model)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            if scheduler is not None and frontier != scheduler.frontier:
                frontier = scheduler.frontier
                del wrapped
                wrapped = DistributedDataParallel(model)
            logits = wrapped(x)
            loss = F.cross_entropy(logits, y if logits.dim() == 4 else y[:, 0, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    served = 0
    if cache is not None:
        served = cache.stats.rows_served
        cache.close()
    dist.barrier()
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    content = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        content.update(key.encode() + tensor.detach().contiguous().numpy().tobytes())
    return Ran(content.hexdigest(), seconds, processor, served)


def work(rank: int, name: str, processes: int, repeats: int, folder: Path) -> None:
    """Trains all variants in one of the processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=processes)
    found: dict[str, list[Ran]] = {how: [] for how in HOW}
    for number in range(repeats):
        for how in HOW:
            directory = None if how == "plain" else folder / f"rows{number}"
            found[how].append(train(name, directory))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def compare(name: str, processes: int, repeats: int) -> list[str]:
    """Runs one loop with some processes. Returns the cells of its row in the table."""
    with tempfile.TemporaryDirectory(dir=".") as where:
        folder = Path(where).absolute()
        words = (name, processes, repeats, folder)
        start_processes(work, words, nprocs=processes, start_method="fork")
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    runs = {how: [[Ran(*one) for one in rank[how]] for rank in ranks] for how in HOW}
    cells = [name, str(processes)]
    for how in HOW[1:]:
        same = all(
            one.weights == plain[0].weights
            for rank, plain in zip(runs[how], runs["plain"], strict=True)
            for one in rank
        )
        cells.append("equal" if same else "DIFFERENT")
    for field, total in (("seconds", max), ("processor", sum)):
        plain, first, again = (
            [total(getattr(one, field) for one in ran) for ran in zip(*runs[how], strict=True)]
            for how in HOW
        )
        cells.append(spread(plain, 1))
        for cached in (first, again):
            cells.append(spread([a / b for a, b in zip(cached, plain, strict=True)], 2))
    served = statistics.median(
        sum(one.served for one in ran) for ran in zip(*runs["again"], strict=True)
    )
    cells.append(f"{served / (ROWS * LOOPS[name][2]):.0%}")
    return cells


def spread(values: list[float], digits: int) -> str:
    """Returns the median, and the smallest and the largest number if there are several."""
    middle, low, high = (
        f"{one:.{digits}f}" for one in (statistics.median(values), min(values), max(values))
    )
    return middle if len(values) == 1 else f"{middle} ({low} - {high})"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Compares loops of several processes.")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3, help="number of runs of each variant")
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    options = parser.parse_args()
    heads = ["loop", "processes", "weights: first run", "second run"]
    heads += ["seconds without the cache", "first run", "second run"]
    heads += ["processor seconds without it", "first run", "second run", "served in the second run"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in options.loops:
        for processes in options.processes:
            print(f"| {' | '.join(compare(name, processes, options.repeats))} |", flush=True)
    print(f"\n{os.cpu_count()} cores, torch {torch.__version__}, n = {options.repeats}")


if __name__ == "__main__":
    main()
