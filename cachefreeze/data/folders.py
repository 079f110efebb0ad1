"""Images in folders of classes: which there are, how they are split, and which are damaged."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachefreeze.data.images import IMAGE_SUFFIXES, DamagedImage, FolderImages
from cachefreeze.data.order import Indices
from cachefreeze.errors import UserError

_log = logging.getLogger("cachefreeze")
# Number of damaged files that are named.
_MOST_NAMED = 10


def find_images(
    root: Path, *, size: int, val_fraction: float | None, workers: int
) -> tuple[FolderImages, FolderImages, tuple[str, ...]]:
    """Finds the training and the validation images of a folder, and the classes.

    Nothing is decoded yet.

    Args:
        root: Folder of the data set.
        size: Height and width of the decoded images.
        val_fraction: Share of every class that becomes the validation split. None if the folder has
            one.
        workers: Number of processes that decode.

    Raises:
        UserError: There are no images, fewer than two classes, or no validation split.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give --data-dir a folder of images")
    has_train = (root / "train").is_dir()
    paths, labels, classes = list_images(root / "train" if has_train else root)
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if has_train and held_out is not None:
        if val_fraction is not None:
            raise UserError(
                f"{held_out} holds the validation images: leave out --val-fraction, or move that "
                "folder"
            )
        val_paths, val_labels, val_classes = list_images(held_out)
        if val_classes != classes:
            odd = sorted(set(classes) ^ set(val_classes))
            raise UserError(
                f"{root / 'train'} and {held_out} have different classes ({', '.join(odd[:5])}): "
                "give both the same sub-folders"
            )
    elif val_fraction is not None:
        train_rows, val_rows = stratified_split(np.array(labels), val_fraction, classes)
        val_paths, val_labels = [paths[i] for i in val_rows], [labels[i] for i in val_rows]
        paths, labels = [paths[i] for i in train_rows], [labels[i] for i in train_rows]
    else:
        raise UserError(
            f"{root} does not say which images to validate on: "
            "make folders train and val in it, or set --val-fraction 0.1"
        )
    train = FolderImages(root, paths, labels, size, workers)
    val = FolderImages(root, val_paths, val_labels, size, workers)
    return train, val, classes


def list_images(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Returns the image files below each class's sub-folder, sorted, their labels, and the classes.

    Raises:
        UserError: There are fewer than two classes, or one has no images.
    """
    classes = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_litter(entry.name)
    )
    passed: list[Path] = []
    paths, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(
            path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
        )
        files: list[Path] = []
        for path in images:
            litter = any(map(_is_litter, path.relative_to(folder).parts))
            (passed if litter else files).append(path)
        if not files:
            raise UserError(f"{folder / name} has no images in it: add some or remove the folder")
        paths += files
        labels += [label] * len(files)
    if passed:
        _log.warning(
            "%d files were passed over, such as %s: other programs left them there, and they are "
            "no images of a class.",
            len(passed),
            passed[0],
        )
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no class folders"
        raise UserError(f"{folder} has {found}: it needs one sub-folder of images for each class")
    return paths, labels, tuple(classes)


def _is_litter(name: str) -> bool:
    """Says whether a file or folder was left by a notebook, macOS or Windows."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


def stratified_split(
    labels: NDArray[np.int64], fraction: float, classes: Sequence[str]
) -> tuple[Indices, Indices]:
    """Splits rows into a training and a validation part, class by class.

    The same labels always give the same split, whatever the seed of the run, so that runs of
    different seeds are validated on the same rows. Every class keeps at least one row in each part.

    Args:
        labels: Label of each row.
        fraction: Share of every class that goes to the validation part.
        classes: Names of the classes.

    Returns:
        Row indices of the training part, and of the validation part.

    Raises:
        UserError: A class has a single row.
    """
    random = np.random.default_rng(0)
    held_out = []
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        if len(rows) < 2:
            raise UserError(
                f"class {classes[label]!r} has a single image, which cannot be both trained and "
                "validated on: add images or give a val folder"
            )
        held_out.append(rows[: min(max(round(fraction * len(rows)), 1), len(rows) - 1)])
    val = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), val), val


def named(damaged: Sequence[DamagedImage]) -> str:
    """Returns the paths of the first damaged images, and how many more there are."""
    first = ", ".join(str(one.path) for one in damaged[:_MOST_NAMED])
    more = f" and {len(damaged) - _MOST_NAMED} more" if len(damaged) > _MOST_NAMED else ""
    return f"{first}{more}"


def without_damaged(
    damaged: Sequence[DamagedImage], train: FolderImages, val: FolderImages, classes: Sequence[str]
) -> tuple[FolderImages, FolderImages]:
    """Leaves out broken images.

    Raises:
        UserError: A class has no training image left, or there is no validation image left.
    """
    paths = {one.path for one in damaged}
    train, val = train.without(paths), val.without(paths)
    left = set(train.labels.tolist())
    gone = [name for label, name in enumerate(classes) if label not in left]
    if gone or not len(val):
        what = f"training image of the class {gone[0]!r}" if gone else "validation image"
        raise UserError(
            f"no {what} is left without those that cannot be decoded ({named(damaged)}): replace "
            "the files"
        )
    return train, val


def tell_of_bits(paths: Sequence[Path]) -> None:
    """Warns of images with more than 8 bits a channel, if there are any."""
    if paths:
        _log.warning(
            "%s and others have more than 8 bits a channel: values above 255 are read as 255, as "
            "torchvision's ImageFolder reads them; scale such images to 8 bits first.",
            paths[0],
        )
