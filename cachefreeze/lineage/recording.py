"""Records the values, states and operations of a pass, and the calls of modules around them."""

import functools
import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cachefreeze.lineage import calls, soundness
from cachefreeze.lineage.frames import Frames
from cachefreeze.lineage.known import Known, buffer_of
from cachefreeze.lineage.modes import modes_now
from cachefreeze.lineage.modules import states_of
from cachefreeze.lineage.operations import Call, Operation, State, Step, Trace
from cachefreeze.lineage.signature import Signature
from cachefreeze.lineage.structure import describe, tensors

UNSEEN = "does work that torch functions do not show (TorchScript, vmap, an extension)"


class Functions(TorchFunctionMode):
    """Receives every torch function that the pass calls, in order."""

    def __init__(self, tracer: "Recording") -> None:
        super().__init__()
        self._tracer = tracer
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        return self._tracer.function(func, args, kwargs or {})


class Running:
    """Notes about an operation while it runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.written: set[int] = set()
        self.draws = False
        self.mixes = False
        self.moves = False
        self.steady = True
        self.shapeless = False
        self.collective = False
        self.same_bits = True


class Around:
    """Notes about a call of a module until it ends."""

    def __init__(self, call: Call, module: nn.Module, first: int, draws: int) -> None:
        self.call = call
        self.first = first
        self.unseen = False
        self.shapeless = False
        self.identities: list[int] | None = None
        self.torchs_own = soundness.is_torchs_own(module)
        self.draws = draws
        self.grad = torch.is_grad_enabled()
        if not self.torchs_own:
            self.attributes = soundness.plain_attributes(module)
            self.sizes = soundness.sizes_of(self.attributes)


def resting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Stops recording while a method of the tracer itself runs."""

    @functools.wraps(method)
    def rest(self: "Recording", *args: Any) -> Any:
        before = self._resting
        self._resting = True
        taken = calls.take_off(self._functions)
        looked = self.frames is not None and self.frames.pause()
        try:
            return method(self, *args)
        finally:
            if looked and self.frames is not None:
                self.frames.resume()
            self._resting = before
            if taken:
                calls.put_on(self._functions)

    return rest


