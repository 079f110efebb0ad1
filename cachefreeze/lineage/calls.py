"""Intercepts calls of modules, and of segments of gradient checkpointing.

`nn.Module.__call__` is replaced in the body of `catching`, and restored afterwards. Hooks and
attributes of modules are not used, since they would be pickled and copied with the module.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.utils.checkpoint as checkpointing
from torch import nn
from torch.overrides import TorchFunctionMode


class Follower(Protocol):
    """Receives the calls of modules in one thread."""

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call of a module, or does something in its place."""
        ...


class _Local(threading.local):
    """State of a thread. Reading a class default is twice as fast as `getattr` with a default."""

    follower: Follower | None = None
    within = False
    segment: tuple[Callable[[], None], Callable[[], None]] | None = None


_local = _Local()
_lock = threading.Lock()
_open = 0
real_call: Callable[..., Any] = nn.Module.__call__
_is_compiling = torch.compiler.is_compiling


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Dynamo traces this function when it compiles a call of a module.
    if _is_compiling():
        return real_call(module, *args, **kwargs)
    follower = _local.follower
    if follower is not None:
        return follower.call(module, args, kwargs)
    if _local.within:
        return real_call(module, *args, **kwargs)
    watcher = _watched.get(id(module))
    if watcher is None and type(module).__name__ == "OptimizedModule":
        # Compiled code does not call the modules that it was made from.
        watcher = _watched.get(id(module._modules.get("_orig_mod")))
    if watcher is None:
        if _before_call is not None:
            _before_call(module, args, kwargs)
        return real_call(module, *args, **kwargs)
    _local.within = True
    try:
        return watcher(module, args, kwargs)
    finally:
        _local.within = False


_before_call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None] | None = None


def before_call(function: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]) -> None:
    """Registers a function that is called before each outermost call of a module without a watcher.

    Args:
        function: Function called with the module and its positional and keyword arguments.
    """
    global _before_call
    _before_call = function


Watcher = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
_watched: dict[int, Watcher] = {}


def watch(modules: Iterable[nn.Module], watcher: Watcher) -> None:
    """Makes a function receive the outermost calls of some modules, in the body of `catching`.

    Args:
        modules: Modules to watch. No reference to them is kept.
        watcher: Function called in the place of each such call, with the module and its arguments.
    """
    _watched.update((id(module), watcher) for module in modules)


def unwatch(numbers: Iterable[int]) -> None:
    """Stops watching some modules.

    Args:
        numbers: Identities (`id`) of the modules, which may not exist any more.
    """
    for number in numbers:
        _watched.pop(number, None)


def watcher_of(module: nn.Module) -> Watcher | None:
    """Returns the function that receives the calls of a module, or None."""
    return _watched.get(id(module))


@contextmanager
def rooted() -> Iterator[None]:
    """Treats calls inside of a watched call as outermost calls, too, in the body."""
    before, _local.within = _local.within, False
    try:
        yield
    finally:
        _local.within = before


@contextmanager
def catching() -> Iterator[None]:
    """Intercepts calls of modules in the body, in every thread."""
    global _open
    with _lock:
        if not _open:
            _put_in_place()
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                _put_back()


@contextmanager
def follower_of_thread(follower: Follower | None) -> Iterator[None]:
    """Makes a follower receive the calls of this thread in the body. None for no follower."""
    before = _local.follower
    _local.follower = follower
    try:
        yield
    finally:
        _local.follower = before


@contextmanager
def unfollowed(mode: TorchFunctionMode | None) -> Iterator[None]:
    """Runs the body without the follower of this thread and without its mode.

    Args:
        mode: Mode of the follower. It is removed for the body if it is on top of the stack of
            modes.
    """
    before = _local.follower
    _local.follower = None
    taken = mode is not None and take_off(mode)
    # A mode below another one cannot be removed, so it is paused.
    paused = getattr(mode, "paused", False)
    if mode is not None and not taken:
        mode.paused = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if taken:
            put_on(mode)
        elif mode is not None:
            mode.paused = paused  # type: ignore[attr-defined]
        _local.follower = before


def take_off(mode: TorchFunctionMode) -> bool:
    """Removes a mode from the stack of modes if it is on top. Returns whether it was."""
    if _on_top() is not mode:
        return False
    torch._C._pop_torch_function_stack()
    return True


def put_on(mode: TorchFunctionMode | None) -> None:
    """Puts a mode back on the stack of modes."""
    torch._C._push_on_torch_function_stack(mode)


def _on_top() -> Any:
    depth = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(depth - 1) if depth else None


@contextmanager
def segments(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Reports the checkpointed segments that this thread runs, in the body of `catching`.

    Args:
        begin: Function called before the forward pass of a segment.
        end: Function called after it.
    """
    _local.segment = (begin, end)
    try:
        yield
    finally:
        _local.segment = None


class _Reentrant:
    """Replaces torch's `CheckpointFunction`."""

    @staticmethod
    def apply(*args: Any) -> Any:
        told = _local.segment
        if told is None:
            return _reentrant.apply(*args)
        told[0]()
        try:
            return _reentrant.apply(*args)
        finally:
            told[1]()


def _nonreentrant(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """Replaces torch's generator around a segment that is not reentrant."""
    told = _local.segment
    if told is None:
        yield from _generator(*args, **kwargs)
        return
    told[0]()
    try:
        yield from _generator(*args, **kwargs)
    finally:
        told[1]()


_reentrant: Any = checkpointing.CheckpointFunction
# Newer versions of torch call the second name, older ones have only the first.
_NAME = "_checkpoint_without_reentrant_generator"
_NAME = f"{_NAME}_impl" if hasattr(checkpointing, f"{_NAME}_impl") else _NAME
_generator: Callable[..., Iterator[Any]] = getattr(checkpointing, _NAME)


def _put_in_place() -> None:
    global real_call
    real_call = nn.Module.__call__
    nn.Module.__call__ = _call  # type: ignore[method-assign]
    checkpointing.CheckpointFunction = _Reentrant  # type: ignore[assignment,misc]
    setattr(checkpointing, _NAME, _nonreentrant)


def _put_back() -> None:
    # If other code has replaced the call since then, its function stays. It calls ours, which does
    # nothing without a follower.
    if nn.Module.__call__ is _call:
        nn.Module.__call__ = real_call  # type: ignore[method-assign]
    checkpointing.CheckpointFunction = _reentrant  # type: ignore[misc]
    setattr(checkpointing, _NAME, _generator)
