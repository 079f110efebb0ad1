"""Loops that call a frozen encoder several times in a step, or with batches of their own making."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from .data import digits, generator, loader
from .harness import Loop, Optimizers
from .networks import backbone, conv, correct, frozen, trained


class Encoder(nn.Module):
    """A frozen backbone and a trained projection."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = frozen(backbone(64, 128, 192))
        self.projection = nn.Linear(192, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.projection(self.backbone(x)))


class Siamese(Loop):
    """Two images in a step, through one frozen encoder. Pairs are drawn anew in each epoch.

    Who: verification of faces and signatures, with a contrastive loss.
    Hard: the encoder is called twice in a step. An image is left in one pair and right in another,
    and the number of a pair means another pair in the next epoch.
    Row: an image, on either side.
    """

    EPOCHS = 5

    class Pairs(Dataset[Any]):
        def __init__(self) -> None:
            self.images, self.epoch = digits(96), 0

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
            draw = generator(1000 * self.epoch + row)
            labels = self.images.tensors[1]
            same = bool(torch.rand((), generator=draw) < 0.5)
            others = torch.where((labels == labels[row]) == same)[0]
            other = int(others[torch.randint(len(others), (), generator=draw)])
            return self.images[row][0], self.images[other][0], torch.tensor(float(same))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return F.pairwise_distance(self.encoder(left), self.encoder(right))

    def __init__(self) -> None:
        self.pairs = self.Pairs()
        self.loader = loader(self.pairs, 16)

    def build(self) -> Any:
        return self.Net()

    def optimizer(self, model: Any) -> Optimizers:
        return Adam(model.encoder.projection.parameters(), lr=1e-3)

    def batches(self, epoch: int) -> Iterable[Any]:
        self.pairs.epoch = epoch
        return self.loader

    def step(self, model: Any, batch: Any) -> Tensor:
        left, right, same = batch
        distance = model(left, right)
        return (same * distance**2 + (1 - same) * F.relu(1 - distance) ** 2).mean()


class HardTriplets(Loop):
    """Triplets with the hardest negatives of the whole set, joined to one batch of three times 16.

    Who: retrieval and re-identification: embed everything at the start of the epoch, then mine.
    Hard: mining runs the model under `no_grad` in batches of 32, training in batches of 48 that
    hold images several times. What is mined depends on the weights.
    Row: an image, wherever it stands in a triplet.
    """

    EPOCHS = 5
    LEARNS = False  # negatives become harder as the embedding becomes better

    def __init__(self) -> None:
        self.x, self.y = digits(96).tensors
        self.negatives = torch.zeros(96, dtype=torch.long)
        self.loader = loader(TensorDataset(torch.arange(96)), 16)

    def build(self) -> Any:
        return Encoder()

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(trained(model), lr=0.05, momentum=0.9)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.eval()
        with torch.no_grad():
            embedded = torch.cat([model(x) for x in self.x.split(32)])
        alike = embedded @ embedded.T
        alike[self.y[:, None] == self.y] = -2
        self.negatives = alike.argmax(1)
        model.projection.train()

    def step(self, model: Any, batch: Any) -> Tensor:
        (anchors,) = batch
        positives = torch.tensor(
            [int(torch.where(self.y == self.y[row])[0][0]) for row in anchors.tolist()]
        )
        rows = torch.cat([anchors, positives, self.negatives[anchors]])
        anchor, positive, negative = model(self.x[rows]).chunk(3)
        return F.triplet_margin_loss(anchor, positive, negative, margin=0.5)


class Episodes(Loop):
    """Few-shot episodes: a prototypical network on frozen features.

    Who: few-shot learning; a batch sampler draws 5 classes, 3 examples and 3 questions each.
    Hard: the order of rows in a batch has a meaning, an epoch does not meet each row once, and rows
    of one batch are chosen together.
    Row: an image.
    """

    EPOCHS = 5

    class Draws(Sampler[list[int]]):
        def __init__(self, labels: Tensor) -> None:
            self.of = [torch.where(labels == label)[0] for label in range(10)]
            self.draw = generator(6)

        def __iter__(self) -> Iterator[list[int]]:
            for _ in range(8):
                classes = torch.randperm(10, generator=self.draw)[:5].tolist()
                drawn = [torch.randperm(len(self.of[c]), generator=self.draw)[:6] for c in classes]
                rows = [self.of[c][order] for c, order in zip(classes, drawn, strict=True)]
                yield torch.stack(rows, 1).flatten().tolist()

    def __init__(self) -> None:
        images = digits(120)
        self.loader = DataLoader(images, batch_sampler=self.Draws(images.tensors[1]))

    def build(self) -> Any:
        return Encoder()

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(trained(model), lr=2e-3, fused=True)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, _ = batch
        features = model(x).view(6, 5, -1)
        prototypes, questions = features[:3].mean(0), features[3:].flatten(0, 1)
        return F.cross_entropy(-torch.cdist(questions, prototypes) * 4, torch.arange(5).repeat(3))


