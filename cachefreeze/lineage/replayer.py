"""Runs a forward pass without its frozen work, or copies the values to keep from a plain pass."""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cachefreeze.lineage import calls, soundness
from cachefreeze.lineage.changes import update
from cachefreeze.lineage.known import off_line
from cachefreeze.lineage.late import Late, Pass, compute_in
from cachefreeze.lineage.modes import uncompiled
from cachefreeze.lineage.module_calls import CallOf
from cachefreeze.lineage.operations import Call, Operation, label
from cachefreeze.lineage.plan import Action, Plan, Planned
from cachefreeze.lineage.program import copy_of, with_strides
from cachefreeze.lineage.structure import bound, fill, matches, tensors

Tensor = torch.Tensor


@dataclass
class Report:
    """Events of a replayed or captured pass.

    Attributes:
        skipped: Number of operations that were left out.
        left: Reason why the rest of the pass ran in full. Empty if the pass followed the trace.
        computed: Numbers of the late values that were computed. It grows if the caller uses more of
            them after the pass.
    """

    skipped: int = 0
    left: str = ""
    computed: AbstractSet[int] = frozenset()


def replay(
    plan: Plan,
    kept: Mapping[int, Tensor],
    model: Callable[..., Any],
    /,
    *args: Any,
    leave_at: int | None = None,
    known_to_fit: bool = False,
    **kwargs: Any,
) -> tuple[Any, Report]:
    """Runs a forward pass without its frozen work.

    If the pass takes another path than the traced one, the rest of it runs in full. The result is
    that of a plain pass in either case.

    Args:
        plan: Plan made from a trace of the model.
        kept: Kept values of the same batch, by number. Do not use these tensors afterwards.
        model: Module or callable that was traced.
        *args: Positional arguments of the call.
        leave_at: Event at which skipping ends, for tests.
        known_to_fit: Whether the signature was just compared with this call.
        **kwargs: Keyword arguments of the call.

    Returns:
        Output of the model, and a report.

    Raises:
        ValueError: A kept value is missing, or has another shape or type.
    """
    given = (args, kwargs)
    difference = "" if known_to_fit else plan.trace.signature.difference(given)
    if difference:
        return model(*args, **kwargs), Report(left=difference)
    inputs = dict(zip(plan.trace.inputs, tensors(given), strict=True))
    ready = _prepared(plan, kept)
    mode = _Replaying(plan, Pass(plan.trace, plan.program, {**ready, **inputs}), leave_at)
    with calls.catching(), calls.follower_of_thread(mode):
        try:
            with mode:
                output = model(*args, **kwargs)
        finally:
            mode.end()
    return output, mode.report


def capture(
    plan: Plan,
    model: Callable[..., Any],
    /,
    *args: Any,
    known_to_fit: bool = False,
    **kwargs: Any,
) -> tuple[Any, dict[int, Tensor] | None, Report]:
    """Runs a plain forward pass and copies the values to keep.

    Args:
        plan: Plan made from a trace of the model.
        model: Module or callable that was traced.
        *args: Positional arguments of the call.
        known_to_fit: Whether the signature was just compared with this call.
        **kwargs: Keyword arguments of the call.

    Returns:
        Output of the model; copies of the values to keep by number, or None if the pass took
        another path than the traced one; and a report.
    """
    given = (args, kwargs)
    difference = "" if known_to_fit else plan.trace.signature.difference(given)
    if difference:
        return model(*args, **kwargs), None, Report(left=difference)
    inputs = dict(zip(plan.trace.inputs, tensors(given), strict=True))
    mode = _Capturing(plan, inputs)
    with calls.catching(), calls.follower_of_thread(mode), mode:
        output = model(*args, **kwargs)
    if len(mode.found) == len(plan.cut.kept):
        return output, mode.found, mode.report
    if not mode.report.left:
        mode.report.left = "the pass ended before all values to keep were made"
    return output, None, mode.report


