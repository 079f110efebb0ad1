"""Finds what code reads beside its arguments: globals, closures, defaults, attributes of classes.

Only functions that ran in a pass are looked into. Another function can run in the next pass only if
something that these functions read has changed, and that is noticed.
"""

import builtins
import functools
import gc
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from cachefreeze.keys import bytecode
from cachefreeze.lineage.contents import attributes_of
from cachefreeze.lineage.frames import Frames
from cachefreeze.lineage.structure import PLAIN_KINDS, is_tensor

NONE = object()
# Limits on what is looked into: depth, and number of entries of a container.
_DEEP, _MANY = 3, 500
_CONTAINERS = (list, tuple, dict, set, frozenset)
# Packages that are not looked into: their versions are part of the environment, or they change no
# results.
_FOREIGN = frozenset({"torch", "numpy", "builtins", "cachefreeze", *sys.stdlib_module_names})
# Packages among them in which people replace functions by their own.
_PATCHED = ("torch", "numpy")
PARTS_OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__")
_BUILTINS = vars(builtins)


class Place:
    """Place that code reads a value from.

    Args:
        name: Name of the place, for messages.
        read: Function that reads the value. If None, it is read from `holder` by `key`.
        holder: Dictionary, or weak reference to a function. None if the place is in neither.
        key: Key in the dictionary, or name of the function's attribute.
    """

    __slots__ = ("holder", "key", "name", "read")

    def __init__(
        self, name: str, read: Callable[[], Any] | None = None, holder: Any = None, key: Any = None
    ) -> None:
        self.name, self.holder, self.key = name, holder, key
        if read is None and isinstance(holder, weakref.ref):
            read = functools.partial(_part_of, holder, key)
        self.read: Callable[[], Any] = read or functools.partial(holder.get, key, NONE)

    @property
    def is_gone(self) -> bool:
        """Whether the place is in a function that was deleted."""
        return isinstance(self.holder, weakref.ref) and self.holder() is None


