"""Tensors that a loader gives before their values are loaded: most of them are never needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_map

from cachefreeze.lineage import calls, soundness
from cachefreeze.lineage.modes import modes_now, uncompiled, under
from cachefreeze.lineage.structure import tensors

Tensor = torch.Tensor
_quiet = torch._C.DisableTorchFunctionSubclass
# `Unloaded` says that its class is `torch.Tensor`, so its real class is set below that.
set_class: Callable[[Any, type], None] = vars(object)["__class__"].__set__


class Unloaded(torch.Tensor):
    """A tensor whose values are loaded by the first use of anything but shape, type and device.

    The very object becomes a plain `torch.Tensor` then. `.to(device)`, `pin_memory` and another
    memory format alone make another such tensor.
    """

    # Code that asks for the class of a tensor goes the way that it would with the tensor itself.
    __class__ = property(lambda self: torch.Tensor)  # type: ignore[assignment]
    # Values once loaded, where the object itself could not become them.
    late_real: Tensor | None
    unloaded_load: Callable[[bool], Tensor]
    unloaded_keys: np.ndarray
    unloaded_around: tuple[Any, ...]

    @staticmethod
    def __new__(
        cls: type["Unloaded"],
        like: Tensor,
        device: torch.device,
        load: Callable[[bool], Tensor],
        keys: np.ndarray,
    ) -> "Unloaded":
        """Makes a tensor.

        Args:
            like: Tensor of the same shape, strides and type.
            device: Device.
            load: Function that returns the values. It is told whether something has used them, or
                the cache needs them.
            keys: Hashes of the rows, of shape (rows, 2).
        """
        made: Unloaded = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        calls.before_call(_before_call)
        made.late_real, made.unloaded_load, made.unloaded_keys = None, load, keys
        made.unloaded_around = (
            modes_now(),
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )
        return made

    def __init__(self, *args: Any) -> None:
        """Does nothing more. See `__new__`."""

    @classmethod
    @uncompiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Loads the values of the tensors among the arguments, then calls the function."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with _quiet():
                return func(*args, **kwargs)
        if func in _MOVES and args and type(args[0]) is Unloaded:
            moved = _moved(func, args[0], args[1:], kwargs)
            if moved is not None:
                return moved
        load_in((args, kwargs), used=True)
        kept = [one for one in tensors((args, kwargs)) if type(one) is Unloaded]
        if not kept:
            return func(*args, **kwargs)
        args, kwargs = tree_map(_real, (args, kwargs))
        result = func(*args, **kwargs)
        return {id(one.late_real): one for one in kept}.get(id(result), result)

    @classmethod
    @uncompiled
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Gives a kernel the loaded tensors. Only C++ code comes here."""
        args, kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*args, **kwargs)


_METADATA = soundness.METADATA | {Tensor._version.__get__}  # type: ignore[attr-defined]
_MOVES = frozenset({Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.contiguous, Tensor.pin_memory})


def is_unloaded(value: Any) -> bool:
    """Says whether a value is a tensor that is not loaded yet."""
    return type(value) is Unloaded


def kind_of(tensor: Tensor) -> type:
    """Returns the class of a tensor, which is that of its values if they are not loaded yet."""
    kind = type(tensor)
    return torch.Tensor if kind is Unloaded else kind


def load_in(given: Any, used: bool = False) -> None:
    """Loads the tensors in some arguments that are not loaded yet.

    Args:
        given: Arguments.
        used: Whether something of the user's uses them.
    """
    for one in tensors(given):
        if type(one) is Unloaded:
            _load(one, used)


def another(tensor: Unloaded) -> Unloaded:
    """Returns a tensor with the same values, on a buffer of its own once they are loaded."""
    load = tensor.unloaded_load
    with _quiet():
        return Unloaded(
            tensor, tensor.device, lambda used: load(used).clone(), tensor.unloaded_keys
        )


