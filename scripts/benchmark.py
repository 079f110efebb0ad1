"""Compares whole runs: freezing only, with the cache, again with the kept rows, without freezing.

    python scripts/benchmark.py [--repeats 3] [--again] [--no-freezing] -- --arch wrn16_2 --t0 0.5

The options after the two dashes are given to `python -m cachefreeze.train`. Each run has its own
process, and the ways take turns. Ratios are taken within a repeat; the median is printed with the
spread. Exit code 1 means that the weights differ.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = "freezing only"
# With `--again` and `--no-freezing` also the last two.
WAYS = {
    BASE: ["--no-cache"],
    "cached": [],
    "again": [],
    "no freezing": ["--no-cache", "--no-freeze"],
}


def run(options: list[str], folder: Path, way: str) -> dict[str, Any]:
    """Runs the program.

    Args:
        options: Options of the program.
        folder: Folder of this repeat, with the cache of the runs before.
        way: Name of the way to run it: one of `WAYS`.

    Returns:
        Summary of the run, with the seconds of the whole process as `process_seconds`.
    """
    output = folder / way.replace(" ", "-")
    command = [sys.executable, "-m", "cachefreeze.train", *options, *WAYS[way], "--quiet",
               "--no-report", "--output-dir", str(output),
               "--cache-dir", str(folder / "cache")]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    summary = json.loads((output / "summary.json").read_text())
    return {**summary, "process_seconds": seconds}


def spread(values: list[float]) -> str:
    """Returns the median of some numbers, with the smallest and the largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def main() -> int:
    """Runs all ways in turn and prints their times; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each way")
    parser.add_argument(
        "--again", action="store_true", help="run once more with the cache of the run before"
    )
    parser.add_argument("--no-freezing", action="store_true", help="run once without freezing, too")
    parser.add_argument("options", nargs="*", help="options of cachefreeze.train, after --")
    args = parser.parse_args()
    left_out = {"again": not args.again, "no freezing": not args.no_freezing}
    found: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for way in WAYS:
                if left_out.get(way) or (way == "no freezing" and repeat):
                    continue
                one = run(args.options, Path(folder), way)
                found.setdefault(way, []).append(one)
                print(f"{way:14} {one['process_seconds']:7.1f} s  {one['val_accuracy']:.2%}")
    base = found.pop(BASE)
    found.pop("no freezing", None)
    for way, runs in found.items():
        for name in ("process_seconds", "wall_seconds"):
            ratios = [plain[name] / one[name] for plain, one in zip(base, runs, strict=True)]
            print(f"{BASE} / {way}, {name}: {spread(ratios)}")
    weights = {one["weights_sha256"] for runs in (base, *found.values()) for one in runs}
    print(f"weights are {'the same' if len(weights) == 1 else 'NOT the same'}")
    return 0 if len(weights) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
