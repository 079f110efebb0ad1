"""Recurrent networks and transformers: axes, methods, precision."""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from .data import digits, loader, padded, sounds, texts
from .harness import Loop, Optimizers
from .networks import Block, correct, trained


class FrozenLstm(Loop):
    """A head on a frozen bidirectional LSTM, with time as the first axis.

    Who: speech and sensor data; `batch_first=False` is the default.
    Hard: rows are the second axis of the outputs and of the states. An LSTM gives other bits under
    `no_grad` and in batches of another size.
    Row: a sequence.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 96, num_layers=2, bidirectional=True)
            self.head = nn.Linear(192 + 96, 4)

        def forward(self, x: Tensor) -> Tensor:
            out, (_, cells) = self.lstm(x.transpose(0, 1))
            logits: Tensor = self.head(torch.cat([out.mean(0), cells[-1]], 1))
            return logits

    def __init__(self) -> None:
        waves, pitch = sounds(96, 160, 160, seed=8)
        self.loader = loader(TensorDataset(torch.stack(waves).view(96, 20, 8), pitch), 16)

    def build(self) -> Any:
        model = self.Net()
        model.lstm.requires_grad_(False)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return Adam(model.head.parameters(), lr=1e-2)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, pitch = batch
        return F.cross_entropy(model(x), pitch)


class PackedGru(Loop):
    """A frozen GRU over packed texts of different lengths.

    Who: `pack_padded_sequence`, in every tutorial on recurrent networks.
    Hard: packing sorts the batch and lays its rows in one another: no axis of the data counts rows.
    How many rows are alive at a time is a python matter.
    Row: a text, in a batch of its mates' lengths.
    """

    EXPECT = "served or told"

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(60, 48)
            self.gru = nn.GRU(48, 96, batch_first=True)
            self.head = nn.Linear(96, 2)

        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(
                self.words(ids), lengths, batch_first=True, enforce_sorted=False
            )
            logits: Tensor = self.head(self.gru(packed)[1][-1])
            return logits

    def __init__(self) -> None:
        rows, topics = texts(96, 6, 20, seed=12)
        ids, mask = padded(rows, 20)
        self.loader = loader(TensorDataset(ids, mask.sum(1), topics), 16)

    def build(self) -> Any:
        model = self.Net()
        model.words.requires_grad_(False)
        model.gru.requires_grad_(False)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(model.head.parameters(), lr=0.2, momentum=0.9)

    def step(self, model: Any, batch: Any) -> Tensor:
        ids, lengths, topics = batch
        return F.cross_entropy(model(ids, lengths), topics)


class HalfPrecision(Loop):
    """torchvision's ViT under autocast to bfloat16; only the head trains.

    Who: everybody who wants speed: `with torch.autocast(...)` around the forward pass.
    Hard: what is kept is of another type than the weights, and validation runs without autocast on
    the same weights. Autocast keeps cast copies of weights during a pass.
    Row: an image, in one precision.
    """

    def __init__(self) -> None:
        self.loader = loader(digits(64), 16)
        self.held_back = DataLoader(digits(32, first=100), 16)

    def build(self) -> Any:
        model = VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=10)
        model.requires_grad_(False)
        model.heads.requires_grad_(True)
        nn.init.normal_(model.heads.head.weight, std=0.05)  # torchvision's own begins at zero
        return model.eval()

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(trained(model), lr=1e-2, fused=True)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), y)

    def validate(self, model: Any) -> Tensor:
        with torch.no_grad():
            return torch.stack([correct(model(x), y) for x, y in self.held_back])


class Methods(Loop):
    """The loop walks the blocks of a model itself, and calls its methods. It never calls the model.

    Who: research code, and every model with `encode` and `classify`.
    Hard: there is no call of the whole to catch. The last block trains; what stands before it is
    a `ModuleList` that is no call either.
    Row: an image.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 64, 4, 4)
            self.places = nn.Parameter(torch.randn(64, 64) * 0.1)
            self.blocks = nn.ModuleList([Block(64) for _ in range(3)])
            self.head = nn.Linear(64, 10)

        def encode(self, x: Tensor) -> Tensor:
            return self.patches(x).flatten(2).transpose(1, 2) + self.places

        def classify(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x.mean(1))
            return logits

    def __init__(self) -> None:
        self.loader = loader(digits(96), 16)

    def build(self) -> Any:
        model = self.Net()
        model.requires_grad_(False)
        model.blocks[-1].requires_grad_(True)
        model.head.requires_grad_(True)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(trained(model), lr=1e-3)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        x = model.encode(x)
        for block in model.blocks:
            x = block(x)
        return F.cross_entropy(model.classify(x), y)


class ChannelsLast(Loop):
    """A frozen timm network in `channels_last`, called by `forward_features` and `forward_head`.

    Who: users of timm's training script, where the format is an option.
    Hard: what is kept must come back with its strides, or kernels and `randn_like` go other ways.
    The head draws dropout.
    Row: an image.
    """

    NEEDS = ("timm",)

    def __init__(self) -> None:
        self.loader = loader(digits(48, 64), 8)

    def build(self) -> Any:
        timm = import_module("timm")
        model = timm.create_model(
            "resnet10t", num_classes=10, drop_rate=0.1, channels=(48, 64, 96, 96)
        )
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
        return model.to(memory_format=torch.channels_last)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(trained(model), lr=0.05, momentum=0.9, nesterov=True, weight_decay=2e-5)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        features = model.forward_features(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(model.forward_head(features + 0.01 * torch.randn_like(features)), y)


LOOPS: tuple[type[Loop], ...] = (FrozenLstm, PackedGru, HalfPrecision, Methods, ChannelsLast)
