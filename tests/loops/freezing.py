"""What is frozen changes while the loop trains, or only seems to be frozen."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset

from .data import digits, loader, padded, texts
from .harness import Loop, Optimizers
from .networks import Classifier, backbone, conv, correct, frozen, trained


class Images(Loop):
    """Base of the loops of this file: digits in batches of 16."""

    def __init__(self) -> None:
        self.loader: DataLoader[Any] = loader(digits(96), 16)
        self.held_back = DataLoader(digits(48, first=100), 24)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)


class Stages(nn.Module):
    """Three stages and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 48), conv(48, 96), conv(96, 128)])
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class GradualUnfreezing(Images):
    """The head first, then one stage more from above, each with its own group in the optimizer.

    Who: users of ULMFiT and fastai; everybody who "unfreezes after two epochs".
    Hard: the kept values are of use until the stage below them trains. Then values from further
    down are needed, for rows that were never computed there.
    Row: an image.
    """

    EPOCHS = 7

    def build(self) -> Any:
        model = Stages()
        frozen(model.stages)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        self.adam = AdamW(model.head.parameters(), lr=2e-3)
        return self.adam

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.head.train()
        if epoch in (3, 5):
            stage = model.stages[2 if epoch == 3 else 1].requires_grad_(True).train()
            self.adam.add_param_group({"params": list(stage.parameters()), "lr": 5e-4})


class FreezingOnPlateau(Images):
    """Stage after stage freezes, from below, when the loss no longer falls by much.

    Who: FreezeOut, Egeria, AutoFreeze, and people with a callback of ten lines.
    Hard: nothing is frozen in the first epoch, and the place where frozen work ends moves up during
    the run, at times that nobody knows beforehand.
    Row: an image.
    """

    EPOCHS = 8

    def build(self) -> Any:
        self.frozen, self.losses, self.best = 0, list[float](), float("inf")
        return Stages()

    def optimizer(self, model: Any) -> Optimizers:
        return Adam(model.parameters(), lr=1e-3)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()
        mean = sum(self.losses) / max(1, len(self.losses))
        if epoch and self.frozen < 2 and mean > 0.3 * self.best:
            model.stages[self.frozen].requires_grad_(False)
            self.frozen += 1
        self.best = min(self.best, mean) if self.losses else self.best
        self.losses = []
        model.stages[: self.frozen].eval()

    def step(self, model: Any, batch: Any) -> Tensor:
        loss = super().step(model, batch)
        self.losses.append(loss.item())
        return loss


class LayerAfterLayer(Images):
    """FreezeOut: each stage has a rate of its own that falls to zero, in the middle of an epoch.

    Who: users of FreezeOut's author's code, which sets `requires_grad` by the number of the step.
    Hard: freezing comes between two batches of one epoch. The batch norms of a frozen stage go on
    to be in training mode until the next epoch begins.
    Row: an image.
    """

    EPOCHS = 7
    ENDS = (8, 15, 1000, 1000)

    def build(self) -> Any:
        self.at = 0
        return Stages()

    def optimizer(self, model: Any) -> Optimizers:
        self.parts = [*model.stages, model.head]
        return SGD([{"params": part.parameters()} for part in self.parts], lr=0.05, momentum=0.9)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()
        for part, end in zip(self.parts, self.ENDS, strict=True):
            part.train(self.at < end)

    def update(self, model: Any, optimizer: Any, loss: Tensor) -> None:
        for group, part, end in zip(optimizer.param_groups, self.parts, self.ENDS, strict=True):
            part.requires_grad_(self.at < end)
            group["lr"] = 0.05 * max(0.0, 1 - self.at / end)
            if self.at >= end:
                for parameter in part.parameters():
                    parameter.grad = None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.at += 1


