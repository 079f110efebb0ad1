"""Shows what is in a cache folder: `python scripts/cache_stats.py [CACHE_DIR]`.

The folder is the directory of an `ActivationCache`, or the `--cache-dir` of `cachefreeze.train`. It
may also be the URL of an object store (`s3://bucket/name`), which is listed then.
Runs may use the cache at the same time. Only `--prune` changes anything. Exit code 0: all is well;
1: something is damaged; 2: the folder is no cache, or an option does not fit.
"""

import argparse
import io
import json
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf, prod
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.report.summary_text import format_table
from cachefreeze.store.directory import is_directory
from cachefreeze.store.files import human_bytes
from cachefreeze.store.inspect import Pruned, SetReport, inspect, prune, verify
from cachefreeze.store.inspect_objects import inspect_objects, prune_objects, verify_objects
from cachefreeze.store.objects import is_url

COLUMNS, BAR = 100, 20
MOST_DIMS, MOST_SIZE = 64, 2**40
MOST_NAME, MOST_SETTING, MOST_SETTINGS = 60, 40, 8
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


def main() -> int:
    """Prints what is in a cache folder; returns the exit code."""
    parser = argparse.ArgumentParser(description="Show what is in a cache folder.")
    parser.add_argument(
        "cache_dir",
        nargs="?",
        type=lambda text: text if is_url(text) else Path(text),
        default=Path("data/cache"),
        help="folder of the cache, or URL of an object store (default: data/cache)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--verify", action="store_true", help="check every chunk's checksum")
    parser.add_argument(
        "--prune",
        nargs="?",
        const=inf,
        metavar="DAYS",
        help="remove files that killed runs left; with DAYS, also rows not used for so many days",
    )
    parser.add_argument(
        "--max-gb",
        type=float,
        help="largest size of the folder in GB (default: as much as a run would let it take)",
    )
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may not know every letter of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    days = None if args.prune is None else float(args.prune)
    try:
        found = look(args.cache_dir, check=args.verify, prune_days=days)
    except UserError as error:  # an object store that does not work
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = args.max_gb is not None
    free = None if is_url(args.cache_dir) else shutil.disk_usage(args.cache_dir).free
    budget = args.max_gb * 1e9 if chosen else None if free is None else (found.nbytes + free) // 2
    if args.json:
        totals = {
            "cache_dir": str(args.cache_dir),
            "bytes": found.nbytes,
            "free_bytes": free,
            "budget_bytes": budget,
            "budget_given": chosen,
            "over_budget": budget is not None and found.nbytes > budget,
        }
        print(json.dumps(totals | as_json(found), indent=2))
    else:
        which = "--max-gb" if chosen else "half of the free disk, a run's default"
        lines = as_text(found, args.cache_dir)
        print("\n".join([*lines, *budget_lines(found.nbytes, budget, which, free)]))
    return 1 if found.problems else 0


