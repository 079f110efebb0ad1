"""VGG with batch norm for 32x32 images (Simonyan & Zisserman, 2015)."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from cachefreeze.errors import UserError
from cachefreeze.models.layers import conv, initialize

# Convolutions in each of the five stages (table 1 of the paper: A, B, D, E).
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class ConvLayer(nn.Module):
    """A layer: conv3x3-BN-ReLU and, at the end of a stage, 2x2 max pooling."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, 3)
        self.bn = nn.BatchNorm2d(out_channels)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H, W), or half as high and wide."""
        return self.pool(F.relu(self.bn(self.conv(x))))


class Head(nn.Sequential):
    """The head: global pooling, then two hidden layers of 512 with dropout.

    It maps (N, 512, H, W) to (N, classes). At 32x32 the pooling sees one pixel and changes nothing;
    other sizes need it.
    """

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, classes),
        )


def vgg(classes: int, *, depth: int = 16, dropout: float = 0.5, channels: int = 3) -> nn.Sequential:
    """Builds a VGG with batch norm as a sequence of units: every convolution layer, head.

    Args:
        classes: Number of outputs of the classifier.
        depth: Number of layers with weights in the paper's count: 11, 13, 16 or 19.
        dropout: Probability of the dropout before each of the head's two hidden layers.
        channels: Number of channels of the input images, (N, channels, H, W). H and W are at least
            32.

    Raises:
        UserError: The depth is none of these.
    """
    if depth not in STAGES:
        raise UserError(f"depth {depth} does not fit a VGG: use 11, 13, 16 or 19")
    units: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, layers in enumerate(STAGES[depth], start=1):
        out_channels = min(64 * 2 ** (stage - 1), 512)
        for layer in range(1, layers + 1):
            units[f"conv{stage}_{layer}"] = ConvLayer(channels, out_channels, layer == layers)
            channels = out_channels
    units["head"] = Head(classes, dropout)
    return initialize(nn.Sequential(units))