class MomentumMovesTheFrozen(Images):
    """Frozen by `requires_grad`, but the optimizer still holds the parameters, with zero gradients.

    Who: people with `zero_grad(set_to_none=False)`, or torch before 2.0: the gradient is zero and
    not None, so momentum and weight decay go on to move what they think is frozen.
    Hard: `requires_grad` says frozen, and the weights are others in each step.
    Row: an image, with other features in each step.
    """

    EXPECT, EPOCHS, LEARNS = "refuse", 5, False  # its batch norms have seen one epoch only

    def build(self) -> Any:
        return Classifier()

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)

    def on_epoch(self, model: Any, epoch: int) -> None:
        if epoch == 1:
            frozen(model.backbone)

    def update(self, model: Any, optimizer: Any, loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


class BatchNormLeftTraining(Images):
    """The backbone is frozen by `requires_grad` alone; `model.train()` leaves its batch norms on.

    Who: most people at first: the trap that every forum explains.
    Hard: batch norms take their statistics from the batch, and the running ones move in each step,
    without a version that counts it. A row's features depend on its mates.
    Row: an image, with other features beside other mates.
    """

    EXPECT = "refuse"

    def build(self) -> Any:
        model = Classifier()
        model.backbone.requires_grad_(False)
        return model

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()

    def optimizer(self, model: Any) -> Optimizers:
        return Adam(trained(model), lr=1e-2)

    def validate(self, model: Any) -> Tensor:
        model.eval()
        with torch.no_grad():
            return torch.stack([correct(model(x), y) for x, y in self.held_back])


class DropoutLeftTraining(Loop):
    """A frozen `nn.TransformerEncoder` in training mode: its dropout draws in each step.

    Who: people who freeze an encoder and call `model.train()` on the whole.
    Hard: no two passes of a row are equal. Skipped draws would shift all later ones. In validation
    the encoder is in eval mode, takes its fast path, and could be served.
    Row: a text, with other features in each step.
    """

    EXPECT = "refuse"

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
            self.words = nn.Embedding(60, 64, padding_idx=0)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(64, 2)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.encoder(self.words(ids), src_key_padding_mask=ids == 0)
            logits: Tensor = self.head(x[:, 0])
            return logits

    def __init__(self) -> None:
        rows, topics = texts(112, 6, 20, seed=3)
        data = TensorDataset(padded(rows, 20)[0], topics)
        self.loader = loader(torch.utils.data.Subset(data, range(96)), 16)
        self.held_back = DataLoader(torch.utils.data.Subset(data, range(96, 112)), 8)

    def build(self) -> Any:
        model = self.Net()
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(trained(model), lr=1e-2, fused=True)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()

    def step(self, model: Any, batch: Any) -> Tensor:
        ids, topics = batch
        return F.cross_entropy(model(ids), topics)

    def validate(self, model: Any) -> Tensor:
        model.eval()
        with torch.no_grad():
            return torch.stack([correct(model(ids), topics) for ids, topics in self.held_back])


class ReplacedWeights(Images):
    """The frozen part gets other weights in the middle of the run, by `load_state_dict`.

    Who: people who train a backbone elsewhere and load the newest one while the head trains.
    Hard: same modules, same rows, same modes: only the bits of the weights tell. Afterwards the
    rows may be kept and served anew.
    Row: an image, under one set of weights.
    """

    EPOCHS = 7

    def build(self) -> Any:
        self.later = copy.deepcopy(frozen(backbone(64, 128, 192)).state_dict())
        model = Classifier()
        frozen(model.backbone)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(model.head.parameters(), lr=0.05)

    def batches(self, epoch: int) -> Iterable[Any]:
        for at, batch in enumerate(self.loader):
            if (epoch, at) == (3, 2):
                self.model.backbone.load_state_dict(self.later)
            yield batch

    def on_epoch(self, model: Any, epoch: int) -> None:
        self.model = model


class MeanTeacher(Images):
    """The teacher is a moving average of the student, and takes no gradient.

    Who: mean teacher, BYOL, DINO, FixMatch with EMA. The average is written through `.data`.
    Hard: the teacher looks frozen in every way: no gradient, eval mode, `no_grad`. The writes move
    no version. A cache that hashes its weights once serves the first teacher for ever.
    Row: an image, with other targets in each step.
    """

    EXPECT = "refuse"

    def build(self) -> Any:
        student = Classifier(widths=(32, 64))
        teacher = frozen(copy.deepcopy(student))
        return nn.ModuleDict({"student": student, "teacher": teacher})

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(model["student"].parameters(), lr=0.05, momentum=0.9)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        logits = model["student"](x)
        with torch.no_grad():
            target = model["teacher"](x).softmax(1)
        return F.cross_entropy(logits, y) + F.mse_loss(logits.softmax(1), target)

    def update(self, model: Any, optimizer: Any, loss: Tensor) -> None:
        super().update(model, optimizer, loss)
        pairs = zip(model["teacher"].parameters(), model["student"].parameters(), strict=True)
        for average, current in pairs:
            average.data.mul_(0.95).add_(current.data, alpha=0.05)


class QueueOfNegatives(Images):
    """A momentum encoder on top of a stem that is frozen for good, with a queue of negatives.

    Who: MoCo and its children with a pretrained stem. The keys' encoder is written by `p.data = `.
    Hard: two encoders share the frozen stem. One trains, the other moves without a gradient. The
    queue is a buffer that the loop writes. The stem alone can be served.
    Row: an image.
    """

    LEARNS = False  # the queue begins with noise, which is easy to tell from an image

    def build(self) -> Any:
        encoder = nn.Sequential(conv(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = nn.Module()
        model.stem = frozen(nn.Sequential(conv(3, 64, 1), conv(64, 64)))
        model.query = nn.Sequential(encoder, nn.Linear(64, 32))
        model.key = frozen(copy.deepcopy(model.query))
        model.register_buffer("queue", F.normalize(torch.randn(48, 32)), persistent=False)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(model.query.parameters(), lr=0.05, momentum=0.9)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, _ = batch
        stem = model.stem(x)
        query = F.normalize(model.query(stem))
        with torch.no_grad():
            pairs = zip(model.key.parameters(), model.query.parameters(), strict=True)
            for moved, current in pairs:
                moved.data = moved.data * 0.9 + current.data * 0.1
            key = F.normalize(model.key(model.stem(x)))
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ model.queue.T.clone()], 1)
        model.queue = torch.cat([key, model.queue])[:48]
        return F.cross_entropy(logits / 0.2, torch.zeros(len(x), dtype=torch.long))


class AveragedWeights(Images):
    """A moving average of all weights is swapped in for validation and out again.

    Who: users of `ema.store(); ema.copy_to(); validate(); ema.restore()`, as diffusers does it.
    Hard: the average of frozen weights is not equal to them in the last bits, so validation runs on
    two backbones in turn. The average is a deep copy, made while the cache is attached. The swap
    goes through `.data`.
    Row: an image, under the weights of training or those of validation.
    """

    EPOCHS = 5

    def build(self) -> Any:
        model = Classifier()
        frozen(model.backbone)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(model.head.parameters(), lr=1e-2, fused=True)

    def on_epoch(self, model: Any, epoch: int) -> None:
        if epoch == 0:
            self.average = copy.deepcopy(model)
        model.train()
        model.backbone.eval()

    def update(self, model: Any, optimizer: Any, loss: Tensor) -> None:
        super().update(model, optimizer, loss)
        with torch.no_grad():
            pairs = zip(self.average.parameters(), model.parameters(), strict=True)
            for average, current in pairs:
                average.mul_(0.9).add_(current, alpha=0.1)

    def validate(self, model: Any) -> Tensor:
        stored = [parameter.detach().clone() for parameter in model.parameters()]
        model.eval()
        with torch.no_grad():
            found = [model(x) for x, _ in self.held_back]
            self._copy(self.average.parameters(), model)
            found += [model(x) for x, _ in self.held_back]
            self._copy(stored, model)
            found += [self.average(x) for x, _ in self.held_back]
        return torch.cat(found)

    @staticmethod
    def _copy(source: Iterable[Tensor], model: nn.Module) -> None:
        for parameter, value in zip(model.parameters(), source, strict=True):
            parameter.data.copy_(value.data)


class Biases(Images):
    """Only the biases and the head train (BitFit).

    Who: people with little memory for the optimizer.
    Hard: most parameters are frozen, and next to no work is: after the first bias all depends on
    what trains. A cache that counts parameters promises much.
    Row: an image; only the first convolution is the same each time.
    """

    EXPECT = "served or told"

    def build(self) -> Any:
        model = nn.Sequential(
            *(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 48), (48, 64))),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("4") or name.endswith("bias"))
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return Adam(trained(model), lr=1e-2)


LOOPS: tuple[type[Loop], ...] = (
    GradualUnfreezing,
    FreezingOnPlateau,
    LayerAfterLayer,
    MomentumMovesTheFrozen,
    BatchNormLeftTraining,
    DropoutLeftTraining,
    ReplacedWeights,
    MeanTeacher,
    QueueOfNegatives,
    AveragedWeights,
    Biases,
)
