"""Late values: tensors in the place of skipped results. They compute themselves when used."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils.dlpack
from torch.utils._pytree import tree_map

from cachefreeze.lineage import soundness
from cachefreeze.lineage.modes import uncompiled
from cachefreeze.lineage.operations import Trace, Value
from cachefreeze.lineage.program import Program, copy_of
from cachefreeze.lineage.unloaded import another, exchange, is_unloaded

Tensor = torch.Tensor
_quiet = torch._C.DisableTorchFunctionSubclass


class Late(torch.Tensor):
    """A tensor whose values are not computed yet.

    Shape, type, strides, device and `requires_grad` are known. The first use of anything else
    computes the values, and the same object becomes a plain `torch.Tensor`. References to it stay
    valid.
    """

    # Code that checks the class of a tensor must take the same branch as for a plain tensor.
    __class__ = property(lambda self: torch.Tensor)  # type: ignore[assignment]
    late_number: int
    late_pass: "Pass"
    late_real: Tensor | None
    late_leaf: bool

    @staticmethod
    def __new__(cls: type["Late"], value: Value, owner: "Pass") -> "Late":
        """Makes a late value.

        Args:
            cls: This class.
            value: Value of the trace that the tensor stands for.
            owner: Pass that can compute the value.
        """
        made: Late = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride,
            dtype=value.dtype,
            device=value.device,
            requires_grad=value.requires_grad,
        )
        made.late_number, made.late_pass, made.late_real = value.number, owner, None
        made.late_leaf = value.leaf
        return made

    def __init__(self, value: Value, owner: "Pass") -> None:
        """Does nothing, since `__new__` does all."""

    @classmethod
    @uncompiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes the late values among the arguments, then calls the function."""
        if func == soundness.IS_LEAF:
            return bool(args[0].late_leaf)
        if func in soundness.METADATA:
            with _quiet():
                return func(*args, **(kwargs or {}))
        for late in _late_in((args, kwargs)):
            owner = late.__dict__.get("late_pass")
            if owner is not None:
                owner.compute_now(late)
        kept = list(_late_in((args, kwargs)))
        if not kept:
            return func(*args, **(kwargs or {}))
        # C++ code, for example a custom function, holds the object, so it could not become a plain
        # tensor. If it has a place in the graph of autograd, the kernels get the computed tensor.
        # Otherwise the function gets it.
        with _quiet():
            if any(late.grad_fn is not None for late in kept):
                return func(*args, **(kwargs or {}))
        real = {id(late.late_real): late for late in kept}
        args, kwargs = tree_map(_real, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return real.get(id(result), result)

    @classmethod
    @uncompiled
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Passes the computed tensors to a kernel. Only autograd and C++ code call this."""
        args, kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*args, **kwargs)


def _real(value: Any) -> Any:
    if type(value) is Late:
        return value.late_pass.real(value)
    return value


def compute_in(value: Any) -> None:
    """Computes the late values in some arguments, for functions that do not ask for them."""
    for late in _late_in(value):
        late.late_pass.compute_now(late)


def _late_in(value: Any) -> Iterator[Late]:
    if type(value) is Late:
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _late_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _late_in(item)
    elif isinstance(value, slice):
        yield from _late_in((value.start, value.stop, value.step))


class Pass:
    """One replayed pass: the tensors that it was given, and the late values that it has returned.

    Args:
        trace: Trace that is replayed.
        program: Operations of the trace.
        given: Inputs and kept values, by number.

    Attributes:
        ids: Tensor and number of its value, by `id` of the tensor.
        computed: Numbers of the late values that were computed.
        quiet: Function that returns a context without a follower.
    """

    def __init__(self, trace: Trace, program: Program, given: dict[int, Tensor]) -> None:
        self.ids: dict[int, tuple[Tensor, int]] = {}
        self.computed: set[int] = set()
        self.quiet: Callable[[], AbstractContextManager[Any]] = nullcontext
        # Threads of the model may use late values at the same time.
        self._lock = threading.RLock()
        self._trace = trace
        self._program = program
        self._given: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self._lates: dict[int, weakref.ref[Late]] = {}
        self._keys = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )
        for number, tensor in given.items():
            self.give(number, tensor)

    def give(self, number: int, tensor: Tensor) -> None:
        """Notes that a value is this tensor from now on."""
        self._given[number] = tensor
        self._versions[number] = _version(tensor)
        self.ids[id(tensor)] = tensor, number

    def sources(self) -> dict[int, Tensor]:
        """Returns the tensors that nobody has written to, by number.

        Late values are computed from them.
        """
        versions = self._versions
        return {n: tensor for n, tensor in self._given.items() if _version(tensor) == versions[n]}

    def save(self, number: int) -> None:
        """Copies a value before a write, if late values may need it."""
        if number in self._given:
            given: Any = self._given[number]
            copied = another(given) if is_unloaded(given) else copy_of(given.detach())
            self._given[number], self._versions[number] = copied, _version(copied)

    def written(self, writes: Sequence[tuple[int, int]]) -> None:
        """Notes that tensors were written to and have new values."""
        for old, new in writes:
            for tensor, number in list(self.ids.values()):
                if number == old and self._given.get(old) is not tensor:
                    self.give(new, tensor)  # `save` has copied the old value
                elif number == old:
                    del self._given[old]
                    self.give(new, tensor)

    def write(self, old: int, new: int) -> None:
        """Carries out a skipped write: the late tensor has another value from now on."""
        reference = self._lates.pop(old, None)
        late = reference() if reference is not None else None
        if late is None or reference is None or type(late) is not Late:
            return
        late.late_number = new
        self._lates[new] = reference
        if new in self._given:
            self._lates.pop(new)
            self._become(late, self._given[new])
        elif late.requires_grad != self._trace.values[new].requires_grad:
            with _quiet():
                late.requires_grad_(not late.requires_grad)

    def hand_out(self, number: int) -> Tensor:
        """Returns the tensor for a value: the given one, or a late one."""
        reference = self._lates.get(number)
        late = reference() if reference is not None else None
        if late is not None:
            return late
        given = self._given.get(number)
        if given is not None:
            return given
        made = Late(self._trace.values[number], self)
        self._lates[number] = weakref.ref(made)
        return made

    def compute_now(self, late: Late) -> None:
        """Computes a late value, together with those on the same buffer."""
        with self._lock:
            self._compute_group(late)

    def _compute_group(self, late: Late) -> None:
        if type(late) is not Late or late.late_real is not None:
            return
        storage = self._trace.values[late.late_number].storage
        group = [
            one for one in self._alive() if self._trace.values[one.late_number].storage == storage
        ]
        self._compute([late, *(one for one in group if one is not late)])

    def compute_all(self) -> None:
        """Computes every late value that still exists."""
        with self._lock:
            self._compute(self._alive())

    def real(self, late: Late) -> Tensor:
        """Returns the computed tensor of a late value that cannot become a plain tensor."""
        with self._lock:
            if late.late_real is None:
                self._compute([late], swap=False)
        assert late.late_real is not None
        return late.late_real

    def settle(self) -> None:
        """Copies the inputs that late values need, since the caller may write to its tensors."""
        if self._alive():
            for number in self._trace.inputs:
                self.save(number)
        self.ids.clear()

    def _alive(self) -> list[Late]:
        found = [reference() for reference in self._lates.values()]
        return [late for late in found if type(late) is Late and late.late_real is None]

    def _compute(self, lates: list[Late], swap: bool = True) -> None:
        if not lates:
            return
        by_number = {late.late_number: late for late in lates}
        # Below autograd, torch has disabled the dispatch keys by which functions choose their
        # kernels. Recorded operations run with the keys of the pass.
        keys = nullcontext() if swap else torch._C._ForceDispatchKeyGuard(*self._keys)
        with self.quiet(), keys:
            results = self._program.run(list(by_number), self.sources())
        self.computed.update(by_number)
        for number, late in by_number.items():
            self._lates.pop(number, None)
            if type(late) is Late and late.late_real is None:
                self._become(late, results[number], swap)

    def _become(self, late: Late, tensor: Tensor, swap: bool = True) -> None:
        """Makes a late value a plain tensor, or stores the tensor in it if that is not possible."""
        number = late.late_number
        with _quiet():
            held = late.grad_fn is not None
        if swap and not held and exchange(late, tensor):
            self.give(number, late)
        else:
            late.late_real = tensor
            self.give(number, tensor)


def _to_dlpack(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Computes a late value before torch exports its memory."""
    tensor.data_ptr()
    return _capsule(tensor, *args, **kwargs)


# The only function of torch that reads memory without a call of the tensor's class: a late value
# would end the process. The original function is never restored, as late values may always exist.
_capsule: Any = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]
torch.utils.dlpack.to_dlpack = _to_dlpack  # type: ignore[attr-defined,assignment]
torch.to_dlpack = _to_dlpack  # type: ignore[attr-defined,assignment]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
