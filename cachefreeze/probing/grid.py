"""The grid of heads of a probing: linear layers, logistic regressions and nearest neighbours."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cachefreeze.probing.backbone import Layout
from cachefreeze.probing.fits import logistic, neighbours
from cachefreeze.probing.heads import Heads, Linear
from cachefreeze.probing.options import ProbeSettings
from cachefreeze.probing.pictures import IGNORED
from cachefreeze.probing.probe import train_heads
from cachefreeze.probing.rows import Rows

# Standard deviation of the first weights of linear heads, as in DINOv2's evaluation.
_SPREAD = 0.01
# Images whose pixels are predicted at once.
_FEW = 16


@dataclass(frozen=True)
class Trial:
    """A head of the grid, and how good it is.

    Attributes:
        method: `linear`, `logistic` or `neighbours`.
        blocks: Number of last blocks whose outputs it takes.
        pooling: Part of these outputs that it takes: `class`, `mean`, `both` or `patches`.
        setting: Other settings of the head, such as its learning rate, in words.
        score: Accuracy on the validation images. For segmentation, mean intersection over union.
        rate: Learning rate for a batch of 256. None if it has none.
        decay: Weight decay. None if it has none.
        head: Trained layer. None for nearest neighbours.
    """

    method: str
    blocks: int
    pooling: str
    setting: str
    score: float
    rate: float | None = None
    decay: float | None = None
    head: Linear | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the trial as a dict of plain values."""
        names = ("method", "blocks", "pooling", "setting", "score", "rate", "decay")
        return {name: getattr(self, name) for name in names}


def linear_heads(
    settings: ProbeSettings, layout: Layout, classes: int
) -> list[tuple[Linear, int, str, float, float]]:
    """Returns heads with their blocks, pooling, learning rate and weight decay."""
    found = []
    patches = settings.task == "segmentation"
    poolings = ["patches"] if patches else layout.poolings(settings.pooling)
    for blocks in settings.blocks:
        for pooling in poolings:
            every = range(sum(layout.widths[:blocks]))
            columns = every if patches else layout.columns(blocks, pooling)
            for decay, rate in product(settings.weight_decay, settings.lr):
                head = Linear(columns, classes)
                torch.nn.init.normal_(head.linear.weight, std=_SPREAD)
                torch.nn.init.zeros_(head.linear.bias)
                found.append((head, blocks, pooling, rate, decay))
    return found


def train_linear(
    settings: ProbeSettings,
    layout: Layout,
    classes: int,
    rows: Rows,
    val: Rows,
    device: torch.device,
    tick: Callable[[int], object],
) -> list[Trial]:
    """Trains all linear heads together."""
    torch.manual_seed(settings.seed)
    grid = linear_heads(settings, layout, classes)
    shares: Callable[[Tensor], Tensor] | None = None
    judge: Any = None
    if settings.task == "segmentation":
        shares = lambda masks: shares_of_patches(masks, layout.side, classes)  # noqa: E731
        judge = lambda group: unions(group, val, layout.side, classes, device)  # noqa: E731
    scores, _ = train_heads(
        [head for head, *_ in grid],
        [rate * settings.batch_size / 256 for *_, rate, _ in grid],
        [decay for *_, decay in grid],
        rows,
        val,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        device=device,
        tick=tick,
        shares=shares,
        judge=judge,
        classes=classes,
    )
    more = len(settings.weight_decay) > 1
    return [
        Trial(
            "linear", blocks, pooling, f"lr {rate:g}" + (f", decay {decay:g}" if more else ""),
            score, rate, decay, head,
        )
        for (head, blocks, pooling, rate, decay), score in zip(grid, scores, strict=True)
    ]  # fmt: skip


def fitted(
    settings: ProbeSettings,
    layout: Layout,
    classes: int,
    rows: Rows,
    val: Rows,
    device: torch.device,
    tick: Callable[[int], object],
) -> list[Trial]:
    """Fits the heads that need no learning rate, on the last block's output."""
    found: list[Trial] = []
    x, labels = rows.plain.to(device), rows.targets.to(device)
    queries, truth = val.plain.to(device), val.targets.to(device)
    for pooling in layout.poolings(settings.pooling):
        one = Linear(layout.columns(1, pooling), classes)
        some, asked = one.taken(x), one.taken(queries)
        if "logistic" in settings.methods:
            for strength, (weight, bias) in zip(
                settings.C, logistic(some, labels, classes, settings.C), strict=True
            ):
                head = Linear(one.columns, classes)
                head.linear.weight.data, head.linear.bias.data = weight, bias
                head.to(device)
                right = (head.linear(asked).argmax(1) == truth).double().mean()
                found.append(
                    Trial("logistic", 1, pooling, f"C {strength:g}", float(right), head=head)
                )
        if "neighbours" in settings.methods:
            for count, said in zip(
                settings.k, neighbours(some, labels, classes, asked, settings.k), strict=True
            ):
                right = (said == truth).double().mean()
                found.append(Trial("neighbours", 1, pooling, f"k {count}", float(right)))
        tick(1)
    return found


# Segmentation.


def shares_of_patches(masks: Tensor, side: int, classes: int) -> Tensor:
    """Returns the share of each class in each patch, (n, patches, classes).

    Training on these shares is the same as training on all pixels, if each pixel has the logits of
    its patch. Pixels of no class count in no share.

    Args:
        masks: Class of each pixel, (n, size, size).
        side: Number of patches along each side of the image.
        classes: Number of classes.
    """
    found = [
        F.adaptive_avg_pool2d((masks == number).float()[:, None], side).flatten(1)
        for number in range(classes)
    ]
    return torch.stack(found, -1)


def pixels_of(logits: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Returns the class of each pixel, (n, H, W), from the logits of patches (n, P, classes)."""
    maps = logits.transpose(1, 2).unflatten(2, (side, side))
    large = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return large.argmax(1)


@torch.no_grad()
def unions(
    group: Heads, val: Rows, side: int, classes: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Returns the mean intersection over union of each head, over the classes that occur.

    It is returned twice: as the score, and in the place of the loss.
    """
    counts = torch.zeros(group.count, classes * classes, dtype=torch.int64)
    bad: set[int] = set()
    for x, masks in zip(val.plain.split(_FEW), val.targets.split(_FEW), strict=True):
        known = masks != IGNORED
        truth = masks[known].long()
        for number, logits in enumerate(group.outputs(x.to(device))):
            if not logits.isfinite().all():
                bad.add(number)
                continue
            said = pixels_of(logits, side, (masks.shape[1], masks.shape[2])).cpu()[known]
            counts[number] += torch.bincount(truth * classes + said, minlength=classes**2)
    found = []
    for number, table in enumerate(counts.view(-1, classes, classes).double()):
        both = table.diagonal()
        either = table.sum(0) + table.sum(1) - both
        there = either > 0
        mean = float((both[there] / either[there]).mean()) if there.any() else 0.0
        found.append(0.0 if number in bad else mean)
    return found, found
