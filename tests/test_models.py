"""The three networks are those of their papers, cut into the paper's units."""

import pytest
import torch
from torch import nn

from cachefreeze import UserError, units_of
from cachefreeze.models import build

SMALL = {
    "wrn": {"depth": 16, "width": 1},
    "densenet": {"depth": 22, "growth_rate": 4},
    "vgg": {"depth": 11},
}


def names_of(model: nn.Module) -> tuple[str, ...]:
    return tuple(unit.name for unit in units_of(model))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arch", "sizes", "classes", "millions"),
    [
        ("wrn", {"depth": 40, "width": 4}, 10, 8.9),  # table 4 of the WRN paper
        ("wrn", {"depth": 28, "width": 10}, 10, 36.5),
        ("wrn", {"depth": 16, "width": 8}, 10, 11.0),
        ("densenet", {"depth": 100, "growth_rate": 12}, 10, 0.8),  # table 2 of the DenseNet paper
        ("densenet", {"depth": 40, "growth_rate": 12, "bottleneck": False}, 10, 1.0),
        ("densenet", {"depth": 250, "growth_rate": 24}, 10, 15.3),
        # 14.71 M in the 13 convolutions (table 2 of the VGG paper, less its large head),
        # 0.53 M in the head.
        ("vgg", {"depth": 16}, 10, 15.2),
    ],
)
def test_the_published_networks_have_their_published_sizes(
    arch: str, sizes: dict[str, int], classes: int, millions: float
) -> None:
    with torch.device("meta"):
        model = build(arch, classes, **sizes)  # type: ignore[arg-type]
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_units_are_those_that_the_paper_freezes() -> None:
    wrn = names_of(build("wrn", 10, depth=16, width=1))
    assert wrn == (
        "stem",
        *(f"group{group}_block{block}" for group in (1, 2, 3) for block in (1, 2)),
        "head",
    )
    densenet = names_of(build("densenet", 10, depth=16, growth_rate=4))
    assert densenet == (
        "stem",
        *("block1_layer1", "block1_layer2", "transition1"),
        *("block2_layer1", "block2_layer2", "transition2"),
        *("block3_layer1", "block3_layer2"),
        "head",
    )
    vgg = names_of(build("vgg", 10, depth=16))
    assert len(vgg) == 14
    assert vgg[:3] == ("conv1_1", "conv1_2", "conv2_1")


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("size", [32, 48])
def test_networks_take_images_of_several_sizes(arch: str, size: int) -> None:
    model = build(arch, 7, **SMALL[arch]).eval()  # type: ignore[arg-type]
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("wrn", {"depth": 17, "width": 2}),
        ("wrn", {"depth": 4, "width": 2}),
        ("wrn", {"depth": 16, "width": 0}),
        ("densenet", {"depth": 41, "growth_rate": 12}),
        ("densenet", {"depth": 42, "growth_rate": 12, "bottleneck": False}),
        ("densenet", {"depth": 40, "growth_rate": 0}),
        ("vgg", {"depth": 12}),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_examples(arch: str, sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"does not fit .*: use"):
        build(arch, 10, **sizes)  # type: ignore[arg-type]