class Recording:
    """Records values, states and operations of a pass, in order.

    Args:
        modules: Modules that the callable uses, each with its name.
        moving: Parameters and buffers that count as trained although they require no gradient.
        given: Arguments of the pass.
        frames: Reporter of the Python functions that run. None for no reports.
    """

    def __init__(
        self,
        modules: list[tuple[str, nn.Module]],
        moving: Any,
        given: Any,
        frames: Frames | None = None,
        last_bits: bool = False,
    ) -> None:
        self._last_bits = last_bits
        self.trace = Trace()
        self.frames = frames
        self.known = Known(self.trace.values)
        self._functions = Functions(self)
        self._names: dict[int, str] = {}
        self._met: list[tuple[str, weakref.ref[nn.Module]]] = []
        self._moving = {id(tensor) for tensor in moving}
        self._running: Running | None = None
        self._stack: list[Around] = []
        self._segments: list[int] = []
        self._segment_count = 0
        self._unseen: dict[int, tuple[int, ...]] = {}
        self._asked: list[int] = []
        self._exposed: dict[int, tuple[int, bytes]] = {}
        self._found: list[State] = []
        self._resting = True
        self._draws = 0
        self._hidden_draws = False
        self._torch = soundness.torch_generators()
        self._python = soundness.python_generators()
        for name, module in modules:
            self._register(name, module)
        self._fixed = {
            id(value)
            for _, one in modules
            for part in one.modules()
            for value in vars(part).values()
        }
        for tensor in tensors(given):
            if self.known.number(tensor) < 0:
                self.trace.inputs.append(self.known.add(tensor, -1))
        self.trace.signature = Signature(modules, given)

    def function(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs and records a call of a torch function."""
        raise NotImplementedError

    def _end(
        self,
        operation: Operation,
        running: Running,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Records the results of an operation."""
        raise NotImplementedError

    def _register(self, prefix: str, module: nn.Module) -> None:
        for name, part in module.named_modules(prefix=prefix):
            self._names.setdefault(id(part), name)
        for name, tensor in states_of(prefix, module):
            self._state(name, tensor)

    @resting
    def _register_new(self, module: nn.Module) -> None:
        self._register(type(module).__name__, module)
        self._met.append((type(module).__name__, weakref.ref(module)))

    def _state(self, name: str, tensor: torch.Tensor) -> int:
        number = self.known.number(tensor)
        if number < 0:
            trained = tensor.requires_grad or id(tensor) in self._moving
            number = self.known.add(tensor, -2)
            self.trace.states.append(State(name, self.known.reference(tensor), trained, number))
        return number

    def _begin_segment(self) -> None:
        self._segments.append(self._segment_count)
        self._segment_count += 1

    def _end_segment(self) -> None:
        self._segments.pop()

    def _number(self, tensor: torch.Tensor) -> int:
        """Returns the number of a tensor's value. Unknown tensors get a new one."""
        if self._exposed:
            self._look_at_exposed(tensor)
        number = self.known.number(tensor)
        if number >= 0:
            return number
        buffer = buffer_of(tensor)
        reads = self._unseen.get(buffer) if buffer else None
        if reads is None and buffer:
            alias = self.known.on(buffer)
            reads = (alias[0],) if alias else None
        if reads is None:
            # It existed before the pass, or it comes from numpy. Known only at the end of the pass.
            number = self._state("a tensor from outside", tensor)
            self._found.append(next(s for s in self.trace.states if s.value == number))
            return number
        operation = self._unseen_work(reads, [])
        number = self.known.add(tensor, operation.number)
        operation.makes = (number,)
        return number

    def _look_at_exposed(self, tensor: torch.Tensor) -> None:
        """Records a write through memory that was given to other code, such as numpy."""
        number = self.known.number(tensor)
        storage = self.trace.values[number].storage if number >= 0 else -1
        before = self._exposed.get(storage)
        if before is None:
            return
        now = digest(tensor)
        if before != now and before[0] == now[0]:
            self._exposed[storage] = now
            buffer = buffer_of(tensor)
            reads = tuple(self.known.on(buffer))
            targets = self.known.tensors_on((buffer,))
            self._unseen_work(reads, targets, "writes through numpy or a pointer")

    def _unseen_work(
        self, reads: tuple[int, ...], written: list[torch.Tensor], reason: str = UNSEEN
    ) -> Operation:
        """Records work that no torch function shows, and makes the module around it one operation.

        Args:
            reads: Numbers of the values that the work reads.
            written: Tensors that the work writes to.
            reason: Reason why the work must run.
        """
        call = self._stack[-1].call.number if self._stack else -1
        operation = Operation(-1, -1, unseen, "unseen work", (), {}, reads, modes_now(), call)
        operation.must_run, operation.taints = reason, True
        here = len(self.trace.operations)
        pairs = [(self.known.number(one), self.known.renew(one, here)) for one in written]
        operation.writes = tuple(pairs)
        operation.makes = tuple(after for _, after in pairs)
        self._commit(operation, Running())
        for around in self._stack[-1:]:
            around.unseen = True
        return operation

    @resting
    def _begin(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Operation:
        reads: list[int] = []

        def number(tensor: torch.Tensor) -> int:
            found = self._number(tensor)
            reads.append(found)
            return found

        described = describe(tuple(args), number), describe(kwargs, number)
        return Operation(
            number=-1,
            event=-1,
            func=func,
            name=name,
            args=described[0],
            kwargs=described[1],
            reads=tuple(dict.fromkeys(reads)),
            modes=modes_now(),
            call=self._stack[-1].call.number if self._stack else -1,
            segment=self._segments[0] if self._segments else -1,
        )

    def _commit(self, operation: Operation, running: Running) -> None:
        operation.number, operation.event = len(self.trace.operations), len(self.trace.events)
        operation.seconds = running.seconds
        operation.mixes, operation.moves = running.mixes, running.moves
        operation.steady = running.steady
        operation.shapeless = running.shapeless
        self.trace.operations.append(operation)
        if operation.func is not unseen:  # a replay does not see this work either
            self.trace.events.append(Step(operation.number))


def digest(tensor: torch.Tensor) -> tuple[int, bytes]:
    """Returns the position of a tensor in its storage, and a hash of its elements."""
    held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return int(tensor.storage_offset()), hashlib.blake2b(held.numpy().data, digest_size=16).digest()


def unseen(*args: Any, **kwargs: Any) -> None:
    """Stands for work that no torch function shows."""
    raise AssertionError("unseen work cannot be called")
