"""One module whose calls are cached. It has a trace for each kind of call."""

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _device as device_contexts

from cachefreeze import lineage
from cachefreeze.cache import messages
from cachefreeze.cache.cache_state import CacheState, Filled
from cachefreeze.cache.cached_trace import CachedTrace
from cachefreeze.cache.final_check import hash_all
from cachefreeze.cache.module_call import ModuleCall
from cachefreeze.cache.padding import differ_in_length
from cachefreeze.cache.state import State
from cachefreeze.keys import ExternalState, environment
from cachefreeze.lineage import calls
from cachefreeze.lineage.known import LINE, off_line
from cachefreeze.lineage.structure import PLAIN_KINDS

# Largest number of signatures of a module, and of traces for one signature.
_MOST = 16
# Number of signatures for one mode after which the user gets a message.
_MANY_SHAPES = 4
# Largest number of lengths of padded rows.
_MOST_LENGTHS = 64
# Number of traces that are made if frozen work seems to take little time.
_TRIES = 3
# Number of lengths after which rows are not expected to be padded to the same length again.
_MANY_LENGTHS = 8
# Number of calls that may be traced. Beyond them, one call of 16 may be.
_FEW_TRACES = 4
# Number of calls that run without the cache until a module is not checked at each call any more.
# After the same number of calls it is checked again.
_LOOK_AGAIN = 16

# Signature of a call: torch's switches, numbers and strings among the arguments, shapes of tensors.
_Key = tuple[Any, Any, tuple[Any, ...]]
# `requires_grad` of all parameters, and `training` of all modules.
_Flags = tuple[tuple[bool, ...], tuple[bool, ...]]


