"""What a unit computes, written down so that it can be hashed."""

import contextlib
import enum
import functools
import inspect
import uuid
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from types import CodeType, FunctionType

import numpy as np
import torch
from torch import Tensor, fx, nn

from cachefreeze.hashing import tensors_sha256


class Sources:
    """The source code of the classes of modules, as it was when this was made.

    Read once: a file that is edited while a run goes on must neither stop the run nor change what
    the run says of the code that it is running.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._texts: dict[type, str] = {}
        for kind in {kind for module in modules for kind in type(module).__mro__}:
            # torch's own classes change with its version only, which is hashed anyway.
            if not kind.__module__.startswith(("torch.", "builtins")):
                # Not to be had of classes defined at a prompt, or compiled; or the file is broken.
                with contextlib.suppress(OSError, TypeError, SyntaxError):
                    self._texts[kind] = inspect.getsource(kind)

    def of(self, module: nn.Module) -> list[str]:
        """Of the module's class and its bases."""
        return [self._texts[kind] for kind in type(module).__mro__ if kind in self._texts]


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
        settings = {
            key: plain(value)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and key not in ("training", "train")
        }
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
    if isinstance(value, FunctionType) and value.__closure__ is None:
        return (value.__module__, value.__qualname__, code(value.__code__))
    if inspect.isbuiltin(value):
        return (value.__module__, value.__qualname__)
    if type(value).__module__ == "torch":  # dtypes, devices, memory formats
        return repr(value)
    return uuid.uuid4().hex


def code(value: CodeType) -> object:
    """What a function does: its instructions, names and constants."""
    constants = [code(c) if isinstance(c, CodeType) else repr(c) for c in value.co_consts]
    return (value.co_code, value.co_names, constants)
