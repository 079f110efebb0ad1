"""From decoded pixels to network input, on the training device."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.data.images import Images
from cachefreeze.rows import Indices, all_rows
from cachefreeze.streams import sent

PADDING = 4


class InputRows:
    """Boundary 0: images as network input, (n, C, H, W) float32, normalised on the device.

    Args:
        images: of one split.
        mean, std: per channel, of pixels scaled to 0 .. 1.
        device: of training.
        augment_seed: serve a random view of every image, another in each `epoch`; None serves the
            images as they are.
        resident: keep the pixels in the device's memory once they have been decoded, N x H x W x C
            bytes.

    Attributes:
        epoch: whose views are served; whoever trains sets it.
    """

    def __init__(
        self,
        images: Images,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augment_seed: int | None = None,
        *,
        resident: bool = False,
    ) -> None:
        self.images = images
        self._resident = ResidentImages(images, device) if resident else None
        self.device = device
        self.augment_seed = augment_seed
        self.epoch = 0
        # (u / 255 - mean) / std as one subtraction and one multiplication.
        self.offset = torch.tensor(mean, device=device) * 255
        self.scale = 1 / (torch.tensor(std, device=device) * 255)
        self.pixels_identity = images.identity
        self.identity = f"{images.identity} mean {mean} std {std}"

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        if self.augment_seed is None:
            yield from map(self.from_pixels, self.pixels(order))
            return
        views = random_views(len(self), self.augment_seed, self.epoch)
        # To the device as a whole: each copy would wait for it.
        drawn = torch.from_numpy(views[all_rows(order)]).to(self.device)
        parts = drawn.split([len(rows) for rows in order])
        for pixels, view in zip(self.pixels(order), parts, strict=True):
            seen = augment(sent(pixels, self.device).permute(0, 2, 3, 1), view)
            yield self.from_pixels(seen.permute(0, 3, 1, 2))

    def pixels(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        """Decoded pixels, uint8 (n, C, H, W), for each array of n row indices."""
        source = self.images if self._resident is None else self._resident
        for pixels in source.decode(order):
            yield pixels.permute(0, 3, 1, 2)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Network input, normalised on the device, from uint8 (n, C, H, W)."""
        # uint8 travels to the device: a quarter of the bytes of float32.
        values = sent(pixels, self.device).permute(0, 2, 3, 1).float()
        return ((values - self.offset) * self.scale).permute(0, 3, 1, 2)


class ResidentImages:
    """Decoded pixels that stay in the device's memory from the first time that they are asked for.

    Args:
        images: of one split.
        device: of training.
    """

    def __init__(self, images: Images, device: torch.device) -> None:
        self.images = images
        self.device = device
        # (N, H, W, C); taken now, so that what is free later is free.
        shape = (len(images), *images.sample(1).shape[1:])
        self._pixels = torch.empty(shape, dtype=torch.uint8, device=device)
        self._there = np.zeros(len(images), bool)

    def decode(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        """See `Images.decode`; on the device."""
        decoded = self.images.decode([rows for rows in order if not self._there[rows].all()])
        places = torch.from_numpy(all_rows(order)).to(self.device)
        missing = [not self._there[rows].all() for rows in order]
        batches = zip(order, places.split([len(rows) for rows in order]), missing, strict=True)
        for rows, indices, is_missing in batches:
            if is_missing:
                yield self._keep(rows, indices, next(decoded))
            else:
                yield torch.index_select(self._pixels, 0, indices)

    def _keep(self, rows: Indices, indices: Tensor, pixels: Tensor) -> Tensor:
        pixels = sent(pixels, self.device)
        self._pixels.index_copy_(0, indices, pixels)
        self._there[rows] = True
        return pixels


def random_views(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(rows, 3): where each row is cut out of its padded image (top, left), and whether mirrored.

    Drawn for the whole epoch, so that a row's view does not depend on the batch it comes in.
    """
    random = np.random.default_rng([seed, epoch, 1])
    corners = random.integers(0, 2 * PADDING + 1, (rows, 2))
    return np.column_stack([corners, random.integers(0, 2, rows)])


def augment(pixels: Tensor, views: Tensor) -> Tensor:
    """Crops of images padded with 4 black pixels, perhaps mirrored: (n, H, W, C) to the same.

    `views` is (n, 3), see `random_views`, on the device of the pixels.
    """
    n, height, width, _ = pixels.shape
    padded = F.pad(pixels, (0, 0, PADDING, PADDING, PADDING, PADDING))
    top, left, mirrored = views[:, :, None].unbind(1)
    ys = top + torch.arange(height, device=pixels.device)
    xs = torch.arange(width, device=pixels.device).expand(n, width)
    xs = left + torch.where(mirrored.bool(), width - 1 - xs, xs)
    batch = torch.arange(n, device=pixels.device)[:, None, None]
    return padded[batch, ys[:, :, None], xs[:, None, :]]
