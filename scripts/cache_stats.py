"""Show what is in a cache folder: `python scripts/cache_stats.py [CACHE_DIR]`.

The folder is the directory of an `ActivationCache`, or the `--cache-dir` of `cachefreeze.train`. It
may be used while runs use the cache; nothing is changed but by `--prune`. Exit code 0: all is well;
1: something is damaged; 2: the folder is no cache, or an option does not fit.
"""

import argparse
import dataclasses
import io
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.files import human_bytes
from cachefreeze.report.summary_text import duration, format_table
from cachefreeze.samples import Encoded, Values, encodings, sample
from cachefreeze.segments.budget import named_folders
from cachefreeze.segments.directory import is_directory
from cachefreeze.store import (
    CacheReport,
    StoreError,
    StoreReport,
    default_budget,
    inspect_cache,
    remove_rubbish,
)
from cachefreeze.store.folder import is_store, rubbish

# Of a line; a folder's name is as long as it is.
COLUMNS = 100
BAR = 20
# Of names that a store gives itself.
MOST_NAME = 30


@dataclass
class Look:
    """What was found in a folder.

    Args:
        cache: the report on it.
        budget: bytes that it may take.
        chosen: the budget was given, and is not what a run would take without being told.
        pruned: how much rubbish was removed.
        verified: every chunk was looked at.
        values, codecs: by the name of a store, if that was asked for: of a sample of its rows, or
            why there is none.
    """

    cache: CacheReport
    budget: float
    chosen: bool
    pruned: int = 0
    verified: bool = False
    values: dict[str, Values | str] = field(default_factory=dict)
    codecs: dict[str, list[Encoded] | str] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what is in a cache folder.")
    parser.add_argument(
        "cache_dir",
        nargs="?",
        type=Path,
        default=Path("data/cache"),
        help="folder of the cache (default: data/cache)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--verify", action="store_true", help="check every chunk's checksum")
    parser.add_argument(
        "--prune",
        nargs="?",
        const="",
        metavar="DAYS",
        help="remove what killed runs left; with DAYS, also rows that were not used for so long "
        "(only in the directory of an ActivationCache)",
    )
    parser.add_argument(
        "--values",
        action="store_true",
        help="range and histogram of a sample of each store's rows (only of cachefreeze.train)",
    )
    parser.add_argument(
        "--codecs",
        action="store_true",
        help="what each store would take otherwise, by a sample (only of cachefreeze.train)",
    )
    parser.add_argument(
        "--max-gb",
        type=float,
        help="what the folder may take, in GB (default: what a run would let it take)",
    )
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may not know every letter of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check(args)
        if holds_rows(args.cache_dir):
            return show_directory(args)
        found = look(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_json(found), indent=2) if args.json else "\n".join(as_text(found)))
    return 1 if found.cache.damaged else 0


def check(args: argparse.Namespace) -> None:
    """Compares the options with each other and with the folder.

    Raises:
        UserError: something does not fit.
    """
    folder = args.cache_dir
    if args.max_gb is not None and not 0 <= args.max_gb < inf:
        raise UserError(f"--max-gb {args.max_gb} does not make sense: it must be 0 or more")
    if args.prune:
        try:
            days = float(args.prune)
        except ValueError:
            days = -1.0
        if not 0 <= days < inf:
            raise UserError(
                f"--prune {args.prune} is no number of days: give one, and the folder before it"
            )
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the one that the cache was given")
    if not is_directory(folder):
        raise UserError(f"{folder} is not a cache folder of cachefreeze: name another one")
    if holds_rows(folder):
        if args.values or args.codecs:
            option = "--values" if args.values else "--codecs"
            raise UserError(f"{folder} is of an ActivationCache: it is shown without {option}")
    elif args.prune:
        raise UserError(f"{folder} is of cachefreeze.train: give --prune without a number of days")


def holds_rows(folder: Path) -> bool:
    """Whether a cache folder is the directory of an `ActivationCache`. Both have the same tag."""
    folders = named_folders(folder)
    has_sets = any(named_folders(each) for each in folders if not is_store(each))
    return has_sets or not (any(map(is_store, folders)) or any(rubbish(folder)))


def show_directory(args: argparse.Namespace) -> int:
    """Prints what lies in the directory of an `ActivationCache`. Returns the exit code."""
    # `runpy`, other than `python`, does not find what lies beside this file.
    if (here := str(Path(__file__).parent)) not in sys.path:
        sys.path.append(here)
    import directory_stats

    days = None if args.prune is None else float(args.prune or inf)
    found = directory_stats.look(args.cache_dir, check=args.verify, prune_days=days)
    free, chosen = shutil.disk_usage(args.cache_dir).free, args.max_gb is not None
    budget = args.max_gb * 1e9 if chosen else (found.nbytes + free) // 2
    if args.json:
        totals = {
            "cache_dir": str(args.cache_dir),
            "bytes": found.nbytes,
            "free_bytes": free,
            "budget_bytes": budget,
            "budget_given": chosen,
            "over_budget": found.nbytes > budget,
        }
        print(json.dumps(totals | directory_stats.as_json(found), indent=2))
    else:
        which = "--max-gb" if chosen else "half of the free disk, a run's default"
        lines = directory_stats.as_text(found, args.cache_dir)
        stores = sum(map(is_store, named_folders(args.cache_dir)))
        others = [f"stores of cachefreeze.train, not shown: {stores}"] if stores else []
        totals_lines = budget_lines(found.nbytes, budget, which, free)
        print("\n".join([*lines, *others, *totals_lines]))
    return 1 if found.problems else 0


