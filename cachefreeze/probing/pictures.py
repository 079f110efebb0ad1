"""Images in folders as items of a data set, for classification and for segmentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cachefreeze.data.images import IMAGE_SUFFIXES, ImageFiles, resized, undamaged
from cachefreeze.errors import UserError

# Number in a mask of pixels that belong to no class.
IGNORED = 255


class Pictures(Dataset[Any]):
    """Images as network input, (3, size, size) float32, with their labels.

    Args:
        paths: Path of each image.
        labels: Label of each image. None for 0.
        size: Height and width. The shorter side is resized to it, and the centre is cut out.
        mean: Mean of each channel, of pixels scaled to 0 .. 1.
        std: Standard deviation of each channel, of pixels scaled to 0 .. 1.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int] | None,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.files = ImageFiles(paths, size)
        self.labels = [0] * len(paths) if labels is None else list(labels)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, row: int) -> Tensor:
        """Returns an image as network input.

        Raises:
            UserError: The file cannot be decoded.
        """
        pixels = undamaged(self.files[np.array([row])])[0]
        return ((pixels.float() / 255 - self.mean) / self.std).permute(2, 0, 1).contiguous()

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        return self.picture(row), self.labels[row]


class Masked(Pictures):
    """Images with the class of each pixel, (size, size) uint8, in the place of labels.

    Args:
        paths: Path of each image.
        masks: Path of the mask of each image.
        size: Height and width.
        mean: Mean of each channel, of pixels scaled to 0 .. 1.
        std: Standard deviation of each channel, of pixels scaled to 0 .. 1.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        masks: Sequence[Path],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(paths, None, size, mean, std)
        self.masks = list(masks)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        return self.picture(row), self.mask(row)

    def mask(self, row: int) -> Tensor:
        """Returns the class of each pixel of an image.

        Raises:
            UserError: The mask cannot be read, or has another size than its image.
        """
        path = self.masks[row]
        try:
            with Image.open(path) as file, Image.open(self.files.paths[row]) as picture:
                if file.mode not in ("L", "P", "1"):
                    raise UserError(
                        f"{path} is a colour picture and no mask ({file.mode}): give a "
                        "mask with the number of a class in each pixel, 255 for none"
                    )
                if file.size != picture.size:
                    raise UserError(
                        f"{path} is {file.size[0]}x{file.size[1]}, and its image "
                        f"{picture.size[0]}x{picture.size[1]}: give the mask the size of the image"
                    )
                mask = resized(file, self.files.size, Image.Resampling.NEAREST)
                return torch.from_numpy(np.array(mask, dtype=np.uint8))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}): replace the file") from error


def list_pairs(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the images in a folder `images`, and the masks of the same names in `masks`.

    Raises:
        UserError: There are no such folders or images, or an image has no mask.
    """
    images, masks = folder / "images", folder / "masks"
    for one in (images, masks):
        if not one.is_dir():
            raise UserError(
                f"{folder} has no folder {one.name}: segmentation needs folders images and masks, "
                "with files of the same names"
            )
    by_name = {
        path.relative_to(masks).with_suffix(""): path
        for path in sorted(masks.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    }
    found = [p for p in sorted(images.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise UserError(f"{images} has no images in it: add some")
    missing = [p for p in found if p.relative_to(images).with_suffix("") not in by_name]
    if missing:
        others = f" and {len(missing) - 1} more images" if len(missing) > 1 else ""
        raise UserError(
            f"labels are missing: {masks} has no mask with the name of {missing[0]}{others}. Add "
            "the masks, or remove the images"
        )
    return found, [by_name[p.relative_to(images).with_suffix("")] for p in found]


def split_pairs(
    folder: Path, paths: Sequence[Path], masks: Sequence[Path], fraction: float | None
) -> tuple[tuple[list[Path], list[Path]], tuple[list[Path], list[Path]]]:
    """Splits images and masks: by folders train and val in `images`, or else at random.

    The same files are always split in the same way.

    Raises:
        UserError: A part would be empty.
    """
    train = folder / "images" / "train"
    if train.is_dir() and fraction is None:
        is_val = [not path.is_relative_to(train) for path in paths]
    else:
        count = max(round((fraction or 0.2) * len(paths)), 1)
        chosen = set(np.random.default_rng(0).permutation(len(paths))[:count].tolist())
        is_val = [number in chosen for number in range(len(paths))]
    parts: dict[bool, tuple[list[Path], list[Path]]] = {False: ([], []), True: ([], [])}
    for path, mask, held_out in zip(paths, masks, is_val, strict=True):
        parts[held_out][0].append(path)
        parts[held_out][1].append(mask)
    if not parts[False][0] or not parts[True][0]:
        raise UserError(
            f"{folder} has too few images to train and to validate on ({len(paths)}): add some"
        )
    return parts[False], parts[True]
