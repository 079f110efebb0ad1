"""What a trace holds: values, operations and calls of modules, in the order of one forward pass."""

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
# Reason of an operation that switches the recording of gradients.
SWITCH = "switches gradients"
MIXES = "makes a row's result depend on other rows"
SHAPELESS = "gives a result whose shape depends on the data"


class Modes(NamedTuple):
    """Switches of torch under which an operation ran.

    Attributes:
        grad: Whether gradients were recorded.
        inference: Whether inference mode was on.
        autocast: Device, type and weight cache of each autocast region that was on.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype, bool], ...]


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the traced pass. A tensor that is written to becomes another value.

    Attributes:
        number: Place in `Trace.values`.
        operation: Number of the operation that made the value. Negative for inputs and state.
        shape: Sizes of the dimensions.
        stride: Strides in elements.
        dtype: Type of the elements.
        device: Device of the elements.
        requires_grad: Whether autograd follows the tensor.
        leaf: Whether the tensor is a leaf for autograd.
        storage: Number of the buffer. Views of one buffer share it.
        thing: Number of the tensor object. A written tensor keeps it.
        plain: Whether the tensor is a dense `torch.Tensor`, so that another one can take its place.
        off_line: Bytes from the last line of 16 to the first element, for some kernels of the CPU
            give other bits between lines.
        inputs: Bit set of the inputs that the value depends on.
        state: Bit set of the parameters and buffers that the value depends on.
        kind: One of "trained", "live", "frozen", "input" and "constant".
        reason: Reason for "live".
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
        """Bytes of the elements. An expanded dimension counts once."""
        count = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            count *= size if stride or not size else 1
        return count * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class Operation:
    """One followed call of a torch function, or one call of a module that is not followed inside.

    Attributes:
        number: Place in `Trace.operations`.
        event: Place in `Trace.events`.
        func: Function that was called.
        name: Name of the function, for people.
        args: Template of the positional arguments.
        kwargs: Template of the keyword arguments.
        reads: Numbers of the values among the arguments and, for a module, of its parameters.
        output: Template of the result. Results that are no tensors stand in it as they are.
        makes: Numbers of the values that the call made, written tensors included.
        writes: Pairs of a value before a write and the value after it.
        modes: Switches under which the call ran.
        call: Number of the innermost call of a module around it. Negative if there is none.
        seconds: Time that the kernels took.
        must_run: Reason why the call can never be left out. Empty if it can.
        taints: Whether what depends on the results cannot be left out either.
        escapes: Whether the call hands python a value that was taken from a tensor.
        mixes: Whether the result of a row depends on other rows, as far as is known by name.
        shapeless: Whether the shape of a result depends on what the arguments hold.
        segment: Number of the gradient checkpointing segment around it. Negative for none.
        opaque: Name of the module, if the operation is a call of a module. Otherwise empty.
        kind: As of a value.
        reason: Reason for "live".
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
    shapeless: bool = False
    segment: int = -1
    opaque: str = ""
    kind: str = CONSTANT
    reason: str = ""

    @property
    def skippable(self) -> bool:
        """Whether the call may be left out at replay."""
        return self.kind not in (TRAINED, LIVE) and not self.must_run and not self.escapes


