"""Networks, inputs and names for the tests of units."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cachefreeze.freezeout import Unit

IMAGES = torch.zeros(2, 3, 32, 32)


TOKENS = torch.zeros(2, 6, dtype=torch.long)


def names(units: Sequence[Unit]) -> list[str]:
    return [unit.name for unit in units]


def numbered(count: int, *patterns: str) -> list[str]:
    return [pattern.format(number) for number in range(count) for pattern in patterns]


class UNet(nn.Module):
    """Registers its parts from the outside in: the last of them before those in between."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)
        self.up = self.double(24, 8)
        self.bottom = self.double(8, 16)
        self.down = self.double(3, 8)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        wide = self.down(x)
        deep = self.bottom(nn.functional.max_pool2d(wide, 2))
        deep = nn.functional.interpolate(deep, scale_factor=2.0)
        return self.head(self.up(torch.cat([wide, deep], 1))).mean((2, 3))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Language(nn.Module):
    """A small language model whose head has the embedding's weight.

    Args:
        tied: `registered` if a head holds the weight, `used` if the forward pass takes it.
        head_first: Whether the head is listed before everything else.
    """

    def __init__(self, tied: str = "registered", head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(8, 20)
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        if tied == "registered":
            if not head_first:
                self.head = nn.Linear(8, 20)
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return self.head(h) if hasattr(self, "head") else h @ self.tokens.weight.T


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=3)


def last(units: Sequence[Unit]) -> set[int]:
    return {id(one) for one in units[-1].parameters}
