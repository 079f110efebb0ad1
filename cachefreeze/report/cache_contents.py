"""Groups the sets of a cache folder by the value that they hold, and tells them apart."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from cachefreeze.store.files import human_bytes
from cachefreeze.store.inspect import Pruned, SetReport, inspect, prune, verify
from cachefreeze.store.inspect_objects import inspect_objects, prune_objects, verify_objects

_MOST_NAME, _MOST_SETTING = 60, 40
_MOST_DIMS, _MOST_SIZE = 64, 2**40
# What decides the last bits of a result, in the order of `about["environment"]`.
_SWITCHES = [
    "deterministic algorithms",
    "math attention",
    "flash attention",
    "memory-efficient attention",
    "cuDNN attention",
    "fast path of attention",
    "denormal numbers flushed",
    "processor",
    "torchvision",
]
SETTINGS = {
    "cpu": [
        "torch",
        "device",
        "instructions",
        "matmul precision",
        "oneDNN",
        "threads",
        *_SWITCHES,
    ],
    "cuda": [
        "torch",
        "device",
        "GPU",
        "cuDNN",
        "cuDNN enabled",
        "cuDNN deterministic",
        "cuDNN benchmark",
        "only deterministic algorithms",
        "matmul precision",
        "TF32 convolutions",
        "sums in 16 bits",
        *_SWITCHES,
    ],
}


@dataclass
class Group:
    """Sets that hold the same value of the same model.

    Attributes:
        model: Name of the model.
        value: Operation and module that made the value.
        rows: Shape and type of a row, and its bytes.
        sets: Reports of the sets, the oldest first.
        differences: Settings that tell each set apart from the others, by the name of the set.
            Empty for a single set.
    """

    model: str
    value: str
    rows: str
    sets: list[SetReport] = field(default_factory=list)
    differences: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass
class Contents:
    """Contents of a directory, and what was removed from it.

    Attributes:
        groups: Groups of sets that hold the same value.
        problems: A sentence for each part that is damaged.
        verified: Whether all chunks were read and checked.
        pruned: Removed rows and bytes. None if nothing was to be removed.
        names: Description of the value of each set, by the name of the set. Removed sets are
            included.
    """

    groups: list[Group]
    problems: list[str]
    verified: bool
    pruned: Pruned | None
    names: dict[str, str]

    @property
    def sets(self) -> list[SetReport]:
        """Sets of all groups."""
        return [one for group in self.groups for one in group.sets]

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return sum(one.nbytes for one in self.sets)


def look(directory: Path | str, *, check: bool, prune_days: float | None) -> Contents:
    """Inspects a directory, and removes what is to be removed first.

    Args:
        directory: Folder of an `ActivationCache`, or URL of an object store.
        check: Whether to read all chunks and compare their checksums.
        prune_days: Number of days without use after which rows are removed. If infinite, only files
            that killed runs left are removed. If None, nothing is removed.

    Raises:
        UserError: The folder is no directory of an `ActivationCache`, or the object store does not
            work.
    """
    names: dict[str, str] = {}
    pruned = None
    if prune_days is not None:
        names = _names(_groups(_inspect(directory)))
        older = prune_days * 86400
        pruned = (
            prune_objects(directory, older)
            if isinstance(directory, str)
            else prune(directory, older)
        )
    sets = [one for one in _inspect(directory) if one.segments]
    groups = _groups(sets)
    problems = [each for one in sets for each in one.problems]
    if check:
        found = verify_objects(directory) if isinstance(directory, str) else verify(directory)
        problems = list(found)
    return Contents(groups, problems, check, pruned, names | _names(groups))


def _inspect(directory: Path | str) -> list[SetReport]:
    return inspect_objects(directory) if isinstance(directory, str) else inspect(directory)


def _names(groups: Iterable[Group]) -> dict[str, str]:
    return {one.name: f"{group.value} of {group.model}" for group in groups for one in group.sets}


def _groups(sets: Iterable[SetReport]) -> list[Group]:
    found: dict[tuple[str, str, str], Group] = {}
    for one in sorted(sets, key=lambda one: (one.first_use, one.name)):
        key = safe(_call(one)[0]), _value(one), _rows(one)
        found.setdefault(key, Group(*key)).sets.append(one)
    groups = [found[key] for key in sorted(found)]
    for group in groups:
        if group.sets[0].row is not None:
            group.differences = _differences(group.sets)
    return groups


def _differences(sets: list[SetReport]) -> dict[str, dict[str, str]]:
    settings = {one.name: _settings(one) for one in sets}
    names = dict.fromkeys(name for each in settings.values() for name in each)
    differing = [name for name in names if len({each.get(name) for each in settings.values()}) > 1]
    found = {
        one.name: {name: settings[one.name].get(name, "unknown") for name in differing}
        for one in sets
    }
    versions: dict[tuple[str, ...], list[str]] = {}
    for name, each in found.items():
        versions.setdefault(tuple(each.values()), []).append(name)
    for alike in versions.values():
        if len(alike) > 1:
            for number, name in enumerate(alike, 1):
                found[name]["version"] = f"{number} of {len(alike)}"
    return found


def _settings(one: SetReport) -> dict[str, str]:
    """Returns the settings that the rows of a set depend on, as far as they are known."""
    _, mode, shape, gradients = _call(one)
    found = {"mode": mode, "input": shape, "gradients": gradients}
    if isinstance(count := one.about.get("parameters"), int):
        found["parameters"] = str(count)
    values = one.about.get("environment")
    values = [str(each) for each in values] if isinstance(values, list) else []
    names = SETTINGS.get(values[1] if len(values) > 1 else "", [])
    if len(names) != len(values):  # written by another version
        names = [f"setting {number}" for number in range(1, len(values) + 1)]
    found |= dict(zip(names, values, strict=True))
    return {name: safe(value, _MOST_SETTING) for name, value in found.items()}


def _call(one: SetReport) -> tuple[str, str, str, str]:
    """Returns the model's name, its mode, its input's shape, and whether gradients were enabled."""
    text = _text(one, "model")
    parts = re.fullmatch(r"(.*) \((\w+) mode, ([\dx]*)(, without gradients)?\)", text)
    if parts is None:
        return text or "unknown model", "", "", ""
    return parts[1], parts[2], parts[3], "no" if parts[4] else "yes"


def _value(one: SetReport) -> str:
    text = _text(one, "value")
    if parts := re.fullmatch(r"(.*): (\S+) \([\w]*\)", text):
        where = parts[1] if parts[1] == "the model itself" else f"module {safe(parts[1])}"
        return f"{safe(parts[2])} in {where}"
    return safe(re.sub(r" \([\dx]*\)$", "", text)) or "unknown value"


def _text(one: SetReport, name: str) -> str:
    text = one.about.get(name)
    # No name comes near. Patterns take long for much longer ones.
    return text[:1000] if isinstance(text, str) else ""


def row_shape(one: SetReport) -> tuple[int, ...]:
    """Returns the shape of a row in the model, or its shape in the file if that is not known."""
    assert one.row is not None
    dims, rows = _numbers(one, "shape"), _numbers(one, "rows")
    if dims is None:
        return one.row.dims
    if rows is not None and len(rows) == 3 and rows[0] < len(dims):
        axis, outer, inner = rows
        dims = [*dims[:axis], *([outer * inner] if outer * inner > 1 else []), *dims[axis + 1 :]]
    return tuple(dims) if prod(dims) == prod(one.row.dims) else one.row.dims


def _numbers(one: SetReport, name: str) -> list[int] | None:
    found = one.about.get(name)
    if not isinstance(found, list) or len(found) > _MOST_DIMS:
        return None
    return found if all(type(n) is int and 0 <= n < _MOST_SIZE for n in found) else None


def _rows(one: SetReport) -> str:
    if one.row is None:
        return "nothing readable"
    dims = "x".join(map(str, row_shape(one))) or "one number,"
    what = "whole batches" if "rows" in one.about and one.about["rows"] is None else "rows"
    return f"{what} of {dims} {one.row.dtype}, {human_bytes(one.row.nbytes)} each"


def cut(text: str, most: int) -> str:
    """Returns a text of at most so many characters. A text that is cut ends with dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def safe(text: str, most: int = _MOST_NAME) -> str:
    """Returns a text of unknown origin in a form that is safe to print on a terminal."""
    shown = "".join(each if each.isprintable() else "?" for each in text[: most + 1])
    return cut(shown, most)
