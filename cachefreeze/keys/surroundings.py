"""What the code of modules reads beside its arguments, parameters and buffers.

Attributes that are no numbers or strings (tensors, functions, tuples, arrays), functions that were
put in the place of others, global variables, closures, and attributes of classes. What a traced
pass says holds for a later one only if all these are the same.
"""

import enum
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import xxhash
from torch import nn

from cachefreeze.lineage.contents import Glance, content
from cachefreeze.lineage.soundness import PARTS
from cachefreeze.lineage.structure import PLAIN_KINDS, is_tensor

_Read = Callable[[], Any]
_NONE = object()
# Depth of calls, and number of functions, that are looked into.
_DEEP, _MANY_FUNCTIONS = 3, 200
# Bytes of an array, and number of entries of a container, that are compared.
_LARGE, _MANY = 1 << 16, 500
_READ_BY_CODE = (tuple,)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_FOREIGN = ("torch", "numpy", "builtins")


class Surroundings:
    """What the code of some modules reads now, to be compared later.

    Args:
        modules: Modules.
        given: Arguments of a call. Functions among them are looked into.
    """

    def __init__(self, modules: Iterable[nn.Module], given: Any) -> None:
        # By identity, those that need not be held by weak reference, others opened each time.
        self._fixed: list[tuple[str, _Read, Any]] = []
        self._held: list[tuple[str, _Read, weakref.ref[Any]]] = []
        self._opened: list[tuple[str, _Read, Any, list[weakref.ref[Any]]]] = []
        self._objects: list[tuple[str, _Read, Any, Any]] = []
        self._glance: Glance | None = None
        seen: set[int] = set()
        modules = list(modules)
        for name, read in _attributes(modules):
            # The signature of a trace compares what containers and plain objects hold.
            self._add(name, read, _CONTAINERS)
        for name, read in _code(modules, given, seen):
            self._add(name, read, _READ_BY_CODE)

    def _add(self, name: str, read: _Read, known: tuple[type, ...]) -> None:
        value = read()
        if any(name == other[0] and read() is other[1]() for other in self._opened):
            return
        if type(value) in PLAIN_KINDS or (isinstance(value, known) and _is_plain(value, 0)):
            self._fixed.append((name, read, value))
        elif known is _READ_BY_CODE and _is_namespace(value):
            if not any(other is value and name == named for named, _, other, _ in self._objects):
                self._objects.append((name, read, value, content(value)))
        elif isinstance(value, (*_CONTAINERS, np.ndarray)):
            alive: list[weakref.ref[Any]] = []
            self._opened.append((name, read, _told(value, alive), alive))
        else:
            try:
                self._held.append((name, read, weakref.ref(value)))
            except TypeError:
                self._fixed.append((name, read, value))

    def settle(self) -> None:
        """Forgets what the pass itself has changed, such as a counter."""
        self._fixed = [one for one in self._fixed if _is_fixed(one)]
        self._held = [one for one in self._held if _is_held(one)]
        self._opened = [one for one in self._opened if _is_opened(one)]
        self._objects = [one for one in self._objects if _is_object(one)]
        self._glance = None

    def difference(self) -> str:
        """Names something that has changed, or returns an empty string."""
        for one in self._fixed:
            if not _is_fixed(one):
                return one[0]
        for other in self._held:
            if not _is_held(other):
                return other[0]
        for opened in self._opened:
            if not _is_opened(opened):
                return opened[0]
        if self._glance is None:
            self._glance = Glance([value for _, _, value, _ in self._objects])
        same = all(read() is value for _, read, value, _ in self._objects)
        if not same or not self._glance.is_same():
            for one_object in self._objects:
                if not _is_object(one_object):
                    return one_object[0]
        return ""


def _is_fixed(one: tuple[str, _Read, Any]) -> bool:
    now, value = one[1](), one[2]
    if now is value:
        return True
    return type(now) is type(value) and type(value) in _COMPARED and repr(now) == repr(value)


_COMPARED = PLAIN_KINDS | {tuple, list, dict, set, frozenset}


def _is_object(one: tuple[str, _Read, Any, Any]) -> bool:
    return content(one[1]()) == one[3]


def _is_held(one: tuple[str, _Read, "weakref.ref[Any]"]) -> bool:
    now = one[1]()
    return now is not None and one[2]() is now


def _is_opened(one: tuple[str, _Read, Any, list["weakref.ref[Any]"]]) -> bool:
    return all(ref() is not None for ref in one[3]) and _told(one[1](), []) == one[2]


def _told(value: Any, alive: list["weakref.ref[Any]"], depth: int = 0) -> Any:
    """Describes a value by what it holds, and objects by their identity.

    Args:
        value: Value.
        alive: Where weak references to those objects go. An identity says something as long as
            they live.
        depth: Depth of the value in others.
    """
    kind = type(value)
    if kind in PLAIN_KINDS:
        return kind, repr(value)
    if isinstance(value, np.ndarray) and value.dtype != object and value.nbytes <= _LARGE:
        return kind, value.shape, str(value.dtype), xxhash.xxh3_128_digest(value.tobytes())
    if depth <= _DEEP and isinstance(value, dict):
        items = list(value.items())[:_MANY]
        return kind, len(value), [(repr(key), _told(one, alive, depth + 1)) for key, one in items]
    if depth <= _DEEP and isinstance(value, (list, tuple)):
        return kind, len(value), [_told(one, alive, depth + 1) for one in value[:_MANY]]
    try:
        alive.append(weakref.ref(value))
    except TypeError:
        return kind, (len(value) if isinstance(value, _CONTAINERS) else id(value))
    return id(value)


