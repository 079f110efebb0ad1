"""Contents of the settings of modules: plain values, containers and objects in their attributes.

An example is the configuration of a Hugging Face model, which all its parts share.
"""

import ctypes
import sys
import threading
import types
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from itertools import chain, count
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from cachefreeze.lineage.structure import PLAIN_KINDS

# Largest number of entries of a container, and largest depth, that are compared.
_MANY, _DEEP = 10_000, 4
_SEQUENCES, _SETS = (list, tuple, deque), (set, frozenset)
# Types whose contents can change in place, although all objects stay the same.
_ARRAYS = (np.ndarray, bytearray, array)
# What shows something that lies elsewhere.
_WINDOWS = (ContextVar, threading.local, types.MappingProxyType, memoryview, weakref.ref, Iterator)
_C_DATA: Any = ctypes.c_int.__mro__[-2]
WINDOWS = (*_WINDOWS, bytearray, array, _C_DATA)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def content(value: Any, depth: int = 0) -> Any:
    """Returns a comparable description of a setting, or None if the value is not a setting.

    Args:
        value: Value of an attribute.
        depth: Number of objects around the value.
    """
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # -0.0 == 0.0, and they are two settings
    if type(value) in PLAIN_KINDS:
        return type(value), value
    if depth > _DEEP:
        return None
    if isinstance(value, _ARRAYS):
        plain = np.asarray(value)
        return type(value), plain.shape, str(plain.dtype), hash(plain.tobytes())
    if isinstance(value, (*_SEQUENCES, *_SETS)):
        items = list(value) if isinstance(value, _SEQUENCES) else sorted(value, key=repr)
        return type(value), [content(item, depth + 1) for item in items[:_MANY]]
    if isinstance(value, dict):
        pairs = list(value.items())[:_MANY]
        return type(value), [(repr(key), content(item, depth + 1)) for key, item in pairs]
    held = attributes_of(value)
    return (type(value), content(held, depth)) if held is not None else None


def shown_by(value: Any) -> Any:
    """Returns what one of `WINDOWS` shows, as bytes or a plain container of Python.

    An iterator shows a new number each time, since reading it changes it.
    """
    if isinstance(value, ContextVar):
        return [value.get(None)]
    if isinstance(value, threading.local):
        return dict(vars(value))
    if isinstance(value, types.MappingProxyType):
        return dict(value)
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, Iterator):
        return next(_numbers)
    return bytes(value)


_numbers = count()


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Returns the attributes of a plain object. None for tensors, modules, classes, functions."""
    if isinstance(value, (torch.Tensor, nn.Module, type, types.ModuleType, *_FUNCTIONS)):
        return None
    held = getattr(value, "__dict__", None)
    slots = _slots(type(value))
    if slots:
        there = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        return {**there, **(held if isinstance(held, dict) else {})}
    return held if isinstance(held, dict) else None


def _slots(kind: type) -> list[str]:
    """Returns the names of the attributes in `__slots__`, for classes of user code."""
    if kind.__module__.partition(".")[0] in _NO_SLOTS:
        return []
    return [
        name
        for one in kind.__mro__
        for name, value in vars(one).items()
        if isinstance(value, types.MemberDescriptorType)
    ]


_NO_SLOTS = frozenset(("builtins", "torch", "numpy", "cachefreeze", *sys.stdlib_module_names))


def _never_the_same(held: dict[Any, Any]) -> object:
    return object()


# Number that is another one as soon as somebody has assigned to an entry of a dictionary. torch's
# compiler relies on it, too. Without it, entries are compared one by one.
dict_version: Callable[[Any], Any] = getattr(
    torch._C._dynamo.guards, "dict_version", _never_the_same
)


class Glance:
    """Quick comparison of settings by the identity of all objects in them, in one pass in C.

    If an object was replaced, the contents may still be equal.

    Args:
        values: Settings.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self._views: list[Iterable[Any]] = []
        self._objects: list[Any] = []
        self._dicts: list[dict[str, Any]] = []
        # These objects are kept alive, since the identity of a deleted object may be used again.
        self._alive: list[Any] = []
        self._sees_all = True
        for value in values:
            self._open(value, 0)
        self._ids = [*map(id, chain.from_iterable(self._views))]

    def _open(self, value: Any, depth: int) -> None:
        if type(value) in PLAIN_KINDS:
            self._alive.append(value)
            return
        if depth > _DEEP:
            return
        if isinstance(value, (*_ARRAYS, *WINDOWS)):
            self._sees_all = False
            return
        if isinstance(value, dict):
            self._sees_all &= len(value) <= _MANY and all(
                type(key) in PLAIN_KINDS or isinstance(key, type) for key in value
            )
            self._alive += list(value)[:_MANY]
            self._views += [value, value.values()]
            items = list(value.values())
        elif isinstance(value, (*_SEQUENCES, *_SETS)):
            self._sees_all &= len(value) <= _MANY
            self._views.append(value)
            items = list(value)
        else:
            held = attributes_of(value)
            if held is not None and _slots(type(value)):
                self._sees_all = False
            elif held is not None:
                self._objects.append(value)
                self._dicts.append(held)
                self._open(held, depth)
            return
        for item in items[:_MANY]:
            self._open(item, depth + 1)

    @property
    def size(self) -> int:
        """Number of objects that are compared."""
        return len(self._ids)

    def is_same(self) -> bool:
        """Returns whether all objects are the same. False if this comparison cannot tell."""
        return (
            self._sees_all
            and [*map(id, chain.from_iterable(self._views))] == self._ids
            and all(map(is_, map(_dict_of, self._objects), self._dicts))
        )


def _dict_of(value: Any) -> Any:
    # Does not call a `__getattribute__` of the class, which would cost more than all the rest.
    return object.__getattribute__(value, "__dict__")
