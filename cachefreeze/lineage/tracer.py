"""Follows one forward pass: which operations run, in which order, and what each depends on."""

import functools
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cachefreeze.errors import UserError
from cachefreeze.lineage import calls, soundness
from cachefreeze.lineage.known import Known, buffer_of
from cachefreeze.lineage.modules import modules_of, states_of
from cachefreeze.lineage.operations import (
    SWITCH,
    Call,
    Enter,
    Leave,
    Modes,
    Operation,
    State,
    Step,
    Trace,
    label,
    mark,
    twin_of,
)
from cachefreeze.lineage.signature import Signature
from cachefreeze.lineage.structure import (
    NotDescribed,
    Ref,
    Unknown,
    changes,
    describe,
    describe_objects,
    numbers,
    outputs,
    tensors,
)

_CAME_AND_WENT = "uses a tensor that no torch function made (from numpy, or from a global variable)"
_UNSEEN = "does work that torch functions do not show (TorchScript, vmap, an extension)"


def trace(
    model: Callable[..., Any],
    /,
    *args: Any,
    moving: Collection[torch.Tensor] = (),
    **kwargs: Any,
) -> tuple[Any, Trace]:
    """Runs one ordinary forward pass and follows it.

    The pass is the caller's own: random numbers are drawn and buffers move as without following.

    Args:
        model: Module, or a function or method that calls modules.
        *args: Positional arguments of the call, the example batch among them.
        moving: Parameters and buffers that count as trained although they take no gradient.
        **kwargs: Keyword arguments of the call.

    Returns:
        Output of the pass, and its trace.

    Raises:
        UserError: The callable uses no module.
    """
    modules = modules_of(model)
    if not modules:
        name = getattr(model, "__name__", type(model).__name__)
        raise UserError(
            f"{name!r} uses no torch.nn.Module: give a model, or a function that calls one."
        )
    tracer = _Tracer(modules, moving, (args, kwargs))
    began = time.perf_counter()
    with tracer.following():
        output = model(*args, **kwargs)
    tracer.trace.seconds = time.perf_counter() - began
    tracer.finish(output)
    return output, tracer.trace


class _Functions(TorchFunctionMode):
    """Sees every torch function that the pass calls, in order."""

    def __init__(self, tracer: "_Tracer") -> None:
        super().__init__()
        self._tracer = tracer
        self.paused = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        return self._tracer.function(func, args, kwargs or {})


class _Kernels(TorchDispatchMode):
    """Sees every kernel, also those that no torch function shows: what it writes and draws."""

    def __init__(self, tracer: "_Tracer") -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._tracer.kernel(func, args, kwargs or {})


class _Either:
    """Holds what one of two sets holds, without copying the larger one in every call."""

    def __init__(self, one: Collection[int], other: Collection[int]) -> None:
        self._sets = one, other

    def __contains__(self, value: object) -> bool:
        return any(value in one for one in self._sets)


class _Running:
    """What is noted of an operation while it runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.written: set[int] = set()
        self.draws = False
        self.mixes = False
        self.shapeless = False
        self.collective = False
        self.same_bits = True


class _Around:
    """What is noted of a call of a module until it ends."""

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


def _resting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Makes what a method of the tracer itself computes invisible to the tracer."""

    @functools.wraps(method)
    def rest(self: "_Tracer", *args: Any) -> Any:
        before = self._resting
        self._resting = True
        taken = calls.take_off(self._functions)
        try:
            return method(self, *args)
        finally:
            self._resting = before
            if taken:
                calls.put_on(self._functions)

    return rest