class CodeReads:
    """Finds the places that functions read. Each function is looked into once.

    Args:
        calls: Whether to look into functions that other functions mention. This is for code that
            has not run.

    Attributes:
        places: Places found so far.
    """

    def __init__(self, calls: bool = False) -> None:
        self.places: list[Place] = []
        self._calls = calls
        self._known: set[tuple[int, Any]] = set()
        # By identity, because equal code of two functions may read different places.
        self._codes: dict[int, types.CodeType] = {}
        self._spaces: dict[int, Mapping[str, Any]] = {}
        self._unresolved: list[tuple[types.CodeType, Any, dict[str, _Enclosed]]] = []

    def _is_new(self, holder: Any, key: Any) -> bool:
        place = id(holder), key
        if place in self._known:
            return False
        self._known.add(place)
        return True

    def _add(self, name: str, holder: Any, read: Callable[[], Any], key: Any = "") -> None:
        if self._is_new(holder, key):
            self.places.append(Place(name, read))

    def _entry(self, name: str, space: Mapping[str, Any], key: str) -> bool:
        if not self._is_new(space, key):
            return False
        self.places.append(Place(name, None, space, key))
        return True

    def forget(self) -> None:
        """Forgets which functions were looked into. The places stay."""
        self._codes, self._known, self._unresolved = {}, set(), []

    def take(self, value: Any, owner: Any = None, depth: int = 0) -> None:
        """Looks into a callable, and into the arguments that are bound to it.

        Args:
            value: Function, method, or partial. Anything else is ignored.
            owner: Class of the object that the function is a method of.
            depth: Depth of nested calls.
        """
        if depth > _DEEP:
            return
        if isinstance(value, functools.partial):
            for name in ("args", "keywords"):
                bound = getattr(value, name)
                read = functools.partial(_itself, bound)
                self._add("an argument of a partial", value, read, name)
            self.take(value.func, owner, depth)
        elif isinstance(value, types.MethodType):
            bound = value.__self__
            self.take(value.__func__, bound if isinstance(bound, type) else type(bound), depth)
            self._object(bound)
        elif isinstance(value, types.FunctionType):
            self._function(value, owner, depth)
        elif isinstance(value, types.BuiltinMethodType):
            bound = value.__self__
            if isinstance(bound, _CONTAINERS):
                name = f"the object of `{value.__name__}`"
                self._add(name, bound, functools.partial(_itself, bound))
        elif isinstance(getattr(value, "__wrapped__", None), types.FunctionType):
            self._function(value.__wrapped__, owner, depth)  # such as `functools.lru_cache`

    def module_class(self, kind: type[nn.Module]) -> None:
        """Looks into the `forward` of a class of modules."""
        read = functools.partial(getattr, kind, "forward", NONE)
        self._add(f"`forward` of {kind.__name__}", kind, read, "forward")
        function = getattr(kind, "forward", None)
        if not isinstance(function, types.FunctionType) or not is_foreign(function):
            self.take(function, kind)
            return
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType):
                self._module(value, function.__code__.co_names, 0)
            elif hasattr(kind, name):  # a method that somebody may put another in the place of
                read = functools.partial(getattr, kind, name, NONE)
                self._add(f"`{name}` of {kind.__name__}", kind, read, name)

    def _function(self, function: types.FunctionType, owner: Any, depth: int = 0) -> None:
        code = function.__code__
        self._codes[id(code)] = code
        # A function that the pass makes may lie where one lay that it has dropped.
        if is_foreign(function) or not self._is_new(function, (id(code), owner)):
            return
        reference = weakref.ref(function)
        for name in PARTS_OF_FUNCTIONS:
            part = "the code" if name == "__code__" else "a default"
            if self._is_new(function, (id(code), name)):
                called = f"{part} of {function.__qualname__}"
                self.places.append(Place(called, None, reference, name))
        self._attributes(function)
        names = bytecode.names(code)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            read = functools.partial(bytecode.content, cell, NONE)
            self._add(f"`{name}` of {function.__qualname__}", cell, read)
            self._value(read(), names, depth, owner)
        self._reads(code, names, function.__globals__, owner, depth)

    def _attributes(self, function: types.FunctionType | types.MethodType) -> None:
        """Adds the attributes of a function, such as what `functools.singledispatch` calls."""
        if vars(function):
            read = functools.partial(_part_of, weakref.ref(function), "__dict__")
            self._add(f"an attribute of {function.__qualname__}", function, read, "__dict__")

    def _reads(
        self, code: types.CodeType, names: list[str], space: dict[str, Any], owner: Any, depth: int
    ) -> None:
        """Adds the global variables and class attributes that code mentions."""
        self._codes.update((id(one), one) for one in bytecode.codes(code))
        if not {"environ", "getenv"}.isdisjoint(names):
            self._add(
                "the environment", os.environ, functools.partial(getattr, os.environ, "_data")
            )
        for name in names:
            if hasattr(Tensor, name):
                self._entry(f"`{name}` of torch.Tensor", vars(Tensor), name)
            if name in _BUILTINS and name not in space:
                self._entry(f"the builtin `{name}`", _BUILTINS, name)
            if name in space or name in _BUILTINS:
                value = space.get(name, NONE)
                if isinstance(value, types.ModuleType):
                    self._module(value, names, 0)
                elif not _is_trained(value):
                    self._entry(f"the global variable `{name}`", space, name)
                    self._value(value, names, depth)
            elif isinstance(sys.modules.get(name), types.ModuleType):  # imported by the code
                self._module(sys.modules[name], names, 0)
        if owner is not None:
            self._class(owner, names, depth)

    def _value(
        self, value: Any, names: list[str], depth: int, owner: Any = None, inside: int = 0
    ) -> None:
        """Looks into a value that code reads, for everything that the code may read from it."""
        if type(value) in PLAIN_KINDS or is_tensor(value) or inside > _DEEP:
            return
        if isinstance(value, _CONTAINERS):
            items = list(value.values() if isinstance(value, dict) else value)[:_MANY]
            for item in items:
                self._value(item, names, depth, owner, inside + 1)
        elif isinstance(value, type):
            self._class(value, names, depth)
        elif isinstance(value, types.ModuleType):
            self._module(value, names, depth)
        elif isinstance(value, (types.FunctionType, types.MethodType)):
            self._attributes(value)
            if self._calls:
                self.take(value, owner, depth + 1)
        elif not isinstance(value, nn.Module):
            self.take(value, owner, depth + 1)
            self._class(type(value), names, depth)

    def _class(self, kind: type, names: list[str], depth: int) -> None:
        """Adds the class attributes that code mentions, and all settings if it uses `getattr`."""
        before: list[Mapping[str, Any]] = []
        for one in (*kind.__mro__, type(kind)):
            if is_foreign(one):
                continue
            held = self._spaces.setdefault(id(one), vars(one))
            by_text = "getattr" in names
            chosen = [key for key in held if _is_setting(key, held[key])] if by_text else names
            for key in chosen:
                if key in held and self._entry(f"`{key}` of {one.__name__}", held, key):
                    # An attribute of the same name may be added to a subclass.
                    for space in before:
                        self._entry(f"`{key}` of {kind.__name__}", space, key)
                    if not isinstance(held[key], type):
                        self._value(held[key], names, depth)
            before.append(held)

    def _module(self, module: types.ModuleType, names: Iterable[str], depth: int) -> None:
        space, names = vars(module), list(names)
        root = (module.__name__ or "").partition(".")[0]
        if root == "cachefreeze":
            return
        by_python = root in _FOREIGN and root not in _PATCHED
        for name in names:
            value = space.get(name, NONE)
            if isinstance(value, types.ModuleType):
                if depth < _DEEP and value is not module:
                    self._module(value, names, depth + 1)
            elif value is not NONE and not _is_trained(value):
                if by_python and not callable(value):
                    continue
                self._entry(f"`{name}` of {module.__name__}", space, name)
                if root not in _FOREIGN:
                    self._value(value, names, _DEEP - 1)

    def _object(self, value: Any) -> None:
        """Adds an object that its own methods read."""
        if not is_foreign(type(value)) and attributes_of(value) is not None:
            try:
                reference = weakref.ref(value)
            except TypeError:
                return
            name = f"an attribute of a {type(value).__name__}"
            self._add(name, value, functools.partial(_alive, reference))

    # Functions that run in a pass.

    def frames(self, found: Callable[[], None]) -> Frames:
        """Makes the hook that looks into the functions that run.

        Args:
            found: Function that is called before another function runs for the first time. The
                places that the other function reads are known then.
        """

        def first(frame: types.FrameType) -> None:
            self._ran(frame)
            found()

        frames = Frames(first)
        frames.codes = self._codes
        return frames

    def _ran(self, frame: types.FrameType) -> None:
        code, space = frame.f_code, frame.f_globals
        if str(space.get("__name__", "")).partition(".")[0] in _FOREIGN:
            return
        local = frame.f_locals
        first = local.get(code.co_varnames[0]) if code.co_argcount else None
        owner: Any = first if isinstance(first, type) else type(first)
        if code.co_argcount and not is_tensor(first) and not isinstance(first, type):
            self._object(first)
        for holder in (*map(vars, owner.__mro__), space):
            function = _unwrapped(holder.get(code.co_name))
            if getattr(function, "__code__", None) is code:
                self._function(function, owner)
                return
        owner = None if is_foreign(owner) else owner
        self._reads(code, bytecode.names(code), space, owner, 0)
        free = {name: _Enclosed(local[name]) for name in code.co_freevars if name in local}
        for name, enclosed in free.items():
            if not enclosed.is_weak:
                self.places.append(Place(f"`{name}` of {code.co_qualname}", enclosed.read))
        self._unresolved.append((code, owner, free))

    def resolve(self) -> None:
        """Finds the functions that ran and have no name, to read their closures.

        It walks over all objects of the garbage collector, which takes some 40 ms.
        """
        wanted = {id(code): (owner, free) for code, owner, free in self._unresolved}
        codes = [code for code, _, _ in self._unresolved]
        self._unresolved = []
        if not codes:
            return
        for function in gc.get_referrers(*codes):
            if not isinstance(function, types.FunctionType) or id(function.__code__) not in wanted:
                continue
            owner, free = wanted[id(function.__code__)]
            closure = function.__closure__ or ()
            cells = dict(zip(function.__code__.co_freevars, closure, strict=True))
            # The same code may belong to many functions, each with another closure.
            if all(name in free and free[name].fits(cell) for name, cell in cells.items()):
                for name, cell in cells.items():
                    free[name].cell = cell
                    if not free[name].is_weak:
                        self._is_new(cell, "")  # so that it is not added twice
                self._function(function, owner)
        for _, free in wanted.values():
            for enclosed in free.values():
                enclosed.settle()