def _prepared(plan: Plan, kept: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Gives kept values the strides, memory alignment and `requires_grad` of the traced pass."""
    ready: dict[int, Tensor] = {}
    for number in plan.cut.kept:
        value, tensor = plan.trace.values[number], kept.get(number)
        if tensor is None:
            raise ValueError(f"`kept` lacks the kept value {plan.trace.describe(number)}.")
        if tuple(tensor.shape) != value.shape or tensor.dtype != value.dtype:
            raise ValueError(
                f"The kept value {plan.trace.describe(number)} has another shape or type: "
                f"{tuple(tensor.shape)}, {tensor.dtype}."
            )
        if tensor.stride() != value.stride or off_line(tensor) != value.off_line:
            tensor = with_strides(tensor, value.stride, value.off_line)
        if value.requires_grad and not value.leaf:
            anchor = torch.empty(0, requires_grad=True)
            tensor = _Made.apply(anchor, [tensor])
        ready[number] = tensor.requires_grad_(value.requires_grad)
    return ready


class _Made(torch.autograd.Function):
    """Makes a tensor that requires gradient and is not a leaf, like a computed one."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, held: list[Tensor]) -> Tensor:
        """Returns the tensor."""
        return held[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        """Stops the gradient, since no work before a frozen value is trained."""
        return None, None


class _Following(TorchFunctionMode):
    """Follows the events of a plan in a pass that runs now."""

    def __init__(self, plan: Plan, events: list[Planned | None]) -> None:
        super().__init__()
        self.plan = plan
        self.report = Report()
        self._events = events
        self._at = 0
        self._left = False
        self._open = True
        self.paused = False

    # Methods in which replays and captures differ.

    def number(self, tensor: Any) -> int:
        """Returns the number of the value that a tensor has in this pass, or -1."""
        raise NotImplementedError

    def sources(self) -> dict[int, Tensor]:
        """Returns the tensors from which recorded operations can be run."""
        raise NotImplementedError

    def carry_out(self, planned: Planned, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Does what is planned for an operation."""
        raise NotImplementedError

    def whole(self, planned: Planned, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Does what is planned for a call that is handled as a whole."""
        raise NotImplementedError

    def leave(self, why: str) -> None:
        """Stops following: the rest of the pass runs in full."""
        if not self._left:
            self._left = True
            self.report.left = why

    # Methods of both.

    @uncompiled
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._left or self.paused or not self._open or func in soundness.METADATA:
            return func(*args, **(kwargs or {}))
        if func is soundness.ITERATE:
            return iter(self.step(torch.Tensor.unbind, (args[0], 0), {}))
        return self.step(func, args, kwargs or {})

    def step(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Handles the next torch function, if it is the one that is planned."""
        planned = self._events[self._at] if self._at < len(self._events) else None
        operation = planned.operation if planned is not None else None
        if planned is None or operation is None or func != operation.func:
            self.leave(f"the traced pass did not call `{label(func)}` here")
        elif planned.checked and not self._matches(operation, args, kwargs):
            self.leave(f"`{operation.name}` was called with other arguments")
        else:
            self._at += 1
            return self.carry_out(planned, func, args, kwargs)
        return func(*args, **kwargs)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handles the next call of a module, if it is the one that is planned."""
        planned = self._events[self._at] if self._at < len(self._events) else None
        if self._left or not self._open:
            return self._plainly(module, args, kwargs)
        if planned is not None and planned.operation is not None and planned.operation.opaque:
            return self._opaque(planned, module, args, kwargs)
        call = planned.call if planned is not None else None
        if planned is None or call is None or not call.is_of(module):
            self.leave(f"the traced pass did not call this {type(module).__name__} here")
            return self._plainly(module, args, kwargs)
        if planned.action is not Action.FOLLOW:
            with calls.unfollowed(self):
                try:
                    if planned.action is Action.UNFOLLOWED:
                        return calls.real_call(module, *args, **kwargs)
                    if self._is_whole(planned, call, args, kwargs):
                        return self.whole(planned, module, args, kwargs)
                finally:
                    inside, self._at = self._at, call.leave + 1
            self._at = inside
        return self._inside(call, module, args, kwargs)

    def _inside(self, call: Call, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._at += 1
        try:
            output = calls.real_call(module, *args, **kwargs)
        except BaseException:
            if self._open and self._at != call.leave:
                self.leave("the model raised an error")
            self._at = call.leave + 1
            raise
        if self._open and self._at != call.leave:
            self.leave(
                f"{call.name or type(module).__name__} ended earlier than in the traced pass"
            )
        self._at = call.leave + 1
        return output

    def _plainly(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        with calls.unfollowed(self):
            return calls.real_call(module, *args, **kwargs)

    def _opaque(
        self, planned: Planned, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        operation = planned.operation
        assert operation is not None
        assert isinstance(operation.func, CallOf)
        if operation.func.module() is not module:
            self.leave(f"the traced pass did not call this {type(module).__name__} here")
        elif planned.checked and not self._matches(operation, args, kwargs):
            self.leave(f"`{operation.name}` was called with other arguments")
        else:
            self._at += 1
            with calls.unfollowed(self):
                run = functools.partial(calls.real_call, module)
                return self.carry_out(planned, run, args, kwargs)
        return self._plainly(module, args, kwargs)

    def _matches(self, one: Operation | Call, args: Any, kwargs: dict[str, Any]) -> bool:
        return matches(one.args, args, self.number) and matches(one.kwargs, kwargs, self.number)

    def _is_whole(self, planned: Planned, call: Call, args: Any, kwargs: Any) -> bool:
        if not self._matches(call, args, kwargs):
            return False
        return all(
            matches(guard.output, self.plan.program.result(guard, self.sources()), self.number)
            for guard in planned.guards
        )


class _Replaying(_Following):
    def __init__(self, plan: Plan, run: Pass, leave_at: int | None) -> None:
        super().__init__(plan, plan.replayed)
        self._pass = run
        self._leave_at = len(plan.replayed) if leave_at is None else leave_at
        self.report.computed = run.computed
        run.quiet = self._quiet

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        before, self._open = self._open, False
        with calls.unfollowed(self):
            try:
                yield
            finally:
                self._open = before

    def number(self, tensor: Any) -> int:
        if type(tensor) is Late:
            return tensor.late_number if tensor.late_pass is self._pass else -1
        found = self._pass.ids.get(id(tensor))
        return found[1] if found is not None else self.plan.states.get(id(tensor), -1)

    def sources(self) -> dict[int, Tensor]:
        return self._pass.sources()

    def leave(self, why: str) -> None:
        if not self._left:
            super().leave(why)
            self._pass.compute_all()

    def step(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self._look_ahead()
        if self._left or not self._open:
            return func(*args, **kwargs)
        return super().step(func, args, kwargs)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._open:
            self._look_ahead()
        return super().call(module, args, kwargs)

    def _look_ahead(self) -> None:
        """Stops following after the last skipped event. The rest of the pass may take any path."""
        if self._at >= self._leave_at:
            self.leave("skipping ended at `leave_at`")
        elif self._at > self.plan.last_skipped:
            self._open = False

    def carry_out(self, planned: Planned, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        operation = planned.operation
        assert operation is not None
        if planned.action is Action.RUN:
            for number in planned.saved:
                self._pass.save(number)
            if operation.name.endswith(".write") or operation.opaque:
                compute_in((args, kwargs))  # Dynamo would break its graph at a late value
            result = func(*args, **kwargs)
            if planned.tracked:
                self._pass.written(operation.writes)
                for number, tensor in bound(operation.output, result):
                    if number in planned.tracked:
                        self._pass.give(number, tensor)
            return result
        self.report.skipped += 1
        if planned.simple >= 0:
            return self._pass.hand_out(planned.simple)
        return fill(operation.output, self._skipped(planned, args, kwargs))

    def whole(self, planned: Planned, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = planned.call
        assert call is not None
        self.report.skipped += len(planned.inside)
        tensor = self._skipped(planned, args, kwargs)
        if call.changes:
            update((args, kwargs), call.changes, tensor)
        return fill(call.output, tensor)

    def _skipped(
        self, planned: Planned, args: Any, kwargs: dict[str, Any]
    ) -> Callable[[int], Tensor]:
        """Skips work. Returns a function from the numbers of its results to tensors."""
        if not planned.returned:
            return self._pass.hand_out
        given = list(tensors((args, kwargs)))
        for old, new in planned.writes:
            self._pass.write(old, new)
        # If the plain call returns one of its arguments, this one must return the same object.
        own = {self.number(tensor): tensor for tensor in given}
        return lambda number: own[number] if number in own else self._pass.hand_out(number)

    def end(self) -> None:
        """Ends the pass.

        Existing late values no longer depend on tensors that the caller may change.
        """
        self._open = False
        self._pass.quiet = nullcontext
        self._pass.settle()


class _Capturing(_Following):
    def __init__(self, plan: Plan, inputs: Mapping[int, Tensor]) -> None:
        super().__init__(plan, plan.captured)
        self.found: dict[int, Tensor] = {}
        self._inputs = dict(inputs)
        self._ids: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        for number, tensor in inputs.items():
            self._note(number, tensor)

    def number(self, tensor: Any) -> int:
        found = self._ids.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        return self.plan.states.get(id(tensor), -1)

    def sources(self) -> dict[int, Tensor]:
        # An input that was written to has another value now.
        return {n: tensor for n, tensor in self._inputs.items() if self.number(tensor) == n}

    def carry_out(self, planned: Planned, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        assert planned.operation is not None
        self._take(planned, [planned.operation], planned.operation.output, result)
        return result

    def whole(self, planned: Planned, module: nn.Module, args: Any, kwargs: Any) -> Any:
        output = calls.real_call(module, *args, **kwargs)
        assert planned.call is not None
        results = output, (args, kwargs) if planned.call.after is not None else None
        self._take(planned, planned.inside, planned.call.results, results)
        return output

    def _take(
        self, planned: Planned, operations: Sequence[Operation], template: Any, result: Any
    ) -> None:
        """Notes the new values of tensors, and copies those to keep."""
        for operation in operations:
            for old, new in operation.writes:
                for reference, number in list(self._ids.values()):
                    tensor = reference()
                    if number == old and tensor is not None:
                        self._note(new, tensor)
                        self._keep(planned, new, tensor)
        for number, tensor in bound(template, result):
            if number in planned.tracked:
                self._note(number, tensor)
            self._keep(planned, number, tensor)

    def _note(self, number: int, tensor: Tensor) -> None:
        self._ids[id(tensor)] = weakref.ref(tensor), number

    def _keep(self, planned: Planned, number: int, tensor: Tensor) -> None:
        if number in planned.kept:
            self.found[number] = copy_of(tensor.detach())
            # The rest of the pass may take any path.
            self._open = len(self.found) < len(self.plan.cut.kept)