def _moved(func: Any, tensor: Unloaded, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the result of a function that moves a tensor, or None if it does more."""
    with _quiet():
        device, shape = tensor.device, tensor.shape
        if func is Tensor.pin_memory:
            return tensor
        if kwargs.get("copy") or (func is Tensor.to and any(arg is True for arg in args[2:])):
            return None
        try:
            if func is Tensor.cuda:
                kwargs = {"device": torch.device("cuda", torch.cuda.current_device()), **kwargs}
                args = ()
            elif func is Tensor.cpu:
                kwargs = {"device": torch.device("cpu"), **kwargs}
            like = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            if func is Tensor.contiguous:
                wanted, moved = device, like.contiguous(*args, **kwargs)
            else:
                to, dtype, _, form = torch._C._nn._parse_to(*_named(args), **kwargs)
                if dtype is not None and dtype != tensor.dtype:
                    return None
                wanted = device if to is None else to
                moved = like if form is None else like.to(memory_format=form)
        except (TypeError, RuntimeError, AssertionError):
            return None  # plainly, with its own error
        if wanted.type == "cuda" and wanted.index is None:
            wanted = torch.device("cuda", torch.cuda.current_device())
        if wanted == device and moved.stride() == like.stride():
            return tensor
    return Unloaded(moved, wanted, _after(tensor, func, args, kwargs), tensor.unloaded_keys)


def _named(args: Any) -> Any:
    # `x.to(other)` takes device and type of another tensor.
    if args and isinstance(args[0], torch.Tensor):
        with _quiet():
            return (args[0].device, args[0].dtype, *args[1:])
    return args


def _after(
    tensor: Unloaded, func: Any, args: Any, kwargs: dict[str, Any]
) -> Callable[[bool], Tensor]:
    def load(used: bool) -> Tensor:
        _load(tensor, used)
        moved: Tensor = func(_real(tensor), *args, **kwargs)
        return moved

    return load


def _before_call(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Loads what a module is given that goes another way, with other bits, for such tensors."""
    late = any(type(one) is Unloaded for one in (*args, *kwargs.values()))
    if late and soundness.is_opaque(module):
        load_in((args, kwargs), used=True)


def _real(value: Any) -> Any:
    if type(value) is Unloaded:
        _load(value, True)
        if type(value) is Unloaded:
            return value.late_real
    return value


def _load(tensor: Unloaded, used: bool) -> None:
    if tensor.late_real is not None:
        return
    modes, include, exclude = tensor.unloaded_around
    guard = torch._C._ForceDispatchKeyGuard(include, exclude)
    with guard, _unfollowed(), calls.unfollowed(None), under(modes):
        values = tensor.unloaded_load(used)
        # A loaded tensor may have been written to while it was made.
        values = values if values.is_inference() or not values._version else values.data
    if type(tensor) is Unloaded and not exchange(tensor, values):
        tensor.late_real = values


@contextmanager
def _unfollowed() -> Iterator[None]:
    """Leaves all function modes but the one of the default device."""
    taken: list[TorchFunctionMode] = []
    try:
        for _ in range(torch._C._len_torch_function_stack()):
            taken.append(torch._C._pop_torch_function_stack())
        for mode in reversed(taken):
            if isinstance(mode, DeviceContext):
                torch._C._push_on_torch_function_stack(mode)
        yield
    finally:
        for _ in range(torch._C._len_torch_function_stack()):
            torch._C._pop_torch_function_stack()
        for mode in reversed(taken):
            torch._C._push_on_torch_function_stack(mode)


def exchange(late: Any, tensor: Tensor) -> bool:
    """Exchanges what two tensor objects are: one becomes a plain tensor. Says whether it could.

    Args:
        late: Tensor of a class of ours.
        tensor: Plain tensor, which stands for `late` afterwards, with that as its `late_real`.
    """
    kind = type(late)
    with _quiet():
        # C++ code alone may hold the object, as a custom function does with what it saves. Earlier
        # versions of torch, such as 2.6, count python among the holders of such a tensor only once
        # C++ code has returned it: this function does no more than that.
        torch._C._functorch.unwrap_if_dead(late)
        if late._use_count() > 1:
            return False  # C++ code holds it
    left = late.__dict__
    late.__dict__ = {}
    set_class(late, torch.Tensor)
    try:
        torch._C._swap_tensor_impl(late, tensor)
    except RuntimeError:
        set_class(late, kind)
        late.__dict__ = left
        return False
    # C++ code may hold what the late value was, counted or not: that stands for the tensor now.
    set_class(tensor, kind)
    tensor.__dict__.update(left, late_real=late)
    return True
