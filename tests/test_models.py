"""The three networks are those of their papers, cut into the paper's units."""

import pytest
import torch
from cachefreeze.models.units import canonical
from torch import nn

from cachefreeze import Units, UserError, partition
from cachefreeze.models import build

SMALL = {
    "wrn": {"depth": 16, "width": 1},
    "densenet": {"depth": 22, "growth_rate": 4},
    "vgg": {"depth": 11},
}


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
    wrn = partition(build("wrn", 10, depth=16, width=1))
    assert wrn.names == (
        "stem",
        *(f"group{group}_block{block}" for group in (1, 2, 3) for block in (1, 2)),
        "head",
    )
    densenet = partition(build("densenet", 10, depth=16, growth_rate=4))
    assert densenet.names == (
        "stem",
        *("block1_layer1", "block1_layer2", "transition1"),
        *("block2_layer1", "block2_layer2", "transition2"),
        *("block3_layer1", "block3_layer2"),
        "head",
    )
    vgg = partition(build("vgg", 10, depth=16))
    assert len(vgg) == 14
    assert vgg.names[:3] == ("conv1_1", "conv1_2", "conv2_1")


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("size", [32, 48])
def test_any_cut_gives_what_the_whole_network_gives(arch: str, size: int) -> None:
    model = build(arch, 7, **SMALL[arch]).eval()  # type: ignore[arg-type]
    units = partition(model)
    x = torch.randn(2, 3, size, size)
    whole = model(x)
    assert whole.shape == (2, 7)
    for cut in range(len(units) + 1):
        assert torch.equal(units.run(units.run(x, 0, cut), cut), whole)


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


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_row_does_not_depend_on_its_company(arch: str, dtype: torch.dtype | None) -> None:
    """Bit for bit: its place in the batch, the other rows, or how much of the batch is padding."""
    model = build(arch, 7, **SMALL[arch]).to(memory_format=torch.channels_last)  # type: ignore[arg-type]
    units = partition(model)
    units.freeze(len(units) - 1)
    x = torch.randn(40, 3, 32, 32)

    def frozen(rows: list[int]) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return units.run_frozen(x[rows], 0, len(units) - 1, 16)

    reference = frozen(list(range(16)))
    assert torch.equal(frozen([3]), reference[3:4])
    assert torch.equal(frozen([39, 38, 5, 30])[2], reference[5])
    assert torch.equal(frozen(list(range(15, -1, -1))), reference.flip(0))


def test_a_frozen_run_may_stop_anywhere_and_go_on_there() -> None:
    units = partition(build("densenet", 7, depth=22, growth_rate=4))
    units.freeze(len(units) - 1)
    x = torch.randn(5, 3, 32, 32)
    whole = units.run_frozen(x, 0, 9, 8)
    for cut in range(10):
        assert torch.equal(units.run_frozen(units.run_frozen(x, 0, cut, 8), cut, 9, 8), whole)


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 1, 1), (4, 1, 5, 5), (1, 3, 1, 7), (4, 9)])
def test_a_layout_is_kept_and_spelled_out_in_one_way(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    plain, n = x.stride(), shape[0]
    assert canonical(x).stride() == plain
    assert canonical(x.transpose(0, 1)).is_contiguous()
    if x.dim() < 4:
        return
    _, c, h, w = shape
    strides = (h * w * c, 1, w * c, c)
    last = torch.randn(9 * x.numel()).as_strided(shape, strides)
    for layout in (last, canonical(last), last[:1], last.as_strided(shape, (7, *strides[1:]))[:1]):
        assert canonical(layout).stride() == strides
        assert torch.equal(canonical(layout), layout)
    assert canonical(x.as_strided((1, *shape[1:]), (7, *plain[1:]))).stride() == plain
    assert n == len(canonical(last))


def test_what_two_units_share_is_refused() -> None:
    shared, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = shared.weight
    with pytest.raises(ValueError, match="share a parameter"):
        Units({"first": shared, "second": other})
    relu = nn.ReLU()
    with pytest.raises(ValueError, match="'1' and '3' share a module"):
        Units({"1": relu, "3": relu})


def test_freezing_more_units_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="3 units"):
        Units({"a": nn.Linear(2, 2)}).freeze(3)
