"""The public face of the cache: one object that works with any training loop."""

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._device import DeviceContext

from cachefreeze.cache import optimizer_steps, weight_loads
from cachefreeze.cache.arguments import check_models, check_options
from cachefreeze.cache.cache_state import CacheState, Filled
from cachefreeze.cache.cached_module import CachedModule
from cachefreeze.cache.entries import Entries
from cachefreeze.cache.final_check import hash_all
from cachefreeze.cache.loader import Loader
from cachefreeze.cache.memory import free_memory
from cachefreeze.cache.statistics import Report, Stats, in_words
from cachefreeze.cache.views import numbered
from cachefreeze.lineage import calls, unloaded
from cachefreeze.lineage.undone import undone
from cachefreeze.store import open_directory

_log = logging.getLogger("cachefreeze")
_open: "weakref.WeakSet[ActivationCache]" = weakref.WeakSet()


def _close_all() -> None:
    # A program may end without `close`. Rows that are not written yet would be lost.
    for cache in list(_open):
        cache._close()


# Functions run in reverse order at exit, so this one runs before the one that closes directories.
atexit.register(_close_all)


class ActivationCache:
    """Keeps the results of frozen work, so that a training loop does not compute them twice.

    The loop stays as it is:

        cache = cachefreeze.ActivationCache(model)
        for epoch in range(epochs):
            for images, labels in loader:
                loss = criterion(model(images), labels)
                ...
        print(cache)  # number of served rows, and what limits the cache
        cache.close()

    Frozen work is every operation whose result depends on the batch and on frozen parameters alone.
    A parameter is frozen if it has `requires_grad=False` when the model is called. A row is one
    sample of a batch. When a row comes for the first time, the model runs as usual, and the values
    that trained work takes from frozen work are kept under a hash of the row's content. When all
    rows of a batch are known, frozen work is skipped, and kept values take the place of its
    results.

    Weights, losses and random state become the same as without a cache. The first batches that
    could be served are computed and compared bit by bit. The cache does not change the `training`
    flag of any module: dropout and batch norms in training mode run as usual, and so does the work
    behind them. `messages` says what limits the cache. Rows must come again to be served. With
    random augmentation in front of the model, no row comes again.

    Args:
        *models: Modules whose calls are cached: one model, or several such as a student and its
            teacher. Direct calls of their submodules are cached as well.
        directory: Folder that rows are written to, or URL of an object store ("s3://bucket/name").
            Later runs find rows there, and so do other runs at the same time. The folder is created
            if it does not exist. If None, rows are kept in memory only.
        local: Folder for copies of rows of an object store, `~/.cache/cachefreeze/...` if None.
        max_bytes: Largest number of bytes of kept rows: in memory, or in the directory (of an
            object store: `local`) over all runs if there is one. The least recently used rows are
            dropped first. If None, half of the free disk with a directory, and a quarter of the
            free memory without one. With a directory, memory takes no more than that quarter.
        codec: Format of kept rows. "raw" keeps their bits. "zstd" keeps their bits too, compressed
            in the directory. "int8" rounds floating-point numbers to 8 bits, which takes a quarter
            of the bytes of float32. It needs `exact=False`.
        exact: Whether a kept value must equal the computed one bit for bit to be served. If False,
            values that differ by rounding are served too, and a message gives the difference.
        probation: Number of batches that are computed and compared before any batch is served. If
            None, two for common functions on one thread of a CPU. Otherwise a quarter of the
            batches before the first row came again, at least 2 and at most 8.
        offload_frozen: Whether frozen weights that only skipped work reads leave a GPU while all
            rows of an epoch are known. They are in host memory then, and come back before a batch
            is computed, and as soon as anybody reads one. Each time, they stay longer before they
            leave again. Not for programs with CUDA graphs of their own that read these weights. No
            effect on a CPU.
        verify: Checks that go on after that. "sample" compares a few served batches and hashes the
            frozen parameters again, within 1 % of the time. "all" computes and compares every
            batch, so that nothing is saved. "off" checks nothing more.

    Raises:
        UserError: A model is not a module, has no parameters, or has a cache already. Or another
            argument is wrong, or the directory cannot be used. The message says what to change.
    """

    # A cache may be an attribute of a model. Without `__dict__`, it is not compared as a setting.
    __slots__ = (
        "__weakref__", "_cached", "_called", "_close", "_depth", "_lock", "_models", "_names",
        "_parts", "_shared",
    )  # fmt: skip

    def __init__(
        self,
        *models: nn.Module,
        directory: str | os.PathLike[str] | None = None,
        local: str | os.PathLike[str] | None = None,
        max_bytes: int | None = None,
        codec: str = "raw",
        exact: bool = True,
        probation: int | None = None,
        offload_frozen: bool = False,
        verify: str = "sample",
    ) -> None:
        models = check_models(models)
        check_options(max_bytes, probation, verify, codec, directory is not None, exact)
        folder = open_directory(directory, max_bytes, local)
        memory = free_memory() // 4 if max_bytes is None or folder is not None else max_bytes
        self._shared = CacheState(Entries(memory, folder, codec), exact, probation)
        self._shared.report.verify = verify
        self._shared.offloading.is_on = offload_frozen
        if folder is not None:
            self._shared.folder = folder.path / "items"
            self._shared.most_useless = folder.room // 4
        self._models = models
        self._cached: dict[int, CachedModule] = {}
        self._parts: dict[int, nn.Module] = {}
        self._names: dict[int, str] = {}
        self._lock = threading.RLock()
        self._called = False
        self._depth = 0
        for model in models:
            for path, part in model.named_modules():
                self._parts[id(part)] = part
                name = type(model).__name__
                self._names[id(part)] = f"`{path}` of {name}" if path else name
        # The registry of calls and the loaders must not keep the cache alive.
        reference = weakref.ref(self)

        def traces() -> Iterable[Any]:
            cache = reference()
            modules = [] if cache is None else list(cache._cached.values())
            return [trace for module in modules for trace in module.traces()]

        self._shared.traces = traces

        def watcher(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = reference()
            if cache is None:
                return module(*args, **kwargs)
            return cache._call(module, args, kwargs)

        watcher.cache = reference  # type: ignore[attr-defined]
        calls.watch(self._parts.values(), watcher)
        catching = calls.catching()
        catching.__enter__()
        numbers = {id(one) for part in models for one in part.parameters()}
        unwatch = (
            optimizer_steps.watch(self._shared, numbers),
            weight_loads.watch(self._shared),
        )
        self._close = weakref.finalize(
            self,
            _close,
            list(self._parts),
            catching,
            unwatch,
            self._cached,
            self._shared,
        )
        self._close.atexit = False  # `_close_all` does it, before directories are closed
        _open.add(self)

    @property
    def stats(self) -> Stats:
        """Counters of what the cache has done so far."""
        stats = self._shared.stats
        counts: dict[tuple[bytes, ...], int] = {}
        for module in self._cached.values():
            for trace in module.traces():
                counts.update(trace.selection.kept.count())
        stats.rows_kept = sum(counts.values())
        stats.bytes = self._shared.entries.nbytes + self._shared.held
        return stats

    @property
    def messages(self) -> tuple[str, ...]:
        """Sentences about what limits the cache. The logger "cachefreeze" gets them as well."""
        return (*self._shared.messages.values(), *self._shared.entries.messages)

    def report(self) -> Report:
        """Returns what was checked in kept rows and frozen parameters, and what was found.

        All frozen parameters are hashed first. `stats` and `messages` give what was served and what
        limits it. `str(cache)` gives both in words.
        """
        hash_all(self._shared.traces(), self._shared)
        report, weights = self._shared.report, self._shared.weights
        served = self._shared.stats.rows_served
        return replace(
            report, found=[*report.found], bytes_hashed=weights.hashed, rows_served=served
        )

    @property
    def waits_for_fill(self) -> bool:
        """Whether only `fill` keeps further rows in training when more has become frozen.

        If False, the newly frozen work runs until it has taken as long as keeping its rows would
        take. A loop that knows how many steps are left can decide better: it sets this to True, and
        calls `fill` where that pays. Calls without gradients are not affected.
        """
        return self._shared.waits_for_fill

    @waits_for_fill.setter
    def waits_for_fill(self, value: bool) -> None:
        self._shared.waits_for_fill = value

    def fill(self, loader: Iterable[Any], call: Callable[[Any], Any] | None = None) -> None:
        """Keeps the rows of a data set before training goes on, in one pass over it.

            cache.fill(loader)

        Without this method, rows are kept while the next epoch runs. If the first model was called
        before in the same way, only its frozen work runs. It starts from rows that were kept when
        less was frozen, if there are any. Random state and buffers are restored afterwards. Modes
        stay as they are, so call `model.train()` first if the loop does.

        Args:
            loader: Batches of the size that the training loop uses.
            call: Function that runs the forward pass of one batch, as the training loop does. The
                cache may end it with an exception as soon as the rows are kept. If None, the first
                model is called: with the entries of a mapping as keyword arguments, with the first
                entry of a tuple or list, or else with the batch itself.
        """
        self._shared.filling = self._models[0] if len(self._models) == 1 else None
        empty = True
        try:
            with undone(self._models):
                for batch in loader:
                    empty = False
                    with contextlib.suppress(Filled):
                        call(batch) if call is not None else _call_with(self._models[0], batch)
        finally:
            self._shared.filling = None
        if empty:
            self._shared.tell(
                "nothing to fill with",
                "fill was given no batch. A generator is empty after one pass: give a list or a "
                "DataLoader.",
            )

    def loader(
        self,
        dataset: Any,
        *args: Any,
        views: int | str | None = None,
        transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> Loader:
        """Makes a DataLoader that does not load what only frozen work would use.

        It takes the arguments of `torch.utils.data.DataLoader`, and returns the same batches in the
        same order, with the same random state:

            loader = cache.loader(dataset, batch_size=32, shuffle=True)

        When the rows of a batch are known, its large tensors come without values. Such a tensor
        loads itself if anything but the cache uses it. Parts of at most 4 KiB a row, such as
        labels, are kept and always have their values.

        An item is known by its number as long as the data set, its transforms and the files that
        the item was read from are unchanged. Some items are loaded and compared in each epoch. All
        items are loaded if they draw random numbers, if there is a `collate_fn` of your own, or if
        the data set is an `IterableDataset`.

        With `views`, items may be augmented at random and be kept all the same: epoch e shows view
        e modulo `views` of every item. A view is drawn from the seed, the number of the item and
        that of the view alone. Random numbers that the program itself draws stay the same.

        Args:
            dataset: Data set whose items have numbers.
            *args: Further arguments of `torch.utils.data.DataLoader`.
            views: Number of views of each item. "flips" stands for two: the item and its mirror
                image, shown equally often. If None, items are as the data set gives them.
            transform: Function that makes a view of an image, such as transforms of torchvision or
                Albumentations. The image is the first entry of an item that is a tuple or list, or
                else the item. If None, views differ by what the data set itself draws at random.
            seed: Seed of the views.
            **kwargs: Further keyword arguments of `torch.utils.data.DataLoader`.

        Returns:
            DataLoader that belongs to this cache. Once the cache is closed, it loads everything.

        Raises:
            UserError: The data set is a generator or another iterator, `views` is no number of
                views, or `transform` is given without `views`.
        """
        dataset = numbered(dataset, views, transform, seed)
        close, shared = self._close, weakref.ref(self._shared)
        return Loader(lambda: shared() if close.alive else None, dataset, *args, **kwargs)

    def close(self) -> None:
        """Ends caching and frees memory. Rows that are not in the directory yet are written there.

        The modules and torch are as they were before the cache was made. Closing twice does
        nothing.
        """
        if not self._close.alive:
            return
        if not self._called:
            names = ", ".join(dict.fromkeys(type(part).__name__ for part in self._models))
            self._shared.tell(
                "never called",
                f"The cache of {names} has seen no call: give ActivationCache the modules that the "
                "loop calls, not copies of them.",
            )
        elif not self.messages and not any(one.traces() for one in self._cached.values()):
            self._shared.tell(
                "nothing frozen",
                f"No parameter of {type(self._models[0]).__name__} was frozen in any call: freeze "
                "what should not change with cachefreeze.freeze or requires_grad = False.",
            )
        optimizer_steps.tell_if_nothing_trains(self._shared)
        self._close()
        self._models, self._cached, self._parts, self._names = (), {}, {}, {}
        self._shared.held = 0

    def __enter__(self) -> "ActivationCache":
        """Returns the cache."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the cache."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles a cache as a closed one, so that the copy of a model has no cache."""
        return _closed, ()

    def __str__(self) -> str:
        """Returns what the cache has done, and what limits it."""
        entries = self._shared.entries
        return in_words(self.stats, entries.max_bytes, entries.dropped, self.messages)

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an outermost call of a module."""
        target = module
        if id(module) not in self._parts:  # a compiled module around a watched one
            target = module._modules.get("_orig_mod")  # type: ignore[assignment]
        known = self._parts.get(id(target))
        # Calls are cached in one thread at a time.
        may_follow = known is target and self._may_follow()
        if not may_follow or not self._lock.acquire(blocking=False):
            unloaded.load_in((args, kwargs))
            return module(*args, **kwargs)
        self._depth += 1
        try:
            self._called = True
            number = id(target)
            cached = self._cached.get(number)
            if cached is None:
                cached = CachedModule(self._shared, self._names[number], target)
                self._cached[number] = cached
            return cached.call(module, args, kwargs, inner=self._depth > 1)
        finally:
            self._depth -= 1
            self._lock.release()

    def _may_follow(self) -> bool:
        # Checkpointing runs modules again in the backward pass. Under other function or dispatch
        # modes, in torch.func and in torch.jit.trace, tensors do not hold plain values.
        return (
            torch._C._current_graph_task_id() == -1
            and not _follows_functions()
            and not torch._C._len_torch_dispatch_stack()
            and torch._C._functorch.peek_interpreter_stack() is None
            and not torch._C._is_tracing()
        )


def _call_with(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _follows_functions() -> bool:
    """Returns whether a torch function mode is on, except `torch.set_default_device`."""
    depth = torch._C._len_torch_function_stack()
    return any(
        not isinstance(torch._C._get_function_stack_at(place), DeviceContext)
        for place in range(depth)
    )


def _close(
    numbers: list[int],
    catching: Any,
    unwatch: Iterable[Callable[[], None]],
    modules: dict[int, CachedModule],
    shared: CacheState,
) -> None:
    calls.unwatch(numbers)
    catching.__exit__(None, None, None)
    for end in unwatch:
        end()
    entries = shared.entries
    traces = [trace for module in modules.values() for trace in module.traces()]
    try:
        shared.offloading.bring_back()
        hash_all(traces, shared)
        if entries.directory is not None:
            for trace in traces:
                trace.write_all()
    finally:
        entries.close()
        for sentence in entries.messages:
            _log.warning("%s", sentence)


class _Nothing(nn.Module):
    """Module for a cache that is closed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))


def _closed() -> ActivationCache:
    cache = ActivationCache(_Nothing())
    cache._close()
    return cache
