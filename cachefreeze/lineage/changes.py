"""Changes that a module makes to the objects that it is given, such as a key-value cache."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cachefreeze.lineage.structure import Built, Ref, fill


class Change(NamedTuple):
    """One thing that a call did to the objects that it was given.

    Attributes:
        path: Steps from the arguments to the changed object: whether the step is an attribute, and
            its name, key or place.
        attribute: Whether an attribute is set, and not an entry.
        key: Name, key or place of what is set.
        new: Template of the new content. `Gone` if it is removed.
    """

    path: tuple[tuple[bool, Any], ...]
    attribute: bool
    key: Any
    new: Any


class Gone:
    """Stands for what a call has removed."""


_Same = Callable[[int, int], bool]
_Path = tuple[tuple[bool, Any], ...]


def changes(before: Any, after: Any, same: _Same, path: _Path = ()) -> list[Change]:
    """Finds what a call changed in the objects that it was given.

    Args:
        before: Template of the arguments before the call.
        after: Template of the arguments after it.
        same: Function that says whether two values are of one tensor, which was written to.
        path: Steps to these arguments.
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
    """Changes objects as a module changed those that it was given.

    Args:
        target: Arguments of the call.
        made: What the call changed.
        tensor: Function from a value's number to a tensor.
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