def check(args: argparse.Namespace) -> None:
    """Checks that the options fit each other and the folder.

    Raises:
        UserError: An option makes no sense, or the folder is no cache.
    """
    folder = args.cache_dir
    if args.max_gb is not None and not 0 <= args.max_gb < inf:
        raise UserError(f"--max-gb {args.max_gb} does not make sense: it must be 0 or more")
    if isinstance(args.prune, str):
        try:
            days = float(args.prune)
        except ValueError:
            days = -1.0
        if not 0 <= days < inf:
            raise UserError(
                f"--prune {args.prune} is no number of days: give one, and the folder before it"
            )
    if is_url(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the one that the cache was given")
    if not is_directory(folder):
        raise UserError(f"{folder} is not a cache folder of cachefreeze: name another one")


def budget_lines(used: float, budget: float | None, which: str, free: float | None) -> list[str]:
    """Returns lines about the size of a folder, its limit, and the free disk."""
    if budget is None:
        return [f"{human_bytes(used)} in all"]
    share = min(used / budget if budget else float(used > 0), 1.0)
    bar = f"[{'#' * int(share * BAR):{BAR}}] {int(share * 100):3}%"  # full only if nothing is left
    line = f"{bar}  {human_bytes(used)} of {human_bytes(budget)} ({which})"
    over = [f"over budget by {human_bytes(used - budget)}"] if used > budget else []
    return [line, *over, *([] if free is None else [f"{human_bytes(free)} free on this disk"])]


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
    return {name: safe(value, MOST_SETTING) for name, value in found.items()}


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
    if not isinstance(found, list) or len(found) > MOST_DIMS:
        return None
    return found if all(type(n) is int and 0 <= n < MOST_SIZE for n in found) else None


def _rows(one: SetReport) -> str:
    if one.row is None:
        return "nothing readable"
    dims = "x".join(map(str, row_shape(one))) or "one number,"
    what = "whole batches" if "rows" in one.about and one.about["rows"] is None else "rows"
    return f"{what} of {dims} {one.row.dtype}, {human_bytes(one.row.nbytes)} each"


def as_json(found: Contents) -> dict[str, Any]:
    """Returns all that is known, in plain values. Times are seconds since 1970."""
    pruned = found.pruned
    return {
        "damaged": bool(found.problems),
        "problems": found.problems,
        "verified": found.verified,
        "pruned": pruned and {"bytes": pruned.nbytes, "rows": pruned.rows},
        "sets": [_set_as_json(one, group) for group in found.groups for one in group.sets],
    }


def _set_as_json(one: SetReport, group: Group) -> dict[str, Any]:
    return {
        "set": one.name,
        "model": group.model,
        "value": group.value,
        "row_shape": None if one.row is None else list(row_shape(one)),
        "row_bytes": None if one.row is None else one.row.nbytes,
        "dtype": None if one.row is None else one.row.dtype,
        "rows": one.rows,
        "bytes": one.nbytes,
        "runs": one.segments,
        "in_use": one.in_use,
        "first_use": one.first_use or None,
        "last_use": one.last_use or None,
        "differences": group.differences.get(one.name, {}),
        "problems": one.problems,
        "about": one.about,
    }


def as_text(found: Contents, directory: Path | str) -> Iterator[str]:
    """Yields the lines of a table for each value, and lines about damage and removed rows."""
    now, model = time.time(), None
    for group in found.groups:
        if group.model != model:
            yield group.model
            model = group.model
        yield cut(f"  output of {group.value}", COLUMNS)
        yield cut(f"  {group.rows}", COLUMNS)
        yield from _table(group, now)
        yield ""
    yield from (f"damaged: {sentence}" for sentence in found.problems)
    if found.problems:
        yield "Runs do not use what is damaged. They compute it again."
    elif found.verified and found.groups:
        yield "verified: every chunk is as it was written"
    if found.pruned is not None:
        for name, rows in found.pruned.rows.items():
            what = found.names.get(name, "unknown value")
            what_rows = _count(rows, "row") if rows else "unreadable rows"
            yield cut(f"removed: {what_rows} of {name[:12]}, {what}", COLUMNS)
        yield f"removed: {human_bytes(found.pruned.nbytes)} in all"
    rows = sum(one.rows for one in found.sets)
    sets = f"{_count(len(found.sets), 'set')} of {_count(rows, 'row')}" if found.sets else "no rows"
    yield f"{sets} in {directory}"


def _table(group: Group, now: float) -> Iterator[str]:
    table = [["    set", "rows", "size", "written by", "first used", "last used"]]
    table += [
        [
            f"    {one.name[:12]}",
            f"{one.rows:,}",
            human_bytes(one.nbytes),
            _count(one.segments, "run"),
            _ago(now, one.first_use),
            "in use now" if one.in_use else _ago(now, one.last_use),
        ]
        for one in group.sets
    ]
    header, *lines = format_table(table, right=(1, 2, 3))
    yield header
    for one, line in zip(group.sets, lines, strict=True):
        yield line
        yield from _difference_lines(group.differences.get(one.name, {}))
    if len(group.sets) > 1 and group.sets[0].row is not None:
        yield "    A set serves only runs that are like those that made it."
    if any("version" in each for each in group.differences.values()):
        yield "    Versions differ in the weights or the code that made the rows."


def _difference_lines(different: dict[str, str]) -> list[str]:
    words = [f"{name} {value}" for name, value in different.items()]
    if not words:
        return []
    if len(words) > MOST_SETTINGS:
        words = [*words[:MOST_SETTINGS], f"and {len(words) - MOST_SETTINGS:,} others"]
    indent = " " * 6
    line = f"made with {', '.join(words)}"
    return textwrap.wrap(line, COLUMNS, initial_indent=indent, subsequent_indent=f"{indent}  ")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _ago(now: float, then: float) -> str:
    if not then:
        return "unknown"
    seconds = max(now - then, 0.0)
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds // 86400:,.0f} days ago"


def cut(text: str, most: int) -> str:
    """Returns a text of at most so many characters. A text that is cut ends with dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def safe(text: str, most: int = MOST_NAME) -> str:
    """Returns a text of unknown origin in a form that is safe to print on a terminal."""
    shown = "".join(each if each.isprintable() else "?" for each in text[: most + 1])
    return cut(shown, most)


if __name__ == "__main__":
    sys.exit(main())
