"""Compare whole runs: freezing only, with the cache, and without freezing.

    python scripts/benchmark.py [--repeats 3] [--no-freezing] -- --arch wrn16_2 --t0 0.5

What follows the two dashes is given to `python -m cachefreeze.train`. Runs are whole processes, in
turn; ratios are taken within a repeat, and medians told with their spread. Exit code 1 means that
the weights differ.
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

WAYS = {
    "freezing only": ["--no-cache"],
    "cached": [],
    "no freezing": ["--no-cache", "--no-freeze"],
}


def run(options: list[str], folder: Path, way: str) -> dict[str, Any]:
    """Runs the program.

    Args:
        options: Options of the program.
        folder: Empty folder for the run and its cache.
        way: Name of what is run.

    Returns:
        Summary of the run, with the seconds of the whole process as `process_seconds`.
    """
    command = [sys.executable, "-m", "cachefreeze.train", *options, *WAYS[way], "--quiet",
               "--no-report", "--output-dir", str(folder / "run"),
               "--cache-dir", str(folder / "cache")]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return {**summary, "process_seconds": seconds}


def spread(values: list[float]) -> str:
    """Returns the median of some numbers with the least and the largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def main() -> int:
    """Runs all ways in turn and prints what they took; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each way")
    parser.add_argument(
        "--no-freezing", action="store_true", help="run without freezing, too, once"
    )
    parser.add_argument("options", nargs="*", help="options of the program, after --")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(args.repeats):
        for way in WAYS:
            if way == "no freezing" and (repeat or not args.no_freezing):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found[way].append(run(args.options, Path(folder), way))
            one = found[way][-1]
            print(f"{way:14} {one['process_seconds']:7.1f} s  {one['val_accuracy']:.2%}")
    pairs = list(zip(found["freezing only"], found["cached"], strict=True))
    for name in ("process_seconds", "wall_seconds"):
        ratios = [plain[name] / cached[name] for plain, cached in pairs]
        print(f"freezing only / cached, {name}: {spread(ratios)}")
    same = all(a["weights_sha256"] == b["weights_sha256"] for a, b in pairs)
    print(f"weights are {'the same' if same else 'NOT the same'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
