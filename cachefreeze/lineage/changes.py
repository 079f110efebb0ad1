"""Changes that a module makes to the objects that it is given, such as a key-value cache."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cachefreeze.lineage.structure import Built, Ref, fill


class Change(NamedTuple):
    """One change that a call made to the objects that it was given.

    Attributes:
        path: Steps from the arguments to the changed object. A step is a pair: whether it is an
            attribute, and its name, key or position.
        attribute: Whether an attribute changed. If False, an entry of a container changed.
        key: Name, key or position of the attribute or entry.
        new: Template of the new content, or `Gone` if it was removed.
    """

    path: tuple[tuple[bool, Any], ...]
    attribute: bool
    key: Any
    new: Any


class Gone:
    """Content of an entry or attribute that was removed."""


_Same = Callable[[int, int], bool]
_Path = tuple[tuple[bool, Any], ...]


def changes(before: Any, after: Any, same: _Same, path: _Path = ()) -> list[Change]:
    """Finds the changes that a call made to the objects that it was given.

    Args:
        before: Template of the arguments before the call.
        after: Template of the arguments after the call.
        same: Function that says whether two values are one tensor object, before and after a write.
        path: Steps from the arguments of the call to these templates.
    """
    found: list[Change] = []
    if isinstance(after, Built) and isinstance(before, Built):
        found += _entries(before.items or {}, after.items or {}, same, path, False)
        found += _entries(before.attributes, after.attributes, same, path, True)
    elif isinstance(after, dict):
        found += _entries(before, after, same, path, False)
    elif isinstance(after, (tuple, list)):
        found += _entries(dict(enumerate(before)), dict(enumerate(after)), same, path, False)
    return found


def _entries(
    before: dict[Any, Any], after: dict[Any, Any], same: _Same, path: _Path, attribute: bool
) -> Iterator[Change]:
    for key in reversed([one for one in before if one not in after]):
        yield Change(path, attribute, key, Gone)
    for key, new in after.items():
        old = before.get(key, Gone)
        if isinstance(old, Ref) and isinstance(new, Ref):
            if not same(old.number, new.number):
                yield Change(path, attribute, key, new)
        elif isinstance(new, (Built, dict, list, tuple)) and type(old) is type(new):
            yield from changes(old, new, same, (*path, (attribute, key)))
        elif old is not new and (type(old) is not type(new) or not _are_equal(old, new)):
            yield Change(path, attribute, key, new)


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def update(target: Any, made: Iterable[Change], tensor: Callable[[int], Any]) -> None:
    """Makes the changes of a recorded call in the arguments of another call.

    Args:
        target: Arguments of the other call.
        made: Changes of the recorded call.
        tensor: Function from the number of a value to a tensor.
    """
    for change in made:
        place = target
        for attribute, key in change.path:
            place = vars(place)[key] if attribute else place[key]
        entries = vars(place) if change.attribute else place
        if change.new is Gone:
            del entries[change.key]
        elif isinstance(entries, list) and change.key == len(entries):
            entries.append(fill(change.new, tensor))
        else:
            entries[change.key] = fill(change.new, tensor)
