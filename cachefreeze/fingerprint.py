"""What a unit computes, written down so that it can be hashed."""

import enum
import functools
import inspect
import sys
import uuid
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import numpy as np
import torch
from torch import Tensor, fx, nn

from cachefreeze.hashing import tensors_sha256


class Sources:
    """What the classes of modules do, as it was when this was made: their functions and constants,
    and all that those use."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._texts: dict[type, str] = {}
        for kind in {kind for module in modules for kind in type(module).__mro__}:
            # torch's own classes change with its version only, which is hashed anyway.
            if kind is not object and not kind.__module__.startswith("torch."):
                # Its source may not be there (a notebook, a prompt), and does not say what the
                # functions are that it calls: what was compiled does.
                self._texts[kind] = repr(members(kind))

    def of(self, module: nn.Module) -> list[str]:
        """Of the module's class and its bases."""
        return [self._texts[kind] for kind in type(module).__mro__ if kind in self._texts]


# What every module has, and what freezing and cutting leave on one.
OF_TORCH = {*vars(nn.Module()), "train", "_mode_of"}
# Begins what is another text each time: of what cannot be written down.
UNKNOWN = "unknown:"


def members(kind: type) -> object:
    """What a class does: its functions and constants."""
    result = []
    for name, value in sorted(vars(kind).items()):
        # Of properties, class methods and the like: the function that is behind them.
        for inside in ("fget", "func", "__func__", "__wrapped__"):
            value = getattr(value, inside, None) or value
        python_s_own = name.startswith("__") and not isinstance(value, FunctionType)
        if not python_s_own and name != "_abc_impl":
            result.append((name, plain(value)))
    return result


def settings_of(module: nn.Module) -> dict[str, object]:
    """A module's attributes, but for what torch keeps there."""
    torchs = type(module).__module__.startswith("torch.")
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if name not in OF_TORCH and not (torchs and name.startswith("_"))
    }


def structure(unit: nn.Module, sources: Sources) -> list[object]:
    """All that a unit's output depends on besides its input: for every module in it the class and
    its code, its settings, hooks, and the bits and memory layout of its parameters and buffers."""
    result: list[object] = []
    for name, module in unit.named_modules():
        kind = type(module)
        tensors = [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]
        settings = {name: plain(value) for name, value in settings_of(module).items()}
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        result += [
            (name, kind.__module__, kind.__qualname__, module.extra_repr()),
            sources.of(module),
            settings,
            plain(hooks),
            steps(module),
            tensors_sha256(tensors),
            [tensor.stride() for _, tensor in tensors],
        ]
    return result


def steps(module: nn.Module) -> object:
    """What a module does that was cut out of another one: its code, and the functions in it."""
    if not isinstance(module, fx.GraphModule):
        return None
    called = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return module.code, plain(called)


def plain(value: object) -> object:
    """A value as something whose `repr` is equal if and only if the values are.

    Of what cannot be written down so, every time another one: it makes a fingerprint that nothing
    matches, and a store that is not used again, which costs time but never a wrong row.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, Tensor):
        return tensors_sha256([("", value)])
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return plain(torch.from_numpy(value.view(np.uint8))), value.shape, str(value.dtype)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, enum.Enum):
        return type(value).__qualname__, plain(value.value)
    if isinstance(value, functools.partial):
        return plain([value.func, value.args, value.keywords])
    if isinstance(value, Mapping):
        return [(plain(key), plain(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Set):
        return sorted(repr(plain(item)) for item in value)
    if isinstance(value, type):
        return (value.__module__, value.__qualname__)
    if isinstance(value, FunctionType):
        return function(value)
    if inspect.isbuiltin(value):
        return (value.__module__, value.__qualname__)
    if type(value).__module__ == "torch":  # dtypes, devices, memory formats
        return repr(value)
    return UNKNOWN + uuid.uuid4().hex


# Functions that are being written down: they may call themselves, and each other.
_busy: set[int] = set()


def function(value: FunctionType) -> object:
    """What a function does: its code, and all that it does it with."""
    named = (value.__module__, value.__qualname__)
    torchs = str(value.__module__).split(".")[0] == "torch"  # whose version is hashed
    if torchs or id(value) in _busy:
        return named
    _busy.add(id(value))
    try:
        names = names_in(value.__code__)
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return (
            *named,
            code(value.__code__),
            plain([value.__defaults__, value.__kwdefaults__]),
            # (`super()` needs the class that it stands in: whoever asks about that has it.)
            [_used(cell.cell_contents, names) for name, cell in cells if name != "__class__"],
            [
                (name, _used(each, names))
                for name, each in sorted(inspect.getclosurevars(value).globals.items())
            ],
        )
    except ValueError:  # a cell that is still empty
        return UNKNOWN + uuid.uuid4().hex
    finally:
        _busy.discard(id(value))


def _used(value: object, names: Set[str]) -> object:
    """What a function has of something that it uses, by these names."""
    if not isinstance(value, type | ModuleType):
        return plain(value)
    module = value.__name__ if isinstance(value, ModuleType) else value.__module__
    named, release = (module, getattr(value, "__qualname__", None)), _release(module)
    if release is not None or id(value) in _busy:
        return named, release
    _busy.add(id(value))
    try:
        if isinstance(value, ModuleType):
            used = [name for name in sorted(names) if hasattr(value, name)]
            return named, [(name, _used(getattr(value, name), names)) for name in used]
        kinds = [kind for kind in value.__mro__ if _release(kind.__module__) is None]
        return named, [members(kind) for kind in kinds]
    finally:
        _busy.discard(id(value))


def _release(module: str) -> str | None:
    """Which one of a package a module is of, if packages of its kind change with that alone: torch
    (whose version is hashed anyway), Python's own, and what says its version."""
    package = module.split(".")[0]
    if package in ("torch", *sys.stdlib_module_names):
        return ""
    version = getattr(sys.modules.get(package), "__version__", None)
    return None if version is None else str(version)


def names_in(value: CodeType) -> Set[str]:
    """All names of globals and attributes that code uses, that of functions inside it too."""
    inside = (each for each in value.co_consts if isinstance(each, CodeType))
    return frozenset(value.co_names).union(*map(names_in, inside))


def code(value: CodeType) -> object:
    """What a function does: its instructions, names and constants."""
    return (value.co_code, value.co_names, [_constant(each) for each in value.co_consts])


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return code(value)
    if isinstance(value, frozenset):  # whose order is another one in each process
        return sorted(repr(_constant(each)) for each in value)
    if isinstance(value, tuple):
        return [_constant(each) for each in value]
    return repr(value)
