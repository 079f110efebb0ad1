"""The public face: a cache that any loop uses by one line."""

import atexit
import contextlib
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._device import DeviceContext
from torch.utils.data import IterableDataset

from cachefreeze.cache.codec import CODECS
from cachefreeze.cache.entries import Entries
from cachefreeze.cache.loader import Loader
from cachefreeze.cache.memory import free_memory
from cachefreeze.cache.shared import Filled, Shared, Stats
from cachefreeze.cache.site import Site
from cachefreeze.cache.verify import VERIFY, Report
from cachefreeze.cache.views import Views
from cachefreeze.cache.words import in_words
from cachefreeze.errors import UserError
from cachefreeze.lineage import calls, unloaded
from cachefreeze.lineage.undone import undone
from cachefreeze.store import Directory

_log = logging.getLogger("cachefreeze")
_open: "weakref.WeakSet[ActivationCache]" = weakref.WeakSet()
# Steps of optimizers, none of which had a gradient, after which the user is told.
_MANY_STEPS = 8


def _close_all() -> None:
    # Rows that wait in memory would be lost with a program that ends without `close`.
    for cache in list(_open):
        cache._close()


# After the one that closes directories, and so before it at the end.
atexit.register(_close_all)


class ActivationCache:
    """Keeps the results of frozen work, so that a training loop does not compute them twice.

    The loop stays as it is. A batch that is not known runs as ever, and what frozen work hands to
    trained work is kept by its content. A batch all of whose rows are known is served: frozen work
    is left out. Weights, losses and random state are those of the loop without a cache.

    What is frozen is what has `requires_grad = False` at the time of the call. Modes are never
    changed. Nothing is served before some batches have been computed and compared bit by bit.

    Args:
        *models: Modules whose calls are cached, such as a model, or a student and its teacher.
            Calls of their parts by the loop itself are cached as well.
        directory: Folder that rows are kept in as well, to be found by later runs and by others at
            the same time. It is made if it is not there. If None, rows are kept in memory only.
        max_bytes: Largest number of bytes that are kept: in memory, or with a directory in it, over
            all runs. What was not used for longest goes first. If None, a quarter of the memory
            that is free now, and half of the disk.
        codec: How rows are kept. "raw" keeps their bits, "zstd" writes them to the directory with
            less bytes and the same bits, and "int8" rounds numbers to 8 bits, which takes a quarter
            of the room of float32 and needs `exact=False`.
        exact: Whether only values are served that are equal to computed ones to the last bit. If
            False, values that differ by rounding are served too, and the difference is told.
        probation: Number of batches that are computed and compared before any is served. If None,
            a quarter of those before the first row came again, at least 2 and at most 8.
        verify: What is checked beyond that. "sample" compares a few served batches, and hashes
            frozen weights again, within 1 % of the time; "all" computes and compares every batch,
            which takes the time of no cache; "off" does neither.

    Raises:
        UserError: Something else than a module is given, a module has no parameter, or has a cache
            already, or the directory cannot be used.
    """

    # Without a `__dict__`, a cache that is an attribute of a model is no setting of the model.
    __slots__ = (
        "__weakref__", "_called", "_close", "_depth", "_lock", "_models", "_names", "_parts",
        "_shared", "_sites",
    )  # fmt: skip

    def __init__(
        self,
        *models: nn.Module,
        directory: str | os.PathLike[str] | None = None,
        max_bytes: int | None = None,
        codec: str = "raw",
        exact: bool = True,
        probation: int | None = None,
        verify: str = "sample",
    ) -> None:
        _check(models, max_bytes, probation, verify)
        _check_codec(codec, directory is not None, exact)
        folder = None if directory is None else Directory(Path(directory), max_bytes)
        memory = free_memory() // 4 if max_bytes is None or folder is not None else max_bytes
        self._shared = Shared(Entries(memory, folder, codec), exact, probation)
        self._shared.report.verify = verify
        if directory is not None:
            self._shared.folder = Path(directory).absolute() / "items"
            limit = max_bytes or shutil.disk_usage(directory).free // 2
            self._shared.most_useless = limit // 4
        self._models = models
        self._sites: dict[int, Site] = {}
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
        # Neither the registry of calls nor loaders must keep the cache alive.
        reference = weakref.ref(self)

        def routes() -> Iterable[Any]:
            cache = reference()
            sites = [] if cache is None else list(cache._sites.values())
            return [route for site in sites for route in site.routes()]

        self._shared.routes = routes

        def watcher(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = reference()
            if cache is None:
                return module(*args, **kwargs)
            return cache._call(module, args, kwargs)

        watcher.cache = reference  # type: ignore[attr-defined]
        calls.watch(self._parts.values(), watcher)
        catching = calls.catching()
        catching.__enter__()
        shared, numbers = self._shared, {id(one) for part in models for one in part.parameters()}
        hook = register_optimizer_step_post_hook(
            lambda optimizer, args, kwargs: _after_step(optimizer, shared, numbers)
        )
        self._close = weakref.finalize(
            self, _close, list(self._parts), catching, hook, self._sites, self._shared.entries
        )
        self._close.atexit = False  # `_close_all` does it, before directories close themselves
        _open.add(self)

    # What the user asks.

    @property
    def stats(self) -> Stats:
        """Counters of what the cache has done so far."""
        stats = self._shared.stats
        counts: dict[tuple[bytes, ...], int] = {}
        for site in self._sites.values():
            for route in site.routes():
                counts.update(route.selection.rows_kept())
        stats.rows_kept = sum(counts.values())
        stats.bytes = self._shared.entries.nbytes + self._shared.held
        return stats

    @property
    def messages(self) -> tuple[str, ...]:
        """Sentences that say what limits the cache. They are logged under "cachefreeze", too."""
        return (*self._shared.messages.values(), *self._shared.entries.messages)

    def report(self) -> Report:
        """Returns what was checked of kept rows and frozen weights, and what was found.

        What was served and what limits it is in `stats` and `messages`, and in `str(cache)`.
        """
        report, weights = self._shared.report, self._shared.weights
        served = self._shared.stats.rows_served
        return replace(
            report, found=[*report.found], bytes_hashed=weights.hashed, rows_served=served
        )

    def fill(self, loader: Iterable[Any], call: Callable[[Any], Any] | None = None) -> None:
        """Keeps the rows of a data set before training goes on, by one pass over it.

        Without it, rows are kept as the next epoch passes. Where the first model is called in a
        way that is known already, nothing but its frozen work runs, from what was kept when less
        was frozen if that is there. Random state and buffers are put back afterwards. Modes are
        those of now: call `model.train()` before, if the loop does.

        Args:
            loader: Batches, of the size that the loop has.
            call: Function that runs the forward pass on a batch, as the loop does. It may be left
                in the middle, once rows are kept. If None, the first model is called: with a
                mapping's entries by name, or else with the tensor, or with the first entry of a
                tuple or list.
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
                "fill was given no batch: a generator is empty after one pass, so give a list or a "
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
        """Makes a DataLoader that does not load what only frozen work would read.

        It takes the arguments of `torch.utils.data.DataLoader`, and gives the same batches in the
        same order, with the same random state. Where the rows of a batch are kept, large tensors
        in it come without their values, which load themselves if anything but the cache uses them.
        Parts of up to 4 KiB a row, such as labels, are kept beside the rows.

        Items are known by their numbers as long as the data set, its transforms and the files that
        it opens are as they were; some are loaded in each epoch and compared. Items that draw
        random numbers are always loaded, and so is everything with a `collate_fn` of one's own, and
        what comes from an `IterableDataset`.

        With `views`, items may be augmented at random and be kept all the same: epoch e shows view
        e modulo `views` of every item, and a view is drawn from the seed, the number of the item
        and that of the view alone, with workers or without. What the program draws itself stays as
        it was. Of E epochs `views` run frozen work, and the others are served.

        Args:
            dataset: Data set.
            *args: Further arguments of `torch.utils.data.DataLoader`.
            views: Number of views of each item. "flips" stands for two: the item and its mirror
                image, each shown as often. If None, items are as the data set gives them.
            transform: Function that makes a view of an image, such as transforms of torchvision or
                Albumentations: of the first entry of an item that is a tuple, or else of the item.
                If None, what the data set itself draws at random makes the views.
            seed: Seed of the views.
            **kwargs: Further arguments of `torch.utils.data.DataLoader`, by name.

        Raises:
            UserError: The data set is a generator or another iterator, or `views` is no number of
                views.
        """
        if isinstance(dataset, Iterator) and not isinstance(dataset, IterableDataset):
            raise UserError(
                f"loader needs a data set whose items have numbers, and was given "
                f"{type(dataset).__name__!r}, which can be passed over once: give a list of its "
                "items."
            )
        if views is not None:
            dataset = Views(dataset, views, transform, seed)
        elif transform is not None:
            raise UserError("transform makes views: say how many of each item by views=.")
        close, shared = self._close, weakref.ref(self._shared)
        return Loader(lambda: shared() if close.alive else None, dataset, *args, **kwargs)

    def close(self) -> None:
        """Ends caching and frees memory; a directory has all rows afterwards.

        Modules, torch and the loop are as before.
        """
        if not self._close.alive:
            return
        if not self._called:
            names = ", ".join(dict.fromkeys(type(part).__name__ for part in self._models))
            self._shared.tell(
                "never called",
                f"The cache of {names} has seen no call of it: give the very modules that the loop "
                "calls.",
            )
        elif not any(site.routes() for site in self._sites.values()):
            self._shared.tell(
                "nothing frozen",
                f"No parameter of {type(self._models[0]).__name__} was frozen in any call: freeze "
                "what does not change with cachefreeze.freeze, or by requires_grad = False.",
            )
        _tell_if_nothing_trains(self._shared, 1)
        self._close()
        self._models, self._sites, self._parts, self._names = (), {}, {}, {}
        self._shared.held = 0

    def __enter__(self) -> "ActivationCache":
        """Returns the cache."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the cache."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles a cache as a closed one: a copy of a model is a plain model."""
        return _closed, ()

    def __str__(self) -> str:
        """Says what the cache has done, and what limits it."""
        return in_words(self.stats, self._shared.entries, self.messages)

    # A call.

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handles an outermost call of a module."""
        target = module
        if id(module) not in self._parts:  # compiled from one that is watched
            target = module._modules.get("_orig_mod")  # type: ignore[assignment]
        known = self._parts.get(id(target))
        # One thread at a time: others run as ever.
        may_follow = known is target and self._may_follow()
        if not may_follow or not self._lock.acquire(blocking=False):
            unloaded.load_in((args, kwargs))
            return module(*args, **kwargs)
        self._depth += 1
        try:
            self._called = True
            number = id(target)
            site = self._sites.get(number)
            if site is None:
                site = self._sites[number] = Site(self._shared, self._names[number], target)
            return site.call(module, args, kwargs, inner=self._depth > 1)
        finally:
            self._depth -= 1
            self._lock.release()

    def _may_follow(self) -> bool:
        # In a backward pass, modules run again for a checkpointed segment. Under other function
        # modes, in torch.func and in tracers, tensors are not what they seem.
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
    """Says whether somebody follows torch's functions, other than `torch.set_default_device`."""
    depth = torch._C._len_torch_function_stack()
    return any(
        not isinstance(torch._C._get_function_stack_at(place), DeviceContext)
        for place in range(depth)
    )


def _after_step(optimizer: torch.optim.Optimizer, shared: Shared, numbers: set[int]) -> None:
    """Doubts the bits of what an optimizer may have moved, and counts steps that moved nothing.

    Args:
        optimizer: Optimizer that has stepped.
        shared: What all routes of the cache have in common.
        numbers: Numbers of the parameters of the models.
    """
    # Optimizers of torch's own leave a parameter alone that has no gradient.
    own = type(optimizer).__module__.startswith("torch.optim")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moved = [parameter for parameter in held if not own or parameter.grad is not None]
    shared.weights.suspect(moved, event=True)
    if shared.idle_steps is None:
        return
    if any(parameter.grad is not None or parameter.requires_grad for parameter in held):
        shared.idle_steps = None
    elif any(id(parameter) in numbers for parameter in held):
        shared.idle_steps += 1
        _tell_if_nothing_trains(shared, _MANY_STEPS)


def _tell_if_nothing_trains(shared: Shared, steps: int) -> None:
    """Tells the user if optimizers have made so many steps, and nothing was there to be moved."""
    if shared.idle_steps is not None and shared.idle_steps >= steps:
        shared.tell(
            "nothing trains",
            "Nothing trains: an optimizer steps, and every parameter that it holds is frozen. Set "
            "requires_grad = True for what shall train, such as the head.",
        )


def _check(
    models: Iterable[Any], max_bytes: int | None, probation: int | None, verify: str
) -> None:
    models = list(models)
    if not models:
        raise UserError("ActivationCache needs a model: ActivationCache(model).")
    for model in models:
        if isinstance(model, type) and issubclass(model, nn.Module):
            raise UserError(
                f"ActivationCache needs a model, not its class: give an instance of "
                f"{model.__name__}."
            )
        if not isinstance(model, nn.Module):
            raise UserError(
                f"ActivationCache needs torch.nn.Module, and was given {type(model).__name__!r}."
            )
        if not any(True for _ in model.parameters()):
            raise UserError(f"{type(model).__name__} has no parameters: there is no frozen work.")
        for part in model.modules():
            other = getattr(calls.watcher_of(part), "cache", lambda: None)()
            if other is not None and other._parts.get(id(part)) is part:
                raise UserError(
                    f"{type(model).__name__} has a cache already: close that one first, or give "
                    "both models to one cache."
                )
    if max_bytes is not None and max_bytes <= 0:
        raise UserError("max_bytes must be a positive number of bytes.")
    if probation is not None and probation < 1:
        raise UserError("probation must be at least 1: nothing is served before it is compared.")
    if verify not in VERIFY:
        raise UserError(f"verify must be one of {', '.join(VERIFY)}, and was {verify!r}.")


def _check_codec(codec: str, on_disk: bool, exact: bool) -> None:
    if codec not in CODECS:
        raise UserError(f"codec must be one of {', '.join(CODECS)}, and was {codec!r}.")
    if codec == "zstd" and not on_disk:
        raise UserError(
            "codec='zstd' is how rows are written to a directory: give one as directory, or take "
            "'raw'."
        )
    if codec == "int8" and exact:
        raise UserError(
            "codec='int8' rounds what it keeps, so that results differ from those without a cache: "
            "give exact=False if that is what you want."
        )


def _close(
    numbers: list[int], catching: Any, hook: Any, sites: dict[int, Site], entries: Entries
) -> None:
    calls.unwatch(numbers)
    catching.__exit__(None, None, None)
    hook.remove()
    try:
        for site in sites.values():
            for route in site.routes():
                route.look_at_the_end()
                if entries.directory is not None:
                    route.write_all()
    finally:
        entries.close()
        for sentence in entries.messages:
            _log.warning("%s", sentence)


class _Nothing(nn.Module):
    """Has a cache that is closed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))


def _closed() -> ActivationCache:
    cache = ActivationCache(_Nothing())
    cache._close()
    return cache
