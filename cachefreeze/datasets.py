"""PyTorch data sets as rows that a cache can serve."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cachefreeze.data.images import leave_signals_to_the_parent
from cachefreeze.errors import UserError
from cachefreeze.fingerprint import UNKNOWN
from cachefreeze.identity import identity_of, random_transform, targets_of
from cachefreeze.models.units import agree, canonical
from cachefreeze.randomness import random_state, set_random_state
from cachefreeze.rows import Indices, Rows

# How often an item is drawn to see whether it is always the same.
DRAWS = 4


class IndexedDataset(Dataset[tuple[int, Tensor, Any]]):
    """A data set whose items say which they are: `(row, input, target)`.

    Give it to a `DataLoader` and to `PrefixCache`. Once the cache has its rows, the inputs are
    neither loaded nor decoded any more, here and in the loader's workers: they come as empty
    tensors, and `cache.batch(rows, inputs)` gives what the first unit that trains is to be given.

    Args:
        dataset: map-style; item i is `(input, target)`, or `(input, target, ...)` whose further
            parts are taken to belong to the target. The input is a tensor, always the same one.
        targets: the target of every item, for when inputs are not loaded. Known for
            `TensorDataset`, `Subset` and most of torchvision's; with others, and without this,
            items are loaded for their targets alone.
        identity: a name that changes whenever an input may have changed (a version, a hash). Known
            for the same data sets; with others, and without this, no later run finds the rows.

    Raises:
        UserError: there are no items, inputs are no tensors, or they are drawn anew each time.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> dataset = IndexedDataset(TensorDataset(torch.zeros(10, 3, 8, 8), torch.arange(10)))
        >>> row, x, y = dataset[7]
        >>> row, x.shape, int(y)
        (7, torch.Size([3, 8, 8]), 7)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        targets: Sequence[Any] | None = None,
        identity: str | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UserError(
                f"a {type(dataset).__name__} has no rows that can be asked for by number: give a "
                "map-style data set, with __len__ and __getitem__"
            )
        self.dataset = dataset
        target = first_target(dataset)
        if targets is not None and len(targets) != len(self):
            raise UserError(f"there are {len(targets)} targets for {len(self)} items")
        self.targets = targets
        if targets is None:
            known = targets_of(dataset)
            # What goes by the name of targets need not be what the items come with.
            self.targets = known if known is not None and same_target(known[0], target) else None
        known_by = identity_of(dataset) if identity is None else f"given: {identity}"
        # What nobody can tell from another is another each time.
        self.identity = known_by or UNKNOWN + uuid.uuid4().hex
        # In memory that a loader's workers share.
        self._served = torch.zeros((), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, row: int) -> tuple[int, Tensor, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[int, Tensor, Any]]:
        # Asked once for a batch: an empty tensor and a full one do not collate.
        served = bool(self._served)
        if served and self.targets is not None:
            nothing = torch.empty(0)
            return [(int(row), nothing, self.targets[row]) for row in rows]
        items = [(int(row), *split_item(self.dataset[row])) for row in rows]
        return [(row, torch.empty(0), y) for row, _, y in items] if served else items

    def serve(self, served: bool) -> None:
        """To be told by a cache: whether it has the rows."""
        self._served.fill_(served)


def first_target(dataset: Dataset[Any]) -> Any:
    """The target of the first item, once that is seen to be the same each time: items that are
    drawn anew cannot be kept. No random state is moved.

    Raises:
        UserError: some are, by the names of transforms or by drawing one several times; or there
            are none, or none with an input and a target.
    """
    if not len(dataset):  # type: ignore[arg-type]
        raise UserError("the data set is empty")
    random, here = random_transform(dataset), torch.device("cpu")
    target = None
    if random is None:
        before = random_state(here)
        try:
            (first, target), *others = (split_item(dataset[0]) for _ in range(DRAWS))
        finally:
            set_random_state(before, here)
        if not all(agree(first, other) for other, _ in others):
            random = "its first item is another one each time"
    if random is not None:
        raise UserError(
            f"the data set is augmented at random ({random}): rows that are kept would be one draw "
            "of it for ever; leave that transform out"
        )
    return target


