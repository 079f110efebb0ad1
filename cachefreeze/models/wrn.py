"""Wide residual networks for small images (Zagoruyko & Komodakis, 2016)."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from cachefreeze.errors import UserError
from cachefreeze.models.layers import Classifier, conv, initialize


class WideBlock(nn.Module):
    """A pre-activation residual block: BN-ReLU-conv3x3-BN-ReLU-(dropout)-conv3x3.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input (figure 1(d)
    and the authors' code).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, 3)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = None if same_shape else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.dropout(F.relu(self.bn2(self.conv1(activated))))
        return self.conv2(out) + shortcut


def wrn(
    classes: int,
    *,
    depth: int = 40,
    width: int = 4,
    dropout: float = 0.0,
    channels: int = 3,
) -> nn.Sequential:
    """Builds WRN-depth-width as a sequence of units: stem, every residual block, head.

    Args:
        classes: Number of outputs of the classifier.
        depth: Number of layers: 6n+4 with n blocks in each of the three groups.
        width: Widening factor of the groups, which have 16, 32 and 64 channels at width 1.
        dropout: Probability of the dropout between the two convolutions of a block (0.3 in the
            paper where it is used).
        channels: Number of channels of the input images, (N, channels, H, W). H and W are at least
            4.

    Raises:
        UserError: The depth is not of the form 6n+4, or the width is below 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise UserError(
            f"depth {depth} does not fit a wide residual network: "
            "use 6n+4, such as 10, 16, 22, 28 or 40"
        )
    if width < 1:
        raise UserError(f"width {width} does not fit a wide residual network: use 1 or more")
    blocks = (depth - 4) // 6
    units: OrderedDict[str, nn.Module] = OrderedDict(stem=conv(channels, 16, 3))
    channels = 16
    for group, stride in enumerate((1, 2, 2), start=1):
        out_channels = 16 * width * 2 ** (group - 1)
        for block in range(1, blocks + 1):
            units[f"group{group}_block{block}"] = WideBlock(
                channels, out_channels, stride if block == 1 else 1, dropout
            )
            channels = out_channels
    units["head"] = Classifier(channels, classes)
    return initialize(nn.Sequential(units))
