"""Network input made of decoded pixels, on the training device."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.data.images import Images
from cachefreeze.data.order import Indices, all_rows
from cachefreeze.plan.views import FLIPS

PADDING = 4


class InputRows:
    """Images as network input, (n, C, H, W) float32, normalised on the device.

    Args:
        images: Images of one split.
        mean: Mean of each channel, of pixels scaled to 0 .. 1.
        std: Standard deviation of each channel, of pixels scaled to 0 .. 1.
        device: Device that the network is trained on.
        augment_seed: Seed of the random views. If None, images are not augmented.
        views: Number of views of each image: epoch e shows view e modulo this number. "flips" for
            an image and its mirror image, equally often. If None, every epoch has another view.
        kept_on: Device whose memory holds the pixels once they have been decoded, one byte an
            element. If None, they are decoded whenever they are asked for.

    Attributes:
        epoch: Number of the epoch whose random views are returned.
    """

    def __init__(
        self,
        images: Images,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augment_seed: int | None = None,
        *,
        views: int | str | None = None,
        kept_on: torch.device | None = None,
    ) -> None:
        self.images = images
        self.views = views
        self._pixels = images if kept_on is None else KeptPixels(images, kept_on)
        self.device = device
        self.augment_seed = augment_seed
        self.epoch = 0
        # (u / 255 - mean) / std as one subtraction and one multiplication.
        self.offset = torch.tensor(mean, device=device) * 255
        self.scale = 1 / (torch.tensor(std, device=device) * 255)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        """Yields a tensor (n, C, H, W) for each array of n row indices."""
        pixels = self._pixels.decode(order)
        if self.augment_seed is None:
            yield from map(self.from_pixels, pixels)
            return
        if self.views == FLIPS:
            views = mirrorings(len(self), self.augment_seed, self.epoch % 2)
        else:
            view = self.epoch if self.views is None else self.epoch % int(self.views)
            views = random_views(len(self), self.augment_seed, view)
        # To the device as a whole: each copy would wait for it.
        drawn = torch.from_numpy(views[all_rows(order)]).to(self.device)
        for one, view in zip(pixels, drawn.split([len(rows) for rows in order]), strict=True):
            yield self.from_pixels(augment(sent(one, self.device), view))

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Normalises uint8 pixels (n, H, W, C) to network input on the device."""
        # uint8 travels to the device: a quarter of the bytes of float32.
        values = sent(pixels, self.device).float()
        return ((values - self.offset) * self.scale).permute(0, 3, 1, 2)


def labels_of(labels: Tensor, order: Sequence[Indices]) -> Iterator[Tensor]:
    """Returns an iterator over the labels of each batch.

    Args:
        labels: Labels of all rows, on the device of the run.
        order: Row indices of each batch.
    """
    # The order travels to the device as a whole: each copy would wait for it.
    rows = torch.from_numpy(all_rows(order)).to(labels.device)
    return iter(labels[rows].split([len(indices) for indices in order]))


class KeptPixels:
    """Decoded pixels that stay in memory from the first time that they are asked for.

    Args:
        images: Images of one split.
        device: Device whose memory holds the pixels.
    """

    def __init__(self, images: Images, device: torch.device) -> None:
        self.images = images
        self.device = device
        # (N, H, W, C); taken now, so that what is free later is free.
        shape = (len(images), *images.sample(1).shape[1:])
        self._pixels = torch.empty(shape, dtype=torch.uint8, device=device)
        self._there = np.zeros(len(images), bool)

    def decode(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        """Yields a uint8 tensor (n, H, W, C) on the device for each array of n row indices."""
        there, missing = self._there.copy(), []
        for rows in order:
            missing.append(np.unique(rows[~there[rows]]))
            there[rows] = True
        decoded = self.images.decode([rows for rows in missing if len(rows)])
        # The order travels to the device as a whole: each copy would wait for it.
        places = torch.from_numpy(all_rows(order)).to(self.device)
        batches = zip(places.split([len(rows) for rows in order]), missing, strict=True)
        for indices, rows in batches:
            if len(rows):
                pixels = sent(next(decoded), self.device)
                self._pixels.index_copy_(0, torch.from_numpy(rows).to(self.device), pixels)
                self._there[rows] = True
            yield torch.index_select(self._pixels, 0, indices)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device. A GPU goes on with its work meanwhile."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    with contextlib.suppress(RuntimeError):  # there is no more pinned memory to be had
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def random_views(rows: int, seed: int, view: int) -> NDArray[np.int64]:
    """Draws a view of each row, (rows, 3): top, left, and whether mirrored (1) or not (0).

    A row's view depends on the seed and on the numbers of the row and the view alone.
    """
    bits = _bits(rows, seed, view)
    sides = np.uint64(2 * PADDING + 1)
    top, left = ((bits >> np.uint64(shift) & np.uint64(0xFFFF)) % sides for shift in (0, 16))
    return np.column_stack([top, left, bits >> np.uint64(32) & np.uint64(1)]).astype(np.int64)


def mirrorings(rows: int, seed: int, view: int) -> NDArray[np.int64]:
    """Returns views in the form of `random_views`, in which half of the rows are mirrored.

    A row that is mirrored in view 0 is not mirrored in view 1.
    """
    mirrored = ((_bits(rows, seed, 0) >> np.uint64(32)).astype(np.int64) + view) % 2
    return np.column_stack([np.full((rows, 2), PADDING), mirrored])


def _bits(rows: int, seed: int, view: int) -> NDArray[np.uint64]:
    """Returns 64 random bits for each row, by the mixing function of splitmix64."""
    bits = np.zeros(rows, np.uint64)
    for number in (np.uint64(seed), np.uint64(view), np.arange(rows, dtype=np.uint64)):
        bits = (bits ^ number) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    return bits


def augment(pixels: Tensor, views: Tensor) -> Tensor:
    """Crops images that are padded with 4 black pixels, and mirrors some.

    Args:
        pixels: Images, (n, H, W, C).
        views: Random views of `random_views`, (n, 3), on the device of the pixels.
    """
    n, height, width, _ = pixels.shape
    padded = F.pad(pixels, (0, 0, PADDING, PADDING, PADDING, PADDING))
    top, left, mirrored = views[:, :, None].unbind(1)
    ys = top + torch.arange(height, device=pixels.device)
    xs = torch.arange(width, device=pixels.device).expand(n, width)
    xs = left + torch.where(mirrored.bool(), width - 1 - xs, xs)
    batch = torch.arange(n, device=pixels.device)[:, None, None]
    return padded[batch, ys[:, :, None], xs[:, None, :]]
