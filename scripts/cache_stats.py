"""Show what is in a cache folder: `python scripts/cache_stats.py [CACHE_DIR]`.

Exit code 0: all is well; 1: something is damaged; 2: the folder is no cache.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.files import human_bytes
from cachefreeze.report import duration, format_table
from cachefreeze.store import CacheReport, StoreReport, inspect_cache, remove_rubbish

HEADER = ["store", "network", "boundary", "split", "rows", "shape", "type", "codec", "chunks"]
HEADER += ["size", "state", "age"]
RIGHT_ALIGNED = [HEADER.index(title) for title in ("rows", "chunks", "size", "age")]


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what is in a cache folder.")
    parser.add_argument(
        "cache_dir", nargs="?", type=Path, default=Path("data/cache"), help="default: data/cache"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--verify", action="store_true", help="check every chunk's checksum")
    parser.add_argument("--prune", action="store_true", help="remove what killed runs left")
    args = parser.parse_args()
    try:
        report = inspect_cache(args.cache_dir, verify=args.verify)
        pruned = 0
        if args.prune and report.orphans:
            pruned = remove_rubbish(args.cache_dir)
            report = inspect_cache(args.cache_dir, verify=args.verify)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(report, pruned), indent=2))
    else:
        print("\n".join(as_text(report, pruned, args.verify)))
    return 1 if report.damaged else 0


def as_json(report: CacheReport, pruned: int) -> dict[str, Any]:
    """All that is known, in plain values."""
    return {
        "cache_dir": str(report.folder),
        "bytes": report.bytes,
        "free_bytes": report.free_bytes,
        "damaged": report.damaged,
        "orphans": [path.name for path in report.orphans],
        "pruned": pruned,
        "stores": [_store_as_json(store) for store in report.stores],
    }


def _store_as_json(store: StoreReport) -> dict[str, Any]:
    result: dict[str, Any] = {
        "fingerprint": store.folder.name,
        "state": store.state,
        "committed": store.committed,
        "in_use": store.in_use,
        "bytes": store.bytes,
        "age_seconds": store.age_seconds,
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
                    "row_shape": list(layout.row_shape),
                    "dtype": layout.dtype,
                    "rows_per_chunk": layout.rows_per_chunk,
                    "chunks_present": store.chunks_present[split],
                    "chunks_expected": layout.chunks,
                    "bytes": store.split_bytes[split],
                }
                for split, layout in about.splits.items()
            },
        }
    return result


def as_text(report: CacheReport, pruned: int, verified: bool) -> list[str]:
    """A table with a line for each split of each store, then totals."""
    rows = [row for store in report.stores for row in _table_rows(store)]
    lines = (
        format_table([HEADER, *rows], right=RIGHT_ALIGNED)
        if rows
        else [f"no stores in {report.folder}"]
    )
    for store in report.stores:
        lines += [f"damaged: {store.folder.name}: {sentence}" for sentence in store.damage]
    if verified and rows and not report.damaged:
        lines.append("verified: every chunk of a complete store is as it was written")
    stores = f"{len(report.stores)} store{'' if len(report.stores) == 1 else 's'}"
    lines.append(
        f"{stores}, {human_bytes(report.bytes)} in {report.folder}; "
        f"{human_bytes(report.free_bytes)} free on this disk"
    )
    if pruned:
        lines.append(f"pruned: {pruned} orphans of killed runs")
    if report.orphans:
        lines.append(
            f"orphans of killed runs: {len(report.orphans)} (--prune removes them; a run that is "
            "resumed goes on with a store that was half written)"
        )
    return lines


def _table_rows(store: StoreReport) -> list[list[str]]:
    name, age = store.folder.name[:12], duration(store.age_seconds)
    about = store.description
    if about is None:
        unknown = ["?", "?", "", "", "", "", "", ""]
        return [[name, *unknown, human_bytes(store.bytes), store.state, age]]
    kind = f"{about.values} as {about.stored} (lossy)" if about.lossy else about.values
    rows: list[list[str]] = []
    for split, layout in about.splits.items():
        what = [
            split,
            f"{layout.rows:,}",
            "x".join(map(str, layout.row_shape)),
            kind,
            about.codec,
            f"{store.chunks_present[split]}/{layout.chunks}",
            human_bytes(store.split_bytes[split]),
        ]
        if rows:
            rows.append(["", "", "", *what, "", ""])
        else:
            place = f"{about.boundary} {about.unit}"
            rows.append([name, about.network, place, *what, store.state, age])
    return rows


if __name__ == "__main__":
    sys.exit(main())
