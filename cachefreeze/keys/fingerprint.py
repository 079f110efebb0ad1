"""Fingerprint of an object with all that its code reads, such as a data set with its transforms.

Two data sets with the same digest return the same item for the same number. This holds for Python
code, Python's containers, arrays and tensors. The contents of files and the state inside C
extensions are not part of the digest.
"""

import enum
import functools
import itertools
import pathlib
import random
import re
import sys
import types
from collections.abc import Callable, Mapping
from operator import is_
from typing import Any

import numpy as np
import torch
import xxhash

from cachefreeze.keys.bits import bits_of
from cachefreeze.keys.bytecode import content, globals_of, is_foreign, names, version
from cachefreeze.lineage.structure import PLAIN_KINDS

# Packages whose code reads files only by Python's `open`.
_OPEN_BY_PYTHON = ("torch", "numpy", "PIL", "sklearn", "cachefreeze")
# Functions that return something else at each call, and change no random state that is compared.
_ENTROPY = frozenset(
    ("default_rng", "RandomState", "SystemRandom", "urandom", "secrets", "uuid1", "uuid4", "Random")
)
# Largest array, in bytes, that is hashed at every quick check, and that is hashed at all.
_SMALL, _LARGE = 1 << 20, 1 << 30
_MANY_FUNCTIONS = 2000
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_NO_VARIABLES = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__",
     "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__",
     "__abstractmethods__", "_abc_impl")
)  # fmt: skip


class _Check:
    """Check that one part of the object is unchanged.

    Args:
        same: Function that returns whether it is unchanged.
        is_generator: Whether the part is a generator of random numbers.
        deep: Whether the check is slow, so that quick checks leave it out.
    """

    def __init__(
        self, same: Callable[[], bool], is_generator: bool = False, deep: bool = False
    ) -> None:
        self.same, self.is_generator, self.deep = same, is_generator, deep

    def settle(self) -> bool:
        """Accepts the change. Returns whether there is still something to check."""
        return False


class _Entries(_Check):
    """Check that the entries of a dictionary, or the attributes of a class, are unchanged."""

    def __init__(self, held: Mapping[Any, Any]) -> None:
        super().__init__(self._same)
        self._held, self._before, self._left = held, dict(held), set[Any]()

    def _same(self) -> bool:
        if self._left:
            return not self._changed() - self._left
        now, before = self._held, self._before
        # Both are in the same order, unless an entry was removed and added again.
        return len(now) == len(before) and all(map(is_, now.values(), before.values()))

    def _changed(self) -> set[Any]:
        now, before = self._held, self._before
        return {key for key in (*now, *before) if now.get(key, self) is not before.get(key, self)}

    def settle(self) -> bool:
        self._left |= self._changed()
        return True


