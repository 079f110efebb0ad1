"""Traces one forward pass: which operations run, in which order, and what each depends on."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

from cachefreeze.errors import UserError
from cachefreeze.lineage import blocks, calls, soundness
from cachefreeze.lineage.devices import WorkTimer
from cachefreeze.lineage.frames import Frames
from cachefreeze.lineage.known import buffer_of
from cachefreeze.lineage.modes import modes_now
from cachefreeze.lineage.module_calls import DRAWS, ModuleCalls, objects_in
from cachefreeze.lineage.modules import modules_of, states_of
from cachefreeze.lineage.operations import SWITCH, Operation, Trace, label, mark
from cachefreeze.lineage.recording import Running, digest, resting
from cachefreeze.lineage.structure import Unknown, describe, numbers, outputs, tensors

# Namespaces of kernels that run no user code.
_OF_TORCH = frozenset(("aten", "prims"))
_CAME_AND_WENT = "uses a tensor that no torch function made (from numpy, or from a global variable)"


def trace(
    model: Callable[..., Any],
    /,
    *args: Any,
    moving: Collection[torch.Tensor] = (),
    code_frames: Frames | None = None,
    last_bits: bool = False,
    **kwargs: Any,
) -> tuple[Any, Trace]:
    """Runs one ordinary forward pass and traces it.

    Random numbers are drawn and buffers change as in a pass without tracing.

    Args:
        model: Module, or a function or method that calls modules.
        *args: Positional arguments of the call, including the example batch.
        moving: Parameters and buffers that count as trained although they require no gradient.
        code_frames: Reporter of the Python functions that run. None for no reports.
        last_bits: Whether the last bits of a row matter. Operations whose last bits depend on
            the place in the batch are live then.
        **kwargs: Keyword arguments of the call.

    Returns:
        Output of the pass, and its trace.

    Raises:
        UserError: The callable uses no module.
    """
    modules = modules_of(model)
    known = {id(module) for _, module in modules}
    modules += [
        (type(value).__name__, value)
        for value in (*args, *kwargs.values())
        if isinstance(value, torch.nn.Module) and id(value) not in known
    ]
    if not modules:
        name = getattr(model, "__name__", type(model).__name__)
        raise UserError(
            f"{name!r} uses no torch.nn.Module: give a model, or a function that calls one."
        )
    tracer = _Tracer(modules, moving, (args, kwargs), code_frames, last_bits)
    began = time.perf_counter()
    with tracer.following():
        output = model(*args, **kwargs)
    tracer.trace.seconds = time.perf_counter() - began
    tracer.finish(output)
    return output, tracer.trace


class _Kernels(TorchDispatchMode):
    """Receives every kernel, including those that no torch function shows."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, torch's default, imports the compiler at the first kernel: seconds in every process.
        # Nothing is compiled while a pass is followed.
        return False

    def __init__(self, tracer: "_Tracer") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tracer.kernel(func, args, kwargs or {})