@dataclass(eq=False, slots=True)
class Call:
    """One call of a module.

    Attributes:
        number: Place in `Trace.calls`.
        name: Name of the module within the traced model.
        module: Weak reference to the module.
        twin: Class and plain attributes of a module without state. Some models make such a module
            in every pass.
        parent: Number of the call around it. Negative for an outermost call.
        enter: Place in `Trace.events` at which it begins.
        leave: Place in `Trace.events` at which it ends.
        args: Template of the positional arguments.
        kwargs: Template of the keyword arguments.
        output: Template of the output, if it can be built again.
        after: Template of the arguments after the call, if it changed objects among them.
        changes: What it changed in them.
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
        """Templates of everything that the call gives or changes."""
        return self.output, self.after

    def is_of(self, module: torch.nn.Module) -> bool:
        """Says whether the call was one of this module, or of its like."""
        known = self.module()
        if known is not None or self.twin is None:
            return known is module
        return self.twin == twin_of(module)


def twin_of(module: torch.nn.Module) -> tuple[type, dict[str, Any]] | None:
    """Returns what tells modules without state apart, or None for a module with state."""
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
    """The event at which a call of a module begins."""

    call: int


class Leave(NamedTuple):
    """The event at which a call of a module ends."""

    call: int


class Step(NamedTuple):
    """The event of an operation."""

    operation: int


@dataclass(eq=False, slots=True)
class State:
    """A parameter, a buffer, or another tensor that was there before the pass.

    Attributes:
        name: Name within the traced model.
        tensor: Weak reference to the tensor.
        trained: Whether it takes gradient, or is said to move.
        value: Number of its value.
    """

    name: str
    tensor: "weakref.ref[torch.Tensor]"
    trained: bool
    value: int


@dataclass(eq=False)
class Trace:
    """One forward pass in order. It holds no tensor of the pass but those in `held`.

    Attributes:
        values: Tensors, by number.
        operations: Followed calls, by number.
        calls: Calls of modules, by number.
        events: Beginnings and ends of calls, and operations, in order.
        inputs: Numbers of the values that came with the arguments, in the order of `tensors`.
        states: Parameters, buffers and other tensors that were there before.
        outputs: Numbers of the values that were returned, each with whether it is likely read.
        asked: Numbers of the values of which the pass asked for gradients.
        signature: What another pass must have in common with this one. See `signature`.
        seconds: Time of the pass, with the work of following it.
        held: Tensors without gradient that trained work has taken, each with its version then, by
            number, until `take_held`.
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
        """Returns some values of the pass itself, and lets go of all others.

        Args:
            numbers: Numbers of the values.

        Returns:
            Values by number, or None if one was not held or was written to since.
        """
        found = {number: self._held_as(number) for number in numbers}
        self.held = {}
        whole = {number: tensor for number, tensor in found.items() if tensor is not None}
        return whole if len(whole) == len(found) else None

    def _held_as(self, number: int) -> torch.Tensor | None:
        """Returns a value that is held, or that another one on its buffer is a view of."""
        value = self.values[number]
        if self._rewritten(value):  # a write through `.data` or numpy counts nowhere
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
        """Says whether a value's buffer was written to after the value was made."""
        later = self.operations[value.operation + 1 :]
        written = {self.values[old].storage for one in later for old, _ in one.writes}
        return value.storage in written

    @property
    def kernel_seconds(self) -> float:
        """Time of all kernels of the pass."""
        return sum(one.seconds for one in self.operations)

    def describe(self, number: int) -> str:
        """Names a value for people: the module and the operation that made it, and its shape."""
        value = self.values[number]
        shape = "x".join(map(str, value.shape)) or "scalar"
        if value.operation < 0:
            names = {state.value: state.name for state in self.states}
            return f"{names.get(number, 'input')} ({shape})"
        operation = self.operations[value.operation]
        where = self.calls[operation.call].name if operation.call >= 0 else ""
        return f"{where or 'the model itself'}: {operation.name} ({shape})"


def mark(trace: Trace, asked: Sequence[int] = ()) -> None:
    """Gives every value and operation its kind, from what it depends on.

    Args:
        trace: Trace whose `inputs`, `states`, `reads`, `makes` and `must_run` are known.
        asked: Numbers of values of which python asks gradients. They count as trained.
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
            reason = MIXES if operation.mixes else SHAPELESS if operation.shapeless else ""
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
    """Names a function for people. A property is named by its own name."""
    name = getattr(func, "__name__", None) or type(func).__name__
    if name in ("__get__", "__set__"):
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        return f"{owner}.{'read' if name == '__get__' else 'write'}"
    return str(name)
