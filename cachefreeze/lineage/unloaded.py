"""Tensors of a data loader whose values are loaded only if something uses them."""

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
# `Unloaded` reports `torch.Tensor` as its class, so the class is set by the descriptor of `object`.
set_class: Callable[[Any, type], None] = vars(object)["__class__"].__set__


class Unloaded(torch.Tensor):
    """A tensor whose values are loaded at the first use of anything but shape, type and device.

    The same object becomes a plain `torch.Tensor` then. `.to(device)`, `pin_memory` and a change of
    the memory format load nothing, but return another such tensor.
    """

    # Code that checks the class of a tensor must take the same branch as for a plain tensor.
    __class__ = property(lambda self: torch.Tensor)  # type: ignore[assignment]
    # Loaded values, if the object itself could not become a plain tensor.
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
        """Makes a tensor without values.

        Args:
            cls: This class.
            like: Tensor of the same shape, strides and type.
            device: Device of the tensor.
            load: Function that returns the values. Its argument says whether user code uses the
                values. If False, only the cache needs them.
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
        """Does nothing, since `__new__` does all."""

    @classmethod
    @uncompiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Loads the values of such tensors among the arguments, then calls the function."""
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
        """Passes the loaded tensors to a kernel. Only C++ code calls this."""
        args, kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*args, **kwargs)


_METADATA = soundness.METADATA | {Tensor._version.__get__}  # type: ignore[attr-defined]
_MOVES = frozenset({Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.contiguous, Tensor.pin_memory})


def is_unloaded(value: Any) -> bool:
    """Returns whether a value is a tensor that is not loaded yet."""
    return type(value) is Unloaded


def with_keys(tensor: Tensor, keys: np.ndarray | None) -> Tensor:
    """Notes the keys of a tensor's rows, so that its values need not be hashed.

    Args:
        tensor: Tensor that no code outside of the cache can write to.
        keys: Hashes of the rows, of shape (rows, 2). None if they are not known.
    """
    if keys is not None:
        tensor.row_keys = keys  # type: ignore[attr-defined]
    return tensor


def keys_of(tensor: Tensor) -> np.ndarray | None:
    """Returns the hashes of a tensor's rows if they are known without its values, or None."""
    known = "unloaded_keys" if type(tensor) is Unloaded else "row_keys"
    with _quiet():
        keys: np.ndarray | None = tensor.__dict__.get(known)
    return keys


def kind_of(tensor: Tensor) -> type:
    """Returns the class of a tensor, or of its values if they are not loaded yet."""
    kind = type(tensor)
    return torch.Tensor if kind is Unloaded else kind


def load_in(given: Any, used: bool = False) -> None:
    """Loads the tensors in some arguments that are not loaded yet.

    Args:
        given: Arguments of a call.
        used: Whether user code uses the values.
    """
    for one in tensors(given):
        if type(one) is Unloaded:
            _load(one, used)


def another(tensor: Unloaded) -> Unloaded:
    """Returns an unloaded tensor with the same values, on its own buffer after loading."""
    load = tensor.unloaded_load
    with _quiet():
        return Unloaded(
            tensor, tensor.device, lambda used: load(used).clone(), tensor.unloaded_keys
        )


def _moved(func: Any, tensor: Unloaded, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the result of a function that moves a tensor, or None if the function does more."""
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
            return None  # the plain call raises its own error
        if wanted.type == "cuda" and wanted.index is None:
            wanted = torch.device("cuda", torch.cuda.current_device())
        if wanted == device and moved.stride() == like.stride():
            return tensor
    return Unloaded(moved, wanted, _after(tensor, func, args, kwargs), tensor.unloaded_keys)


def _named(args: Any) -> Any:
    # `x.to(other)` takes device and type from another tensor.
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
    """Loads the arguments of opaque modules, which may compute other bits for unloaded tensors."""
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
        # The values may have been written to while they were made. Plain data have version 0.
        values = values if values.is_inference() or not values._version else values.data
    if type(tensor) is Unloaded and not exchange(tensor, values):
        tensor.late_real = values


@contextmanager
def _unfollowed() -> Iterator[None]:
    """Removes all function modes in the body, apart from the one of the default device."""
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
    """Turns a late tensor into a plain one by an exchange of two objects. Returns whether it could.

    Args:
        late: Tensor of class `Late` or `Unloaded`.
        tensor: Plain tensor with the values. Afterwards it is the late one, with `late_real` set.
    """
    kind = type(late)
    with _quiet():
        # C++ code may hold the object, for example a custom function that saves it. In torch 2.6,
        # the count of holders includes Python's only once C++ code has returned the object. This
        # function does nothing but that.
        torch._C._functorch.unwrap_if_dead(late)
        if late._use_count() > 1:
            return False  # C++ code holds the object
    left = late.__dict__
    late.__dict__ = {}
    set_class(late, torch.Tensor)
    try:
        torch._C._swap_tensor_impl(late, tensor)
    except RuntimeError:
        set_class(late, kind)
        late.__dict__ = left
        return False
    # C++ code may still hold the old tensor of the late object, counted or not. That tensor stands
    # for the values now.
    set_class(tensor, kind)
    tensor.__dict__.update(left, late_real=late)
    return True
