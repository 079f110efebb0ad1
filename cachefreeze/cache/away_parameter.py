"""A parameter whose values are in host memory, and come back as soon as anybody reads them.

The object stays the same, so that a model, an optimizer and the user's code go on holding it. While
its values are away, it is of a class of its own: torch asks this class before it does anything with
the parameter. Its shape, type and device are told without its values.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import inference_mode, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from cachefreeze.keys import in_order_of_memory
from cachefreeze.lineage.devices import HostCopy, now, queue_of, send

Tensor = torch.Tensor

_changes = threading.RLock()
# Name under which a parameter holds where its values are.
_RECORD = "_cachefreeze_away"
# What torch does with a parameter that needs no values.
_NEEDS_NO_VALUES = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "layout", "ndim", "nbytes", "itemsize")
    + ("requires_grad", "is_leaf", "grad", "grad_fn")
} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex),
}
_DEVICE, _IS_CUDA = (getattr(Tensor, name).__get__ for name in ("device", "is_cuda"))


@dataclass(frozen=True)
class _Record:
    """Values of a parameter that are in host memory.

    Attributes:
        device: Device that they belong on.
        stride: Strides that they had there.
        values: Values in the order of memory, of one dimension.
        when_back: Function that is called with the parameter when they are back.
    """

    device: torch.device
    stride: tuple[int, ...]
    values: Tensor
    when_back: Callable[[nn.Parameter], None]


class AwayParameter(nn.Parameter):
    """Parameter whose values are in host memory."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Does what torch was asked for, after the values have come back if it needs them."""
        kwargs = kwargs or {}
        if func in (_DEVICE, _IS_CUDA):
            device = vars(args[0])[_RECORD].device
            return device if func == _DEVICE else device.type == "cuda"
        if func in _NEEDS_NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _all_come_back((args, kwargs))
        return func(*args, **kwargs)

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        """Makes a plain parameter, for code that makes another one of the same type."""
        return nn.Parameter(data, requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies the parameter, after its values have come back."""
        come_back(self)
        return copy.deepcopy(self, memo)


def may_go(tensor: Tensor) -> TypeGuard[nn.Parameter]:
    """Returns whether a tensor is a parameter whose values can leave its device."""
    return (
        type(tensor) is nn.Parameter
        and not tensor.requires_grad
        and tensor.grad is None
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and queue_of(tensor.device) is not None
        and in_order_of_memory(tensor) is not None
    )


def is_alone(tensor: Tensor) -> bool:
    """Returns whether no other object uses a tensor or its memory.

    Memory that others use would not be freed. A graph for a backward pass that has saved the
    tensor, or a TorchScript module, would read it without asking.
    """
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return (
        whole
        and _users(tensor) == _users(torch.empty(1))
        and tensor._use_count() == torch.empty(1)._use_count()  # type: ignore[attr-defined]
    )


def go_away(parameters: Sequence[nn.Parameter], when_back: Callable[[nn.Parameter], None]) -> None:
    """Copies the values of parameters to host memory, and frees those on their device.

    The host waits for all work of the device, because other work may take the memory at once.

    Args:
        parameters: Parameters that `may_go` and `is_alone` have returned True for.
        when_back: Function that is called with each parameter whose values are back.
    """
    with _changing():
        copies = [HostCopy(one) for one in map(in_order_of_memory, parameters) if one is not None]
        assert len(copies) == len(parameters)
        values = [one.get() for one in copies]
        for device in {one.device for one in parameters if one.device.type == "cuda"}:
            torch.cuda.synchronize(device)  # other streams may still read the weights
        try:
            for one, kept in zip(parameters, values, strict=True):
                record = _Record(one.device, one.stride(), kept, when_back)
                nothing = _unreadable(one)
                vars(one)[_RECORD] = record
                one.__class__ = AwayParameter
                one.data = nothing
        except BaseException:  # an interrupt, for example
            for one in parameters:
                come_back(one)
                vars(one).pop(_RECORD, None)
            raise


def come_back(tensor: Any) -> None:
    """Brings the values of a parameter back to its device. Does nothing if they are not away."""
    if type(tensor) is not AwayParameter:
        return
    with _changing():
        if type(tensor) is not AwayParameter:  # another thread was faster
            return
        record = vars(tensor)[_RECORD]
        values = send(record.values, record.device)  # fails if there is no room
        now(record.device).wait()  # other streams may read it
        tensor.data = values.as_strided(tensor.shape, record.stride)
        del vars(tensor)[_RECORD]
        tensor.__class__ = nn.Parameter  # type: ignore[assignment]
    record.when_back(tensor)


@contextmanager
def _changing() -> Iterator[None]:
    """Lets one thread at a time move values. Modes of the user do not see it.

    Examples are modes that make fake tensors, inference mode, and the levels of `torch.func`.
    """
    with (
        _changes,
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        torch._C.DisableTorchFunction(),
        inference_mode(False),
    ):
        yield


def _unreadable(tensor: Tensor) -> Tensor:
    """Returns a tensor on the CPU of the same shape and type, which nobody can read.

    Some functions, such as `torch.tensor`, ask no class. They get an error.
    """
    nothing = torch.full((), torch.nan, dtype=tensor.dtype, device="cpu").expand(tensor.shape)
    torch._C._set_storage_data_ptr_access_error_msg(
        nothing.untyped_storage()._cdata,
        "The values of this frozen weight are in host memory (offload_frozen=True). Read them by "
        "an operation of torch first, such as `weight.detach()`.",
    )
    return nothing


def _all_come_back(given: Any) -> None:
    """Brings back the values of all parameters among the arguments of a function."""
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, (list, tuple)):
        for one in given:
            _all_come_back(one)
    else:
        come_back(given)


def _users(tensor: Tensor) -> int:
    """Returns how many tensors and other objects use the memory of a tensor."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))  # type: ignore