class _Enclosed:
    """Value in a function's closure. Its cell is found only after the function ran.

    Args:
        value: Value that the cell holds when the function begins.
    """

    __slots__ = ("cell", "value")

    def __init__(self, value: Any) -> None:
        self.cell: Any = None
        # Tensors of the pass must not be kept alive.
        self.value = weakref.ref(value) if is_tensor(value) else value

    def fits(self, cell: Any) -> bool:
        now = bytecode.content(cell, NONE)
        return (self.value() is now) if is_tensor(now) and self.is_weak else self.value is now

    @property
    def is_weak(self) -> bool:
        return isinstance(self.value, weakref.ref)

    def settle(self) -> None:
        if self.cell is not None:
            self.value = None

    def read(self) -> Any:
        return self.value if self.cell is None else bytecode.content(self.cell, NONE)


def is_foreign(kind: Any) -> bool:
    """Returns whether a class or function belongs to torch, numpy or Python."""
    return str(getattr(kind, "__module__", "") or "").partition(".")[0] in _FOREIGN


def _is_trained(value: Any) -> bool:
    return is_tensor(value) and value.requires_grad


def _is_setting(key: str, value: Any) -> bool:
    return not key.startswith("__") and not callable(value) and not hasattr(value, "__get__")


def _itself(value: Any) -> Any:
    return value


def _part_of(reference: "weakref.ref[Any]", name: str) -> Any:
    return getattr(reference(), name, NONE)


def _alive(reference: "weakref.ref[Any]") -> Any:
    value = reference()
    return NONE if value is None else value


def _unwrapped(value: Any) -> Any:
    """Returns the function that a descriptor wraps."""
    for name in ("__func__", "fget", "func", "__wrapped__"):
        if not isinstance(value, types.FunctionType):
            value = getattr(value, name, value)
    return value
