"""Shows what is in a cache folder: `python scripts/cache_stats.py [CACHE_DIR]`.

The folder is the directory of an `ActivationCache`, or the `--cache-dir` of `cachefreeze.train`. It
may also be the URL of an object store (`s3://bucket/name`), which is listed then.
Runs may use the cache at the same time. Only `--prune` changes anything. Exit code 0: all is well;
1: something is damaged; 2: the folder is no cache, or an option does not fit.
"""

import argparse
import io
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.report.cache_contents import Contents, Group, cut, look, row_shape
from cachefreeze.report.summary_text import format_table
from cachefreeze.store.directory import is_directory
from cachefreeze.store.files import human_bytes
from cachefreeze.store.inspect import SetReport
from cachefreeze.store.objects import is_url

COLUMNS, BAR, MOST_SETTINGS = 100, 20, 8


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


if __name__ == "__main__":
    sys.exit(main())
