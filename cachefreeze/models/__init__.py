"""The networks by name, each an ordered list of units."""

from torch import nn

from cachefreeze.models.densenet import densenet
from cachefreeze.models.vgg import vgg
from cachefreeze.models.wrn import wrn


def build(
    arch: str,
    classes: int,
    *,
    depth: int,
    width: int | None = None,
    growth_rate: int | None = None,
    bottleneck: bool = True,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A freshly initialised network; its children are its units.

    Args:
        arch: `wrn` (which needs `width`), `densenet` (which needs `growth_rate`) or `vgg`.

    Raises:
        UserError: sizes that the network cannot have.
    """
    if arch == "wrn":
        assert width is not None
        return wrn(classes, depth=depth, width=width, dropout=dropout)
    if arch == "densenet":
        assert growth_rate is not None
        return densenet(
            classes, depth=depth, growth_rate=growth_rate, bottleneck=bottleneck, dropout=dropout
        )
    assert arch == "vgg"
    return vgg(classes, depth=depth, dropout=dropout)