class _Tracer(ModuleCalls):
    """Records torch functions and kernels of a pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kernels = _Kernels(self)

    @contextmanager
    def following(self) -> Iterator[None]:
        with (
            calls.catching(),
            calls.follower_of_thread(self),
            calls.segments(self._begin_segment, self._end_segment),
            self._kernels,
            self._functions,
            self.frames or contextlib.nullcontext(),
        ):
            self._resting = False
            try:
                yield
            finally:
                self._resting = True

    def function(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._resting or self._running is not None or func in soundness.METADATA:
            return func(*args, **kwargs)
        if func is soundness.ITERATE:
            return iter(self.function(torch.Tensor.unbind, (args[0], 0), {}))
        operation = self._begin(func, label(func), args, kwargs)
        running = self._running = Running()
        try:
            output = func(*args, **kwargs)
        except BaseException:
            operation.must_run = "raises an error"
            self._commit(operation, running)
            raise
        finally:
            self._running = None
        self._end(operation, running, args, kwargs, output)
        return output

    @resting
    def _end(
        self,
        operation: Operation,
        running: Running,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        here = len(self.trace.operations)
        makes: list[int] = []
        writes: list[tuple[int, int]] = []
        self._set_reason(operation, running, args, kwargs)
        if operation.name in soundness.EXPOSING_NAMES:
            for tensor in tensors(args[:1]):
                value = self.known.number(tensor)
                if value >= 0:
                    self._exposed[self.trace.values[value].storage] = digest(tensor)
        targets = [(tensor, True) for tensor in self.known.tensors_on(running.written)]
        if operation.name.endswith(("_", ".write")) and not operation.name.endswith("__"):
            # Functions that change the tensor and not its elements: `requires_grad_`, `detach_`,
            # `x.data = y`.
            targets += [(value, False) for value in args[:1] if isinstance(value, torch.Tensor)]
        for tensor, elements in targets:
            before = self.known.number(tensor)
            if before >= 0 and all(pair[1] != before for pair in writes):
                after = self.known.renew(tensor, here)
                writes.append((before, after))
                makes.append(after)
                if elements or self.trace.values[before].operation < 0:
                    self._set_reason_of_write(operation, before, running)

        def number(tensor: torch.Tensor) -> int:
            found = self.known.number(tensor)
            if found < 0:
                found = self.known.add(tensor, here)
                makes.append(found)
                if not self.trace.values[found].plain and not operation.must_run:
                    operation.must_run = f"gives a tensor of another kind ({type(tensor).__name__})"
            return found

        operation.output = describe(output, number)
        operation.makes, operation.writes = tuple(makes), tuple(writes)
        if not operation.must_run:
            if any(True for _ in numbers(operation.output)):
                operation.escapes = _holds_data(operation.output)
            else:
                operation.escapes = not writes
        for value in makes:
            self._unseen.pop(self.known.buffer(value), None)
        self._hold(args, kwargs, output)
        self._commit(operation, running)

    def _hold(self, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Holds the untrained values that trained work reads.

        Autograd holds most of them anyway.
        """
        if not any(tensor.requires_grad for tensor in tensors(output)):
            return
        for tensor in tensors((args, kwargs)):
            number = self.known.number(tensor)
            if number < 0 or tensor.requires_grad or tensor.is_inference():
                continue
            value = self.trace.values[number]
            if value.operation >= 0 and value.plain:
                self.trace.held[number] = tensor.detach(), tensor._version

    def _set_reason(
        self, operation: Operation, running: Running, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Sets the reason why an operation must run, from its name, arguments and kernels."""
        name = operation.name
        if soundness.is_switch(name):
            operation.must_run = SWITCH
        elif running.draws or soundness.holds_generator((*args, *kwargs.values())):
            operation.must_run, operation.taints = f"draws random numbers ({name})", True
            self._draws += 1
        elif running.collective and not running.same_bits:
            operation.must_run, operation.taints = "exchanges tensors with other processes", True
        elif soundness.asks_gradients(name) or operation.func is torch.autograd.grad:
            operation.must_run = "asks for gradients"
            wanted = args[:1]
            if name == "grad":
                wanted = args[1] if len(args) > 1 else kwargs.get("inputs", ())
            if name == "backward":
                self._asked += [v.number for v in self.trace.values if v.requires_grad]
            else:
                self._asked += [self._number(tensor) for tensor in tensors(wanted)]
        elif name.endswith(".write") and name != "requires_grad.write":
            operation.must_run, operation.taints = f"sets {name[:-6]} of a tensor", True

    def _set_reason_of_write(self, operation: Operation, before: int, running: Running) -> None:
        """Sets the reason why a write to a tensor of the model or of the caller must run."""
        buffer = self.trace.values[before].storage
        if buffer in self.known.state_buffers:
            if running.collective and running.same_bits:
                operation.must_run = "exchanges tensors with other processes"
                return
            name = next(
                (s.name for s in self.trace.states if self.trace.values[s.value].storage == buffer),
                "a buffer",
            )
            operation.must_run, operation.taints = f"writes to `{name}`", True
        elif buffer in self.known.input_buffers and not operation.must_run:
            operation.must_run = "writes to its input"

    def kernel(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a kernel, and notes what it does."""
        if self._resting:
            return func(*args, **kwargs)
        if self._running is None:
            return self._kernel_unseen(func, args, kwargs)
        # Inside of a torch function, torch has removed the function mode already.
        self._resting = True
        looked = self.frames is not None and func.namespace in _OF_TORCH and self.frames.pause()
        try:
            return self._kernel(func, args, kwargs)
        finally:
            if looked and self.frames is not None:
                self.frames.resume()
            self._resting = False

    @resting
    def _kernel_unseen(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self._kernel(func, args, kwargs)

    def _kernel(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        running = self._running
        known = soundness.kernel(func)
        written = known.written(args, kwargs)
        copies = [tensor.clone() for tensor in written] if known.collective else []
        draws = known.may_draw
        before = self._generators_now() if draws else ()
        with WorkTimer(args) as work:
            output = func(*args, **kwargs)
        seconds = work.seconds
        drew = False
        if draws:
            self._torch = soundness.torch_generators()
            drew = not soundness.same_generators(before, self._torch)
        if running is None:
            self._record_kernel(args, kwargs, output, written, drew)
            return output
        running.seconds += seconds
        running.draws = running.draws or drew
        running.mixes = running.mixes or known.mixes
        running.steady = running.steady and known.is_steady(output)
        if self._last_bits and known.may_move_bits and not running.moves:
            running.moves = blocks.moves_bits(func, args, kwargs, output)
        if known.shape_follows_data(args):
            running.shapeless = True
            for around in self._stack[-1:]:
                around.shapeless = True
        if written:
            running.written |= {buffer_of(tensor) for tensor in written} - {0}
        if known.collective:
            running.collective = True
            # The exchange may still be running. It must end before results are compared.
            waited = getattr(output[-1], "wait", None) if isinstance(output, tuple) else None
            if waited is not None:
                waited()
            same = all(map(torch.equal, copies, written))
            running.same_bits = running.same_bits and same
        return output

    @contextmanager
    def _kernels_of(self, module: torch.nn.Module, running: Running) -> Iterator[None]:
        """Runs an opaque module, for some without the mode that receives kernels.

        These are compiled modules, and all modules under autocast. Dynamo compiles nothing below
        such a mode, and uncompiled code gives other bits. Under autocast, kernels of torch's
        transformers call other kernels without the casts. So writes and draws of the module are
        found by comparison. Buffers are compared by their bits, since some kernels write without a
        change of the version.
        """
        changes_bits = soundness.is_compiled(module) or modes_now().autocast
        if not changes_bits or _get_current_dispatch_mode() is not self._kernels:
            yield
            return
        running.steady = False
        with _pop_mode_temporarily():
            generators = self._generators_now()
            held = [
                (tensor, tensor.detach().clone())
                for _, tensor in states_of("", module)
                if not isinstance(tensor, torch.nn.Parameter)
            ]
            versions = self.known.versions()
            with WorkTimer([tensor for tensor, _ in held]) as work:
                yield
            running.seconds = work.seconds
            self._torch = soundness.torch_generators()
            running.draws = not soundness.same_generators(generators, self._torch)
            written = [tensor for tensor, before in held if not torch.equal(tensor, before)]
            written += [tensor for tensor, version in versions if tensor._version != version]
            running.written = {buffer_of(tensor) for tensor in written} - {0}

    def _generators_now(self) -> tuple[Any, ...]:
        """Returns the states of torch's generators.

        Notes whether numbers were drawn outside of kernels.
        """
        now = soundness.torch_generators()
        if not soundness.same_generators(self._torch, now):
            self._hidden_draws = True
        return now

    def _record_kernel(
        self, args: Any, kwargs: dict[str, Any], output: Any, written: list[Any], drew: bool
    ) -> None:
        """Records a kernel that runs outside of every torch function."""
        reads = []
        for tensor in tensors((args, kwargs)):
            number = self.known.number(tensor)
            buffer = buffer_of(tensor)
            on = self.known.on(buffer)
            reads += [number] if number >= 0 else (on[:1] or list(self._unseen.get(buffer, ())))
        for tensor in tensors(output):
            if self.known.number(tensor) < 0 and not self.known.on(buffer_of(tensor)):
                self._unseen[buffer_of(tensor)] = tuple(dict.fromkeys(reads))
        targets = self.known.tensors_on({buffer_of(tensor) for tensor in written} - {0})
        if targets or drew:
            self._unseen_work(tuple(dict.fromkeys(reads)), targets)
            self._draws += drew

    def finish(self, output: Any) -> None:
        """Completes the trace after the pass, when its local variables are gone."""
        trace = self.trace
        trace.outputs = [
            (self.known.number(tensor), read)
            for tensor, read in outputs(output)
            if self.known.number(tensor) >= 0
        ]
        for state in self._found:
            if state.tensor() is None:
                for operation in trace.operations:
                    if state.value in operation.reads and not operation.must_run:
                        operation.must_run, operation.taints = _CAME_AND_WENT, True
        # Code outside of torch may have written to the memory of these values, without a trace of
        # it.
        trace.held = {
            number: held
            for number, held in trace.held.items()
            if trace.values[number].storage not in self._exposed
        }
        self._generators_now()
        if self._hidden_draws or self._python != soundness.python_generators():
            self._forbid_whole_calls(DRAWS)
        if self.frames is not None and (number := self.frames.ended()):
            self._forbid_whole_calls(f"reads {number}, which the pass itself changes")
        for name, reference in self._met:
            module = reference()
            if module is not None:
                trace.signature.watch(name, module)
        trace.signature.settle()
        trace.asked = self._asked
        mark(trace, self._asked)

    def _forbid_whole_calls(self, why: str) -> None:
        """Allows no module to be left out as a whole, since one of them depends on earlier calls.

        The generators of Python and numpy do not tell who used them. The operations inside are
        still compared with the trace, including numbers that were drawn.

        Args:
            why: Behaviour that some module shows, as in `Call.why_not_whole`.
        """
        suspects: set[int] = set()
        for call in reversed(self.trace.calls):
            module = call.module()
            if call.number in suspects or module is None or not soundness.is_torchs_own(module):
                call.why_not_whole = call.why_not_whole or why
                suspects.add(call.parent)
        for operation in self.trace.operations:
            if operation.opaque and not operation.must_run:
                operation.must_run, operation.taints = f"{why} ({operation.name})", True


def _holds_data(template: Any) -> bool:
    """Returns whether a result holds numbers beside tensors."""
    return any(
        isinstance(item, (bool, int, float, complex, Unknown)) for item in objects_in(template)
    )
