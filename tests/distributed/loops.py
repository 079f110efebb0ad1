"""Training loops under DistributedDataParallel, as users write them."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from cachefreeze import FreezeOutLR, freeze, param_groups
from cachefreeze.models import wrn

ROWS, BATCH, EPOCHS = 96, 4, 5
# Called before each epoch, with its number.
BeforeEpoch = Callable[[int], None]


def body(norm: bool = True) -> nn.Sequential:
    layers = [
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip
    made = nn.Sequential(*layers)
    freeze(made)
    return made


class Classifier(nn.Module):
    """A frozen body with a batch norm, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


# Number of collectives that a model has run in this process.
collectives = 0


class Exchanging(Classifier):
    """Takes the mean over all processes away before its frozen body."""

    def forward(self, x: Tensor) -> Tensor:
        global collectives
        mean = x.mean()
        dist.all_reduce(mean)
        collectives += 1
        return super().forward(x - mean)


class Adapted(nn.Module):
    """Frozen layers. The last two have trained adapters of rank 2 beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(192, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 4)
        self.requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(64, 2, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(2, 64, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x.flatten(1)))
        for number, block in enumerate(self.blocks):
            y = block(x)
            if number >= 2:
                y = y + self.up[number - 2](self.down[number - 2](x))
            x = x + torch.tanh(y)
        return self.head(x)


class Segmenter(nn.Module):
    """A frozen body whose early and late maps both go to a trained dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = body(), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.late.requires_grad_(False)
        self.join = nn.Sequential(nn.Conv2d(24, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x)
        late = F.interpolate(torch.tanh(self.late(early)), scale_factor=2.0)
        return self.head(self.join(torch.cat([early, late], dim=1)))


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, 8, 8, generator=generator)
    labels = torch.randint(4, (ROWS, 8, 8), generator=generator)
    data = TensorDataset(images, labels)
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, seed=3))


def epochs(
    batches: DataLoader, before: BeforeEpoch, count: int = EPOCHS
) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(count):
        before(epoch)
        batches.sampler.set_epoch(epoch)
        yield from batches


def fine_tune(model: nn.Module, before: BeforeEpoch) -> None:
    """Trains what is not frozen."""
    # Some loops are given the wrapped model, with its cache.
    wrapped = (
        model if isinstance(model, DistributedDataParallel) else DistributedDataParallel(model)
    )
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    for x, labels in epochs(loader(), before):
        logits = wrapped(x)
        loss = F.cross_entropy(logits, labels if logits.dim() == 4 else labels[:, 0, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def freeze_out(model: nn.Module, before: BeforeEpoch) -> None:
    """Freezes layer after layer, and wraps what still trains anew after each freeze."""
    optimizer = torch.optim.SGD(param_groups(model, torch.zeros(2, 3, 8, 8)), 0.05, momentum=0.9)
    batches = loader()
    count = 2 * EPOCHS  # the last freeze before the head's is in the middle
    scheduler = FreezeOutLR(optimizer, model, count * len(batches), t0=0.1)
    frozen, wrapped = scheduler.frontier, DistributedDataParallel(model)
    for x, labels in epochs(batches, before, count):
        if frozen != scheduler.frontier:
            frozen = scheduler.frontier
            del wrapped
            wrapped = DistributedDataParallel(model)
        model.train()
        loss = F.cross_entropy(wrapped(x), labels[:, 0, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def broadcast(model: nn.Module, before: BeforeEpoch) -> None:
    """Changes a buffer of frozen work in one process. The wrapper sends it to all others."""

    def and_change(epoch: int) -> None:
        before(epoch)
        if epoch == 4 and dist.get_rank() == 0:
            model.body[1].running_mean.add_(0.5)

    fine_tune(model, and_change)


LOOPS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, BeforeEpoch], None]]] = {
    "head": (Classifier, fine_tune),
    "wrapped": (lambda: DistributedDataParallel(Classifier()), fine_tune),
    "adapters": (Adapted, fine_tune),
    "collective": (Exchanging, fine_tune),
    "broadcast": (Classifier, broadcast),
    "segmentation": (Segmenter, fine_tune),
    "freezeout": (lambda: wrn(4, depth=10, width=1), freeze_out),
}