class Accumulation(Loop):
    """Gradients of three parts of a batch are added up; validation runs in batches of another size.

    Who: everybody whose batch does not fit.
    Hard: the optimizer steps after every third call. Validation under `no_grad` and `eval()` has
    batches of 20, the last one of 5, and rows of its own with the numbers of training's rows.
    Row: an image.
    """

    EPOCHS = 5

    def __init__(self) -> None:
        self.loader = loader(digits(96), 8)
        self.held_back = DataLoader(digits(45, first=200), 20)
        self.at = 0

    def build(self) -> Any:
        head = nn.Sequential(nn.Dropout(0.2), nn.Linear(192, 10))
        return nn.Sequential(OrderedDict(backbone=frozen(backbone(64, 128, 192)), head=head))

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(trained(model), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()
        model.backbone.eval()

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    def update(self, model: Any, optimizer: Any, loss: Tensor) -> None:
        (loss / 3).backward()
        self.at += 1
        if self.at % 3 == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def validate(self, model: Any) -> Tensor:
        model.eval()
        with torch.no_grad():
            found = [(model(x), y) for x, y in self.held_back]
        return torch.stack([correct(logits, y) for logits, y in found])


class ProbesWithHooks(Loop):
    """Heads on several layers of one frozen backbone, which forward hooks read.

    Who: linear probing of every layer, as interpretability and DINOv2's evaluation do it.
    Hard: the output of the backbone is thrown away. What counts goes into a list through hooks, so
    a call that is skipped whole gives the heads nothing, or what they got the last time.
    Row: an image.
    """

    def __init__(self) -> None:
        self.loader = loader(digits(96), 16)
        self.caught: list[Tensor] = []

    def build(self) -> Any:
        trunk = frozen(nn.Sequential(conv(3, 48), conv(48, 96), conv(96, 128)))
        for stage in trunk:
            stage.register_forward_hook(self._catch)
        heads = nn.ModuleList([nn.Linear(width, 10) for width in (48, 96, 128)])
        return nn.ModuleDict({"trunk": trunk, "heads": heads})

    def _catch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.caught.append(output.mean((2, 3)))

    def optimizer(self, model: Any) -> Optimizers:
        return Adam(model["heads"].parameters(), lr=1e-2)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        self.caught.clear()
        with torch.no_grad():
            model["trunk"](x)
        heads = zip(model["heads"], self.caught, strict=True)
        return torch.stack([F.cross_entropy(head(seen), y) for head, seen in heads]).sum()


class ManyHeads(Loop):
    """Sixteen heads with other rates and decays train on one frozen backbone: a sweep in one run.

    Who: linear evaluation of DINOv2, which trains all learning rates at once.
    Hard: nothing is hard here; the gain is large, so the cache must not lose it. The loss of each
    head is kept.
    Row: an image.
    """

    def __init__(self) -> None:
        self.loader = loader(digits(128), 16)

    def build(self) -> Any:
        heads = nn.ModuleList([nn.Linear(192, 10) for _ in range(16)])
        return nn.ModuleDict({"backbone": frozen(backbone(64, 128, 192)), "heads": heads})

    def optimizer(self, model: Any) -> Optimizers:
        groups = [
            {"params": head.parameters(), "lr": 0.2 / (1 + number), "weight_decay": 1e-4 * number}
            for number, head in enumerate(model["heads"])
        ]
        return SGD(groups, momentum=0.9)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        with torch.no_grad():
            features = model["backbone"](x)
        return torch.stack([F.cross_entropy(head(features), y) for head in model["heads"]]).mean()


LOOPS: tuple[type[Loop], ...] = (
    Siamese,
    HardTriplets,
    Episodes,
    Accumulation,
    ProbesWithHooks,
    ManyHeads,
)