def same_target(one: Any, other: Any) -> bool:
    """Whether two targets are the same to a training loop, that is to say once collated."""
    try:
        return agree(default_collate([one]), default_collate([other]))
    except Exception:  # nothing that a loader could collate, or compare
        return False


def split_item(item: Any) -> tuple[Tensor, Any]:
    """Input and target of an item; raises UserError if it has not got them."""
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise UserError(
            f"an item of the data set is a {type(item).__name__}: it has to be (input, target)"
        )
    x, *others = item
    if not isinstance(x, Tensor):
        raise UserError(
            f"the input of an item of the data set is a {type(x).__name__}: it has to be a tensor "
            "(for images: transform=torchvision.transforms.ToTensor())"
        )
    return x, others[0] if len(others) == 1 else tuple(others)


class DatasetRows:
    """Rows at boundary 0: the inputs of a data set, on the training device.

    Args:
        dataset: of one split.
        device: of training.
        channels_last: how images lie in memory.
        workers: processes that load items; 0 loads them in this one.
    """

    def __init__(
        self, dataset: IndexedDataset, device: torch.device, channels_last: bool, workers: int
    ) -> None:
        self.dataset = dataset
        self.device = device
        self.channels_last = channels_last
        self.workers = workers
        self.identity = dataset.identity
        # From other memory a copy to a GPU waits for it.
        self._pinned = device.type == "cuda"

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        inputs = _Inputs(self.dataset.dataset)
        for x in loaded(inputs, order, self.workers, torch.stack, pinned=self._pinned):
            yield self.as_input(x)

    def items(self, order: Sequence[Indices]) -> Iterator[tuple[Indices, Tensor, Any]]:
        """Row indices, inputs and targets, as an `IndexedDataset` gives them."""
        batches = loaded(self.dataset, order, self.workers, default_collate, pinned=self._pinned)
        for rows, (_, x, y) in zip(order, batches, strict=True):
            yield rows, x, y

    def targets(self, rows: Indices) -> Any:
        """As a loader would give them, without loading inputs; the data set has to know them."""
        known = self.dataset.targets
        assert known is not None
        if isinstance(known, Tensor):
            return known[torch.from_numpy(rows)]
        return default_collate([known[int(row)] for row in rows])

    def as_input(self, x: Tensor) -> Tensor:
        """Inputs in the one layout that the network is always given."""
        x = x.to(self.device, non_blocking=x.is_pinned())
        if x.dim() != 4:
            return canonical(x)
        if not self.channels_last:
            return canonical(x.contiguous())
        return canonical(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))


class _Inputs(Dataset[Tensor]):
    """The inputs of a data set."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, row: int) -> Tensor:
        return split_item(self.dataset[row])[0]


def loaded(
    dataset: Dataset[Any],
    order: Sequence[Indices],
    workers: int,
    collate: Callable[..., Any],
    *,
    pinned: bool = False,
) -> Iterator[Any]:
    """One batch for each array of row indices."""
    # A generator of its own: without one, each pass would draw from the global random state, and a
    # run that loads fewer items would go on with other random numbers.
    yield from DataLoader(
        dataset,
        batch_sampler=[rows.tolist() for rows in order],
        collate_fn=collate,
        num_workers=min(workers, len(order)),
        generator=torch.Generator(),
        pin_memory=pinned,
        worker_init_fn=leave_signals_to_the_parent,
    )


def split_rows(split: str, rows: Any, known: int) -> Indices:
    """Row indices that a user gave, as an array.

    Raises:
        ValueError: they are none, or there are no such rows.
    """
    indices = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"rows are a list of whole numbers, and not {str(rows)[:40]}")
    if len(indices) and not 0 <= indices.min() <= indices.max() < known:
        raise ValueError(f"rows {indices.min()} to {indices.max()} of {split}, which has {known}")
    return indices.astype(np.int64)


def rows_of(
    data: Dataset[Any] | Rows, device: torch.device, channels_last: bool, workers: int
) -> Rows:
    """What a user gave for a split, as rows."""
    if hasattr(data, "batches"):
        return data  # type: ignore[return-value]
    if not isinstance(data, IndexedDataset):
        data = IndexedDataset(data)
    return DatasetRows(data, device, channels_last, workers)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches as one; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
