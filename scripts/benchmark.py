"""Time whole runs with and without freezing and cache, in turn, on the same data and network.

    python scripts/benchmark.py --repeats 3 --pin 0 -- --arch wrn16_2 --t0 0.5 --epochs 20

What stands behind `--` goes to `python -m cachefreeze.train`. Every repeat runs all modes in turn,
so that a machine whose speed drifts is as slow for one as for the others; ratios are taken within
a repeat, and their medians printed. The modes:

no freezing     plain training
freezing only   FreezeOut as published (--no-cache)
cached          as it is meant to be
limit           the cached run with the frozen prefix's rows in memory, filling and measuring not
                counted: what no cache can beat
same time       no freezing, with as many epochs as fit into the cached run's time

With `--device cuda` as its first words it is another program, for GPUs: `benchmark_device.py`.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import benchmark_device
import numpy as np
import torch
from torch import Tensor

from cachefreeze import config, train
from cachefreeze.encoding import in_order
from cachefreeze.models.units import is_channels_last
from cachefreeze.planner import efficiency
from cachefreeze.prefix_cache import Materialization, PrefixCache
from cachefreeze.report.summary_text import markdown_table
from cachefreeze.resume import Start
from cachefreeze.rows import Indices, Rows, batches_of
from cachefreeze.stored_rows import StoredPixels, StoredRows

MODES = {
    "no freezing": ["--no-freeze", "--no-cache"],
    "freezing only": ["--no-cache"],
    "cached": ["--cache"],
    "limit": ["--cache", "--cache-policy", "eager", "--cache-codec", "raw"],
    "same time": ["--no-freeze", "--no-cache"],
}

Summary = dict[str, Any]
Runs = dict[str, list[Summary]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="of all modes (default: 3)")
    parser.add_argument("--modes", default=",".join(MODES), help="which, with commas between them")
    parser.add_argument(
        "--once", default="", help="modes that run in the first repeat only, with commas"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=OPTIONS",
        help="one more mode: cached, with more options",
    )
    parser.add_argument("--pin", type=int, metavar="CORE", help="run on this processor core only")
    parser.add_argument("--json", type=Path, help="write the summaries of all runs to this file")
    parser.add_argument("--limit", action="store_true", help=argparse.SUPPRESS)  # runs one itself
    parser.add_argument("options", nargs="*", help="of cachefreeze.train, after --")
    if sys.argv[1:2] == ["--device"]:
        return benchmark_device.main(sys.argv[1:])
    args = parser.parse_args()
    if args.limit:
        settings = dataclasses.replace(config.parse(args.options), cache_max_gb=1e6)
        train.run(Start(settings, args.options), MemoryCache)
        return 0
    if args.pin is not None:
        os.sched_setaffinity(0, {args.pin})
    modes = {name: MODES[name] for name in args.modes.split(",")}
    for also in args.also:
        name, options = also.split("=", 1)
        modes[name] = ["--cache", *shlex.split(options)]
    runs = measure(modes, args.repeats, set(args.once.split(",")), args.options)
    if args.json is not None:
        args.json.write_text(json.dumps(runs, indent=2))
    print("\n".join(table(runs)))
    return 0


def measure(modes: dict[str, list[str]], repeats: int, once: set[str], options: list[str]) -> Runs:
    runs: Runs = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory(prefix="cachefreeze-benchmark-") as folder:
        for repeat in range(repeats):
            for mode, switches in modes.items():
                if mode in once and repeat:
                    continue
                name = f"{repeat}-{mode.replace(' ', '-')}"
                words = [*options, *switches, "--cache-dir", f"{folder}/cache-{name}"]
                if mode == "same time":
                    words += ["--epochs", str(epochs_in_the_same_time(runs))]
                summary = run(words, Path(folder) / name, limit=mode == "limit")
                runs[mode].append(summary)
                print(f"{repeat + 1}: {mode}: {summary['wall_seconds']:.1f} s", file=sys.stderr)
                subprocess.run(["rm", "-rf", f"{folder}/cache-{name}"], check=True)
    return runs


def run(options: list[str], output: Path, *, limit: bool) -> Summary:
    """One run in a process of its own; returns its summary."""
    program = [str(Path(__file__)), "--limit", "--"] if limit else ["-m", "cachefreeze.train"]
    command = [sys.executable, *program, *options, "--no-report", "--output-dir", str(output)]
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    summary: Summary = json.loads((output / "summary.json").read_text())
    if limit:
        summary["wall_seconds"] -= summary["materialize_seconds"] + summary["profile_seconds"]
    return summary


def epochs_in_the_same_time(runs: Runs) -> int:
    """Of training without freezing, in the time that the last cached run took."""
    plain, cached = runs["no freezing"][-1], runs["cached"][-1]
    seconds = plain["train_seconds"] + plain["validate_seconds"]
    allowed = cached["wall_seconds"] - (plain["wall_seconds"] - seconds)
    return max(int(allowed / (seconds / plain["epochs"])), 1)


class MemoryCache(PrefixCache):
    """Keeps the rows in memory, which is to cost nothing: its time is taken off afterwards."""

    def materialize(
        self, stop: int | None = None, codec: str = "raw", *, fill: bool = True
    ) -> Materialization | None:
        assert stop is not None
        start = time.perf_counter()
        filled: dict[str, Rows] = {}
        size = 0
        for split, count in self.rows.items():
            order = batches_of(np.arange(count), self.batch_size)
            batches = list(self._source(stop)(split, order))
            last = is_channels_last(batches[0])
            rows = torch.cat([in_order(x, last) for x in batches])
            size += rows.nbytes
            memory = MemoryRows(rows, last, self.device)
            filled[split] = memory
            if stop == 0:
                filled[split] = StoredPixels(memory, self.inputs[split])  # type: ignore[arg-type]
        self._holdings.rows, self._holdings.boundary = filled, stop
        seconds = time.perf_counter() - start
        rows_in_all = sum(self.rows.values())
        return Materialization(stop, rows_in_all, size, seconds, seconds, False, 0, codec, False)


class MemoryRows(StoredRows):
    """Rows from a tensor: (N, H, W, C) if they are channels-last, else (N, ...)."""

    def __init__(self, rows: Tensor, channels_last: bool, device: torch.device) -> None:
        self.memory = rows
        self.channels_last = channels_last
        self.device = device
        self.identity = ""

    def __len__(self) -> int:
        return len(self.memory)

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        for indices in order:
            rows = torch.index_select(self.memory, 0, torch.from_numpy(indices))
            yield (rows.permute(0, 3, 1, 2) if self.channels_last else rows).to(self.device)


def table(runs: Runs) -> list[str]:
    """Medians over the repeats, in Markdown."""
    rows = [
        [
            "median (min - max)",
            "n",
            "seconds",
            "no freezing / this",
            "freezing only / this",
            "accuracy",
            "epochs",
            "rows x frozen units computed",
        ]
    ]
    for mode, summaries in runs.items():
        rows.append(
            [
                mode,
                str(len(summaries)),
                spread([summary["wall_seconds"] for summary in summaries], ".1f"),
                ratios(runs, "no freezing", mode),
                ratios(runs, "freezing only", mode),
                f"{summaries[0]['val_accuracy']:.2%}",
                str(summaries[0]["epochs"]),
                f"{summaries[0]['cache']['prefix_unit_rows_computed']:,}",
            ]
        )
    return [*markdown_table(rows), "", *verdicts(runs)]


def verdicts(runs: Runs) -> list[str]:
    lines = []
    if "freezing only" in runs and "cached" in runs:
        hashes = {
            summary["weights_sha256"]
            for mode in ("freezing only", "cached")
            for summary in runs[mode]
        }
        verdict = "the same, bit for bit" if len(hashes) == 1 else "DIFFERENT"
        lines.append(f"Weights of freezing only and cached, all repeats: {verdict}.")
        if "limit" in runs:
            three = zip(*(runs[m] for m in ("freezing only", "cached", "limit")), strict=False)
            shares = [efficiency(*(each["wall_seconds"] for each in trio)) for trio in three]
            reached = [share for share in shares if share is not None]
            lines.append(f"Efficiency: {spread(reached, '.2f')}.")
    plans = [summary["plan"] for summary in runs.get("cached", []) if summary["plan"]]
    if plans:
        off = [plan["actual"]["seconds"] / plan["predicted"]["seconds"] for plan in plans]
        hoped = [plan["predicted"]["efficiency"] or 0.0 for plan in plans]
        lines += [
            f"Actual over predicted time of cached: {spread(off, '.2f')}; efficiency predicted: "
            f"{spread(hoped, '.2f')}.",
            f"Materialisations: {len(runs['cached'][0]['cache']['boundaries'])}; measuring took "
            f"{spread([plan['profile_seconds'] for plan in plans], '.1f')} s.",
        ]
    return lines


def ratios(runs: Runs, one: str, other: str) -> str:
    """Median and range of the ratios of wall time, repeat by repeat."""
    if one not in runs or one == other:
        return ""
    pairs = zip(runs[one], runs[other], strict=False)
    return spread([a["wall_seconds"] / b["wall_seconds"] for a, b in pairs], ".2f")


def spread(values: list[float], how: str) -> str:
    if not values:
        return ""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{how}} ({low:{how}} - {high:{how}})" if len(values) > 1 else f"{middle:{how}}"


if __name__ == "__main__":
    sys.exit(main())
