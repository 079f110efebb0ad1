"""Operations that lead to a value, in a form that is the same in another model or run."""

import enum
import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from cachefreeze.keys.external_state import read_by_code
from cachefreeze.lineage.module_calls import CallOf
from cachefreeze.lineage.operations import Modes, Operation, Trace
from cachefreeze.lineage.program import Program
from cachefreeze.lineage.soundness import PARTS
from cachefreeze.lineage.structure import PLAIN_KINDS, Built, Ref, numbers


@dataclass(frozen=True)
class Lineage:
    """How a value is computed.

    Attributes:
        digest: Hash of the operations, their constants, and the shapes and dtypes of the inputs.
        inputs: Positions of the inputs that the value depends on, in the order of their first use.
        states: Numbers of the parameters and buffers that the value depends on, in the same order.
        portable: Whether the digest means the same in another process. It does not if something has
            no name, such as a function that is defined inside another one, or if an operation
            consists of code from outside torch, because that code may be edited.
    """

    digest: bytes
    inputs: tuple[int, ...]
    states: tuple[int, ...]
    portable: bool


def lineage_of(trace: Trace, number: int, program: Program) -> Lineage:
    """Finds the lineage of a value."""
    writer = _Writer(trace)
    for operation in program.needed([number], ()):
        writer.operation(operation)
    text = f"{writer.text()}\n-> {writer.name(number)}"
    return Lineage(
        xxhash.xxh3_128_digest(text.encode()),
        tuple(writer.inputs),
        tuple(writer.states),
        writer.portable,
    )


