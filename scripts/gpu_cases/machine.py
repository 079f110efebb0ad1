"""Where and how long a case may run, and the images that it runs on."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as pictures

# Function that keeps results.
Save = Callable[[dict[str, Any]], None]
# Height and width of images from files, and the largest number of them.
_SIZE, _MOST_IMAGES = 256, 512
_ENDS = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass
class Machine:
    """Where and how long a case may run.

    Attributes:
        device: Device of the loops.
        tiny: Whether networks are tiny, in float32.
        until: Time at which the case must have ended, as of `monotonic`.
        repeats: Largest number of repeats.
        workers: Number of processes that load images.
        images: Folder of images. None for random ones.
    """

    device: torch.device
    tiny: bool
    until: float
    repeats: int
    workers: int
    images: Path | None

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - monotonic()


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what a function finds, or its error: the rest of a case goes on without it."""
    try:
        return call()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"failed": reason, "traceback": traceback.format_exc().splitlines()}


def read_images(folder: Path) -> Tensor:
    """Reads the first images of a folder and its folders, resized and cropped to squares.

    Returns:
        Images of whole numbers from 0 to 255, (rows, 3, height, width).

    Raises:
        ValueError: There are no images, or one cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDS)
    if not paths:
        raise ValueError(f"{folder} has no images: give --images a folder with .jpg or .png files")
    images = []
    for path in paths[:_MOST_IMAGES]:
        try:
            image = decode_image(str(path), ImageReadMode.RGB)
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        image = pictures.resize(image, [_SIZE], antialias=True)
        images.append(pictures.center_crop(image, [_SIZE, _SIZE]))
    return torch.stack(images)
