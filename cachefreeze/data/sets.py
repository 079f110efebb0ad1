"""Data sets, each with a training and a validation split of the same classes."""

import gzip
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachefreeze.data.folders import (
    find_images,
    named,
    stratified_split,
    tell_of_bits,
    without_damaged,
)
from cachefreeze.data.images import ArrayImages, DamagedImage, FolderImages, Images
from cachefreeze.errors import UserError

_log = logging.getLogger("cachefreeze")
# Per channel, of the 50,000 training images scaled to 0 .. 1.
CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# Images that are decoded to see how long it takes.
SAMPLE = 64
CIFAR_ROWS = (50_000, 10_000)
CIFAR_ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
# Wraps a pass over images, given with its number of batches, to show how it gets on.
Bar = Callable[[Iterator[Tensor], int], Iterable[Tensor]]


@dataclass(frozen=True)
class DataSet:
    """A training split and a validation split of the same classes.

    Attributes:
        name: Name of the data set.
        classes: Names of the classes.
        train: Images of the training split.
        val: Images of the validation split.
        image_shape: Channels, height and width of the images.
        mean: Mean of each channel, of pixels scaled to 0 .. 1.
        std: Standard deviation of each channel, of pixels scaled to 0 .. 1.
        skipped: Number of broken images that were left out.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that tell whether a resumed run has the data set that it began with.

        If `same` differs, the data set is certainly another one. `identity` also differs if files
        were only copied or touched.
        """
        statistics = [list(self.mean), list(self.std)]
        return {
            "same": [list(self.classes), self.train.names, self.val.names, *statistics],
            "identity": [self.train.identity, self.val.identity],
        }

    @property
    def outline(self) -> "Outline":
        """Outline of the data set."""
        return Outline(
            self.name,
            len(self.train),
            len(self.val),
            len(self.classes),
            self.image_shape,
            skipped=self.skipped,
        )


@dataclass(frozen=True)
class Outline:
    """Sizes of a data set, which are all that a plan needs. The data set itself need not be there.

    Attributes:
        name: Name of the data set.
        train_rows: Number of training images.
        val_rows: Number of validation images.
        classes: Number of classes.
        image_shape: Channels, height and width of the images.
        decode_seconds: Seconds that decoding an image takes.
        skipped: Number of broken images that were left out.
    """

    name: str
    train_rows: int
    val_rows: int
    classes: int
    image_shape: tuple[int, int, int]
    decode_seconds: float = 0.0
    skipped: int = 0

    @property
    def description(self) -> str:
        """Description of the data set in one line."""
        skipped = f", {self.skipped} broken images left out" if self.skipped else ""
        return (
            f"{self.name}: {self.train_rows:,} training and {self.val_rows:,} validation images, "
            f"{'x'.join(map(str, self.image_shape))}, {self.classes} classes{skipped}"
        )


def load(
    name: str,
    folder: Path,
    *,
    image_size: int,
    val_fraction: float | None,
    workers: int,
    bar: Bar,
    normalization: Statistics | None = None,
    skip_broken: bool = False,
) -> DataSet:
    """Loads a data set.

    Args:
        name: Name of the data set: `digits`, `cifar10`, `cifar100` or `imagefolder`.
        folder: Folder of an `imagefolder`. For CIFAR, the folder that it is in or downloaded to.
        image_size: Height and width of the images of an `imagefolder`.
        val_fraction: Share of every class of an `imagefolder` that becomes the validation split.
            None if the folder has one.
        workers: Number of processes that decode images of an `imagefolder`.
        bar: Function that wraps a pass over images and shows its progress.
        normalization: Mean and standard deviation of each channel to normalise with, in place of
            those of the training images. A folder's images are not all decoded then.
        skip_broken: Whether broken images of an `imagefolder` are left out.

    Raises:
        UserError: The data set is not there, cannot be read, or is damaged.
    """
    if name == "imagefolder":
        with reading(folder):
            return load_folder(
                folder,
                size=image_size,
                val_fraction=val_fraction,
                workers=workers,
                bar=bar,
                normalization=normalization,
                skip_broken=skip_broken,
            )
    found = load_digits() if name == "digits" else load_cifar(name, folder)
    if normalization is not None:
        found = replace(found, mean=normalization[0], std=normalization[1])
    return found