class Fingerprint:
    """Fingerprint of an object, to be compared later and in other processes.

    Args:
        value: Object to look into.

    Attributes:
        digest: Hash of everything that was seen.
        portable: Whether the digest means the same in another process.
        unseen: Name of something that could not be looked into. Empty if there is none.
        entropy: Name of a function that returns something else at each call. Empty if none is used.
        only_python: Whether all code reads files by Python's `open`, as far as can be seen.
    """

    def __init__(self, value: Any) -> None:
        self.portable, self.only_python = True, True
        self.unseen = self.entropy = ""
        self._hash = xxhash.xxh3_128(f"{sys.version_info[:3]}".encode())
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._looks: list[_Check] = []
        self._functions = 0
        self._read(torch.get_default_dtype)
        self._tell(value)
        self.digest = self._hash.digest()

    def is_same(self, deep: bool = False) -> bool:
        """Returns whether nothing has changed.

        Args:
            deep: Whether the elements of large arrays are compared too.
        """
        return all(one.same() for one in self._looks if deep or not one.deep)

    def settle(self) -> bool:
        """Accepts what one use of the object has changed, such as a counter.

        Returns:
            False if a generator of random numbers is among the changes.
        """
        changed = [one for one in self._looks if not one.deep and not one.same()]
        gone = [one for one in changed if not one.settle()]
        if gone:
            self._looks = [one for one in self._looks if one not in gone]
        return not any(one.is_generator for one in changed)

    def _say(self, *words: Any) -> None:
        self._hash.update("\0".join(map(str, words)).encode(errors="surrogatepass") + b"\1")

    def _watch(
        self, same: Callable[[], bool], is_generator: bool = False, deep: bool = False
    ) -> None:
        self._looks.append(_Check(same, is_generator, deep))

    def _tell(self, value: Any) -> None:
        kind = type(value)
        if kind in PLAIN_KINDS:
            self._say(kind.__name__, repr(value))
            return
        number = self._numbers.get(id(value))
        if number is not None:
            self._say("again", number)
            return
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        for kinds, tell in _TOLD:
            if isinstance(value, kinds):
                tell(self, value)
                return
        if kind.__module__.partition(".")[0] == "pandas" and hasattr(value, "to_dict"):
            self._say("pandas", kind.__name__)
            self._tell({"index": value.index.tolist(), "values": _columns(value)})
            before = value.copy()
            self._watch(lambda: bool(value.equals(before)))
        elif kind.__module__ == "datetime" or kind in (range, re.Pattern, complex):
            self._say(kind.__name__, repr(value))
        elif hasattr(value, "__dict__") or _slots(kind):
            self._object(value)
        else:
            self._opaque(value)

    def _opaque(self, value: Any) -> None:
        self.portable = False
        self.unseen = self.unseen or type(value).__name__
        self._say("opaque", id(value))

    def _object(self, value: Any) -> None:
        self._class(type(value))
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict):
            self._dict(held)
        for name in _slots(type(value)):
            one = getattr(value, name, None)
            self._say(name)
            self._tell(one)
            self._watch(functools.partial(_has, value, name, one))
        if not held and not _slots(type(value)) and not _is_plain_class(type(value)):
            self._opaque(value)  # its state is inside a C extension

    def _sequence(self, value: Any) -> None:
        self._say(type(value).__name__, len(value))
        if isinstance(value, list):
            before = list(value)
            if _are_plain(before):
                self._watch(lambda: value == before)
            else:
                self._watch(lambda: len(value) == len(before) and all(map(is_, value, before)))
        if _are_plain(value):
            self._say(repr(list(value)))
        else:
            for one in value:
                self._tell(one)

    def _dict(self, value: Any) -> None:
        self._say(type(value).__name__, len(value))
        self._looks.append(_Entries(value))
        for key, one in list(value.items()):
            self._tell(key)
            self._tell(one)

    def _set(self, value: Any) -> None:
        self._say(type(value).__name__, len(value))
        before = set(value)
        self._watch(lambda: value == before)
        if _are_plain(before):
            self._say(sorted(map(repr, before)))
        else:
            self.portable = False
            for one in before:
                self._tell(one)

    def _array(self, value: np.ndarray) -> None:
        self._say("array", value.dtype.str, value.shape)
        if value.dtype == object:
            self._tell(value.tolist())
            self.portable = False
            return
        self._bytes(lambda: value if value.flags.c_contiguous else np.ascontiguousarray(value))
        if value.nbytes > _SMALL:
            where = value.ctypes.data
            self._watch(lambda: value.ctypes.data == where)

    def _tensor(self, value: torch.Tensor) -> None:
        self._say("tensor", value.dtype, tuple(value.shape), value.device, value.requires_grad)
        if value.layout != torch.strided:
            self._opaque(value)
            return
        if not value.is_inference():
            version = value._version
            self._watch(lambda: value._version == version)
        self._bytes(lambda: bits_of(value).cpu().numpy())

    def _bytes(self, read: Callable[[], np.ndarray]) -> None:
        found = read()
        if found.nbytes > _LARGE:
            self.portable = False
            self.unseen = self.unseen or f"an array of {found.nbytes / 1e9:.0f} GB"
            return
        digest = _hash_of(found)
        self._hash.update(digest)
        self._watch(lambda: _hash_of(read()) == digest, deep=found.nbytes > _SMALL)

    def _generator(self, value: Any) -> None:
        before = _state_of(value)
        self._say(type(value).__name__, before)
        self._watch(lambda: _state_of(value) == before, is_generator=True)

    def _module(self, value: types.ModuleType) -> None:
        self._say("module", value.__name__, version(value.__name__))
        self._uses(value.__name__)

    def _uses(self, where: str) -> None:
        root = where.partition(".")[0]
        if root in sys.stdlib_module_names or root in _OPEN_BY_PYTHON:
            return
        if root == "torchvision" and not where.startswith("torchvision.io"):
            return
        if is_foreign(where) or version(where):
            self.only_python = False

    def _class(self, kind: type) -> None:
        if id(kind) in self._numbers:
            self._say("class again", self._numbers[id(kind)])
            return
        self._numbers[id(kind)] = len(self._numbers)
        self._alive.append(kind)
        self._say("class", kind.__module__, kind.__qualname__)
        self._uses(kind.__module__)
        for one in kind.__mro__:
            if is_foreign(one.__module__):
                self._say(one.__module__, one.__qualname__, version(one.__module__))
                continue
            self._looks.append(_Entries(vars(one)))
            for name, value in sorted(vars(one).items()):
                if name not in _NO_VARIABLES:
                    self._say(name)
                    self._member(value)

    def _member(self, value: Any) -> None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, (property, functools.cached_property)):
            parts = ("fget", "fset", "func")
            value = [getattr(value, part, None) for part in parts]
        if not isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            self._tell(value)

    def _function(self, function: types.FunctionType) -> None:
        name, where = function.__qualname__, function.__module__ or ""
        self._say("function", where, name)
        self._uses(where)
        if is_foreign(where):
            self._say(version(where))
            return
        self._functions += 1
        if self._functions > _MANY_FUNCTIONS:
            self._opaque(function)
            return
        code, defaults = function.__code__, function.__defaults__
        self._watch(lambda: function.__code__ is code and function.__defaults__ is defaults)
        self._code(code)
        self._tell(defaults)
        self._tell(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            self._read(functools.partial(content, cell))
        space = function.__globals__
        for word in names(code):
            if word in _ENTROPY and function.__name__ != "__init__":
                self.entropy = self.entropy or f"`{word}` in {name}"
        for word in globals_of(code):
            if word in space:
                self._say(word)
                self._read(functools.partial(space.get, word, None))
                self._in_module(space[word], code)

    def _in_module(self, module: Any, code: types.CodeType) -> None:
        """Adds what code reads from one of the user's own modules."""
        if isinstance(module, types.ModuleType):
            for word in names(code):
                if word in vars(module) and version(module.__name__):
                    found = vars(module)[word]
                    self._uses(getattr(found, "__module__", None) or "")
                elif word in vars(module) and not is_foreign(module.__name__):
                    self._say(word)
                    self._read(functools.partial(vars(module).get, word, None))

    def _read(self, read: Callable[[], Any]) -> None:
        value = read()
        self._tell(value)
        self._watch(lambda: read() is value)

    def _code(self, code: types.CodeType) -> None:
        self._say(code.co_name, code.co_code.hex(), code.co_names, code.co_varnames)
        for one in code.co_consts:
            if isinstance(one, types.CodeType):
                self._code(one)
            elif isinstance(one, frozenset):
                self._say(sorted(map(repr, one)))
            else:
                self._say(repr(one))

    def _method(self, value: Any) -> None:
        self._tell(value.__func__)
        self._tell(value.__self__)

    def _builtin(self, value: Any) -> None:
        owner = getattr(value, "__self__", None)
        self._say("builtin", getattr(value, "__qualname__", type(value).__name__))
        where = getattr(value, "__module__", None) or ""
        self._uses(where)
        if owner is not None and not isinstance(owner, (types.ModuleType, type)):
            self._tell(owner)

    def _partial(self, value: Any) -> None:
        self._say("partial")
        for one in (value.func, value.args, value.keywords):
            self._tell(one)

    def _enum(self, value: Any) -> None:
        self._say("enum", type(value).__qualname__, value.name)

    def _named(self, value: Any) -> None:
        self._say(type(value).__name__, str(value))


_Teller = Callable[[Fingerprint, Any], None]
_TOLD: tuple[tuple[Any, _Teller], ...] = (
    (enum.Enum, Fingerprint._enum),
    (type, Fingerprint._class),
    ((list, tuple), Fingerprint._sequence),
    (dict, Fingerprint._dict),
    ((set, frozenset), Fingerprint._set),
    (np.ndarray, Fingerprint._array),
    (torch.Tensor, Fingerprint._tensor),
    (_GENERATORS, Fingerprint._generator),
    (types.ModuleType, Fingerprint._module),
    (types.FunctionType, Fingerprint._function),
    (types.MethodType, Fingerprint._method),
    (functools.partial, Fingerprint._partial),
    ((types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
      types.MethodWrapperType, np.ufunc, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
     Fingerprint._builtin),
    ((torch.dtype, torch.device, torch.layout, torch.memory_format, pathlib.PurePath, np.dtype,
      np.generic, slice, bytearray, type(Ellipsis)), Fingerprint._named),
)  # fmt: skip


def _are_plain(values: Any) -> bool:
    """Returns whether a sequence holds only numbers and strings, or tuples of them."""
    kinds = set(map(type, values))
    if not kinds - {tuple} <= PLAIN_KINDS:
        return False
    inner = (one for one in values if type(one) is tuple)
    return tuple not in kinds or set(map(type, itertools.chain.from_iterable(inner))) <= PLAIN_KINDS


def _columns(value: Any) -> Any:
    if hasattr(value, "columns"):
        return {str(name): value[name].tolist() for name in value.columns}
    return value.tolist()


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for one in kind.__mro__:
        slots = vars(one).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _is_plain_class(kind: type) -> bool:
    return all(isinstance(vars(one).get("__dict__"), types.GetSetDescriptorType) or one is object
               for one in kind.__mro__)  # fmt: skip


def _has(value: Any, name: str, held: Any) -> bool:
    return getattr(value, name, None) is held


def _hash_of(array: np.ndarray) -> bytes:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return xxhash.xxh3_128_digest(flat.data) if flat.size else b""


def _state_of(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return xxhash.xxh3_128_hexdigest(generator.get_state().numpy().tobytes())
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return (
            repr(generator.get_state(legacy=False)["state"]["pos"])
            + _hash_of(generator.get_state(legacy=False)["state"]["key"]).hex()
        )
    return str(hash(generator.getstate()))
