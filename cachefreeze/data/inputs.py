"""From decoded pixels to network input, on the training device."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cachefreeze.data.images import Images
from cachefreeze.rows import Indices


class InputRows:
    """Boundary 0: images as network input, (n, C, H, W) float32, normalised on the device."""

    def __init__(
        self, images: Images, mean: Sequence[float], std: Sequence[float], device: torch.device
    ) -> None:
        self.images = images
        self.device = device
        # (u / 255 - mean) / std as one subtraction and one multiplication.
        self.offset = torch.tensor(mean, device=device) * 255
        self.scale = 1 / (torch.tensor(std, device=device) * 255)
        self.identity = f"{images.identity} mean {mean} std {std}"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def black(self) -> Tensor:
        """What a black pixel becomes, one value a channel."""
        return -self.offset * self.scale

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        for pixels in self.images.decode(order):
            # uint8 travels to the device: a quarter of the bytes of float32.
            x = (pixels.to(self.device).float() - self.offset) * self.scale
            yield x.permute(0, 3, 1, 2)


class Augmentation:
    """Random crop with 4 pixels of black padding, and horizontal flip with probability 1/2.

    The draw of a row depends on (seed, epoch, row) alone, whatever batch it comes in.

    Args:
        rows: of the training split.
        seed: of the run.
        black: what a black pixel is after normalisation, one value a channel.
    """

    PADDING = 4

    def __init__(self, rows: int, seed: int, black: Tensor) -> None:
        self.rows = rows
        self.seed = seed
        self.black = black

    def __call__(self, x: Tensor, indices: Indices, epoch: int) -> Tensor:
        """Another view of each row of `x` (n, C, H, W), whose row indices are given."""
        n, c, height, width = x.shape
        random = np.random.default_rng([self.seed, epoch, 1])
        draws = random.integers(0, 2 * self.PADDING + 1, (self.rows, 2))[indices]
        flips = random.integers(0, 2, self.rows)[indices]
        top, left, flip = (
            torch.from_numpy(a).to(x.device)[:, None] for a in (draws[:, 0], draws[:, 1], flips)
        )
        size = (n, c, height + 2 * self.PADDING, width + 2 * self.PADDING)
        padded = self.black.view(1, c, 1, 1).expand(size).contiguous()
        inside = (
            slice(self.PADDING, self.PADDING + height),
            slice(self.PADDING, self.PADDING + width),
        )
        padded[:, :, *inside] = x
        ys = top + torch.arange(height, device=x.device)
        xs = torch.arange(width, device=x.device).expand(n, width)
        xs = left + torch.where(flip.bool(), width - 1 - xs, xs)
        batch = torch.arange(n, device=x.device)[:, None, None]
        # Indices on both sides of the channel put it last: (n, height, width, c).
        return padded[batch, :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
