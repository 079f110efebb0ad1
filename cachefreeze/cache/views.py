"""Random views of the items of a data set: as many of each as asked for, which come again."""

import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, IterableDataset

from cachefreeze.errors import UserError
from cachefreeze.plan.views import FLIPS


class Views(Dataset[Any]):
    """Views of the items of a data set. It has as many items as the data set.

    Item `view * len(dataset) + row` is a view of a row, the same one in every process: while it is
    made, the data set and the transform draw from random states of torch, NumPy and Python that are
    set from the seed, the number of the row and that of the view alone.

    Args:
        dataset: Data set whose items have numbers.
        views: Number of views of each item, or "flips" for an item and its mirror image.
        transform: Function that makes a view of an image. The image is the first entry of an item
            that is a tuple or list, or else the item. If None, no function is applied.
        seed: Seed of the views.
    """

    def __init__(
        self,
        dataset: Any,
        views: int | str,
        transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        count = 2 if views == FLIPS else views
        if not isinstance(count, int) or count < 1:
            raise UserError(f"views must be 1 or more, or 'flips', and was {views!r}.")
        self.flips, self.views = views == FLIPS, count
        numbered = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not numbered or isinstance(dataset, IterableDataset):
            raise UserError(
                f"views needs a data set whose items have numbers, and was given "
                f"{type(dataset).__name__!r}: give one with __len__ and __getitem__."
            )
        self.seed = seed
        # Transforms of Albumentations draw from generators of their own. The user's are left alone.
        self._own_generators = hasattr(transform, "set_random_seed")
        made: Any = copy.deepcopy(transform) if self._own_generators else transform
        self.transform = made
        if self._own_generators:
            made.set_random_seed(0)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def items(self) -> int:
        """Number of views of all items."""
        return self.views * len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        view, row = divmod(int(number), len(self.dataset))
        with _seeded(self.seed, row, view):
            item = self.dataset[row]
            # Of an epoch about one half is mirrored, and of a row every other view.
            if self.flips and (view + _number_from(self.seed, row)) % 2:
                item = _of_image(item, _mirrored)
            if self.transform is None:
                return item
            if self._own_generators:
                return _of_image(item, lambda image: self._albumentations(image, row, view))
            return _of_image(item, self.transform)

    def _albumentations(self, image: Any, row: int, view: int) -> Any:
        self.transform.set_random_seed(_number_from(self.seed, row, view) % 2**32)
        try:
            return self.transform(image=np.asarray(image))["image"]
        finally:
            self.transform.set_random_seed(0)


def numbered(
    dataset: Any, views: int | str | None, transform: Callable[[Any], Any] | None, seed: int
) -> Any:
    """Returns a data set whose items have numbers: the one given, or views of it.

    Args:
        dataset: Data set.
        views: Number of views of each item, "flips", or None for the items themselves.
        transform: Function that makes a view of an image.
        seed: Seed of the views.

    Raises:
        UserError: The data set is an iterator, `views` is no number of views, or `transform` is
            given without `views`.
    """
    if isinstance(dataset, Iterator) and not isinstance(dataset, IterableDataset):
        raise UserError(
            f"loader needs a data set whose items have numbers and was given "
            f"{type(dataset).__name__!r}, which gives its items only once: give a list of "
            "its items."
        )
    if views is not None:
        return Views(dataset, views, transform, seed)
    if transform is not None:
        raise UserError("transform makes views: give views, the number of views of each item.")
    return dataset


class EpochsOfViews(BatchSampler):
    """Batches of numbers of views: in each epoch one view of every row.

    Args:
        batches: Batches of numbers of rows.
        dataset: Views of these rows.

    Attributes:
        epoch: Number of the next epoch, from 0. Its view is this number modulo the number of views.
    """

    def __init__(self, batches: Any, dataset: Views) -> None:
        self.batches, self.dataset, self.epoch = batches, dataset, 0
        # Those who make another loader of this one, such as accelerate, ask for them.
        self.sampler = getattr(batches, "sampler", batches)
        self.batch_size = getattr(batches, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = getattr(batches, "drop_last", False)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        # Workers ask for an iterator twice: an epoch begins with its first batch.
        first = (self.epoch % self.dataset.views) * len(self.dataset)
        self.epoch += 1
        for rows in self.batches:
            yield [first + int(row) for row in rows]


def _of_image(item: Any, function: Callable[[Any], Any]) -> Any:
    """Applies a function to the image of an item."""
    if type(item) in (tuple, list):
        return type(item)([function(item[0]), *item[1:]])
    return function(item)


def _mirrored(image: Any) -> Any:
    """Returns an image with left and right exchanged.

    Args:
        image: Tensor (..., width), array (height, width, ...) or picture of PIL.
    """
    if isinstance(image, torch.Tensor):
        return image.flip(-1)
    if isinstance(image, np.ndarray):
        return np.ascontiguousarray(image[:, ::-1])
    if hasattr(image, "transpose"):
        return image.transpose(0)  # PIL's FLIP_LEFT_RIGHT
    raise UserError(
        f"views='flips' mirrors tensors, arrays and PIL images, and was given "
        f"{type(image).__name__!r}: give views a number, and a transform that mirrors."
    )


def _number_from(*numbers: int) -> int:
    """Returns a number of 64 bits that is drawn from others alone."""
    words = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Lets torch (on the CPU), Python and NumPy draw from given numbers alone, inside the context.

    The random state is put back afterwards.
    """
    seed = _number_from(*numbers)
    # `torch.manual_seed` would move the generators of GPUs as well.
    torchs = torch.default_generator.get_state()
    python, numpys = random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.default_generator.set_state(torchs)
        random.setstate(python)
        np.random.set_state(numpys)