class _Tracer:
    def __init__(self, modules: list[tuple[str, nn.Module]], moving: Any, given: Any) -> None:
        self.trace = Trace()
        self.known = Known(self.trace.values)
        self._functions = _Functions(self)
        self._names: dict[int, str] = {}
        self._moving = {id(tensor) for tensor in moving}
        self._running: _Running | None = None
        self._stack: list[_Around] = []
        self._segments: list[int] = []
        self._segment_count = 0
        self._unseen: dict[int, tuple[int, ...]] = {}
        self._asked: list[int] = []
        self._found: list[State] = []
        self._resting = True
        self._draws = 0
        self._hidden_draws = False
        self._torch = soundness.torch_generators()
        self._python = soundness.python_generators()
        for name, module in modules:
            self._know(name, module)
        self._fixed = {
            id(value) for _, one in modules for part in one.modules() for value in vars(part).values()
        }
        for tensor in tensors(given):
            if self.known.number(tensor) < 0:
                self.trace.inputs.append(self.known.add(tensor, -1))
        self.trace.signature = Signature(modules, given)

    def _know(self, prefix: str, module: nn.Module) -> None:
        for name, part in module.named_modules(prefix=prefix):
            self._names.setdefault(id(part), name)
        for name, tensor in states_of(prefix, module):
            self._state(name, tensor)

    @_resting
    def _meet(self, module: nn.Module) -> None:
        self._know(type(module).__name__, module)

    def _state(self, name: str, tensor: torch.Tensor) -> int:
        number = self.known.number(tensor)
        if number < 0:
            trained = tensor.requires_grad or id(tensor) in self._moving
            number = self.known.add(tensor, -2)
            self.trace.states.append(State(name, self.known.reference(tensor), trained, number))
        return number

    @contextmanager
    def following(self) -> Iterator[None]:
        with (
            calls.catching(),
            calls.follower_of_thread(self),
            calls.segments(self._begin_segment, self._end_segment),
            _Kernels(self),
            self._functions,
        ):
            self._resting = False
            try:
                yield
            finally:
                self._resting = True

    def _begin_segment(self) -> None:
        self._segments.append(self._segment_count)
        self._segment_count += 1

    def _end_segment(self) -> None:
        self._segments.pop()

    # Functions

    def function(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._resting or self._running is not None or func in soundness.METADATA:
            return func(*args, **kwargs)
        if func is soundness.ITERATE:
            return iter(self.function(torch.Tensor.unbind, (args[0], 0), {}))
        operation = self._begin(func, label(func), args, kwargs)
        running = self._running = _Running()
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

    @_resting
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

    def _number(self, tensor: torch.Tensor) -> int:
        """Finds the number of a value, also of one that no torch function has made."""
        number = self.known.number(tensor)
        if number >= 0:
            return number
        buffer = buffer_of(tensor)
        reads = self._unseen.get(buffer) if buffer else None
        if reads is None and buffer:
            alias = self.known.on(buffer)
            reads = (alias[0],) if alias else None
        if reads is None:
            # It was there before the pass, or it comes from numpy: the end of the pass tells.
            number = self._state("a tensor from outside", tensor)
            self._found.append(next(s for s in self.trace.states if s.value == number))
            return number
        operation = self._bare("unseen work", reads)
        operation.must_run, operation.taints = _UNSEEN, True
        number = self.known.add(tensor, len(self.trace.operations))
        operation.makes = (number,)
        self._commit(operation, _Running())
        for around in self._stack[-1:]:
            around.unseen = True
        return number

    def _bare(self, name: str, reads: tuple[int, ...]) -> Operation:
        call = self._stack[-1].call.number if self._stack else -1
        return Operation(-1, -1, _nothing, name, (), {}, reads, modes_now(), call)

    def _commit(self, operation: Operation, running: _Running) -> None:
        operation.number, operation.event = len(self.trace.operations), len(self.trace.events)
        operation.seconds = running.seconds
        operation.mixes = running.mixes
        operation.shapeless = running.shapeless
        self.trace.operations.append(operation)
        if operation.func is not _nothing:  # nobody sees unseen work at replay either
            self.trace.events.append(Step(operation.number))

    @_resting
    def _end(
        self,
        operation: Operation,
        running: _Running,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        here = len(self.trace.operations)
        makes: list[int] = []
        writes: list[tuple[int, int]] = []
        self._unusual(operation, running, args, kwargs)
        if operation.name in soundness.EXPOSING_NAMES:
            running.written |= {buffer_of(one) for one in tensors(args[:1])} - {0}
        targets = [(tensor, True) for tensor in self.known.tensors_on(running.written)]
        if operation.name.endswith(("_", ".write")) and not operation.name.endswith("__"):
            # What changes a tensor, not its elements: `requires_grad_`, `detach_`, `x.data = y`.
            targets += [(value, False) for value in args[:1] if isinstance(value, torch.Tensor)]
        for tensor, elements in targets:
            before = self.known.number(tensor)
            if before >= 0 and all(pair[1] != before for pair in writes):
                after = self.known.renew(tensor, here)
                writes.append((before, after))
                makes.append(after)
                if elements or self.trace.values[before].operation < 0:
                    self._outside(operation, before, running)

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
        self._commit(operation, running)

    def _unusual(
        self, operation: Operation, running: _Running, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Finds reasons why an operation must run, in its name, its arguments and its kernels."""
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
        elif name in soundness.EXPOSING_NAMES and self._is_made(args):
            operation.must_run, operation.taints = "hands out memory (numpy, data_ptr)", True
        elif name.endswith(".write") and name != "requires_grad.write":
            operation.must_run, operation.taints = f"sets {name[:-6]} of a tensor", True

    def _is_made(self, args: Any) -> bool:
        """Says whether the first argument was made in the pass. Inputs are the caller's own."""
        return any(
            self.trace.values[self._number(tensor)].operation >= 0 for tensor in tensors(args[:1])
        )

    def _outside(self, operation: Operation, before: int, running: _Running) -> None:
        """Notes that a written value outlives the call: it belongs to the model or the caller."""
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

    # Kernels

    def kernel(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a kernel, and notes what it does."""
        if self._resting:
            return func(*args, **kwargs)
        return self._kernel(func, args, kwargs)

    @_resting
    def _kernel(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        running = self._running
        known = soundness.kernel(func)
        written = known.written(args, kwargs)
        copies = [tensor.clone() for tensor in written] if known.collective else []
        draws = known.may_draw
        before = self._generators_now() if draws else ()
        began = time.perf_counter()
        output = func(*args, **kwargs)
        seconds = time.perf_counter() - began
        drew = False
        if draws:
            self._torch = soundness.torch_generators()
            drew = not soundness.same_generators(before, self._torch)
        if running is None:
            self._orphan(args, kwargs, output, written, drew)
            return output
        running.seconds += seconds
        running.draws = running.draws or drew
        running.mixes = running.mixes or known.mixes
        if known.shape_follows_data(args):
            running.shapeless = True
            for around in self._stack[-1:]:
                around.shapeless = True
        if written:
            running.written |= {buffer_of(tensor) for tensor in written} - {0}
        if known.collective:
            running.collective = True
            # What is sent around may arrive later: it is waited for before it is compared.
            waited = getattr(output[-1], "wait", None) if isinstance(output, tuple) else None
            if waited is not None:
                waited()
            same = all(map(torch.equal, copies, written))
            running.same_bits = running.same_bits and same
        return output

    def _generators_now(self) -> tuple[Any, ...]:
        """Returns the state of torch's generators, and notes what was drawn without a kernel."""
        now = soundness.torch_generators()
        if not soundness.same_generators(self._torch, now):
            self._hidden_draws = True
        return now

    def _orphan(
        self, args: Any, kwargs: dict[str, Any], output: Any, written: list[Any], drew: bool
    ) -> None:
        """Notes a kernel that runs below no torch function that was seen."""
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
            operation = self._bare("unseen work", tuple(dict.fromkeys(reads)))
            operation.must_run, operation.taints = _UNSEEN, True
            here = len(self.trace.operations)
            writes = [(self.known.number(one), self.known.renew(one, here)) for one in targets]
            operation.writes = tuple(writes)
            operation.makes = tuple(after for _, after in writes)
            self._draws += drew
            self._commit(operation, _Running())
            for around in self._stack[-1:]:
                around.unseen = True

    # Modules

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running is not None:
            return calls.real_call(module, *args, **kwargs)
        if id(module) not in self._names:
            self._meet(module)
        if soundness.is_opaque(module):
            return self._opaque(module, args, kwargs)
        around = self._enter(module, args, kwargs)
        began = time.perf_counter()
        try:
            output = calls.real_call(module, *args, **kwargs)
        except BaseException:
            self._leave(around, began)
            around.call.why_not_whole = "raises an error"
            raise
        self._leave(around, began)
        self._judge(around, module, args, kwargs, output)
        return output

    @_resting
    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> _Around:
        parent = self._stack[-1].call.number if self._stack else -1
        (args_template, kwargs_template), identities = self._described((args, kwargs))
        call = Call(
            number=len(self.trace.calls),
            name=self._names[id(module)],
            module=weakref.ref(module),
            parent=parent,
            enter=len(self.trace.events),
            args=args_template,
            kwargs=kwargs_template,
            twin=twin_of(module),
        )
        # Describing may have found work that was not seen, which comes before the call.
        call.enter = len(self.trace.events)
        around = _Around(call, module, len(self.trace.operations), self._draws)
        around.identities = identities
        self.trace.calls.append(call)
        self.trace.events.append(Enter(call.number))
        self._stack.append(around)
        return around

    def _described(self, given: Any) -> tuple[Any, list[int] | None]:
        """Describes the arguments of a call, if possible with the objects among them."""
        args, kwargs = given
        try:
            if not kwargs:  # the dictionary is nobody's
                described, identities = describe_objects(args, self._number, self._fixed)
                return (described, {}), identities
            return describe_objects(given, self._number, self._fixed)
        except NotDescribed:
            return (describe(given[0], self._number), describe(given[1], self._number)), None

    @_resting
    def _leave(self, around: _Around, began: float) -> None:
        self._stack.pop()
        around.call.leave = len(self.trace.events)
        around.call.seconds = time.perf_counter() - began
        self.trace.events.append(Leave(around.call.number))

    @_resting
    def _judge(
        self, around: _Around, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Decides whether a call could be left out as a whole, and whether it is opaque."""
        call = around.call
        drew = around.draws != self._draws
        if self._stack and (around.unseen or self._hides_shapes(around, module, output)):
            self._collapse(around, module, args, kwargs, output, drew)
            return
        call.why_not_whole = self._effect(around, module, drew)
        if not call.why_not_whole and (_unknown(call.args) or _unknown(call.kwargs)):
            call.why_not_whole = "takes an object that is not described"
        if not call.why_not_whole:
            call.why_not_whole = self._results(around, (args, kwargs), output)
        if not call.why_not_whole:
            call.why_not_whole = self._kept_elsewhere(around, (args, kwargs), output)

    def _hides_shapes(self, around: _Around, module: nn.Module, output: Any) -> bool:
        """Says whether shapes that depend on the data, as in a router, stay inside a module.

        Such a module is one operation if all of it is frozen: its way depends on its input alone.
        """
        if not around.shapeless:
            return False
        if any(one.requires_grad or id(one) in self._moving for _, one in states_of("", module)):
            return False
        shapeless: set[int] = set()
        for operation in self.trace.operations[around.first :]:
            writes_into = operation.reads[:1] if operation.name.startswith(_INTO) else ()
            reads = writes_into or operation.reads
            if operation.shapeless or not shapeless.isdisjoint(reads):
                shapeless.update(operation.makes)
        return shapeless.isdisjoint(self._number(tensor) for tensor in tensors(output))

    def _results(self, around: _Around, given: Any, output: Any) -> str:
        """Describes the output of a call, and what it did to the objects that it was given."""
        call = around.call
        if around.identities == []:
            return self._output(around, output)
        after, identities = self._described(given)
        values = self.trace.values
        changed = changes(
            (call.args, call.kwargs), after, lambda a, b: values[a].thing == values[b].thing
        )
        if changed:
            if around.identities is None or identities is None:
                return "changes an object that it is given"
            if [one for one in identities if one in set(around.identities)] != around.identities:
                return "replaces an object in one that it is given"
            call.after, call.changes = after, changed
        return self._output(around, output)

    def _output(self, around: _Around, output: Any) -> str:
        fixed = _Either(self._fixed, frozenset(around.identities or ()))
        try:
            around.call.output, _ = describe_objects(output, self._number, fixed)
        except NotDescribed as reason:
            return f"returns something else than tensors: {reason}"
        return ""

    def _effect(self, around: _Around, module: nn.Module, drew: bool) -> str:
        """Names what a call did beside its operations. Empty if it did nothing else."""
        inner = self.trace.calls[around.call.number + 1 :]
        for one in inner:
            if one.why_not_whole in _SPREADS:
                return one.why_not_whole
        if soundness.has_hooks(module):
            return _HOOKS
        if around.grad != torch.is_grad_enabled():
            return SWITCH
        if drew:
            return _DRAWS
        if around.torchs_own:
            return ""
        if soundness.holds_own_generator(module):
            return _DRAWS
        if soundness.attributes_changed(around.attributes, around.sizes, module):
            return _CHANGES
        return ""

    def _kept_elsewhere(self, around: _Around, given: Any, output: Any) -> str:
        """Says whether a tensor of a call lives on in a place that is not its output."""
        alive = [one for one in self.known.alive_since(around.first) if one is not output]
        if not alive:
            return ""
        returned = list(tensors(output))
        allowed = {id(tensor) for tensor in (*returned, *tensors(given))}
        allowed |= {id(tensor._base) for tensor in returned if tensor._is_view()}
        return _KEEPS if any(id(tensor) not in allowed for tensor in alive) else ""

    def _opaque(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a module that is not followed inside. It is one operation."""
        name = self._names[id(module)]
        operation = self._begin(_CallOf(module), type(module).__name__, args, kwargs)
        states = [self._state(f"{name}.{key}", one) for key, one in states_of("", module)]
        operation.reads = tuple(dict.fromkeys((*operation.reads, *states)))
        running = self._running = _Running()
        try:
            with calls.unfollowed(self._functions):
                output = calls.real_call(module, *args, **kwargs)
        except BaseException:
            operation.must_run = "raises an error"
            self._commit(operation, running)
            raise
        finally:
            self._running = None
        if soundness.has_hooks(module):
            operation.must_run, operation.taints = "runs hooks in a module that is opaque", True
        self._end(operation, running, args, kwargs, output)
        operation.opaque = name
        return output

    def _collapse(
        self,
        around: _Around,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        output: Any,
        drew: bool,
    ) -> None:
        """Makes one operation of a call whose work was only partly seen."""
        trace, first, call = self.trace, around.first, around.call
        inner = trace.operations[first:]
        del trace.operations[first:], trace.events[call.enter :], trace.calls[call.number :]
        made = {number for one in inner for number in one.makes}
        reads = [number for one in inner for number in one.reads if number not in made]
        reads += [*numbers(call.args), *numbers(call.kwargs)]
        reads += [self._state(f"{call.name}.{key}", one) for key, one in states_of("", module)]
        operation = Operation(
            -1, -1, _CallOf(module), type(module).__name__, call.args, call.kwargs,
            tuple(dict.fromkeys(reads)), modes_now(), call.parent, opaque=call.name,
        )  # fmt: skip
        operation.segment = self._segments[0] if self._segments else -1
        serious = [one for one in inner if one.must_run and one.must_run not in (_UNSEEN, SWITCH)]
        effect = self._effect(around, module, drew)
        if serious or effect or _unknown(call.args) or _unknown(call.kwargs):
            reason = serious[0].must_run if serious else effect or _UNSEEN
            operation.must_run, operation.taints = reason, True
        for number in made:
            trace.values[number].operation = first
        pairs = [pair for one in inner for pair in one.writes if pair[0] not in made]
        operation.writes = tuple(pairs)
        operation.output = describe(output, self._number)
        operation.makes = tuple(sorted(made))
        running = _Running()
        running.seconds = sum(one.seconds for one in inner)
        running.mixes = any(one.mixes for one in inner)
        self._commit(operation, running)

    # The end

    def finish(self, output: Any) -> None:
        """Completes the trace when the pass is over and its locals are gone."""
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
        self._generators_now()
        if self._hidden_draws or self._python != soundness.python_generators():
            self._distrust()
        trace.signature.settle()
        trace.asked = self._asked
        mark(trace, self._asked)


    def _distrust(self) -> None:
        """Lets no module be left out as a whole, since one of them drew unseen random numbers.

        Python's and numpy's generators tell nobody who used them. What is followed call by call is
        compared with the trace, numbers that were drawn included.
        """
        suspects: set[int] = set()
        for call in reversed(self.trace.calls):
            module = call.module()
            if call.number in suspects or module is None or not soundness.is_torchs_own(module):
                call.why_not_whole = call.why_not_whole or _DRAWS
                suspects.add(call.parent)
        for operation in self.trace.operations:
            if operation.opaque and not operation.must_run:
                operation.must_run, operation.taints = f"draws random numbers ({operation.name})", True


class _CallOf:
    """Calls a module that is one operation. It holds the module weakly."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.__name__ = type(module).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        if module is None:
            raise RuntimeError(
                f"A value that was left out cannot be computed: a {self.__name__} is gone."
            )
        with calls.unfollowed(None):
            return module(*args, **kwargs)


_HOOKS = "runs a hook"
_DRAWS = "draws random numbers"
_CHANGES = "changes an attribute of its module"
_KEEPS = "keeps a tensor elsewhere than in its output"
# Functions whose result has the shape of their first argument.
_INTO = ("index_add", "index_copy", "index_put", "scatter", "masked_", "__setitem__")
_SPREADS = frozenset((_HOOKS, _DRAWS, _CHANGES, "raises an error"))


def _nothing(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("unseen work cannot be called")


def _objects(given: Any) -> Iterator[Any]:
    """Yields the objects in arguments that a template does not describe."""
    stack = [given]
    while stack:
        value = stack.pop()
        if isinstance(value, Ref):
            continue
        if isinstance(value, (tuple, list)):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
        yield value


def _unknown(template: Any) -> bool:
    return any(isinstance(item, Unknown) for item in _objects(template))


def _holds_data(template: Any) -> bool:
    """Says whether a result holds numbers beside tensors."""
    return any(isinstance(item, (bool, int, float, complex, Unknown)) for item in _objects(template))


def modes_now() -> Modes:
    """Returns the switches that are on in this thread."""
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in _AUTOCAST
        if torch.is_autocast_enabled(kind)
    )
    return Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


_AUTOCAST = ("cpu", "cuda")
