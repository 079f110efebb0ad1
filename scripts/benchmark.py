"""Time whole runs with and without freezing and cache, in turn, on the same data and network.

    python scripts/benchmark.py --repeats 3 --pin 0 -- --arch wrn16_2 --t0 0.5 --epochs 10

What stands behind `--` goes to `python -m cachefreeze.train`. Every repeat runs all three modes,
so that a machine whose speed drifts is as slow for one as for the others; ratios are taken within
a repeat, and their medians printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODES = {
    "no freezing": ["--no-freeze", "--no-cache"],
    "freezing only": ["--no-cache"],
    "cached": ["--cache"],
}

Runs = dict[str, list[dict[str, Any]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of all modes (default: 3)")
    parser.add_argument("--pin", type=int, metavar="CORE", help="run on this processor core only")
    parser.add_argument("--json", action="store_true", help="print the summaries of all runs")
    parser.add_argument("options", nargs="*", help="of cachefreeze.train, after --")
    args = parser.parse_args()
    if args.pin is not None:
        os.sched_setaffinity(0, {args.pin})
    runs: Runs = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="cachefreeze-benchmark-") as folder:
        for repeat in range(args.repeats):
            for mode, switches in MODES.items():
                output = Path(folder) / f"{repeat}-{mode.replace(' ', '-')}"
                cache = ["--cache-dir", f"{folder}/cache{repeat}"]
                options = [*args.options, *switches, *cache, "--output-dir", str(output)]
                summary = run(options, output)
                runs[mode].append(summary)
                print(f"{repeat + 1}: {mode}: {summary['wall_seconds']:.1f} s", file=sys.stderr)
    print(json.dumps(runs, indent=2) if args.json else "\n".join(table(runs)))
    return 0


def run(options: list[str], output: Path) -> dict[str, Any]:
    """One run in a process of its own; returns its summary."""
    command = [sys.executable, "-m", "cachefreeze.train", *options]
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def table(runs: Runs) -> list[str]:
    """Medians over the repeats, in Markdown."""
    repeats = len(runs["cached"])
    lines = [
        f"| median of {repeats} | seconds (min - max) | no freezing / this | freezing only / this "
        "| validation accuracy | rows x frozen units computed |",
        "|---|---|---|---|---|---|",
    ]
    for mode, summaries in runs.items():
        seconds = [summary["wall_seconds"] for summary in summaries]
        lines.append(
            f"| {mode} | {statistics.median(seconds):.1f} ({min(seconds):.1f} - "
            f"{max(seconds):.1f}) | {ratio(runs, 'no freezing', mode)} | "
            f"{ratio(runs, 'freezing only', mode)} | {summaries[0]['val_accuracy']:.2%} | "
            f"{summaries[0]['cache']['prefix_unit_rows_computed']:,} |"
        )
    hashes = {
        summary["weights_sha256"] for mode in ("freezing only", "cached") for summary in runs[mode]
    }
    verdict = "the same, bit for bit" if len(hashes) == 1 else "DIFFERENT"
    return [*lines, "", f"Weights of freezing only and cached, all repeats: {verdict}."]


def ratio(runs: Runs, one: str, other: str) -> str:
    """Median and range of the ratios of wall time, repeat by repeat."""
    ratios = [
        a["wall_seconds"] / b["wall_seconds"] for a, b in zip(runs[one], runs[other], strict=True)
    ]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
