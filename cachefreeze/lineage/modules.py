"""Finds the modules that a callable uses, and the tensors that these modules hold."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cachefreeze.lineage.soundness import PARTS
from cachefreeze.lineage.structure import PLAIN_KINDS, is_tensor

_CONTAINERS = (list, tuple, dict)


def modules_of(call: Callable[..., Any]) -> list[tuple[str, nn.Module]]:
    """Returns the modules that a callable uses, each with a name. Parts of these are not listed.

    A module is found if it is the callable itself, the owner of a bound method, an argument of a
    `functools.partial`, in a closure, a default argument, or a global variable that the code names.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    seen: set[int] = set()

    def look(value: Any, name: str, depth: int) -> None:
        if isinstance(value, nn.Module):
            found.setdefault(id(value), (name, value))
        elif id(value) in seen or depth > 4:
            return
        elif isinstance(value, _CONTAINERS):
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                look(item, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(value, functools.partial):
            for item in (value.func, value.args, value.keywords):
                look(item, name, depth + 1)
        elif inspect.ismethod(value):
            look(value.__self__, "", depth + 1)
            look(value.__func__, name, depth + 1)
        elif inspect.isfunction(value):
            seen.add(id(value))
            for key, item in _closed_over(value):
                look(item, key, depth + 1)
            for key, item in _globals_of(value):
                if isinstance(item, nn.Module):
                    look(item, key, depth + 1)
            for item in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                look(item, "", depth + 1)
        elif _opens(value, depth):
            _look_inside(value, name, depth)

    def _look_inside(value: Any, name: str, depth: int) -> None:
        seen.add(id(value))
        if inspect.ismodule(value):
            return
        for key, item in list(vars(value).items()):
            look(item, f"{name}.{key}" if name else key, depth + 1)

    look(call, "", 0)
    parts = {id(part) for _, one in found.values() for part in one.modules() if part is not one}
    return [pair for pair in found.values() if id(pair[1]) not in parts]


def _opens(value: Any, depth: int) -> bool:
    """Returns whether the attributes of an object are searched for modules."""
    if not hasattr(value, "__dict__") or isinstance(value, type):
        return False
    return depth <= 1 or not callable(value)


def _closed_over(function: Any) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue


def _globals_of(function: Any) -> Iterator[tuple[str, Any]]:
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def compiled_functions(module: nn.Module) -> list[str]:
    """Returns the names of compiled functions that the code of a module or its parts uses.

    These functions run uncompiled while a pass is traced, and their results may differ in the last
    bits. They are found among the attributes of modules and the global variables of the modules'
    code, and in functions that this code calls directly.
    """
    found: dict[str, None] = {}
    seen: set[int] = set()

    def look(function: Any, depth: int) -> None:
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not inspect.isfunction(function) or id(function) in seen:
            return
        seen.add(id(function))
        for name, value in (*_globals_of(function), *_closed_over(function)):
            if _is_compiled(value):
                found[name] = None
            elif depth and getattr(value, "__module__", "torch").split(".")[0] != "torch":
                look(value, depth - 1)

    for part in module.modules():
        for name, value in vars(part).items():
            # A compiled module is traced as one operation, and stays compiled.
            if _is_compiled(value) and name not in ("forward", "_compiled_call_impl"):
                found[name] = None
        if not type(part).__module__.startswith("torch."):
            look(type(part).forward, 1)
    return list(found)


def _is_compiled(value: Any) -> bool:
    return inspect.isfunction(value) and hasattr(value, "_torchdynamo_orig_callable")


def states_of(prefix: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors that a module and its parts hold, each with a name.

    Parameters and buffers come first. Tensors in plain attributes, lists and dictionaries follow.
    """
    attributes: list[tuple[str, torch.Tensor]] = []
    for path, part in module.named_modules(prefix=prefix):
        dot = f"{path}." if path else ""
        held = vars(part)
        if "_parameters" not in held:  # a scripted module
            for key, tensor in (*part.named_parameters("", False), *part.named_buffers("", False)):
                yield dot + key, tensor
            continue
        for kind in ("_parameters", "_buffers"):
            for key, tensor in held[kind].items():
                if tensor is not None:
                    yield dot + key, tensor
        for key, value in held.items():
            if key in PARTS or type(value) in PLAIN_KINDS:
                continue
            if is_tensor(value):
                attributes.append((dot + key, value))
            elif isinstance(value, _CONTAINERS) and not key.startswith("_"):
                items = value.values() if isinstance(value, dict) else value
                attributes += [(dot + key, one) for one in items if isinstance(one, torch.Tensor)]
    yield from attributes
