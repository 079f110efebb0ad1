"""What a traced pass depends on beside arguments, parameters and buffers, compared at every call.

Attributes of modules that are no numbers or strings (tensors, functions, arrays), and what code
reads: global variables, closures, defaults, attributes of classes. What a traced pass says holds
for a later one only if all these are the same.
"""

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, call, is_not, itemgetter
from typing import Any

import numpy as np
import xxhash
from torch import nn

from cachefreeze.keys.code_reads import PARTS_OF_FUNCTIONS, CodeReads, Place, is_foreign
from cachefreeze.lineage.contents import Glance, attributes_of
from cachefreeze.lineage.frames import Frames
from cachefreeze.lineage.soundness import PARTS
from cachefreeze.lineage.structure import PLAIN_KINDS, is_tensor

# Depth that is compared, and number of entries of a container. Of more, the first and last are.
_DEEP, _MANY, _SOME = 4, 1000, 50
_SEQUENCES, _SETS = (list, tuple, deque), (set, frozenset)
_CONTAINERS = (dict, *_SEQUENCES, *_SETS)
_OPENED = (*_CONTAINERS, np.ndarray)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
# Objects of python's own that people keep settings in.
_PLAIN_OBJECTS = ("SimpleNamespace", "Namespace")


class _Watched:
    """A place, and what was read there.

    What holds others is described, with the identity of what is no setting; anything else is known
    by its identity.

    Args:
        place: Place.
        opens: Whether an object is compared by what it holds, or by its identity alone.
    """

    __slots__ = ("alive", "name", "opened", "place", "told", "value")

    def __init__(self, place: Place, opens: bool) -> None:
        self.place, self.name = place, place.name
        value = place.read()
        self.opened = opens and _is_opened(value)
        self.alive: list[weakref.ref[Any]] = []
        self.told = self._told(value, self.alive)
        # The identity of what has no weak reference says something as long as it lives.
        held = isinstance(value, _CONTAINERS) or not (self.opened or self.alive)
        self.value: Any = value if held else None

    def _told(self, value: Any, alive: list["weakref.ref[Any]"]) -> Any:
        return _told(value, alive) if self.opened else _identity(value, alive)

    def is_same(self) -> bool:
        now = self.place.read()
        return all(map(is_not, map(call, self.alive), repeat(None))) and (
            self._told(now, []) == self.told
        )

    @property
    def hides(self) -> bool:
        """Whether a glance cannot tell that it is the same."""
        return self.opened and not Glance([self.place.read()]).is_same()


_parts = attrgetter(*PARTS_OF_FUNCTIONS)


class _Look:
    """A quick look at places: whether the very objects of before are there.

    Args:
        watched: Places, which hold what they held.
    """

    def __init__(self, watched: Sequence[_Watched]) -> None:
        spaces: dict[int, tuple[Any, list[str], list[str]]] = {}
        self._reads: list[Any] = []
        self._functions: list[Any] = []
        for one in watched:
            holder, key = one.place.holder, one.place.key
            if isinstance(holder, weakref.ref):
                # All three parts of a function are looked at, by whichever of them is a place.
                self._functions += [holder] if holder not in self._functions[-1:] else []
                continue
            if holder is None:
                self._reads.append(one.place.read)
                continue
            _, there, absent = spaces.setdefault(id(holder), (holder, [], []))
            (there if key in holder else absent).append(key)
        # Twice the first one: of a single key there is no tuple.
        self._entries = [
            (itemgetter(*there, there[0]), holder) for holder, there, _ in spaces.values() if there
        ]
        self._absent = [(holder.keys(), absent) for holder, _, absent in spaces.values() if absent]
        self._alive = [reference for one in watched for reference in one.alive]
        self._held = watched
        opened = [one.place.read() for one in watched if one.opened]
        self._glance = Glance({id(value): value for value in opened}.values())
        self._ids = self._ids_now()

    def _ids_now(self) -> list[int]:
        entries = [take(holder) for take, holder in self._entries]
        functions = chain.from_iterable(map(_parts, map(call, self._functions)))
        return [*map(id, chain(map(call, self._reads), functions, *entries))]

    def is_same(self) -> bool:
        try:
            if self._ids_now() != self._ids:
                return False
        except (KeyError, AttributeError):  # an entry, or a function, is gone
            return False
        return (
            all(keys.isdisjoint(absent) for keys, absent in self._absent)
            and all(map(is_not, map(call, self._alive), repeat(None)))
            and self._glance.is_same()
        )