def outline(
    name: str,
    folder: Path,
    *,
    image_size: int,
    val_fraction: float | None,
    workers: int,
    skip_broken: bool = False,
) -> Outline:
    """Returns the sizes of a data set without reading it. CIFAR need not be there.

    Args:
        name: Name of the data set: `digits`, `cifar10`, `cifar100` or `imagefolder`.
        folder: Folder of an `imagefolder`.
        image_size: Height and width of the images of an `imagefolder`.
        val_fraction: Share of every class of an `imagefolder` that becomes the validation split.
            None if the folder has one.
        workers: Number of processes that decode images of an `imagefolder`.
        skip_broken: Whether broken images of an `imagefolder` are left out, for which all training
            images are decoded.

    Raises:
        UserError: A folder of images is not there, cannot be read, or has no two splits.
    """
    if name == "digits":
        return load_digits().outline
    if name in CIFAR_ARCHIVES:
        return Outline(name, *CIFAR_ROWS, int(name.removeprefix("cifar")), (3, 32, 32))
    with reading(folder):
        train, val, classes = find_images(
            folder, size=image_size, val_fraction=val_fraction, workers=workers
        )
        whole = train.without({one.path for one in train.damaged()}) if skip_broken else train
        seconds = decode_seconds(whole, workers)
    shape = (3, image_size, image_size)
    name, skipped = f"imagefolder {folder.name}", len(train) - len(whole)
    return Outline(name, len(whole), len(val), len(classes), shape, seconds, skipped)


def decode_seconds(images: Images, workers: int) -> float:
    """Measures the seconds that decoding an image takes, on a sample.

    Args:
        images: Images of one split.
        workers: Number of processes that decode.
    """
    start = time.perf_counter()
    decoded = len(images.sample(SAMPLE))
    return (time.perf_counter() - start) / decoded / max(workers, 1)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns errors of the file system into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read ({error.strerror}): "
            "repair or remove it, or give another --data-dir"
        ) from error


