"""State outside of a call that its result depends on, and that is compared at every call.

It consists of the attributes of modules other than numbers and strings (tensors, functions, arrays)
and of what their code reads: global variables, closures, defaults, attributes of classes. A trace
is valid for a later call only if all of this is unchanged.
"""

import functools
import gc
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
from cachefreeze.lineage.contents import (
    WINDOWS,
    Glance,
    attributes_of,
    dict_version,
    shown_by,
)
from cachefreeze.lineage.frames import Frames
from cachefreeze.lineage.soundness import PARTS
from cachefreeze.lineage.structure import PLAIN_KINDS, is_tensor

# Limits on what is compared: depth of nesting, and number of entries of a container. Of a larger
# container, so many entries at the start and at the end are compared.
_DEEP, _MANY, _SOME = 4, 10_000, 50
_SEQUENCES, _SETS = (list, tuple, deque), (set, frozenset)
_CONTAINERS = (dict, *_SEQUENCES, *_SETS)
_OPENED = (*_CONTAINERS, np.ndarray, *WINDOWS)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
# Classes of Python that people keep settings in.
_PLAIN_OBJECTS = (
    "SimpleNamespace", "Namespace", "ChainMap", "UserDict", "UserList", "Synchronized",
)  # fmt: skip


class _Watched:
    """Value that code reads from one place, and a check that it is unchanged.

    A container or a plain object is compared by its contents, anything else by its identity.

    Args:
        place: Place that the value is read from.
        opens: Whether contents may be compared. If False, the identity is.
    """

    __slots__ = ("alive", "name", "opened", "place", "told", "value")

    def __init__(self, place: Place, opens: bool) -> None:
        self.place, self.name = place, place.name
        value = place.read()
        self.opened = opens and _is_opened(value)
        self.alive: list[weakref.ref[Any]] = []
        self.told = self._told(value, self.alive)
        # An object that allows no weak reference is kept alive: its `id` could be used again.
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
    def counts(self) -> bool:
        """Whether a number in it is another one."""
        return _counts(self.told, self._told(self.place.read(), []))

    @property
    def hides(self) -> bool:
        """Whether a `Glance` cannot show that the contents are unchanged."""
        return self.opened and not Glance([self.place.read()]).is_same()


_parts = attrgetter(*PARTS_OF_FUNCTIONS)


class _Look:
    """Quick check that the same objects are in all places.

    Args:
        watched: Values, which are unchanged at this moment.
    """

    def __init__(self, watched: Sequence[_Watched]) -> None:
        spaces: dict[int, tuple[Any, list[_Watched]]] = {}
        self._reads: list[Any] = []
        self._functions: list[Any] = []
        for one in watched:
            holder = one.place.holder
            if isinstance(holder, weakref.ref):
                # All parts of a function are compared, so each function is needed once.
                self._functions += [holder] if holder not in self._functions[-1:] else []
                continue
            if holder is None:
                self._reads.append(one.place.read)
                continue
            spaces.setdefault(id(holder), (holder, []))[1].append(one)
        self._spaces = [_Space(holder, held) for holder, held in spaces.values()]
        self._dicts = [_dict_behind(holder) for holder, _ in spaces.values()]
        self._versions = [*map(dict_version, self._dicts)]
        in_spaces = {id(one) for _, held in spaces.values() for one in held if not one.opened}
        self._alive = [one for w in watched if id(w) not in in_spaces for one in w.alive]
        self._held = watched
        opened = [one.place.read() for one in watched if one.opened]
        self._glance = Glance({id(value): value for value in opened}.values())
        try:
            self._ids = self._ids_now()
        except AttributeError:  # a function was deleted just now: the next comparison names it
            self._ids = []

    def _ids_now(self) -> list[int]:
        functions = chain.from_iterable(map(_parts, map(call, self._functions)))
        return [*map(id, chain(map(call, self._reads), functions))]

    def is_same(self) -> bool:
        try:
            if self._ids_now() != self._ids or not self._spaces_are_same():
                return False
        except (KeyError, AttributeError):  # an entry, or a function, is gone
            return False
        return all(map(is_not, map(call, self._alive), repeat(None))) and self._glance.is_same()

    def _spaces_are_same(self) -> bool:
        versions = [*map(dict_version, self._dicts)]
        if versions != self._versions:
            # Other entries were assigned to: loops in a script write to its global variables.
            pairs = zip(versions, self._versions, self._spaces, strict=True)
            if not all(one == other or space.is_same() for one, other, space in pairs):
                return False
            self._versions = versions
        return True


class _Space:
    """Entries of one dictionary that are compared.

    Args:
        holder: Dictionary.
        watched: Places in it.
    """

    __slots__ = ("_absent", "_alive", "_holder", "_ids", "_keys", "_take")

    def __init__(self, holder: Any, watched: Sequence[_Watched]) -> None:
        self._holder = holder
        there = [one.place.key for one in watched if one.place.key in holder]
        # The first key comes twice, because itemgetter returns no tuple for a single key.
        self._take = itemgetter(*there, there[0]) if there else _nothing
        self._absent = [one.place.key for one in watched if one.place.key not in holder]
        self._alive = [reference for one in watched for reference in one.alive]
        self._keys = holder.keys()
        self._ids = [*map(id, self._take(holder))]

    def is_same(self) -> bool:
        """Returns whether the same objects are there, and no entry that was absent."""
        return (
            [*map(id, self._take(self._holder))] == self._ids
            and self._keys.isdisjoint(self._absent)
            and all(map(is_not, map(call, self._alive), repeat(None)))
        )


