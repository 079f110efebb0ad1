"""Decoded pixels of one split, held in memory or read from image files."""

import contextlib
import hashlib
import os
import signal
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cachefreeze.data.order import Indices
from cachefreeze.errors import UserError

# Those of torchvision's `IMG_EXTENSIONS`. To import it takes seconds.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip


# Files of a split whose header is read to find out how many bits its images have: 0.1 s.
MOST_HEADERS = 1000


class Images(Protocol):
    """Decoded pixels of one split and their labels.

    Attributes:
        labels: Labels of the rows, (N,) int64, on the CPU.
        identity: Hash that changes whenever a decoded pixel may have changed.
        names: Hash of the files' names, sizes and labels. For arrays, the same as `identity`.
    """

    labels: Tensor
    identity: str
    names: str

    def __len__(self) -> int: ...

    def decode(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        """Yields a uint8 tensor (n, H, W, C) on the CPU for each array of n row indices."""

    def sample(self, rows: int) -> Tensor:
        """Returns pixels of at most `rows` images, spread over the split.

        They are decoded in this process.
        """


def spread(rows: int, of: int) -> Indices:
    """Returns row indices that are evenly spread.

    Args:
        rows: Number of row indices. If there are fewer rows, all are returned.
        of: Number of rows in all.
    """
    return np.unique(np.linspace(0, of - 1, min(rows, of)).astype(np.int64))


class ArrayImages:
    """Images that are held in memory.

    Args:
        pixels: Images, (N, H, W, C) uint8.
        labels: Labels of the rows, (N,).
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.pixels = np.ascontiguousarray(pixels)
        self.labels = torch.from_numpy(np.ascontiguousarray(labels))
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(self.pixels.data)
        digest.update(self.labels.numpy().data)
        self.identity = self.names = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def decode(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        """Yields a uint8 tensor (n, H, W, C) on the CPU for each array of n row indices."""
        for rows in order:
            yield torch.from_numpy(self.pixels[rows])

    def sample(self, rows: int) -> Tensor:
        """Returns pixels of at most `rows` images, spread over the split."""
        return torch.from_numpy(self.pixels[spread(rows, len(self))])


@dataclass(frozen=True)
class DamagedImage:
    """A file that could not be decoded.

    It is a value: an exception of a worker process would come back with that worker's traceback
    around the one sentence that the user needs.

    Attributes:
        path: Path of the file.
        reason: Message of the decoder, or of the disk.
        is_read: Whether the file could be read, so that its content is what is wrong.
    """

    path: Path
    reason: str
    is_read: bool = True


class ImageFiles(Dataset[Tensor | DamagedImage]):
    """Decodes batches of image files to uint8 (n, size, size, 3), in workers of a DataLoader.

    Args:
        paths: Path of the image of each row.
        size: Height and width of the decoded images.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = list(paths)
        self.size = size

    def __getitem__(self, rows: Indices) -> Tensor | DamagedImage:
        batch = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        for position, row in enumerate(rows):
            try:
                batch[position] = decode_image(self.paths[row], self.size)
            except Exception as error:  # image decoders raise a zoo of types on damaged input
                is_read = not isinstance(error, OSError) or error.errno is None
                return DamagedImage(self.paths[row], str(error) or type(error).__name__, is_read)
        return torch.from_numpy(batch)


class FolderImages:
    """Image files, decoded anew whenever they are asked for.

    Args:
        root: Folder that all images are in. The hashes cover paths relative to it.
        paths: Path of the image of each row.
        labels: Label of each row.
        size: Height and width of the decoded images. The shorter side is resized to it, and the
            centre is cut out.
        workers: Number of processes that decode. 0 decodes in this process.
    """

    def __init__(
        self, root: Path, paths: Sequence[Path], labels: Sequence[int], size: int, workers: int
    ) -> None:
        self.root = root
        self.files = ImageFiles(paths, size)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.workers = workers
        how = f"resize and centre crop to {size}, bilinear, Pillow {PIL.__version__}"
        digest, names = hashlib.sha256(how.encode()), hashlib.sha256(how.encode())
        for path, label in zip(paths, labels, strict=True):
            stat = path.stat()
            name = path.relative_to(root).as_posix()
            # Names of files may hold bytes that are no UTF-8.
            start = b"\n" + os.fsencode(name) + b"\0"
            digest.update(start + f"{stat.st_size} {stat.st_mtime_ns} {label}".encode())
            names.update(start + f"{stat.st_size} {label}".encode())
        self.identity, self.names = digest.hexdigest(), names.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        """Yields a uint8 tensor (n, size, size, 3) on the CPU for each array of n row indices.

        Raises:
            UserError: A file cannot be decoded.
        """
        # A generator of its own: without one, each pass would draw from the global random state,
        # and a run that reads fewer images would go on with other random numbers.
        loader: DataLoader[Any] = DataLoader(
            self.files,
            sampler=order,  # each "index" is the rows of a whole batch
            batch_size=None,
            num_workers=min(self.workers, len(order)),
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_the_parent,
        )
        yield from map(undamaged, loader)

    def without(self, paths: Collection[Path]) -> "FolderImages":
        """Returns the images in the same order without some of them."""
        kept = [
            (path, label)
            for path, label in zip(self.files.paths, self.labels.tolist(), strict=True)
            if path not in paths
        ]
        return FolderImages(
            self.root, [path for path, _ in kept], [n for _, n in kept], self.files.size,
            self.workers,
        )  # fmt: skip

    def too_deep(self) -> list[Path]:
        """Returns images with more than 8 bits a channel, from a sample spread over the split.

        Only the headers of these files are read.
        """
        from PIL import Image

        found = []
        for row in spread(MOST_HEADERS, len(self)):
            # Damaged files are told of when they are decoded.
            with contextlib.suppress(Exception), Image.open(self.files.paths[row]) as file:
                if file.mode.startswith(("I", "F")):
                    found.append(self.files.paths[row])
        return found

    def damaged(self) -> list[DamagedImage]:
        """Decodes every file, and returns those that cannot be."""
        loader: DataLoader[Any] = DataLoader(
            self.files,
            sampler=[np.array([row]) for row in range(len(self))],
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_the_parent,
        )
        return [found for found in loader if isinstance(found, DamagedImage)]

    def sample(self, rows: int) -> Tensor:
        """Returns pixels of at most `rows` images, spread over the split.

        Raises:
            UserError: A file cannot be decoded.
        """
        return undamaged(self.files[spread(rows, len(self))])


def leave_signals_to_the_parent(worker: int) -> None:
    """Lets a worker process ignore SIGINT and the first SIGTERM.

    A terminal (Ctrl-C) or a job scheduler sends them to all processes of a run. The parent acts on
    them, once it has finished its step.

    Args:
        worker: Number of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The first one only: the parent's own way to end workers that do not end by themselves is to
    # send it until they do.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def undamaged(batch: Tensor | DamagedImage) -> Tensor:
    """Returns a batch of pixels.

    Raises:
        UserError: A file could not be decoded.
    """
    if isinstance(batch, DamagedImage):
        raise UserError(
            f"{batch.path} cannot be decoded ({batch.reason}): "
            "replace the file or remove it from the folder"
        )
    return batch


def decode_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Returns an image file as RGB (size, size, 3).

    Args:
        path: Path of the file.
        size: Height and width. The shorter side is resized to it, and the centre is cut out.
    """
    from PIL import Image  # torchvision's own dependency

    with Image.open(path) as file:
        image = file.convert("RGB")
    return np.asarray(resized(image, size, Image.Resampling.BILINEAR))


def resized(image: Any, size: int, how: Any) -> Any:
    """Returns a PIL image whose shorter side is resized, and whose centre is cut out.

    Args:
        image: PIL image.
        size: Height and width of the result.
        how: Resampling filter of PIL.
    """
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), how)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return image