class CachedModule:
    """One module whose calls are cached.

    Args:
        shared: State that all parts of the cache share.
        name: Name of the module, for messages.
        module: Module whose calls are cached.
    """

    def __init__(self, shared: CacheState, name: str, module: nn.Module) -> None:
        self._shared = shared
        self._name = name
        self._module = weakref.ref(module)
        self._modules = list(module.modules())
        self._parameters: list[torch.Tensor] = []
        # Traces for each signature, the last used one first.
        self._kinds: dict[_Key, list[CachedTrace]] = {}
        self._flags: weakref.WeakKeyDictionary[CachedTrace, _Flags] = weakref.WeakKeyDictionary()
        self._calls = self._traced = 0
        self._fitting = self._again = 0
        self._by_parts = self._gives_up = False
        self._forward: weakref.ref[Any] | None = None
        self._tried: dict[_Key, int] = {}
        # Names of numbers that a traced pass has read and changed.
        self._counters: set[str] = set()
        # Flags at the time when all traces rested, number of calls in a row that found them at
        # rest, and number of calls since then.
        self._asleep: _Flags | None = None
        self._rested = self._slept = 0

    def traces(self) -> list[CachedTrace]:
        """Returns all traces."""
        return [cached for traces in self._kinds.values() for cached in traces]

    def call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inner: bool
    ) -> Any:
        """Runs a call of the module, with kept values in place of frozen work if possible.

        Args:
            module: Module that is called: this one, or a compiled one around it.
            args: Positional arguments.
            kwargs: Keyword arguments.
            inner: Whether this is a call inside another one, whose frozen modules are cached by
                themselves.
        """
        call = ModuleCall(module, args, kwargs, before_run=self._shared.offloading.bring_back)
        if self._by_parts:
            return _run_by_parts(call)
        if self._gives_up or self._sleeps():
            return call.run()
        before = self._traced
        output = self._call(call, inner)
        # A step may consist of calls of several kinds, so all traces must rest.
        at_rest = before == self._traced and all(one.at_rest for one in self.traces())
        self._rested = self._rested + 1 if at_rest else 0
        self._asleep = self._flags_of_now() if self._rested >= _LOOK_AGAIN else None
        return output

    def _sleeps(self) -> bool:
        """Returns whether a call runs without the cache and without any check."""
        if self._asleep is None or self._shared.moving:
            return False
        self._slept += 1
        return bool(self._slept % _LOOK_AGAIN) and self._flags_of_now() == self._asleep

    def _flags_of_now(self) -> _Flags:
        return (
            tuple([one.requires_grad for one in self._parameters]),
            tuple([part.training for part in self._modules]),
        )

    def _call(self, call: ModuleCall, inner: bool) -> Any:
        given = call.tensors
        shapes = tuple(
            [(one.shape, one.stride() if one.layout == torch.strided else (), one.dtype, one.device,
              one.requires_grad) for one in given]
        )  # fmt: skip
        device = given[0].device if given else torch.device("cpu")
        key = _switches(device), _plain_in(call.given), shapes
        self._calls += 1
        if any(map(_lies_between_lines, given)):
            self._tell("lines", messages.unaligned(self._name, LINE))
            return call.run()
        self._shared.moving.look()
        traces = self._kinds.get(key, [])
        if traces and traces[0].pauses:
            return traces[0].pass_by(call)
        for place, cached in enumerate(traces):
            if not cached.stale and not cached.is_outgrown and cached.guards.fit(call):
                self._fitting += 1
                traces.insert(0, traces.pop(place))
                filling = self._shared.filling
                if filling is not None and filling is self._module() and cached.fill(call):
                    raise Filled
                return cached.run(call)
        return self._call_anew(key, call, inner)

    def _call_anew(self, key: _Key, call: ModuleCall, inner: bool) -> Any:
        """Runs a call that fits no trace. It is traced if that may pay."""
        call.load()
        if self._has_another_forward(call.module):
            self._by_parts = True
            return _run_by_parts(call)
        given = call.tensors
        trained = self._trained()
        for cached in self.traces():  # parameters that were exchanged are gone now
            cached.selection.frozen.tell_if_lost()
        if inner and any(trained):
            return self._run_by_parts_for_now(call)
        if all(trained) or not _has_rows(given) or not all(map(_is_plain, given)):
            return call.run()
        if sharded := self._sharded():
            if all(one.requires_grad for one in sharded):  # what is frozen runs no collective
                return self._run_by_parts_for_now(call)
            self._tell("sharded", messages.sharded(self._name))
            return self._give_up(call)
        flags = self._flags_of_now()
        if self._is_smaller_than_others(key, flags, call.with_keys()):
            return call.run()
        before = self._before(key, flags)
        if before is not None and self._shared.filling is None and before.carry_on(call):
            call.begin_again()
            return before.run(call)
        if before is not None:  # more is frozen, which cannot happen often
            return self._trace(key, flags, call, None)
        if any(cached.history.broken for cached in self.traces()):
            return self._give_up(call)
        like = self._of_another_length(key, flags)
        again = like is not None and like.history.again
        traces = self._kinds.get(key, [])
        if self._traced and self._shared.overhead.is_over:
            return call.run()
        if not traces and len(self._kinds) >= (_MOST_LENGTHS if like is not None else _MOST):
            self._tell("signatures", messages.many_signatures(self._name, _MOST))
            return self._run_by_parts_for_now(call)
        if traces and self._again >= _FEW_TRACES + self._fitting // _FEW_TRACES:
            what = traces[0].guards.difference(call.given)
            self._tell("changes", messages.changes(self._name, what))
            return call.run()
        if self._traced == 0 and (functions := lineage.compiled_functions(call.module)):
            self._gives_up = True
            self._tell("compiled", messages.compiled(self._name, functions))
            return call.run()
        takes = like is not None and like.selection.takes_other_lengths
        if like is not None and not takes and len(self._kinds) >= _MANY_LENGTHS:
            self._tell("lengths", messages.other_lengths(self._name))
            return self._give_up(call)
        if like is not None and takes:
            output, ran = like.run_of_another_length(call)
            if ran:
                return output
        # Tracing takes time: few calls may be traced, and more if rows are known to come again.
        elif self._traced >= _FEW_TRACES + self._calls // (_FEW_TRACES if again else _MOST):
            self._tell_of_other_arguments(key)
            return call.run()
        return self._trace(key, flags, call, like)

    def _run_by_parts_for_now(self, call: ModuleCall) -> Any:
        self._rested = -1  # without traces, but its parts have theirs: it must not sleep
        return _run_by_parts(call)

    def _tell(self, about: str, sentence: str) -> None:
        self._shared.tell(f"{self._name}: {about}", sentence)

    def _tell_of_other_arguments(self, key: _Key) -> None:
        """Tells the user if strings or numbers among the arguments are others in every call."""
        alike = [other for other in self._kinds if (other[0], other[2]) == (key[0], key[2])]
        if len(alike) >= _FEW_TRACES and key not in self._kinds:
            self._tell("words", messages.other_arguments(self._name))

    def _give_up(self, call: ModuleCall) -> Any:
        """Runs this and all further calls without the cache."""
        self._gives_up = True
        hash_all(self.traces(), self._shared)
        for cached in self.traces():
            cached.free()
        self._kinds.clear()
        return call.run()

    def _has_another_forward(self, module: nn.Module) -> bool:
        """Returns whether the module runs another function than in the call before.

        Under DistributedDataParallel, Lightning gives the module a new function for each step.
        """
        forward, before = vars(module).get("forward"), self._forward
        try:
            self._forward = None if forward is None else weakref.ref(forward)
        except TypeError:  # an object without weak references
            self._forward = None
        return forward is not None and before is not None and before() is not forward

    def _sharded(self) -> list[torch.Tensor]:
        """Returns the parameters that lie in pieces on several processes.

        A process that skips frozen work would skip its collectives, for which the others wait.
        """
        tensors = sys.modules.get("torch.distributed.tensor")
        wrappers = sys.modules.get("torch.distributed.fsdp")
        piece = getattr(tensors, "DTensor", ())
        wrapper = getattr(wrappers, "FullyShardedDataParallel", ())
        if any(isinstance(part, wrapper) for part in self._modules):
            return self._parameters  # it mixes frozen and trained ones in one piece
        return [one for one in self._parameters if isinstance(one, piece)]

    def _trained(self) -> list[bool]:
        """Returns `requires_grad` of all parameters, including those of new submodules."""
        module = self._module()
        if module is not None:
            self._modules = list(module.modules())
        self._parameters = [
            one
            for part in self._modules
            for one in (vars(part).get("_parameters") or {}).values()
            if one is not None
        ]
        return [one.requires_grad for one in self._parameters]

    def _trace(self, key: _Key, flags: _Flags, call: ModuleCall, like: CachedTrace | None) -> Any:
        self._traced += 1
        self._again += key in self._kinds
        before = self._before(key, flags)
        self._shared.offloading.bring_back()
        # The pass may write to its inputs.
        copies = call.copies()
        around = ExternalState(self._modules, call.given)
        moving = self._shared.moving.tensors
        output, trace = lineage.trace(
            call.module,
            *call.args,
            moving=moving,
            code_frames=around.frames(),
            last_bits=self._shared.exact,
            **call.kwargs,
        )
        self._shared.stats.rows_computed += _rows(copies)
        if around.counter and around.counter not in self._counters:
            # It may have been set for good, at the first use of something: the next pass tells.
            self._counters.add(around.counter)
            return output
        name = self._words(call.module, copies)
        self._tried[key] = self._tried.get(key, 0) + 1
        last = self._tried[key] >= _TRIES
        like = like if like is not None and like.selection.takes_other_lengths else None
        cached = CachedTrace(self._shared, name, trace, around, copies, before, like, last)
        if cached.state is State.UNDECIDED:
            return output
        self._flags[cached] = flags
        if cached.state is State.BY_PARTS:
            self._by_parts = True
            return output
        if key not in self._kinds:
            self._note_shapes(key, cached)
        traces = self._kinds.get(key, [])
        kept = [cached, *(one for one in traces if not one.stale)][:_MOST]
        # Those that are dropped have served rows since the last hash.
        hash_all([one for one in traces if one not in kept], self._shared)
        self._kinds[key] = kept
        return output

    def _words(self, module: nn.Module, given: list[torch.Tensor]) -> str:
        """Returns the module's name with the mode and the shape of the call."""
        mode = "training" if module.training else "eval"
        shape = "x".join(map(str, given[0].shape))
        without = "" if torch.is_grad_enabled() else ", without gradients"
        return f"{self._name} ({mode} mode, {shape}{without})"

    def _note_shapes(self, key: _Key, cached: CachedTrace) -> None:
        alike = sum(other[:2] == key[:2] for other in self._kinds)
        if alike == _MANY_SHAPES and cached.history.traces == 1:
            self._shared.note(
                f"{self._name}: shapes", messages.many_shapes(self._name, _MANY_SHAPES)
            )

    def _before(self, key: _Key, flags: _Flags) -> CachedTrace | None:
        """Finds the last trace of the same calls that was made when less was frozen."""
        for cached in self._kinds.get(key, []):
            trained = self._flags[cached][0]
            less = all(one or not now for one, now in zip(trained, flags[0], strict=False))
            if less and trained != flags[0] and cached.has_rows:
                return cached
        return None

    def _of_another_length(self, key: _Key, flags: _Flags) -> CachedTrace | None:
        """Finds a trace of the same calls with rows of another length."""
        shapes = [one[0] for one in key[2]]
        for others, cached in self._alike(key, flags):
            length = cached.selection.batch.length
            resting = cached.state is State.RESTING
            if length and not resting and differ_in_length([o[0] for o in others], shapes, length):
                return cached
        return None

    def _is_smaller_than_others(self, key: _Key, flags: _Flags, given: list[torch.Tensor]) -> bool:
        """Gives the rows of a smaller batch to the traces of larger ones. Returns if any exist."""
        larger = [
            cached for shapes, cached in self._alike(key, flags) if _are_more_rows(shapes, given)
        ]
        for cached in larger:
            cached.take_smaller(given)
        return bool(larger)

    def _alike(self, key: _Key, flags: _Flags) -> Iterator[tuple[tuple[Any, ...], CachedTrace]]:
        """Yields the traces of calls in the same mode, each with the shapes of its inputs."""
        for (switches, plain, shapes), traces in self._kinds.items():
            if (switches, plain) == key[:2]:
                for cached in traces:
                    if self._flags[cached] == flags and not cached.stale:
                        yield shapes, cached