def budget_lines(used: float, budget: float, which: str, free: float) -> list[str]:
    """What a folder takes of what it may take, and of the disk."""
    share = used / budget if budget else float(used > 0)
    line = f"{bar(share)}  {human_bytes(used)} of {human_bytes(budget)} ({which})"
    over = [f"over budget by {human_bytes(used - budget)}"] if used > budget else []
    return [line, *over, f"{human_bytes(free)} free on this disk"]


def look(args: argparse.Namespace) -> Look:
    """Whatever the options ask for.

    Raises:
        UserError: the folder is no cache.
    """
    cache, pruned = inspect_cache(args.cache_dir, verify=args.verify), 0
    if args.prune is not None and cache.orphans:
        pruned = remove_rubbish(args.cache_dir)
        cache = inspect_cache(args.cache_dir, verify=args.verify)
    chosen = args.max_gb is not None
    budget = args.max_gb * 1e9 if chosen else default_budget(args.cache_dir)
    found = Look(cache, budget, chosen, pruned, args.verify)
    if args.values or args.codecs:
        for store in cache.stores:
            name = store.folder.name
            try:
                drawn = sample(store.folder)
            except StoreError as error:
                if args.values:
                    found.values[name] = str(error)
                if args.codecs:
                    found.codecs[name] = str(error)
                continue
            if args.values:
                found.values[name] = Values.of(drawn)
            if args.codecs:
                found.codecs[name] = encodings(drawn)
    return found


def as_json(found: Look) -> dict[str, Any]:
    """All that is known, in plain values."""
    cache = found.cache
    return {
        "cache_dir": str(cache.folder),
        "bytes": cache.bytes,
        "free_bytes": cache.free_bytes,
        "budget_bytes": found.budget,
        "budget_given": found.chosen,
        "damaged": cache.damaged,
        "verified": found.verified,
        "orphans": [path.name for path in cache.orphans],
        "pruned": found.pruned,
        "stores": [_store_as_json(store, found) for store in cache.stores],
    }


def _store_as_json(store: StoreReport, found: Look) -> dict[str, Any]:
    result: dict[str, Any] = {
        "fingerprint": store.folder.name,
        "state": store.state,
        "committed": store.committed,
        "kept": store.kept,
        "in_use": store.in_use,
        "bytes": store.bytes,
        "age_seconds": store.age_seconds,
        "unused_seconds": store.unused_seconds,
        "last_run": None if store.usage is None else dataclasses.asdict(store.usage),
        "damage": list(store.damage),
    }
    if store.description is not None:
        about = store.description
        result |= {
            "network": about.network,
            "boundary": about.boundary,
            "unit": about.unit,
            "values": about.values,
            "stored": about.stored,
            "codec": about.codec,
            "lossy": about.lossy,
            "details": about.details,
            "splits": {
                split: {
                    "rows": layout.rows,
                    "rows_present": store.rows_present[split],
                    "row_shape": list(layout.row_shape),
                    "row_bytes": layout.row_bytes,
                    "dtype": layout.dtype,
                    "rows_per_chunk": layout.rows_per_chunk,
                    "chunks_present": store.chunks_present[split],
                    "chunks_expected": layout.chunks,
                    "bytes": store.split_bytes[split],
                }
                for split, layout in about.splits.items()
            },
        }
    name = store.folder.name
    if name in found.values:
        result["sampled_values"] = _plain(found.values[name])
    if name in found.codecs:
        result["sampled_codecs"] = _plain(found.codecs[name])
    return result


def _plain(sampled: Values | list[Encoded] | str) -> Any:
    if isinstance(sampled, str):
        return {"error": sampled}
    if isinstance(sampled, list):
        return [dataclasses.asdict(each) for each in sampled]
    return dataclasses.asdict(sampled)


