"""Builds networks by name."""

from typing import Any

from torch import nn

from cachefreeze.models.densenet import densenet
from cachefreeze.models.ready_made import (
    IMAGENET,
    Statistics,
    build_ready_made,
    meant_network,
    weights_statistics,
)
from cachefreeze.models.vgg import vgg
from cachefreeze.models.wrn import wrn

__all__ = [
    "IMAGENET",
    "Statistics",
    "build",
    "meant_network",
    "weights_statistics",
]


def build(
    arch: str,
    classes: int,
    *,
    depth: int | None = None,
    width: int | None = None,
    growth_rate: int | None = None,
    bottleneck: bool = True,
    dropout: float = 0.0,
    image_size: int = 224,
    weights: str | None = None,
) -> nn.Module:
    """Builds a network by its name.

    Args:
        arch: Name of the network: `wrn` (which needs `depth` and `width`), `densenet` (`depth` and
            `growth_rate`), `vgg` (`depth`), `torchvision:NAME`, `timm:NAME` or `hf:NAME`.
        classes: Number of outputs. Named weights bring their own number of outputs.
        depth: Number of layers of a `wrn`, `densenet` or `vgg`.
        width: Widening factor of a `wrn`.
        growth_rate: Number of channels that each dense layer of a `densenet` adds.
        bottleneck: Whether a `densenet` is a DenseNet-BC.
        dropout: Dropout probability of a `wrn`, `densenet` or `vgg`.
        image_size: Height and width of the images, for networks of other libraries.
        weights: Name of trained weights for a network of another library, or `DEFAULT`. If None,
            the network is freshly initialised.

    Raises:
        UserError: The network cannot have these sizes, or there is no network of this name.
    """
    library, colon, name = arch.partition(":")
    if colon:
        return build_ready_made(library, name, classes, image_size=image_size, weights=weights)
    assert depth is not None
    sizes: dict[str, Any] = {"depth": depth, "dropout": dropout}
    if arch == "wrn":
        return wrn(classes, width=_given(width), **sizes)
    if arch == "densenet":
        growth_rate = _given(growth_rate)
        return densenet(classes, growth_rate=growth_rate, bottleneck=bottleneck, **sizes)
    assert arch == "vgg"
    return vgg(classes, **sizes)


def _given(size: int | None) -> int:
    assert size is not None
    return size