def _is_plain(value: Any, depth: int) -> bool:
    """Says whether a value holds numbers and strings only."""
    kind = type(value)
    if kind in PLAIN_KINDS:
        return True
    if kind not in _COMPARED or depth > _DEEP or len(value) > _MANY:
        return False
    return all(_is_plain(one, depth + 1) for one in (value.values() if kind is dict else value))


def _attributes(modules: list[nn.Module]) -> Iterator[tuple[str, _Read]]:
    """Yields attributes, with a name for people and a function that reads each again."""
    for module in modules:
        held = vars(module)
        for key, value in held.items():
            if key not in PARTS and type(value) not in PLAIN_KINDS:
                yield f"`{key}` of {type(module).__name__}", functools.partial(held.get, key, _NONE)


def _code(modules: list[nn.Module], given: Any, seen: set[int]) -> Iterator[tuple[str, _Read]]:
    """Yields what code reads beside attributes, in the same way."""
    for module in modules:
        for key, value in list(vars(module).items()):
            if key not in PARTS and isinstance(value, _FUNCTIONS):
                yield from _in_function(value, type(module), seen, 0)
    for kind in dict.fromkeys(map(type, modules)):
        yield (
            f"`forward` of {kind.__name__}",
            functools.partial(getattr, kind, "forward", _NONE),
        )
        yield from _in_function(getattr(kind, "forward", None), kind, seen, 0)
    for function in _functions_in(given, 0):
        yield from _in_function(function, None, seen, 0)


def read_by_code(kind: type[nn.Module]) -> list[tuple[str, Any]]:
    """Returns what the code of a class reads beside arguments and attributes, each with a name.

    Args:
        kind: Class of modules.
    """
    found = _in_function(getattr(kind, "forward", None), kind, set(), 0)
    return [(name, read()) for name, read in found]


def _functions_in(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, _FUNCTIONS):
        yield value
    elif isinstance(value, (tuple, list, dict)) and depth <= _DEEP:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _functions_in(one, depth + 1)


def _in_function(
    function: Any, owner: type | None, seen: set[int], depth: int
) -> Iterator[tuple[str, _Read]]:
    """Yields what a function reads beside its arguments, and what functions that it calls read.

    Args:
        function: Function, method or partial.
        owner: Class of the object that `self` is.
        seen: Identities of the functions that were looked into.
        depth: Depth of calls.
    """
    if isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None or id(function) in seen or depth > _DEEP or len(seen) > _MANY_FUNCTIONS:
        return
    if (function.__module__ or "").startswith(_FOREIGN):
        return
    seen.add(id(function))
    found: list[tuple[str, _Read]] = [
        (f"`{name}` of {function.__qualname__}", functools.partial(_content, cell))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
    ]
    space = function.__globals__
    for name in _names(code):
        if name in space:
            found.append(
                (f"the global variable `{name}`", functools.partial(space.get, name, _NONE))
            )
            if isinstance(space[name], types.ModuleType):
                found.pop()
                found += _in_module(space[name], code)
            elif isinstance(space[name], type) and not _is_foreign(space[name]):
                found.pop()
                found += [
                    (f"`{key}` of {name}", functools.partial(getattr, space[name], key, _NONE))
                    for key in _names(code)
                    if key in vars(space[name])
                ]
        elif owner is not None and hasattr(owner, name):
            found.append(
                (f"`{name}` of {owner.__name__}", functools.partial(getattr, owner, name, _NONE))
            )
    for name, read in found:
        value = read()
        if isinstance(value, (types.FunctionType, functools.partial)):
            yield name, read
            yield from _in_function(value, owner, seen, depth + 1)
        elif _is_setting(value):
            yield name, read


def _in_module(module: types.ModuleType, code: types.CodeType) -> list[tuple[str, _Read]]:
    if module.__name__.startswith(_FOREIGN):
        return []
    space = vars(module)
    return [
        (f"`{name}` of {module.__name__}", functools.partial(space.get, name, _NONE))
        for name in _names(code)
        if name in space
    ]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _names(one)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _NONE


def _is_setting(value: Any) -> bool:
    return (
        type(value) in PLAIN_KINDS
        or isinstance(value, (*_CONTAINERS, np.ndarray))
        or _is_namespace(value)
        or (is_tensor(value) and not value.requires_grad)
    )


def _is_foreign(kind: type) -> bool:
    return (kind.__module__ or "").startswith(_FOREIGN)


def _is_namespace(value: Any) -> bool:
    """Says whether a value is a plain object of somebody's own, such as a configuration."""
    kind = type(value)
    closed = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, enum.Enum)
    if isinstance(value, closed) or is_tensor(value) or _is_foreign(kind):
        return False
    if (kind.__module__ or "").partition(".")[0] in sys.stdlib_module_names:  # such as a logger
        return False
    return isinstance(getattr(value, "__dict__", None), dict) and Glance([value]).size <= _MANY