class _Writer:
    """Writes operations as text. Tensors are named in the order of their first use."""

    def __init__(self, trace: Trace) -> None:
        self.inputs: list[int] = []
        self.states: list[int] = []
        self.portable = True
        self._trace = trace
        self._names: dict[int, str] = {}
        self._lines: list[str] = []
        self._inputs = {number: place for place, number in enumerate(trace.inputs)}
        self._states = {state.value for state in trace.states}

    def text(self) -> str:
        return "\n".join(self._lines)

    def operation(self, one: Operation) -> None:
        args, kwargs = self._told(one.args), self._told(one.kwargs)
        reads = ",".join(self.name(number) for number in one.reads)
        line = f"{self._function(one.func)}({args};{kwargs};{reads}) {_modes(one.modes)}"
        made = ",".join(self.name(number) for number in one.makes)
        writes = ",".join(f"{self.name(old)}>{self.name(new)}" for old, new in one.writes)
        places = ",".join(self.name(number) for number in numbers(one.output))
        self._lines.append(f"{line} {places} {made} {writes}")

    def name(self, number: int) -> str:
        name = self._names.get(number)
        if name is not None:
            return name
        value = self._trace.values[number]
        about = f"{value.dtype}{value.shape}{value.stride}{value.device}{value.requires_grad}"
        if value.off_line:
            about += f"@{value.off_line}"
        if number in self._inputs:
            name = f"input{len(self.inputs)}"
            self.inputs.append(self._inputs[number])
            self._lines.append(f"{name} {about}")
        elif number in self._states:
            name = f"state{len(self.states)}"
            self.states.append(number)
            self._lines.append(f"{name} {about}")
        else:
            name = f"value{len(self._names)}"
        self._names[number] = name
        return name

    def _function(self, func: Callable[..., Any]) -> str:
        if isinstance(func, CallOf):
            module = func.module()
            return self._unnamed(func) if module is None else self._module(module)
        return self._named(func)

    def _named(self, value: Any) -> str:
        """Returns the path of a function or class, or a serial number if it has none."""
        owner = getattr(value, "__self__", None)
        name = getattr(value, "__qualname__", "") or getattr(value, "__name__", "")
        if type(value).__name__ == "method-wrapper" and owner is not None:
            # A property of tensors, such as `Tensor.shape.__get__`.
            return f"{name} of {getattr(owner, '__qualname__', None) or self._unnamed(value)}"
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            if str(value).partition(".")[0] not in _OWN_OPERATORS:
                self.portable = False
            return f"torch.ops.{value}"
        where = getattr(value, "__module__", None) or ""
        if isinstance(owner, type):
            return f"{self._named(owner)}.{name}"
        if (
            _found(where, name) is value
            or getattr(torch.Tensor, name.split(".")[-1], _NONE) is value
        ):
            self._somebodys(where)
            return f"{where}.{name}"
        # The qualified name of `torch.zeros` contains a hidden class, and that of `max_pool2d` the
        # function that made it.
        for short in (name.split(".")[-1], getattr(value, "__name__", "")):
            for space in (torch, torch._C._nn, torch.nn.functional):
                if short and getattr(space, short, _NONE) is value:
                    return f"{space.__name__}.{short}"
        return self._unnamed(value)

    def _somebodys(self, where: str) -> None:
        """Marks the text as not portable if it names code that may differ in another process."""
        if where and where.partition(".")[0] not in _SAME_EVERYWHERE:
            self.portable = False

    def _unnamed(self, value: Any) -> str:
        self.portable = False
        return f"unnamed {_serial(value)}"

    def _module(self, module: nn.Module) -> str:
        """Describes a module that is one operation: its class, and all that its code can read."""
        told = [self._named(type(module)), str(module.training)]
        held = vars(module)
        for key in sorted(held):
            if key in PARTS:
                hooks = "hook" in key and bool(held[key])
                told.append(self._unnamed(module) if hooks else "")
            elif not isinstance(held[key], torch.Tensor):
                told.append(f"{key}={self._told(held[key])}")
        for kind in ("_parameters", "_buffers"):
            told += [f"{key}:{one is not None}" for key, one in (held.get(kind) or {}).items()]
        for key, part in (held.get("_modules") or {}).items():
            told.append(f"{key}({self._module(part)})" if part is not None else key)
        told += [f"{name}={self._told(value)}" for name, value in read_by_code(type(module))]
        if "_parameters" not in held:  # a scripted module
            told.append(self._unnamed(module))
        return f"[{' '.join(told)}]"

    def _told(self, value: Any) -> str:
        kind = type(value)
        if isinstance(value, Ref):
            return self.name(value.number)
        if isinstance(value, enum.Enum):
            return f"{self._named(kind)}.{value.name}"
        if kind in PLAIN_KINDS or isinstance(value, (torch.dtype, torch.device, torch.layout)):
            return f"{kind.__name__} {value!r}"
        if isinstance(value, torch.memory_format) or value is Ellipsis:
            return repr(value)
        if isinstance(value, slice):
            return f"slice({self._told((value.start, value.stop, value.step))})"
        if isinstance(value, (tuple, list)):
            return f"{kind.__name__}[{','.join(map(self._told, value))}]"
        if isinstance(value, dict):
            items = (f"{self._told(key)}:{self._told(item)}" for key, item in value.items())
            return f"{kind.__name__}{{{','.join(items)}}}"
        if isinstance(value, (set, frozenset)):
            return f"{kind.__name__}{{{','.join(sorted(map(self._told, value)))}}}"
        if isinstance(value, Built):
            return f"built[{','.join(map(self._told, value))}]"
        if isinstance(value, functools.partial):
            return f"partial[{self._told((value.func, value.args, value.keywords))}]"
        if isinstance(value, type) or callable(value):
            return self._named(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            digest = xxhash.xxh3_128_hexdigest(value.tobytes())
            return f"array {value.dtype.str}{value.shape}{digest}"
        return self._unnamed(value)


# Packages whose versions are part of the environment, or of Python.
_SAME_EVERYWHERE = (
    "torch",
    "torchvision",
    "builtins",
    "math",
    "operator",
    "collections",
    "_operator",
)
_OWN_OPERATORS = ("aten", "prims", "torchvision")


_NONE = object()
_numbers = count()
_known: dict[int, tuple[Any, int]] = {}


def _serial(value: Any) -> int:
    """Returns a number for an object without a name. It is never given to another object."""
    number = id(value)
    known = _known.get(number)
    if known is None:
        try:
            held: Any = weakref.ref(value, lambda _: _known.pop(number, None))
        except TypeError:
            held = value
        known = _known[number] = held, next(_numbers)
    return known[1]


def _found(where: str, name: str) -> Any:
    found: Any = sys.modules.get(where)
    for part in name.split("."):
        found = getattr(found, part, _NONE)
    return found


def _modes(modes: Modes) -> str:
    return f"{modes.grad:d}{modes.inference:d}{modes.autocast}"