def load_digits(val_fraction: float = 0.2) -> DataSet:
    """Loads scikit-learn's 1,797 handwritten digits of 8x8 grey pixels, upscaled to 32x32 RGB."""
    # Its file is read as it does, but without its import of nearly three seconds.
    package = find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations is not None
    (place,) = package.submodule_search_locations
    with gzip.open(Path(place) / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        numbers = np.loadtxt(file, delimiter=",")
    images, labels = numbers[:, :-1].reshape(-1, 1, 8, 8), numbers[:, -1].astype(np.int64)
    grey = torch.from_numpy(images).float() * (255 / 16)
    large = torch.nn.functional.interpolate(grey, size=32, mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    classes = tuple("0123456789")
    train, val = (
        ArrayImages(pixels[rows], labels[rows])
        for rows in stratified_split(labels, val_fraction, classes)
    )
    return DataSet("digits", classes, train, val, (3, 32, 32), *statistics(train))


def load_cifar(name: str, folder: Path) -> DataSet:
    """Loads CIFAR-10 or CIFAR-100. It is downloaded if it is missing.

    Args:
        name: Name of the data set: `cifar10` or `cifar100`.
        folder: Folder that the data set is in, or downloaded to.

    Raises:
        UserError: The data set is not there and cannot be downloaded.
    """
    from torchvision import datasets  # takes seconds

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]

    def load(train: bool) -> Any:
        # torchvision compares the MD5 of every file with the published one before it unpickles.
        try:
            return kind(folder, train=train)
        except RuntimeError:
            pass
        existed = folder.exists()
        try:
            return kind(folder, train=train, download=True)
        except (OSError, RuntimeError) as error:
            if not existed and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            raise UserError(
                f"{name} is not in {folder} and cannot be downloaded ({error}): put "
                f"{CIFAR_ARCHIVES[name]} there, or use --dataset digits, which needs no network"
            ) from error

    train, val = load(True), load(False)
    mean, std = CIFAR_STATISTICS[name]
    return DataSet(
        name,
        tuple(train.classes),
        ArrayImages(train.data, np.array(train.targets, np.int64)),
        ArrayImages(val.data, np.array(val.targets, np.int64)),
        (3, 32, 32),
        mean,
        std,
    )


def load_folder(
    root: Path,
    *,
    size: int,
    val_fraction: float | None,
    workers: int,
    bar: Bar,
    normalization: Statistics | None = None,
    skip_broken: bool = False,
) -> DataSet:
    """Loads folders of images: ROOT/train/CLASS/* with ROOT/val or ROOT/test, or ROOT/CLASS/*.

    Every image is decoded once here. The mean and standard deviation come from the training images,
    and a damaged file is found now, not hours later. If `normalization` is given, no image is
    decoded: a run that finds all rows in its cache needs none. With `skip_broken` all images are
    decoded all the same, since a resumed run must have the same rows.

    Args:
        root: Folder of the data set.
        size: Height and width of the decoded images. The shorter side is resized to it, and the
            centre is cut out.
        val_fraction: Share of every class that becomes the validation split. None if the folder has
            one.
        workers: Number of processes that decode. 0 decodes in this process.
        bar: Function that wraps the first pass over the images and shows its progress.
        normalization: Mean and standard deviation of each channel to normalise with. If None, those
            of the training images.
        skip_broken: Whether images that cannot be decoded are left out, and the user is told. A
            file that cannot be read is no such image.

    Raises:
        UserError: There are no images, fewer than two classes, or no validation split, or a file is
            damaged.
    """
    train, val, classes = find_images(root, size=size, val_fraction=val_fraction, workers=workers)
    tell_of_bits([*train.too_deep(), *val.too_deep()])
    if normalization is not None and not skip_broken:
        return DataSet(_name(root), classes, train, val, (3, size, size), *normalization)
    damaged: list[DamagedImage] = []
    try:
        mean, std = _in_one_pass(train, val, bar)
    except UserError as error:
        damaged = [*train.damaged(), *val.damaged()]
        if not skip_broken or not all(one.is_read for one in damaged):
            if len(damaged) < 2:
                raise
            raise UserError(
                f"{len(damaged)} images cannot be decoded ({named(damaged)}): replace the files "
                "or remove them from the folder, or leave them out by --skip-broken"
            ) from error
        train, val = without_damaged(damaged, train, val, classes)
        _log.warning(
            "Images that cannot be decoded are left out, %d in all: %s.",
            len(damaged),
            named(damaged),
        )
        mean, std = _in_one_pass(train, val, bar)
    used = (mean, std) if normalization is None else normalization
    shape = (3, size, size)
    return DataSet(_name(root), classes, train, val, shape, *used, len(damaged))


def _in_one_pass(train: FolderImages, val: FolderImages, bar: Bar) -> Statistics:
    """Decodes all images, and returns the statistics of the training images."""
    found = statistics(train, bar)
    for _ in one_pass(val, bar):
        pass
    return found


def _name(root: Path) -> str:
    return f"imagefolder {root.name}"


def one_pass(images: Images, bar: Bar) -> Iterable[Tensor]:
    """Yields all images in order, in batches of 256."""
    rows = np.arange(len(images))
    order = [rows[start : start + 256] for start in range(0, len(rows), 256)]
    return bar(images.decode(order), len(order))


def statistics(
    images: Images, bar: Bar = lambda batches, total: batches
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation of each channel, of pixels scaled to 0 .. 1.

    Pixels are summed as whole numbers, so the result does not depend on the order of the rows.
    """
    count, total, squares = 0, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for pixels in one_pass(images, bar):
        values = pixels.flatten(0, 2).to(torch.int64)
        count += len(values)
        total = total + values.sum(0)
        squares = squares + (values**2).sum(0)
    mean = total.double() / count
    std = (squares.double() / count - mean**2).sqrt()
    # A channel without any contrast is left as it is.
    std = torch.where(std > 0, std, torch.full_like(std, 255.0))
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
