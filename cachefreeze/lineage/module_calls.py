"""Records calls of modules: which can be left out as a whole, and which are one operation."""

import weakref
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from cachefreeze.lineage import calls, soundness
from cachefreeze.lineage.changes import changes
from cachefreeze.lineage.modes import modes_now
from cachefreeze.lineage.modules import states_of
from cachefreeze.lineage.operations import SWITCH, Call, Enter, Leave, Operation, twin_of
from cachefreeze.lineage.recording import UNSEEN, Around, Recording, Running, resting
from cachefreeze.lineage.structure import (
    NotDescribedError,
    Ref,
    Unknown,
    describe,
    describe_objects,
    numbers,
    tensors,
)

_HOOKS = "runs a hook"
DRAWS = "draws random numbers"
_CHANGES = "changes an attribute of its module"
_KEEPS = "keeps a tensor elsewhere than in its output"
# Beginnings of names of functions whose result has the shape of their first argument.
_INTO = ("index_add", "index_copy", "index_put", "scatter", "masked_", "__setitem__")
_SPREADS = frozenset((_HOOKS, DRAWS, _CHANGES, "raises an error"))


class ModuleCalls(Recording):
    """Records the calls of modules."""

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs and records a call of a module."""
        if self._running is not None:
            return calls.real_call(module, *args, **kwargs)
        if id(module) not in self._names:
            self._register_new(module)
        if soundness.is_opaque(module):
            return self._opaque(module, args, kwargs)
        around = self._enter(module, args, kwargs)
        try:
            output = calls.real_call(module, *args, **kwargs)
        except BaseException:
            self._leave(around)
            around.call.why_not_whole = "raises an error"
            raise
        self._leave(around)
        self._classify(around, module, args, kwargs, output)
        return output

    @resting
    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Around:
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
        # The description of the arguments may have added unseen work, which comes before the call.
        call.enter = len(self.trace.events)
        around = Around(call, module, len(self.trace.operations), self._draws)
        around.identities = identities
        self.trace.calls.append(call)
        self.trace.events.append(Enter(call.number))
        self._stack.append(around)
        return around

    def _described(self, given: Any) -> tuple[Any, list[int] | None]:
        """Returns the template of the arguments, and the identities of its objects.

        None in the place of the identities if an object cannot be rebuilt.
        """
        args, kwargs = given
        try:
            if not kwargs:  # an empty dictionary of Python's own, not of the user
                described, identities = describe_objects(args, self._number, self._fixed)
                return (described, {}), identities
            return describe_objects(given, self._number, self._fixed)
        except NotDescribedError:
            return (describe(given[0], self._number), describe(given[1], self._number)), None

    @resting
    def _leave(self, around: Around) -> None:
        self._stack.pop()
        around.call.leave = len(self.trace.events)
        self.trace.events.append(Leave(around.call.number))

    @resting
    def _classify(
        self, around: Around, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Decides whether a call can be left out as a whole, or becomes one operation."""
        call = around.call
        drew = around.draws != self._draws
        if self._stack and (around.unseen or self._hides_shapes(around, module, output)):
            self._collapse(around, module, output, drew)
            return
        call.why_not_whole = self._effect(around, module, drew)
        if not call.why_not_whole and (_unknown(call.args) or _unknown(call.kwargs)):
            call.why_not_whole = "takes an object of an unknown kind"
        if not call.why_not_whole:
            call.why_not_whole = self._results(around, (args, kwargs), output)
        if not call.why_not_whole:
            call.why_not_whole = self._kept_elsewhere(around, (args, kwargs), output)

    def _hides_shapes(self, around: Around, module: nn.Module, output: Any) -> bool:
        """Returns whether a module is frozen, and shapes that depend on data stay inside of it.

        Such a module, for example a router, can be one operation: its path depends on its input
        alone.
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

    def _results(self, around: Around, given: Any, output: Any) -> str:
        """Describes the output of a call and its changes to arguments.

        Returns a reason if that is not possible, or an empty string.
        """
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
                return "replaces an object inside of an object that it is given"
            call.after, call.changes = after, changed
        return self._output(around, output)

    def _output(self, around: Around, output: Any) -> str:
        fixed = _Either(self._fixed, frozenset(around.identities or ()))
        try:
            around.call.output, _ = describe_objects(output, self._number, fixed)
        except NotDescribedError as reason:
            return f"returns an object that cannot be rebuilt: {reason}"
        return ""

    def _effect(self, around: Around, module: nn.Module, drew: bool) -> str:
        """Returns what a call did apart from its operations. Empty if it did nothing else."""
        inner = self.trace.calls[around.call.number + 1 :]
        for one in inner:
            if one.why_not_whole in _SPREADS:
                return one.why_not_whole
        if soundness.has_hooks(module):
            return _HOOKS
        if around.grad != modes_now().grad:
            return SWITCH
        if drew:
            return DRAWS
        if around.torchs_own:
            return ""
        if soundness.holds_own_generator(module):
            return DRAWS
        if soundness.attributes_changed(around.attributes, around.sizes, module):
            return _CHANGES
        return ""

    def _kept_elsewhere(self, around: Around, given: Any, output: Any) -> str:
        """Returns a reason if a tensor of a call lives on outside of its output.

        Empty if none does.
        """
        alive = [one for one in self.known.alive_since(around.first) if one is not output]
        if not alive:
            return ""
        returned = list(tensors(output))
        allowed = {id(tensor) for tensor in (*returned, *tensors(given))}
        allowed |= {id(tensor._base) for tensor in returned if tensor._is_view()}
        return _KEEPS if any(id(tensor) not in allowed for tensor in alive) else ""

    def _opaque(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a module as one operation."""
        name = self._names[id(module)]
        operation = self._begin(CallOf(module), type(module).__name__, args, kwargs)
        states = [self._state(f"{name}.{key}", one) for key, one in states_of("", module)]
        operation.reads = tuple(dict.fromkeys((*operation.reads, *states)))
        running = self._running = Running()
        # Dynamo would compile what looks into functions.
        looked = soundness.is_compiled(module) and self.frames is not None and self.frames.pause()
        try:
            with calls.unfollowed(self._functions), self._kernels_of(module, running):
                output = calls.real_call(module, *args, **kwargs)
        except BaseException:
            operation.must_run = "raises an error"
            self._commit(operation, running)
            raise
        finally:
            self._running = None
            if looked and self.frames is not None:
                self.frames.resume()
        if soundness.has_hooks(module):
            operation.must_run, operation.taints = (
                "runs hooks in a module that is not followed",
                True,
            )
        self._end(operation, running, args, kwargs, output)
        operation.opaque = name
        return output

    def _kernels_of(self, module: nn.Module, running: Running) -> AbstractContextManager[None]:
        """Returns a context in which the kernels of a module that is one operation are observed."""
        raise NotImplementedError

    def _collapse(self, around: Around, module: nn.Module, output: Any, drew: bool) -> None:
        """Replaces the operations of a call by one, since some of its work was not seen."""
        trace, first, call = self.trace, around.first, around.call
        inner = trace.operations[first:]
        del trace.operations[first:], trace.events[call.enter :], trace.calls[call.number :]
        made = {number for one in inner for number in one.makes}
        reads = [number for one in inner for number in one.reads if number not in made]
        reads += [*numbers(call.args), *numbers(call.kwargs)]
        reads += [self._state(f"{call.name}.{key}", one) for key, one in states_of("", module)]
        operation = Operation(
            -1, -1, CallOf(module), type(module).__name__, call.args, call.kwargs,
            tuple(dict.fromkeys(reads)), modes_now(), call.parent, opaque=call.name,
        )  # fmt: skip
        operation.segment = self._segments[0] if self._segments else -1
        serious = [one for one in inner if one.must_run and one.must_run not in (UNSEEN, SWITCH)]
        effect = self._effect(around, module, drew)
        if serious or effect or _unknown(call.args) or _unknown(call.kwargs):
            reason = serious[0].must_run if serious else effect or UNSEEN
            operation.must_run, operation.taints = reason, True
        for number in made:
            trace.values[number].operation = first
        pairs = [pair for one in inner for pair in one.writes if pair[0] not in made]
        operation.writes = tuple(pairs)
        operation.output = describe(output, self._number)
        operation.makes = tuple(sorted(made))
        running = Running()
        running.seconds = sum(one.seconds for one in inner)
        running.mixes = any(one.mixes for one in inner)
        running.moves = any(one.moves for one in inner)
        running.steady = False
        self._commit(operation, running)


class _Either:
    """Union of two sets, without a copy of the larger one in every call."""

    def __init__(self, one: Collection[int], other: Collection[int]) -> None:
        self._sets = one, other

    def __contains__(self, value: object) -> bool:
        return any(value in one for one in self._sets)


class CallOf:
    """Calls a module that is one operation. Holds the module weakly."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.__name__ = type(module).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module.

        Raises:
            RuntimeError: The module was deleted.
        """
        module = self.module()
        if module is None:
            raise RuntimeError(
                f"A value that was left out cannot be computed: a {self.__name__} was deleted. "
                "Keep the model as long as its outputs are used."
            )
        with calls.unfollowed(None):
            return module(*args, **kwargs)


def objects_in(given: Any) -> Iterator[Any]:
    """Yields a template and all objects in it, but no `Ref`."""
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
    return any(isinstance(item, Unknown) for item in objects_in(template))
