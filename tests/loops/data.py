"""Small data sets: sklearn's bundled digits, and synthetic images, texts and sounds."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32), torch.tensor(found.target)


def digits(count: int, size: int = 32, first: int = 0, channels: int = 3) -> TensorDataset:
    """`count` images of handwritten digits, enlarged to `size` pixels, with values about zero."""
    x, y = (part[first : first + count] for part in _digits())
    x = F.interpolate(x[:, None] / 8 - 1, size=(size, size), mode="bilinear", align_corners=False)
    return TensorDataset(x.repeat(1, channels, 1, 1), y)


def texts(count: int, shortest: int, longest: int, seed: int) -> tuple[list[list[int]], Tensor]:
    """Lists of word numbers (0 pads, 1 begins a text; 60 words in all) on one of two topics."""
    draw = generator(seed)
    topics = torch.randint(2, (count,), generator=draw)
    found = []
    for topic in topics.tolist():
        length = int(torch.randint(shortest, longest + 1, (), generator=draw))
        words = torch.randint(30, (length - 1,), generator=draw) + 4 + 20 * topic
        found.append([1, *words.tolist()])
    return found, topics


def padded(rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """The rows as one tensor, padded with zeros, and the mask of what is not padding."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
    return ids, (ids != 0).long()


def sounds(count: int, shortest: int, longest: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Noisy tones of different lengths, and which of four pitches each has."""
    draw = generator(seed)
    pitch = torch.randint(4, (count,), generator=draw)
    found = []
    for one in pitch.tolist():
        length = int(torch.randint(shortest, longest + 1, (), generator=draw))
        tone = torch.sin(torch.arange(length) * (0.05 + 0.1 * one))
        found.append(tone + 0.1 * torch.randn(length, generator=draw))
    return found, pitch


def loader(
    dataset: Dataset[Any] | Sequence[Any],
    size: int,
    seed: int = 1,
    drop_last: bool = False,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """Shuffled batches in another order in each epoch."""
    return DataLoader(
        cast(Dataset[Any], dataset),
        size,
        shuffle=True,
        generator=generator(seed),
        drop_last=drop_last,
        collate_fn=collate,
    )
