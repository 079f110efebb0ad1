"""Write the page about ready-made models: `python scripts/model_table.py > docs/models.md`.

`python scripts/model_table.py NAME ...` writes it about others: torchvision's names, or timm's as
`timm:NAME`. Nothing is downloaded, and nothing computed but shapes.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from cachefreeze.errors import UserError
from cachefreeze.models import build, partition
from cachefreeze.report import markdown_table

IMAGE_SIZE = 224
CLASSES = 1000
PIXELS = f"{IMAGE_SIZE}x{IMAGE_SIZE}"
MODELS = {
    "resnet18": "",
    "resnet50": "",
    "wide_resnet50_2": "",
    "resnext50_32x4d": "",
    "densenet121": "rows grow from layer to layer within a dense block",
    "vgg16_bn": "",
    "mobilenet_v2": "",
    "mobilenet_v3_small": "",
    "mobilenet_v3_large": "",
    "efficientnet_b0": "",
    "efficientnet_v2_s": "",
    "convnext_tiny": "",
    "regnet_y_400mf": "",
    "shufflenet_v2_x1_0": "",
    "googlenet": "without its auxiliary heads (`aux_logits=False`)",
    "vit_b_16": "the first unit holds the class token and the positions as well",
    "swin_t": "",
}
INTRODUCTION = f"""\
# Ready-made models and their units

`python scripts/model_table.py > docs/models.md` wrote this page; with names it is about those:
torchvision's, or timm's as `timm:NAME`.

A *unit* is the smallest thing that freezes: a convolution or linear layer with the norm, activation
and pooling behind it, or a module that cannot be cut inside (a residual block, an encoder layer).
`partition(model)` cuts between them, wherever a single tensor is handed on;
`partition(model, names)` cuts before the modules that are named.

A *boundary* lies behind every unit but the last. What is kept there of an image is a row, and its
size decides what a store takes. Sizes are in kB (1,000 bytes) in fp32, at {PIXELS}; in bf16 they
are half of that. The image itself takes 150.5 kB, a byte a number.
"""
HEADER = ["model", "units", "first", "largest", "last", "notes"]


@dataclass(frozen=True)
class Network:
    """A network's units and what they hand on.

    Args:
        name: as it was asked for.
        units: names, in order.
        shapes: of a row at the boundary behind each unit but the last.
    """

    name: str
    units: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Bytes of a row, in fp32."""
        return [4 * torch.Size(shape).numel() for shape in self.shapes]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the page about ready-made models.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: those of docs/models.md")
    try:
        networks = [measure(name) for name in parser.parse_args().names or MODELS]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(page(networks)))
    return 0


def measure(name: str) -> Network:
    """A network's units, and the rows between them.

    Raises:
        UserError: there is no such network, or it cannot be cut.
    """
    arch = name if ":" in name else f"torchvision:{name}"
    # Some cannot be built on the meta device: they compute their sizes with tensors.
    model = build(arch, CLASSES, image_size=IMAGE_SIZE).eval().to("meta")
    with torch.device("meta"), torch.no_grad():
        units = partition(model)
        x = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        shapes = []
        for number in range(len(units) - 1):
            x = units.run(x, number, number + 1)
            shapes.append(tuple(x.shape[1:]))
    return Network(name, units.names, tuple(shapes))


def page(networks: Sequence[Network]) -> Iterator[str]:
    """The whole page in Markdown, by line."""
    yield INTRODUCTION
    yield from markdown_table([HEADER, *map(summary, networks)])
    for network in networks:
        yield from section(network)


def summary(network: Network) -> list[str]:
    """A row of the first table."""
    sizes = network.sizes
    numbers = [sizes[0], max(sizes), sizes[-1]]
    notes = MODELS.get(network.name, "")
    return [network.name, str(len(network.units)), *map(kilobytes, numbers), notes]


def section(network: Network) -> Iterator[str]:
    """The units of a network, those in a row that hand on the same in one line."""
    yield from ("", f"## {network.name}", "")
    rows = [["units", "row behind each", "kB"]]
    pairs = list(zip(network.units, network.shapes, strict=False))
    for _, several in groupby(pairs, key=lambda pair: (_family(pair[0]), pair[1][1:])):
        rows += _lines(list(several))
    rows.append([f"`{network.units[-1]}`", "the output", ""])
    yield from markdown_table(rows)


def _lines(pairs: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[list[str]]:
    """Repeated units: in one line if all rows are the same, or grow from unit to unit."""
    shapes = [shape for _, shape in pairs]
    if len(pairs) > 2 and len(set(shapes)) == len(pairs):
        groups = [list(pairs)]
    else:
        groups = [list(several) for _, several in groupby(pairs, key=lambda pair: pair[1])]
    for group in groups:
        ends = [group[0][1], group[-1][1]] if group[0][1] != group[-1][1] else [group[0][1]]
        words = ["x".join(map(str, shape)) for shape in ends]
        sizes = [kilobytes(4 * torch.Size(shape).numel()) for shape in ends]
        yield [_span([name for name, _ in group]), " ... ".join(words), " ... ".join(sizes)]


def kilobytes(size: int) -> str:
    return f"{size / 1000:,.1f}"


def _family(name: str) -> str:
    """A name without its last number, which counts repeated units."""
    return re.sub(r"\d+$", "", name)


def _span(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"`{names[0]}`"
    return f"`{names[0]}` ... `{names[-1]}` ({len(names)})"


if __name__ == "__main__":
    sys.exit(main())