class ExternalState:
    """What the code of some modules reads now, to be compared later.

    Args:
        modules: Modules.
        given: Arguments of a call. Functions among them are looked into.
    """

    def __init__(self, modules: Iterable[nn.Module], given: Any) -> None:
        modules = list(modules)
        self._code = CodeReads()
        attributes = list(_attributes(modules))
        for place in attributes:
            self._code.take(place.read())
        for kind in dict.fromkeys(map(type, modules)):
            self._code.module_class(kind)
        for function in _functions_in(given, 0):
            self._code.take(function)
        # The signature of a trace compares what plain objects among attributes hold.
        self._watched = [_Watched(one, isinstance(one.read(), _OPENED)) for one in attributes]
        self._taken = 0
        self._take()
        self._look: _Look | None = None
        self._slow: list[_Watched] = []

    def frames(self) -> Frames:
        """Makes what looks into the functions that run in the pass."""
        return self._code.frames(self._take)

    def _take(self) -> None:
        """Reads the places that were found since the last time."""
        found, self._taken = self._code.places[self._taken :], len(self._code.places)
        self._watched += [_Watched(place, True) for place in found]

    def settle(self) -> None:
        """Forgets what the pass itself has changed, such as a counter."""
        self._code.resolve()
        self._take()
        self._watched = [one for one in self._watched if one.is_same()]
        self._code.forget()
        self._look = None

    def difference(self) -> str:
        """Names something that has changed, or returns an empty string."""
        if self._look is None or not self._look.is_same():
            for one in self._watched:
                if not one.is_same():
                    return one.name
            # What a glance cannot see is compared as a whole each time.
            self._slow = [one for one in self._watched if one.hides]
            self._look = _Look([one for one in self._watched if not one.hides])
            return ""
        return next((one.name for one in self._slow if not one.is_same()), "")


def _identity(value: Any, alive: list["weakref.ref[Any]"]) -> Any:
    if type(value) in PLAIN_KINDS:
        return type(value), repr(value)
    try:
        alive.append(weakref.ref(value))
    except TypeError:
        return type(value), id(value)
    return id(value)


def _told(value: Any, alive: list["weakref.ref[Any]"], depth: int = 0) -> Any:
    """Describes a value by what it holds, and what holds no settings by its identity.

    Args:
        value: Value.
        alive: Where weak references to what is known by its identity go. An identity says
            something as long as the object lives.
        depth: Depth of the value in others.
    """
    kind = type(value)
    if kind in PLAIN_KINDS:
        return kind, repr(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return kind, value.shape, str(value.dtype), xxhash.xxh3_128_digest(value.tobytes())
    if depth <= _DEEP and not is_tensor(value):
        if isinstance(value, dict):
            items = _some(list(value.items()))
            pairs = [(_key(key), _told(one, alive, depth + 1)) for key, one in items]
            return kind, len(value), pairs
        if isinstance(value, _SEQUENCES):
            return kind, len(value), [_told(one, alive, depth + 1) for one in _some(list(value))]
        if isinstance(value, _SETS):
            told = sorted(map(repr, (_told(one, alive, depth + 1) for one in _some(list(value)))))
            return kind, len(value), told
        if _is_plain_object(value):
            return kind, _told(attributes_of(value), alive, depth)
    return _identity(value, alive)


def _some(items: list[Any]) -> list[Any]:
    return items if len(items) <= _MANY else [*items[:_SOME], *items[-_SOME:]]


def _key(key: Any) -> Any:
    return repr(key) if type(key) in PLAIN_KINDS else id(key)


def _is_opened(value: Any) -> bool:
    """Says whether a value is compared by what it holds."""
    opened = isinstance(value, _OPENED)
    return opened or (not is_tensor(value) and _is_plain_object(value))


def _is_plain_object(value: Any) -> bool:
    """Says whether a value is a plain object of somebody's own, such as a configuration."""
    kind = type(value)
    if is_foreign(kind) and kind.__name__ not in _PLAIN_OBJECTS:
        return False
    return attributes_of(value) is not None


def _attributes(modules: list[nn.Module]) -> Iterator[Place]:
    """Yields attributes of modules that are no numbers or strings."""
    for module in modules:
        held = vars(module)
        for key, value in held.items():
            if key not in PARTS and type(value) not in PLAIN_KINDS:
                yield Place(f"`{key}` of {type(module).__name__}", None, held, key)


def read_by_code(kind: type[nn.Module]) -> list[tuple[str, Any]]:
    """Returns what the code of a class reads beside arguments and attributes, each with a name.

    Args:
        kind: Class of modules.
    """
    code = CodeReads(calls=True)
    code.module_class(kind)
    return [(place.name, place.read()) for place in code.places]


def _functions_in(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, _FUNCTIONS):
        yield value
    elif isinstance(value, (tuple, list, dict)) and depth <= _DEEP:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _functions_in(one, depth + 1)
