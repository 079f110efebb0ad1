"""Densely connected networks for small images (Huang et al., 2017)."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefreeze.errors import UserError
from cachefreeze.models.layers import Classifier, conv, initialize


class DenseLayer(nn.Module):
    """Appends `growth_rate` channels to its input: (N, C, H, W) to (N, C+growth_rate, H, W)."""

    def __init__(self, channels: int, growth_rate: int, bottleneck: bool, dropout: float) -> None:
        super().__init__()
        inner = 4 * growth_rate if bottleneck else channels
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv(channels, inner, 1) if bottleneck else None
        self.bn2 = nn.BatchNorm2d(inner) if bottleneck else None
        self.conv2 = conv(inner, growth_rate, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels, H, W) to (N, channels + growth_rate, H, W)."""
        new = F.relu(self.bn1(x))
        if self.conv1 is not None and self.bn2 is not None:
            new = F.relu(self.bn2(self.conv1(new)))
        return torch.cat([x, self.dropout(self.conv2(new))], 1)


class Transition(nn.Module):
    """Maps (N, C, H, W) to (N, out_channels, H/2, W/2): BN-ReLU-conv1x1, 2x2 average pooling."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = conv(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels, H, W) to (N, out_channels, H/2, W/2)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


def densenet(
    classes: int,
    *,
    depth: int = 76,
    growth_rate: int = 12,
    bottleneck: bool = True,
    dropout: float = 0.0,
    channels: int = 3,
) -> nn.Sequential:
    """Builds a DenseNet as a sequence of units: stem, dense layers, transitions, head.

    Args:
        classes: Number of outputs of the classifier.
        depth: Number of layers: 6n+4 with bottlenecks (n dense layers in each of three blocks),
            3n+4 without.
        growth_rate: Number of channels that each dense layer adds.
        bottleneck: Whether the network is a DenseNet-BC with reduction 0.5: a 1x1 convolution to
            4 x growth_rate channels comes first in each dense layer, and transitions halve the
            channels. If False, it is the plain DenseNet of the paper.
        dropout: Probability of the dropout after each dense layer's last convolution (0.2 in the
            paper where it is used).
        channels: Number of channels of the input images, (N, channels, H, W). H and W are at least
            4.

    Raises:
        UserError: The depth has another form, or the growth rate is below 1.
    """
    per_layer = 6 if bottleneck else 3
    if depth < per_layer + 4 or (depth - 4) % per_layer:
        raise UserError(
            f"depth {depth} does not fit a DenseNet {'with' if bottleneck else 'without'} "
            f"bottlenecks: use {per_layer}n+4, such as 22, 40, 76 or 100"
        )
    if growth_rate < 1:
        raise UserError(f"growth rate {growth_rate} does not fit a DenseNet: use 1 or more")
    layers = (depth - 4) // per_layer
    stem = 2 * growth_rate if bottleneck else 16
    units: OrderedDict[str, nn.Module] = OrderedDict(stem=conv(channels, stem, 3))
    channels = stem
    for block in (1, 2, 3):
        for layer in range(1, layers + 1):
            units[f"block{block}_layer{layer}"] = DenseLayer(
                channels, growth_rate, bottleneck, dropout
            )
            channels += growth_rate
        if block < 3:
            out_channels = channels // 2 if bottleneck else channels
            units[f"transition{block}"] = Transition(channels, out_channels)
            channels = out_channels
    units["head"] = Classifier(channels, classes)
    return initialize(nn.Sequential(units))
