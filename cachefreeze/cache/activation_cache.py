"""The public face: a cache that any loop uses by one line."""

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cachefreeze import lineage
from cachefreeze.cache.entries import Entries
from cachefreeze.cache.memory import free_memory, in_words
from cachefreeze.cache.route import Route, State
from cachefreeze.cache.shared import Shared, Stats, now
from cachefreeze.errors import UserError
from cachefreeze.lineage import calls
from cachefreeze.lineage.structure import PLAIN_KINDS, tensors

# Number of signatures of a module, and of ways through it for one signature, that are followed.
_MOST = 16


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
        max_bytes: Largest number of bytes that are kept. The rows that were not used for longest go
            first. If None, a quarter of the memory that is free now.
        exact: Whether only values are served that are equal to computed ones to the last bit. If
            False, values that differ by rounding are served too, and the difference is told.
        probation: Number of batches that are computed and compared before any is served. If None,
            a quarter of those before the first row came again, at least 2 and at most 8.

    Raises:
        UserError: Something else than a module is given, a module has no parameter, or has a cache
            already.
    """

    # Without a `__dict__`, a cache that is an attribute of a model is no setting of the model.
    __slots__ = (
        "__weakref__", "_called", "_close", "_lock", "_names", "_parts", "_shared", "_sites",
    )  # fmt: skip

    def __init__(
        self,
        *models: nn.Module,
        max_bytes: int | None = None,
        exact: bool = True,
        probation: int | None = None,
    ) -> None:
        _check(models, max_bytes, probation)
        limit = free_memory() // 4 if max_bytes is None else max_bytes
        self._shared = Shared(Entries(limit), exact, probation)
        self._sites: dict[int, _Site] = {}
        self._parts: dict[int, nn.Module] = {}
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()
        self._called = False
        for model in models:
            for path, part in model.named_modules():
                self._parts[id(part)] = part
                name = type(model).__name__
                self._names[id(part)] = f"`{path}` of {name}" if path else name
        # The registry of calls must not keep the cache alive.
        reference = weakref.ref(self)

        def watcher(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = reference()
            if cache is None:
                return module(*args, **kwargs)
            return cache._call(module, args, kwargs)

        watcher.cache = reference  # type: ignore[attr-defined]
        calls.watch(self._parts.values(), watcher)
        catching = calls.catching()
        catching.__enter__()
        weights = self._shared.weights
        hook = register_optimizer_step_post_hook(
            lambda optimizer, args, kwargs: _after_step(optimizer, weights)
        )
        self._close = weakref.finalize(self, _close, list(self._parts), catching, hook)

    # What the user asks.

    @property
    def stats(self) -> Stats:
        """Counters of what the cache has done so far."""
        stats = self._shared.stats
        stats.rows_kept = len(self._shared.entries)
        stats.bytes = self._shared.entries.nbytes + self._shared.held
        return stats

    @property
    def messages(self) -> tuple[str, ...]:
        """Sentences that say what limits the cache. They are logged under "cachefreeze", too."""
        return tuple(self._shared.messages.values())

    def close(self) -> None:
        """Ends caching and frees what was kept. Modules, torch and the loop are as before."""
        if not self._close.alive:
            return
        if not self._called:
            names = ", ".join(dict.fromkeys(type(part).__name__ for part in self._roots()))
            self._shared.tell(
                "never called",
                f"The cache of {names} has seen no call of it: give the very modules that the loop "
                "calls.",
            )
        self._close()
        self._sites = {}
        self._shared.entries = Entries(0)
        self._shared.held = 0

    def _roots(self) -> list[nn.Module]:
        return list(self._parts.values())[:1]

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
        if known is not target or not self._may_follow():
            return module(*args, **kwargs)
        # One thread at a time: others run as ever.
        if not self._lock.acquire(blocking=False):
            return module(*args, **kwargs)
        began = now()
        try:
            self._called = True
            site = self._sites.get(id(target))
            if site is None or not site.is_current():
                site = self._sites[id(target)] = _Site(
                    self._shared, self._names[id(target)], target
                )
            return site.call(module, args, kwargs)
        finally:
            self._shared.watched_seconds += now() - began
            self._lock.release()

    def _may_follow(self) -> bool:
        # In a backward pass, modules run again for a checkpointed segment. Under other function
        # modes, in torch.func and in tracers, tensors are not what they seem.
        return (
            torch._C._current_graph_task_id() == -1
            and not torch._C._len_torch_function_stack()
            and not torch._C._len_torch_dispatch_stack()
            and torch._C._functorch.maybe_get_level(torch.empty(0)) in (-1, None)
            and not torch._C._is_tracing()
        )


class _Site:
    """A module whose calls are cached.

    Args:
        shared: What all routes of the cache have in common.
        name: Name of the module, for people.
        module: Module.
    """

    def __init__(self, shared: Shared, name: str, module: nn.Module) -> None:
        self._shared = shared
        self._name = name
        self._module = weakref.ref(module)
        self._modules = list(module.modules())
        self._parameters = list(module.parameters())
        self._routes: dict[Any, list[Route]] = {}
        self._alike: dict[Any, list[tuple[int, Any]]] = {}

    def is_current(self) -> bool:
        """Says whether the module is still made of the same parts."""
        module = self._module()
        return module is not None and all(
            one is other for one, other in zip(module.modules(), self._modules, strict=False)
        )

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call of the module, or replays it with kept values."""
        frozen = [one.requires_grad for one in self._parameters]
        if all(frozen):
            # Nothing in it is frozen. What it is made of may have been: its parts are asked.
            return module(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        if not given or not all(_is_plain(tensor) for tensor in given):
            return module(*args, **kwargs)
        about = (
            tuple(frozen),
            tuple([one.training for one in self._modules]),
            _switches(),
            _plain_in((args, kwargs)),
        )
        shapes = tuple(
            (tuple(one.shape), one.stride(), one.dtype, one.device, one.requires_grad)
            for one in given
        )
        routes = self._routes.get((about, shapes))
        if routes is None:
            if self._is_smaller_than_others(about, given):
                return module(*args, **kwargs)
            if len(self._routes) >= _MOST:
                self._shared.tell(
                    f"{self._name}: signatures",
                    f"{self._name} was called with more than {_MOST} combinations of shapes and "
                    "modes: further ones are not cached. For padded batches, a fixed length or "
                    "pad_to_multiple_of=64 helps.",
                )
                return module(*args, **kwargs)
            routes = self._routes[about, shapes] = []
            self._alike.setdefault(about, []).append((_rows(given), shapes))
        for route in routes:
            if route.fits((args, kwargs)):
                if route.state is State.STALE:
                    routes.remove(route)
                    break
                return route.call(module, args, kwargs)
        if len(routes) >= _MOST:
            return module(*args, **kwargs)
        return self._trace(routes, module, args, kwargs, given)

    def _trace(
        self,
        routes: list[Route],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
    ) -> Any:
        # The pass may write to what it is given.
        copies = [tensor.detach().clone() for tensor in given]
        output, trace = lineage.trace(
            module, *args, moving=list(self._shared.moving.values()), **kwargs
        )
        self._shared.stats.rows_computed += _rows(given)
        routes.append(Route(self._shared, self._name, trace, copies))
        return output

    def _is_smaller_than_others(self, about: Any, given: list[torch.Tensor]) -> bool:
        """Hands the rows of a smaller batch to the route of a larger one, if there is one."""
        rows = _rows(given)
        larger = [shapes for count, shapes in self._alike.get(about, []) if count > rows]
        fitting = [shapes for shapes in larger if _differ_in_rows(shapes, given)]
        for shapes in fitting:
            for route in self._routes[about, shapes]:
                route.take_smaller(given)
        return bool(fitting)


def _rows(given: list[torch.Tensor]) -> int:
    return given[0].shape[0] if given[0].dim() else 1


def _differ_in_rows(shapes: Any, given: list[torch.Tensor]) -> bool:
    return len(shapes) == len(given) and all(
        tensor.dim() == len(shape)
        and tensor.dtype == dtype
        and tuple(tensor.shape[1:]) == shape[1:]
        for tensor, (shape, _, dtype, _, _) in zip(given, shapes, strict=True)
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.device.type != "meta"
    )


def _switches() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in ("cpu", "cuda")
        ),
        torch.get_num_threads(),
    )


def _plain_in(value: Any) -> Any:
    """Returns the numbers and strings among arguments, with the places that they are in."""
    if isinstance(value, torch.Tensor):
        return None
    if type(value) in PLAIN_KINDS:
        return value
    if isinstance(value, (tuple, list)):
        return tuple([_plain_in(item) for item in value])
    if isinstance(value, dict):
        return tuple((str(key), _plain_in(item)) for key, item in value.items())
    return type(value)


def _after_step(optimizer: torch.optim.Optimizer, weights: Any) -> None:
    """Doubts the bits of what an optimizer may have moved."""
    # Optimizers of torch's own leave a parameter alone that has no gradient.
    own = type(optimizer).__module__.startswith("torch.optim")
    weights.suspect(
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not own or parameter.grad is not None
    )


def _check(models: Iterable[Any], max_bytes: int | None, probation: int | None) -> None:
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


def _close(numbers: list[int], catching: Any, hook: Any) -> None:
    calls.unwatch(numbers)
    catching.__exit__(None, None, None)
    hook.remove()


class _Nothing(nn.Module):
    """Has a cache that is closed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))


def _closed() -> ActivationCache:
    cache = ActivationCache(_Nothing())
    cache._called = True
    cache.close()
    return cache