def as_text(found: Look) -> list[str]:
    """A few lines for each store, then totals; none longer than `COLUMNS`."""
    cache = found.cache
    lines = []
    for store in cache.stores:
        lines += [*map(_cut_line, _store_lines(store, found)), ""]
    if found.verified and cache.stores and not cache.damaged:
        lines.append("verified: every chunk of a complete store is as it was written")
    count = len(cache.stores)
    stores = f"{count} store{'' if count == 1 else 's'}" if count else "no stores"
    lines.append(f"{stores} in {cache.folder}")
    which = "--max-gb" if found.chosen else "80 % of the free disk, a run's default"
    lines += budget_lines(cache.bytes, found.budget, which, cache.free_bytes)
    if found.pruned:
        lines.append(f"pruned: {found.pruned} orphans of killed runs")
    if cache.orphans:
        lines.append(f"orphans of killed runs: {len(cache.orphans)} (--prune removes them;")
        lines.append("  a run that is resumed goes on with a store that was half written)")
    return lines


def _store_lines(store: StoreReport, found: Look) -> Iterator[str]:
    about, name = store.description, store.folder.name
    what = "what is not known"
    if about is not None:
        place = f"{about.boundary} after {_cut(about.unit)}" if about.boundary else "0 (pixels)"
        what = f"{_cut(about.network)}, boundary {place}"
    yield f"{name[:12]}  {what}"
    yield f"  {store.state}, {human_bytes(store.bytes)}, made {ago(store.age_seconds)}"
    if about is not None:
        table = [
            [
                f"  {_cut(split)}",
                f"{store.rows_present[split]:,}/{layout.rows:,} rows",
                bar(store.rows_present[split] / layout.rows),
                f"{store.chunks_present[split]}/{layout.chunks} chunks",
                human_bytes(store.split_bytes[split]),
            ]
            for split, layout in about.splits.items()
        ]
        yield from format_table(table, right=(1, 3, 4))
        layout = next(iter(about.splits.values()))
        shape = "x".join(map(str, layout.row_shape)) or "one number"
        kind = f"{about.values} as {about.stored} (lossy)" if about.lossy else about.values
        yield f"  a row: {shape} {kind}, {human_bytes(layout.row_bytes)}, {about.codec}"
        if (batch := about.details.get("batch_size")) is not None:
            source = about.details.get("input")
            of = "" if source is None else f" from input of {_cut(source)}"
            yield f"  made in batches of {_cut(batch)}{of}"
    if store.unused_seconds is not None:
        yield f"  last used {ago(store.unused_seconds)}"
    if store.usage is not None:
        hits, misses = store.usage.hits, store.usage.misses
        share = f", {hits / (hits + misses):.1%} hits" if hits + misses else ""
        yield f"  its last run: {hits:,} hits, {misses:,} misses (rows computed to fill it){share}"
    for sentence in store.damage:
        yield from _wrapped("damaged", sentence)
    if (values := found.values.get(name)) is not None:
        yield from _value_lines(values)
    if (codecs := found.codecs.get(name)) is not None:
        yield from _codec_lines(codecs)


def _value_lines(values: Values | str) -> Iterator[str]:
    if isinstance(values, str):
        yield from _wrapped("no values", values)
        return
    yield (
        f"  values of {values.rows:,} rows: {values.zeros / max(values.numbers, 1):.1%} are 0, "
        f"{values.nan:,} NaN, {values.infinite:,} infinite"
    )
    if values.low is None:
        return
    yield (
        f"    {values.low:.4g} to {values.high:.4g}, mean {values.mean:.4g}, "
        f"standard deviation {values.deviation:.4g}"
    )
    most = max(values.counts, default=0)
    others = sum(values.counts)
    table = [
        [f"    {low:.3g}", f"{high:.3g}", f"{count / others:.2%}", "#" * round(50 * count / most)]
        for low, high, count in zip(values.edges, values.edges[1:], values.counts, strict=False)
    ]
    if table:
        header = ["    from", "to", "share", "of what is not 0"]
        yield from format_table([header, *table], right=(0, 1, 2))


def _codec_lines(codecs: list[Encoded] | str) -> Iterator[str]:
    if isinstance(codecs, str):
        yield from _wrapped("no codecs", codecs)
        return
    raw = codecs[0].bytes
    table = [["    kept with", "takes", "of raw", "loses"]]
    for each in codecs:
        loses = "nothing" if each.error is None else f"{each.error:.2%} of the values, rms"
        share = f"{each.bytes / raw:.0%}" if raw else ""
        table.append([f"    {each.option}", human_bytes(each.bytes), share, loses])
    yield from format_table(table, right=(1, 2))


def _wrapped(label: str, sentence: str) -> list[str]:
    whole = f"{label}: {sentence}"
    return textwrap.wrap(whole, COLUMNS, initial_indent="  ", subsequent_indent="    ")


def _cut(name: str, most: int = MOST_NAME) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."


def _cut_line(line: str) -> str:
    """A store may claim any number of dimensions, and batches of any size."""
    return _cut(line, COLUMNS)


def bar(share: float) -> str:
    """`[##########          ]  50%`; full only if nothing is missing."""
    share = min(max(share, 0.0), 1.0)
    return f"[{'#' * int(share * BAR):{BAR}}] {int(share * 100):3}%"


def ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"


if __name__ == "__main__":
    sys.exit(main())
