"""The trace of a forward pass: its values, operations and calls of modules, in order."""

import math
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from cachefreeze.lineage.changes import Change
from cachefreeze.lineage.structure import PLAIN_KINDS

TRAINED = "trained"
LIVE = "live"
FROZEN = "frozen"
INPUT = "input"
CONSTANT = "constant"
# Reasons of operations that cannot be left out.
SWITCH = "switches gradients"
MIXES = "makes a row's result depend on other rows"
MOVES = "makes the last bits of a row depend on its place in the batch"
SHAPELESS = "gives a result whose shape depends on the data"
_REASONS = MIXES, MOVES, SHAPELESS


class Modes(NamedTuple):
    """Switches of torch under which an operation ran.

    Attributes:
        grad: Whether gradients were recorded.
        inference: Whether inference mode was on.
        autocast: Device, type and use of the weight cache, for each device with autocast on.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype, bool], ...]


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the traced pass. A write to a tensor makes another value.

    Attributes:
        number: Position in `Trace.values`.
        operation: Number of the operation that made the value. Negative for inputs and state.
        shape: Sizes of the dimensions.
        stride: Strides in elements.
        dtype: Type of the elements.
        device: Device of the elements.
        requires_grad: Whether autograd follows the tensor.
        leaf: Whether the tensor is a leaf of autograd.
        storage: Number of the buffer. Views of one buffer share it.
        thing: Number of the tensor object. It stays the same when the tensor is written to.
        plain: Whether the tensor is a dense `torch.Tensor`, so that another one can replace it.
        off_line: Offset of the first element from a multiple of 16 bytes. Some CPU kernels give
            other bits for other offsets.
        inputs: Bit set of the inputs that the value depends on.
        state: Bit set of the parameters and buffers that the value depends on.
        kind: Kind of work that made the value: "trained", "live", "frozen", "input" or "constant".
        reason: Reason why the value is live. Empty for other kinds.
    """

    number: int
    operation: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    leaf: bool
    storage: int
    thing: int
    plain: bool
    off_line: int = 0
    inputs: int = 0
    state: int = 0
    kind: str = CONSTANT
    reason: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the elements. The elements of an expanded dimension count once."""
        count = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            count *= size if stride or not size else 1
        return count * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class Operation:
    """One call of a torch function, or one call of a module that is traced as one operation.

    Attributes:
        number: Position in `Trace.operations`.
        event: Position in `Trace.events`.
        func: Function that was called.
        name: Name of the function, for people.
        args: Template of the positional arguments.
        kwargs: Template of the keyword arguments.
        reads: Numbers of the values among the arguments and, for a module, of its parameters and
            buffers.
        output: Template of the result. It includes results that are not tensors.
        makes: Numbers of the values that the call made, including written tensors.
        writes: Pairs of a value before a write and the value after it.
        modes: Switches under which the call ran.
        call: Number of the innermost call of a module around it. Negative if there is none.
        seconds: Seconds that the kernels took.
        must_run: Reason why the call can never be left out. Empty if it can.
        taints: Whether work that depends on the results cannot be left out either.
        escapes: Whether the call returns Python values that may come from elements, as `item` does.
        mixes: Whether the result for a row depends on other rows.
        moves: Whether the last bits of a row depend on its place in the batch.
        steady: Whether all of its kernels are known to give each row the same bits at any place in
            the batch, on one thread.
        shapeless: Whether the shape of a result depends on the elements of the arguments.
        segment: Number of the gradient checkpointing segment around it. Negative if there is none.
        opaque: Name of the module, if the operation is a call of a module. Otherwise empty.
        kind: Kind of work: "trained", "live", "frozen", "input" or "constant".
        reason: Reason why the work is live. Empty for other kinds.
    """

    number: int
    event: int
    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    modes: Modes
    call: int
    output: Any = None
    makes: tuple[int, ...] = ()
    writes: tuple[tuple[int, int], ...] = ()
    seconds: float = 0.0
    must_run: str = ""
    taints: bool = False
    escapes: bool = False
    mixes: bool = False
    moves: bool = False
    steady: bool = False
    shapeless: bool = False
    segment: int = -1
    opaque: str = ""
    kind: str = CONSTANT
    reason: str = ""

    @property
    def skippable(self) -> bool:
        """Whether the call may be left out in a replay."""
        return self.kind not in (TRAINED, LIVE) and not self.must_run and not self.escapes


@dataclass(eq=False, slots=True)
class Call:
    """One call of a module.

    Attributes:
        number: Position in `Trace.calls`.
        name: Name of the module in the traced model.
        module: Weak reference to the module.
        twin: Class and plain attributes of a module without state. They identify a module that the
            model creates anew in every pass.
        parent: Number of the call around it. Negative for an outermost call.
        enter: Position of its beginning in `Trace.events`.
        leave: Position of its end in `Trace.events`.
        args: Template of the positional arguments.
        kwargs: Template of the keyword arguments.
        output: Template of the output, if the output can be rebuilt.
        after: Template of the arguments after the call, if the call changed objects among them.
        changes: Changes that the call made to objects among its arguments.
        why_not_whole: Reason why the call cannot be left out as a whole. Empty if it can.
    """

    number: int
    name: str
    module: "weakref.ref[torch.nn.Module]"
    parent: int
    enter: int
    leave: int = -1
    args: Any = None
    kwargs: Any = None
    output: Any = None
    after: Any = None
    changes: Sequence[Change] = ()
    why_not_whole: str = ""
    twin: tuple[type, dict[str, Any]] | None = None

    @property
    def results(self) -> tuple[Any, Any]:
        """Templates of the output and of the changed arguments."""
        return self.output, self.after

    def is_of(self, module: torch.nn.Module) -> bool:
        """Returns whether the call was one of this module, or of an equal module without state."""
        known = self.module()
        if known is not None or self.twin is None:
            return known is module
        return self.twin == twin_of(module)


def twin_of(module: torch.nn.Module) -> tuple[type, dict[str, Any]] | None:
    """Returns what identifies a module without state, or None for a module with state."""
    held = vars(module)
    if held.get("_parameters", True) or held.get("_buffers", True):
        return None
    plain = {key: value for key, value in held.items() if type(value) in PLAIN_KINDS}
    for name, part in held["_modules"].items():
        plain[f"part {name}"] = twin_of(part) if part is not None else None
        if part is not None and plain[f"part {name}"] is None:
            return None
    return type(module), plain


class Enter(NamedTuple):
    """Event: a call of a module begins.

    Attributes:
        call: Number of the call.
    """

    call: int


class Leave(NamedTuple):
    """Event: a call of a module ends.

    Attributes:
        call: Number of the call.
    """

    call: int


class Step(NamedTuple):
    """Event: an operation runs.

    Attributes:
        operation: Number of the operation.
    """

    operation: int


@dataclass(eq=False, slots=True)
class State:
    """A parameter, a buffer, or another tensor that existed before the pass.

    Attributes:
        name: Name in the traced model.
        tensor: Weak reference to the tensor.
        trained: Whether the tensor requires gradient, or was given as `moving`.
        value: Number of its value.
    """

    name: str
    tensor: "weakref.ref[torch.Tensor]"
    trained: bool
    value: int


@dataclass(eq=False)
class Trace:
    """Trace of one forward pass. It keeps no tensor of the pass alive, apart from those in `held`.

    Attributes:
        values: Values, by number.
        operations: Operations, by number.
        calls: Calls of modules, by number.
        events: Beginnings and ends of calls, and operations, in order.
        inputs: Numbers of the values in the arguments of the pass, in the order of `tensors`.
        states: Parameters, buffers and other tensors that existed before the pass.
        outputs: Numbers of the returned values, each with whether the caller probably reads it.
        asked: Numbers of the values whose gradients the pass asked for.
        signature: Conditions under which another pass can use this trace.
        seconds: Seconds that the pass took, with tracing.
        held: Values without gradient that trained work took, by number. Each is a tensor and its
            version at that time. `take_held` removes them.
    """

    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    events: list[Enter | Leave | Step] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    outputs: list[tuple[int, bool]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    signature: Any = None
    seconds: float = 0.0
    held: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def take_held(self, numbers: Collection[int]) -> dict[int, torch.Tensor] | None:
        """Returns some values of the pass itself, and releases all others.

        Returns:
            Values by number. None if one of them was not held, or was written to since.
        """
        found = {number: self._held_as(number) for number in numbers}
        self.held = {}
        whole = {number: tensor for number, tensor in found.items() if tensor is not None}
        return whole if len(whole) == len(found) else None

    def _held_as(self, number: int) -> torch.Tensor | None:
        """Returns a held value, or makes it as a view of another held value on the same buffer."""
        value = self.values[number]
        if self._rewritten(value):  # versions do not count writes through `.data` or numpy
            return None
        for other, (tensor, version) in self.held.items():
            if self.values[other].storage != value.storage or tensor._version != version:
                continue
            if other == number:
                return tensor
            size = math.prod(value.shape)
            steps = zip(value.shape, value.stride, strict=True)
            is_dense = size == 1 + sum((count - 1) * step for count, step in steps)
            is_whole = size * value.dtype.itemsize == tensor.untyped_storage().nbytes()
            if value.dtype == tensor.dtype and is_dense and is_whole:
                return tensor.as_strided(value.shape, value.stride, 0)
        return None

    def _rewritten(self, value: Value) -> bool:
        """Returns whether the buffer of a value was written to after the value was made."""
        later = self.operations[value.operation + 1 :]
        written = {self.values[old].storage for one in later for old, _ in one.writes}
        return value.storage in written

    @property
    def kernel_seconds(self) -> float:
        """Seconds of all kernels of the pass."""
        return sum(one.seconds for one in self.operations)

    def newly_frozen_seconds(self) -> float:
        """Returns the seconds of the trained work that depends on no trained parameter any more."""
        trained = {
            state.value
            for state in self.states
            if (tensor := state.tensor()) is not None and tensor.requires_grad
        }
        seconds = 0.0
        for one in self.operations:
            if not trained.isdisjoint(one.reads):
                trained.update(one.makes)
            elif one.kind == TRAINED:
                seconds += one.seconds
        return seconds

    def describe(self, number: int) -> str:
        """Returns a description of a value for people: module, operation and shape."""
        value = self.values[number]
        shape = "x".join(map(str, value.shape)) or "scalar"
        if value.operation < 0:
            names = {state.value: state.name for state in self.states}
            return f"{names.get(number, 'input')} ({shape})"
        operation = self.operations[value.operation]
        where = self.calls[operation.call].name if operation.call >= 0 else ""
        return f"{where or 'the model itself'}: {operation.name} ({shape})"


def mark(trace: Trace, asked: Sequence[int] = ()) -> None:
    """Sets the kind of every value and operation, from what each depends on.

    Args:
        trace: Trace with complete `inputs`, `states`, `reads`, `makes` and `must_run`.
        asked: Numbers of the values whose gradients the pass asks for. They count as trained.
    """
    trained: list[bool] = [False] * len(trace.values)
    live: list[str] = [""] * len(trace.values)
    for number in asked:
        trained[number] = True
    for bit, number in enumerate(trace.inputs):
        value = trace.values[number]
        value.inputs, value.kind = 1 << bit, INPUT
        trained[number] = trained[number] or value.requires_grad
    for bit, state in enumerate(trace.states):
        trace.values[state.value].state = 1 << bit
        trained[state.value] = trained[state.value] or state.trained
    for operation in trace.operations:
        reads = [trace.values[number] for number in operation.reads]
        inputs = state_bits = 0
        for value in reads:
            inputs |= value.inputs
            state_bits |= value.state
        is_trained = any(trained[value.number] for value in reads)
        reason = next((live[value.number] for value in reads if live[value.number]), "")
        if operation.taints and not reason:
            reason = operation.must_run
        if inputs and not reason:
            flags = operation.mixes, operation.moves, operation.shapeless
            reason = next((one for one, on in zip(_REASONS, flags, strict=True) if on), "")
        operation.reason = reason or operation.must_run
        operation.kind = _kind(is_trained, bool(reason), inputs, state_bits)
        for number in operation.makes:
            value = trace.values[number]
            value.inputs, value.state, value.reason = inputs, state_bits, reason
            trained[number] = trained[number] or is_trained
            live[number] = reason
    for value in trace.values:
        value.kind = _kind(
            trained[value.number], bool(live[value.number]), value.inputs, value.state
        )


def _kind(trained: bool, live: bool, inputs: int, state: int) -> str:
    if trained:
        return TRAINED
    if live:
        return LIVE
    if inputs:
        return FROZEN if state else INPUT
    return CONSTANT


def label(func: Callable[..., Any]) -> str:
    """Returns the name of a function for people, or the name of a property for its getter."""
    name = getattr(func, "__name__", None) or type(func).__name__
    if name in ("__get__", "__set__"):
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        return f"{owner}.{'read' if name == '__get__' else 'write'}"
    return str(name)
