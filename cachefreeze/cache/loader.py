"""DataLoader that does not load what only frozen work would use."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.fetching import Collate, FetchRequest
from cachefreeze.cache.lazy_loading import LazyLoading
from cachefreeze.cache.views import EpochsOfViews, Views
from cachefreeze.errors import UserError


class Loader(DataLoader[Any]):
    """DataLoader that does not load what only frozen work would use.

    `ActivationCache.loader` makes it, and explains it.

    Args:
        cache: Function that returns the cache, or None if the cache is closed.
        dataset: Data set whose items have numbers, or views of one.
        *args: Further arguments of `torch.utils.data.DataLoader`.
        **kwargs: Further keyword arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self, cache: Callable[[], CacheState | None], dataset: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(dataset, *args, **kwargs)
        self._rows = LazyLoading(cache)
        if isinstance(dataset, Views):
            if self.batch_sampler is None:
                raise UserError("views needs batches: give a batch_size, or a batch_sampler.")
            # torch does not let it be set any more.
            self.__dict__["batch_sampler"] = EpochsOfViews(self.batch_sampler, dataset)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next, such as when a run is resumed.

        Args:
            epoch: Number of the epoch, from 0, which decides which view of each row is shown.
        """
        if isinstance(self.batch_sampler, EpochsOfViews):
            self.batch_sampler.epoch = epoch

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles a loader as one that loads everything."""
        return {**self.__dict__, "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a loader as one that loads everything."""
        self.__dict__.update(state)
        self.__dict__["_rows"] = LazyLoading(lambda: None)

    def _get_iterator(self) -> Any:
        if not self._rows.may_know(self):
            return super()._get_iterator()
        return _Batches(self, self._rows)


class _Batches:
    """Iterator over batches. It wraps torch's iterator and fills in what is known."""

    def __init__(self, loader: Loader, rows: "LazyLoading") -> None:
        self._rows = rows
        rows.begin(loader, anew=True)
        # A plain loader with the same arguments, whose items come with a report.
        self._shadow: DataLoader[Any] = DataLoader.__new__(DataLoader)
        self._shadow.__dict__.update(
            loader.__dict__,
            dataset=rows.items(),
            collate_fn=Collate(loader.collate_fn),
            batch_sampler=_Asking(loader.batch_sampler, rows),
            _iterator=None,
        )
        self._torchs: Any = DataLoader._get_iterator(self._shadow)

    def _reset(self, loader: Loader, first_iter: bool = False) -> None:
        self._rows.begin(loader, anew=False)
        self._torchs._reset(self._shadow, first_iter)

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Any:
        try:
            found = next(self._torchs)
        except StopIteration:
            self._rows.end()
            raise
        return self._rows.batch(found["batch"], found["about"])

    def __len__(self) -> int:
        return len(self._torchs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_torchs"], name)


class _Asking:
    """Sampler of requests: batches of numbers, each with what is to be loaded."""

    def __init__(self, sampler: Any, rows: "LazyLoading") -> None:
        self._sampler = sampler
        self._rows = rows

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[FetchRequest]:
        return map(self._rows.ask, iter(self._sampler))