def _run_by_parts(call: ModuleCall) -> Any:
    """Runs a call whose frozen submodules are cached by themselves."""
    with calls.rooted():
        return calls.real_call(call.module, *call.args, **call.kwargs)


def _lies_between_lines(tensor: torch.Tensor) -> bool:
    return _is_plain(tensor) and tensor.numel() > 0 and off_line(tensor) > 0


def _rows(given: list[torch.Tensor]) -> int:
    return given[0].shape[0] if given[0].dim() else 1


def _are_more_rows(shapes: tuple[Any, ...], given: list[torch.Tensor]) -> bool:
    """Returns whether shapes are those of a larger batch of rows of the same kind."""
    if len(shapes) != len(given) or not shapes[0][0] or shapes[0][0][0] <= _rows(given):
        return False
    return all(
        tensor.dim() == len(shape) and tensor.dtype == dtype and tensor.shape[1:] == shape[1:]
        for tensor, (shape, _, dtype, _, _) in zip(given, shapes, strict=True)
    )


def _has_rows(given: list[torch.Tensor]) -> bool:
    first = next((one.shape[0] for one in given if one.dim()), 1)
    return bool(given) and first > 0


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.device.type != "meta"
    )


def _switches(device: torch.device) -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in ("cpu", "cuda")
        ),
        torch.get_default_dtype(),
        device_contexts.CURRENT_DEVICE,
        environment(device),
    )


def _plain_in(value: Any) -> Any:
    """Returns the numbers and strings among arguments, with their positions."""
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, float):
        return repr(value)  # -0.0 is equal to 0.0
    if type(value) in PLAIN_KINDS:
        return type(value), value
    if isinstance(value, (tuple, list)):
        return tuple([_plain_in(item) for item in value])
    if isinstance(value, dict):
        return tuple((str(key), _plain_in(item)) for key, item in value.items())
    return type(value)