def _dict_behind(holder: Any) -> dict[str, Any]:
    """Returns the dictionary that a class keeps its attributes in, or the dictionary itself."""
    if not isinstance(holder, types.MappingProxyType):
        return holder  # type: ignore[no-any-return]
    (found,) = gc.get_referents(holder)
    return found  # type: ignore[no-any-return]


def _nothing(holder: Any) -> tuple[()]:
    return ()


class ExternalState:
    """State outside of a call that the code of some modules reads.

    Args:
        modules: Modules whose code and attributes are looked into.
        given: Arguments of the call. Functions among them are looked into as well.

    Attributes:
        counter: Name of a number that the traced pass has read and changed, or an empty string.
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
        # The contents of plain objects are compared by the signature of the trace.
        self._watched = [_Watched(one, isinstance(one.read(), _OPENED)) for one in attributes]
        self._taken = 0
        self._take()
        self._look: _Look | None = None
        self._slow: list[_Watched] = []
        self.counter = ""

    def frames(self) -> Frames:
        """Makes the hook that looks into each function that runs in the traced pass."""
        frames = self._code.frames(self._take)
        frames.ended = self.settle
        return frames

    def _take(self) -> None:
        """Reads the places that were found since the last call of this method."""
        found, self._taken = self._code.places[self._taken :], len(self._code.places)
        # A function that the pass made and dropped may be gone already.
        self._watched += [_Watched(place, True) for place in found if not place.is_gone]

    def settle(self) -> str:
        """Ends the traced pass. State that the pass itself changed is not compared.

        Returns:
            Name of a number that the pass reads and has changed, such as a counter: then each pass
            depends on the calls before it. Otherwise an empty string. A list that has grown or a
            flag does not count, since it may stay as it is from now on.
        """
        self._code.resolve()
        self._take()
        changed = [one for one in self._watched if not one.is_same()]
        self._watched = [one for one in self._watched if one not in changed]
        self._code.forget()
        self._look = None
        self.counter = next((one.name for one in changed if one.counts), "")
        return self.counter

    def difference(self) -> str:
        """Returns the name of something that has changed, or an empty string."""
        if self._look is None or not self._look.is_same():
            for one in self._watched:
                if not one.is_same():
                    return one.name
            # The quick check does not cover these: they are compared as a whole each time.
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
    """Describes the contents of a container or a plain object, and the identity of anything else.

    Args:
        value: Value to describe.
        alive: List that weak references are appended to, one for each object that is described by
            its identity. An identity is valid as long as the object lives.
        depth: Depth of nesting.
    """
    kind = type(value)
    if kind in PLAIN_KINDS:
        return kind, repr(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return kind, value.shape, str(value.dtype), xxhash.xxh3_128_digest(value.tobytes())
    if depth <= _DEEP and not is_tensor(value):
        if isinstance(value, WINDOWS):
            return _told(shown_by(value), alive, depth + 1)
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


def _counts(before: Any, after: Any) -> bool:
    """Returns whether two descriptions differ in a number, and not in how much they hold."""
    if type(before) not in (tuple, list) or type(after) is not type(before):
        return False
    if len(before) != len(after):
        return False
    if len(before) == 2 and before[0] is after[0] and before[0] in (int, float, complex):
        return bool(before[1] != after[1])
    return any(map(_counts, before, after))


def _some(items: list[Any]) -> list[Any]:
    return items if len(items) <= _MANY else [*items[:_SOME], *items[-_SOME:]]


def _key(key: Any) -> Any:
    return repr(key) if type(key) in PLAIN_KINDS else id(key)


def _is_opened(value: Any) -> bool:
    """Returns whether a value is compared by its contents."""
    opened = isinstance(value, _OPENED)
    return opened or (not is_tensor(value) and _is_plain_object(value))


def _is_plain_object(value: Any) -> bool:
    """Returns whether a value is an instance of a user's class, such as a configuration."""
    kind = type(value)
    if is_foreign(kind) and kind.__name__ not in _PLAIN_OBJECTS:
        return False
    return attributes_of(value) is not None


def _attributes(modules: list[nn.Module]) -> Iterator[Place]:
    """Yields the attributes of modules that are neither numbers nor strings."""
    for module in modules:
        held = vars(module)
        for key, value in held.items():
            if key not in PARTS and type(value) not in PLAIN_KINDS:
                yield Place(f"`{key}` of {type(module).__name__}", None, held, key)


def read_by_code(kind: type[nn.Module]) -> list[tuple[str, Any]]:
    """Returns what the code of a class reads beside arguments and attributes.

    Returns:
        Name and value of each thing that is read.
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
