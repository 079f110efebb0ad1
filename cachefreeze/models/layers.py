"""Layers that the three networks share, and their initialisation."""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Returns a convolution without bias. It keeps height and width if its stride is 1."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )


class Classifier(nn.Module):
    """The head of a pre-activation network: BN-ReLU, global average pooling, linear.

    The last batch norm trains as long as the linear layer does (FreezeOut, the authors' code: both
    have the last index).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels, H, W) to (N, classes)."""
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def initialize(model: Module) -> Module:
    """Sets convolutions by He's method (fan-out) and biases to zero; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model
