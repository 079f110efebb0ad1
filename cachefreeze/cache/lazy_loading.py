"""Decides which items of a batch a loader loads, and returns known ones without their values."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, MapDataPipe, TensorDataset
from torch.utils.data import default_collate as torchs_collate

from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.fetching import FetchReport, FetchRequest, Items, innermost
from cachefreeze.cache.item_records import ItemRecords, NotByRowsError, put_together, take_apart
from cachefreeze.cache.views import Views
from cachefreeze.errors import UserError
from cachefreeze.keys import Fingerprint
from cachefreeze.lineage.devices import some_run_behind
from cachefreeze.lineage.unloaded import Unloaded

# Number of seconds in which an item is loaded as fast as its record is found.
_CHEAP = 3e-5
# One item of so many is loaded in each epoch to be compared. Smallest number of such items.
_ONE_OF, _LEAST = 256, 2
# Number of unloaded batches in a row that the user's code uses until all batches are loaded.
_OFTEN = 3
_CPU = torch.device("cpu")
_OURS = str(Path(__file__).parents[1]) + os.sep
_TORCHS = str(Path(torch.__file__).parent) + os.sep


class LazyLoading:
    """Loads the items of one loader, unless only frozen work would use them.

    Args:
        cache: Function that returns the cache, or None if the cache is closed.
    """

    def __init__(self, cache: Callable[[], CacheState | None]) -> None:
        self._cache = cache
        # The loader is not kept: a batch may outlive it.
        self._dataset: Any = None
        self._collate: Callable[[list[Any]], Any] = torchs_collate
        self._has_workers = False
        self._fingerprint: Fingerprint | None = None
        self._records: ItemRecords | None = None
        # Records by digest. Batches may be on their way while the data set is changed.
        self._asked: dict[bytes, ItemRecords] = {}
        self._items: Items | None = None
        # Digest of the data set that the workers have. They may live for several epochs.
        self._of_workers: bytes | None = None
        self._usable = True
        self._tried = False
        self._epoch = self._batch = self._sampled = 0
        self._used = self._probes = 0
        self._fetches = 0

    @property
    def name(self) -> str:
        """Name of the data set, for messages."""
        views = isinstance(self._dataset, Views)
        return type(self._dataset.dataset if views else self._dataset).__name__

    def may_know(self, loader: DataLoader[Any]) -> bool:
        """Returns whether items can be known by number, as far as the loader's arguments tell."""
        cache = self._cache()
        self._dataset = loader.dataset
        if cache is None or loader.batch_sampler is None:
            return False
        in_memory = type(innermost(loader.dataset)) is TensorDataset
        if in_memory or isinstance(loader.dataset, MapDataPipe):
            return False
        if isinstance(loader.dataset, IterableDataset):
            cache.tell(
                f"loader of {self.name}",
                f"cache.loader loads every item of {self.name}: items of an IterableDataset "
                "have no numbers to be known by. Frozen work on them is still skipped.",
            )
            return False
        if loader.collate_fn is not torchs_collate:
            cache.tell(
                f"loader {id(loader)}: collate",
                f"cache.loader loads every item of {self.name}: your own collate_fn may make "
                "anything of the items. Use the default one to have known items left out.",
            )
            return False
        return self._records is None or not self._records.off

    def begin(self, loader: DataLoader[Any], anew: bool) -> None:
        """Begins an epoch.

        Args:
            loader: Loader of the epoch.
            anew: Whether workers are started with the present data set.
        """
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._has_workers = loader.num_workers > 0
        self._look(deep=True)
        assert self._fingerprint is not None
        if anew:
            self._of_workers = self._fingerprint.digest
            self._items = None
        self._usable = self._of_workers == self._fingerprint.digest
        self._epoch += 1
        self._batch = self._sampled = 0

    def _look(self, deep: bool = False) -> bool:
        """Returns whether the data set is unchanged. If it has changed, looks for its records."""
        if self._fingerprint is not None and self._fingerprint.is_same(deep):
            return True
        self._fingerprint = Fingerprint(self._dataset)
        if self._items is not None:
            self._items.fingerprint = self._fingerprint
        cache = self._cache()
        if cache is None:
            return False
        digest = self._fingerprint.digest
        records = cache.item_records.get(digest)
        if records is None:
            views = isinstance(self._dataset, Views)
            count = self._dataset.items if views else len(self._dataset)
            records = ItemRecords(self._fingerprint, count, self.name)
            if cache.folder is not None:
                records.load(cache.folder)
            cache.item_records[digest] = records
        same = self._records is records
        self._records = self._asked[digest] = records
        if self._fingerprint.entropy:
            self._turn_off(f"may change from time to time, by {self._fingerprint.entropy}")
        return same

    def items(self) -> Items:
        """Makes the data set that loads items for the workers."""
        self._items = Items(self._dataset, self._fingerprint)
        return self._items

    def end(self) -> None:
        """Ends an epoch. Writes the records for other processes."""
        cache = self._cache()
        if self._records is not None and cache is not None and cache.folder is not None:
            try:
                self._records.save(cache.folder)
            except OSError as error:
                cache.tell(
                    "loader: folder",
                    f"Records of the items of {self.name} cannot be written for later runs "
                    f"({error.strerror or error}): those runs load the items once.",
                )

    def ask(self, indices: Any) -> FetchRequest:
        """Decides what is loaded for a batch."""
        self._batch += 1
        cache = self._cache()
        if cache is None or self._records is None or not self._usable or self._records.off:
            return FetchRequest(indices, watch=False)
        if not self._look() and self._has_workers:
            # Workers still have the old data set.
            self._usable = False
            return FetchRequest(indices, watch=False)
        records, places = self._records, _numbers(indices, len(self._records.known))
        if places is None or records.off:
            return FetchRequest(indices)
        if not len(places) or not records.known[places].all() or records.forget_changed(places):
            return FetchRequest(indices, note=True, digest=records.digest)
        if self._used >= _OFTEN:
            return FetchRequest(indices)
        if not cache.would_serve(list(records.keys(places).values())):
            # The user's code may change a batch before the cache sees it. A few batches without
            # values show where.
            self._probes += cache.serves
            if not cache.serves or self._probes > _OFTEN:
                return self._with_keys(indices)
        if self._has_workers and not self._may_stand_in(int(places[0])):
            return self._with_keys(indices)
        return FetchRequest(indices, load=False, digest=records.digest, sample=self._sample(places))

    def _with_keys(self, indices: Any) -> FetchRequest:
        """Asks for known items whose values are needed."""
        assert self._records is not None
        if not some_run_behind():
            return FetchRequest(indices)
        return FetchRequest(indices, note=True, digest=self._records.digest)

    def _may_stand_in(self, index: int) -> bool:
        """Returns whether this process loads the same items as workers. One item is tried."""
        if not self._tried:
            self._tried = True
            records = self._records
            assert records is not None
            try:
                batch, about = self._load([index])
                differs = bool(about.draws or records.differ([index], batch))
            except Exception:  # the user's code may raise anything here that it did not in workers
                differs = True
            if differs:
                self._turn_off("differ between the main process and workers")
        return self._records is not None and not self._records.off

    def _sample(self, places: np.ndarray) -> tuple[int, ...]:
        """Returns the number of an item to load and compare, for some batches of an epoch."""
        assert self._records is not None
        wanted = max(len(self._records.known) // _ONE_OF, _LEAST)
        if self._sampled >= wanted:
            return ()
        self._sampled += 1
        # Random state must not change, so the item is chosen by arithmetic.
        return (int(places[(self._epoch * 7919 + self._sampled * 104729) % len(places)]),)

    def _load(self, indices: Sequence[int]) -> tuple[Any, FetchReport]:
        items, about = Items(self._dataset, self._fingerprint).__getitems__(
            FetchRequest(list(indices))
        )
        return self._collate(items), about

    def batch(self, batch: Any, about: FetchReport) -> Any:
        """Returns a batch for the training loop.

        Args:
            batch: Batch as it was loaded, or a batch of items to compare. None if nothing was
                loaded.
            about: Report on how it was loaded.
        """
        records = self._asked.get(about.ask.digest)
        if about.draws:
            self._turn_off(about.draws)
        if records is None:
            return batch
        if not about.ask.load:
            if about.ask.sample and not records.off:
                self._compare(records, list(about.ask.sample), batch)
            return self._late(records, about.ask)
        if about.ask.note and not records.off:
            self._bind(records, batch, about)
            if some_run_behind() and not records.off:
                return self._loaded(records, batch, about.ask)
        return batch

    def _bind(self, records: ItemRecords, batch: Any, about: FetchReport) -> None:
        indices = [int(index) for index in about.ask.indices]
        self._fetches += 1
        if self._fetches == 2 and about.seconds < _CHEAP:
            records.turn_off("load as fast as their records are found")
            return
        try:
            others = records.bind(indices, batch, about.files)
        except NotByRowsError as why:
            self._turn_off(str(why))
            return
        if any(one is None for one in about.files):
            records.portable = False
        if others:
            self._others(others)

    def _compare(self, records: ItemRecords, indices: list[int], batch: Any) -> None:
        # If a file has changed in the meantime, the difference is no surprise.
        others = records.differ(indices, batch)
        if others and not records.forget_changed(np.asarray(indices)):
            self._others(others)

    def _others(self, indices: list[int]) -> None:
        cache, records = self._cache(), self._records
        assert records is not None
        if cache is not None and cache.folder is not None:
            records.remove(cache.folder)
        self._turn_off(
            f"are not always the same (for example item {indices[0]}), although the data set has "
            "not changed, as far as the cache can see"
        )

    def _turn_off(self, why: str) -> None:
        cache, records = self._cache(), self._records
        assert records is not None
        if not records.off and cache is not None:
            cache.tell(
                f"loader of {self.name}: {why}",
                f"cache.loader loads every item of {self.name}: its items {why}.",
            )
        records.turn_off(why)

    def _loaded(self, records: ItemRecords, batch: Any, ask: FetchRequest) -> Any:
        """Returns a loaded batch whose large parts go on to know the keys of their rows.

        A GPU would have to hash the rows again, and the host would wait for it.
        """
        places = _numbers(ask.indices, len(records.known))
        if places is None or not records.known[places].all():
            return batch
        structure, _, found = take_apart(batch, len(places))
        values, keys = dict(enumerate(found)), records.keys(places)
        for place in records.large:
            value = values[place]
            values[place] = Unloaded(value, _CPU, lambda used, value=value: value, keys[place])
        return put_together(structure, values)

    def _late(self, records: ItemRecords, ask: FetchRequest) -> Any:
        """Returns a batch whose large parts have no values yet."""
        if records.off:  # since the batch was asked for
            return self._load([int(index) for index in ask.indices])[0]
        places = _numbers(ask.indices, len(records.known))
        assert places is not None
        values = records.small(places)
        keys = records.keys(places)
        late = _Late(self, records, places)
        for place in records.large:
            like = records.leaves[place].like(len(places))
            values[place] = Unloaded(like, _CPU, late.loader(place), keys[place])
        return put_together(records.structure, values)

    def load_late(self, records: ItemRecords, places: np.ndarray, used: bool) -> Any:
        """Loads a batch that was returned without values.

        Args:
            records: Records of the items.
            places: Numbers of the items.
            used: Whether the user's code uses the batch.
        """
        indices = places.tolist()
        batch, about = self._load(indices)
        cache = self._cache()
        self._used = self._used + 1 if used else 0
        if used and cache is not None:
            where = _where()
            cache.tell(
                f"loader: {where}",
                f"{where} uses a batch of cache.loader whose values the model does not need: its "
                "items are loaded for this line.",
            )
        if records.off:
            return batch
        if about.draws:
            self._turn_off(about.draws)
        elif others := records.differ(indices, batch):
            if self._fingerprint is None or not self._fingerprint.is_same():
                raise UserError(
                    f"{self.name} was changed after a batch was made and before its first use in "
                    f"{_where()}: use the batch first, or change the data set between epochs."
                )
            self._others(others)
        return batch


class _Late:
    """Batch without values. It is loaded once for all of its parts."""

    def __init__(self, rows: LazyLoading, records: ItemRecords, places: np.ndarray) -> None:
        self._rows, self._records, self._places = rows, records, places
        self._values: dict[int, Any] = {}

    def loader(self, place: int) -> Callable[[bool], torch.Tensor]:
        """Returns a function that loads one part."""

        def load(used: bool) -> torch.Tensor:
            if place not in self._values:
                batch = self._rows.load_late(self._records, self._places, used)
                _, _, values = take_apart(batch, len(self._places))
                self._values = dict(enumerate(values))
            # Each part has one owner, who may write to it.
            value: torch.Tensor = self._values.pop(place)
            return value

        return load


def _numbers(indices: Any, count: int) -> np.ndarray | None:
    """Returns the numbers of items as an array, or None if they are not plain numbers."""
    if not isinstance(indices, (list, tuple)):
        return None
    if not all(type(index) is int or isinstance(index, np.integer) for index in indices):
        return None
    places = np.asarray(indices, dtype=np.int64)
    return places if ((places >= 0) & (places < count)).all() else None


def _where() -> str:
    """Returns file and line of the user's code that runs now."""
    frame = sys._getframe(1)
    found: Any = frame
    while found is not None:
        name = found.f_code.co_filename
        if not name.startswith((_OURS, _TORCHS, "<frozen")) and "contextlib" not in name:
            return f"{name}:{found.f_lineno}"
        found = found.f_back
    return "code"
