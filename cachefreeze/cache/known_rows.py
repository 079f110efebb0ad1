"""What a loader knows of its rows by number, and what it loads of a batch."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, MapDataPipe, TensorDataset
from torch.utils.data import default_collate as torchs_collate

from cachefreeze.cache.binding import Binding, NotByRowsError, put_together, take_apart
from cachefreeze.cache.fetching import About, Ask, Items, innermost
from cachefreeze.cache.views import Views
from cachefreeze.errors import UserError
from cachefreeze.keys import Description
from cachefreeze.lineage.unloaded import Unloaded

# Seconds in which an item is loaded as fast as it is known.
_CHEAP = 3e-5
# One item of so many is loaded in each epoch to be compared, and at least so many.
_ONE_OF, _LEAST = 256, 2
# Number of batches in a row that something uses before all are loaded at once.
_OFTEN = 3
_CPU = torch.device("cpu")
_OURS = str(Path(__file__).parents[1]) + os.sep
_TORCHS = str(Path(torch.__file__).parent) + os.sep


class Cache(Protocol):
    """What a loader asks of the cache that it belongs to."""

    folder: Path | None
    bindings: dict[bytes, Binding]

    @property
    def serves(self) -> bool:
        """Whether any batch was served yet."""
        ...

    def would_serve(self, rows: Sequence[np.ndarray]) -> bool:
        """Says whether a batch is served without a look at its values."""
        ...

    def tell(self, about: str, sentence: str) -> None:
        """Tells the user something, once."""
        ...


class KnownRows:
    """What a loader knows of its rows, and what it loads of a batch.

    Args:
        cache: Function that returns the cache, or None once that is closed.
    """

    def __init__(self, cache: Callable[[], Cache | None]) -> None:
        self._cache = cache
        # Of the loader, which may be gone before the last of its batches.
        self._dataset: Any = None
        self._collate: Callable[[list[Any]], Any] = torchs_collate
        self._has_workers = False
        self._description: Description | None = None
        self._binding: Binding | None = None
        # Also those of batches that are on their way while the data set is changed.
        self._asked: dict[bytes, Binding] = {}
        self._items: Items | None = None
        # Hash of the data set that workers have, if they outlive epochs.
        self._of_workers: bytes | None = None
        self._usable = True
        self._tried = False
        self._epoch = self._batch = self._sampled = 0
        self._used = self._probes = 0
        self._fetches = 0

    @property
    def name(self) -> str:
        """Name of the data set, for people."""
        views = isinstance(self._dataset, Views)
        return type(self._dataset.dataset if views else self._dataset).__name__

    def may_know(self, loader: DataLoader[Any]) -> bool:
        """Says whether rows may be known by number, as far as the arguments of the loader tell."""
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
                "have no numbers to be known by. Frozen work on them is left out all the same.",
            )
            return False
        if loader.collate_fn is not torchs_collate:
            cache.tell(
                f"loader {id(loader)}: collate",
                f"cache.loader loads every item of {self.name}: what a collate_fn of your own "
                "makes of items is not known before they are loaded.",
            )
            return False
        return self._binding is None or not self._binding.off

    def begin(self, loader: DataLoader[Any], anew: bool) -> None:
        """Begins an epoch.

        Args:
            loader: Loader.
            anew: Whether workers start with the data set as it is now.
        """
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._has_workers = loader.num_workers > 0
        self._look(deep=True)
        assert self._description is not None
        if anew:
            self._of_workers = self._description.digest
            self._items = None
        self._usable = self._of_workers == self._description.digest
        self._epoch += 1
        self._batch = self._sampled = 0

    def _look(self, deep: bool = False) -> bool:
        """Sees whether the data set is as it was. Says whether it is."""
        if self._description is not None and self._description.is_same(deep):
            return True
        self._description = Description(self._dataset)
        if self._items is not None:
            self._items.description = self._description
        cache = self._cache()
        if cache is None:
            return False
        digest = self._description.digest
        binding = cache.bindings.get(digest)
        if binding is None:
            views = isinstance(self._dataset, Views)
            count = self._dataset.items if views else len(self._dataset)
            binding = Binding(self._description, count, self.name)
            if cache.folder is not None:
                binding.load(cache.folder)
            cache.bindings[digest] = binding
        same = self._binding is binding
        self._binding = self._asked[digest] = binding
        if self._description.entropy:
            self._turn_off(f"may be others each time, by {self._description.entropy}")
        return same

    def items(self) -> Items:
        """Returns what loads items."""
        self._items = Items(self._dataset, self._description)
        return self._items

    def end(self) -> None:
        """Ends an epoch."""
        self.save()

    def save(self) -> None:
        """Keeps what is known for other processes."""
        cache = self._cache()
        if self._binding is not None and cache is not None and cache.folder is not None:
            try:
                self._binding.save(cache.folder)
            except OSError as error:
                cache.tell(
                    "loader: folder",
                    f"What is known of the items of {self.name} is not kept for later runs: "
                    f"{error.strerror or error}.",
                )

    # What is loaded of a batch.

    def ask(self, indices: Any) -> Ask:
        """Decides what is loaded of a batch, before that is done.

        Args:
            indices: Numbers of its items, as the sampler gave them.
        """
        self._batch += 1
        cache = self._cache()
        if cache is None or self._binding is None or not self._usable or self._binding.off:
            return Ask(indices, watch=False)
        if not self._look() and self._has_workers:
            # Workers have the data set of before.
            self._usable = False
            return Ask(indices, watch=False)
        binding, places = self._binding, _numbers(indices, len(self._binding.known))
        if places is None or binding.off:
            return Ask(indices)
        if not len(places) or not binding.known[places].all() or binding.forget_changed(places):
            return Ask(indices, note=True, digest=binding.digest)
        if self._used >= _OFTEN:
            return Ask(indices)
        if not cache.would_serve(list(binding.keys(places).values())):
            # Something may make another batch of it before the cache sees it: that tells who.
            self._probes += cache.serves
            if not cache.serves or self._probes > _OFTEN:
                return Ask(indices)
        if self._has_workers and not self._may_stand_in(int(places[0])):
            return Ask(indices)
        return Ask(indices, load=False, digest=binding.digest, sample=self._sample(places))

    def _may_stand_in(self, index: int) -> bool:
        """Says whether this process gives the items that workers give. One is tried."""
        if not self._tried:
            self._tried = True
            binding = self._binding
            assert binding is not None
            try:
                batch, about = self._load([index])
                differs = bool(about.draws or binding.differ([index], batch))
            except Exception:  # whatever the user's code raises here, it did not in workers
                differs = True
            if differs:
                self._turn_off("are others in the main process than in workers")
        return self._binding is not None and not self._binding.off

    def _sample(self, places: np.ndarray) -> tuple[int, ...]:
        """Chooses an item that is loaded all the same, in some batches of an epoch."""
        assert self._binding is not None
        wanted = max(len(self._binding.known) // _ONE_OF, _LEAST)
        if self._sampled >= wanted:
            return ()
        self._sampled += 1
        # No random state is drawn from for it.
        return (int(places[(self._epoch * 7919 + self._sampled * 104729) % len(places)]),)

    def _load(self, indices: Sequence[int]) -> tuple[Any, About]:
        items, about = Items(self._dataset, self._description).__getitems__(Ask(list(indices)))
        return self._collate(items), about

    # What comes of it.

    def batch(self, batch: Any, about: About) -> Any:
        """Returns a batch for the loop.

        Args:
            batch: Batch as it was loaded, or of a few items that are to be compared. None if
                nothing was loaded.
            about: How it was loaded.
        """
        binding = self._asked.get(about.ask.digest)
        if about.draws:
            self._turn_off(about.draws)
        if binding is None:
            return batch
        if not about.ask.load:
            if about.ask.sample and not binding.off:
                self._compare(binding, list(about.ask.sample), batch)
            return self._late(binding, about.ask)
        if about.ask.note and not binding.off:
            self._bind(binding, batch, about)
        return batch

    def _bind(self, binding: Binding, batch: Any, about: About) -> None:
        indices = [int(index) for index in about.ask.indices]
        self._fetches += 1
        if self._fetches == 2 and about.seconds < _CHEAP:
            binding.turn_off("are loaded as fast as they are found")
            return
        try:
            others = binding.bind(indices, batch, about.files)
        except NotByRowsError as why:
            self._turn_off(str(why))
            return
        if any(one is None for one in about.files):
            binding.portable = False
        if others:
            self._others(others)

    def _compare(self, binding: Binding, indices: list[int], batch: Any) -> None:
        # A file may have changed in the meantime.
        others = binding.differ(indices, batch)
        if others and not binding.forget_changed(np.asarray(indices)):
            self._others(others)

    def _others(self, indices: list[int]) -> None:
        cache, binding = self._cache(), self._binding
        assert binding is not None
        if cache is not None and cache.folder is not None:
            binding.remove(cache.folder)
        self._turn_off(
            f"are not always the same (item {indices[0]}, for one), although nothing of the data "
            "set that the cache can see has changed"
        )

    def _turn_off(self, why: str) -> None:
        cache, binding = self._cache(), self._binding
        assert binding is not None
        if not binding.off and cache is not None:
            cache.tell(
                f"loader of {self.name}: {why}",
                f"cache.loader loads every item of {self.name}: its items {why}.",
            )
        binding.turn_off(why)

    def _loaded(self, ask: Ask) -> Any:
        batch, _ = self._load([int(index) for index in ask.indices])
        return batch

    def _late(self, binding: Binding, ask: Ask) -> Any:
        """Returns a batch whose large parts are not loaded."""
        if binding.off:  # found while it was on its way
            return self._loaded(ask)
        places = _numbers(ask.indices, len(binding.known))
        assert places is not None
        values = binding.small(places)
        keys = binding.keys(places)
        late = _Late(self, binding, places)
        for place in binding.large:
            like = binding.leaves[place].like(len(places))
            values[place] = Unloaded(like, _CPU, late.loader(place), keys[place])
        return put_together(binding.structure, values)

    def load_late(self, binding: Binding, places: np.ndarray, used: bool) -> Any:
        """Loads a batch that was given without its values.

        Args:
            binding: What was known of its items.
            places: Their numbers.
            used: Whether something of the user's uses it.
        """
        indices = places.tolist()
        batch, about = self._load(indices)
        cache = self._cache()
        self._used = self._used + 1 if used else 0
        if used and cache is not None:
            where = _where()
            cache.tell(
                f"loader: {where}",
                f"{where} uses a batch of cache.loader whose values only frozen work would need: "
                "its items are loaded for that.",
            )
        if binding.off:
            return batch
        if about.draws:
            self._turn_off(about.draws)
        elif others := binding.differ(indices, batch):
            if self._description is None or not self._description.is_same():
                raise UserError(
                    f"{self.name} was changed between the loading of a batch and its first use in "
                    f"{_where()}: use `x` before the data set is changed, or change it between "
                    "epochs."
                )
            self._others(others)
        return batch


class _Late:
    """A batch that is loaded once, for all of its parts."""

    def __init__(self, rows: KnownRows, binding: Binding, places: np.ndarray) -> None:
        self._rows, self._binding, self._places = rows, binding, places
        self._values: dict[int, Any] = {}

    def loader(self, place: int) -> Callable[[bool], torch.Tensor]:
        """Returns a function that loads a part.

        Args:
            place: Place of the part.
        """

        def load(used: bool) -> torch.Tensor:
            if place not in self._values:
                batch = self._rows.load_late(self._binding, self._places, used)
                _, _, values = take_apart(batch, len(self._places))
                self._values = dict(enumerate(values))
            # Each part is given to one owner, who may write to it.
            value: torch.Tensor = self._values.pop(place)
            return value

        return load


def _numbers(indices: Any, count: int) -> np.ndarray | None:
    """Returns the numbers of items as an array, or None if they are no plain numbers."""
    if not isinstance(indices, (list, tuple)):
        return None
    if not all(type(index) is int or isinstance(index, np.integer) for index in indices):
        return None
    places = np.asarray(indices, dtype=np.int64)
    return places if ((places >= 0) & (places < count)).all() else None


def _where() -> str:
    """Names the line of the user's code that runs now."""
    frame = sys._getframe(1)
    found: Any = frame
    while found is not None:
        name = found.f_code.co_filename
        if not name.startswith((_OURS, _TORCHS, "<frozen")) and "contextlib" not in name:
            return f"{name}:{found.f_lineno}"
        found = found.f_back
    return "code"
