"""Fine-tuning with a frozen backbone: without the cache, with it, and once more.

    python scripts/benchmark_finetune.py -- --arch torchvision:resnet18 --freeze-first -2 \
        --dataset imagefolder --data-dir photos --image-size 64 --epochs 10

Every repeat runs the three one after the other, each in a process of its own: without a cache, with
an empty one, and with the one that is there then. Times are of whole processes, from the command to
the prompt. All three must end with the same weights.
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

from cachefreeze.report.summary_text import duration, markdown_table

MODES = ("without the cache", "with it, first run", "second run")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="of all three (default: 3)")
    parser.add_argument("options", nargs="*", help="of cachefreeze.train, after --")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="cachefreeze-finetune-") as folder:
            for mode in MODES:
                found = run(mode, Path(folder), args.options)
                runs[mode].append(found)
                print(f"{repeat + 1}: {mode}: {found['process_seconds']:.1f} s", file=sys.stderr)
    print("\n".join(table(runs)))
    return 0


def run(mode: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """One run; returns its summary, with the seconds of the whole process."""
    output = folder / mode.replace(" ", "-").replace(",", "")
    command = [sys.executable, "-m", "cachefreeze.train", *options, "--output-dir", str(output)]
    command += ["--no-report"]
    command += ["--no-cache"] if mode == MODES[0] else ["--cache-dir", str(folder / "cache")]
    start = time.perf_counter()
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - start
    if finished.returncode:
        raise SystemExit(finished.returncode)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return {**summary, "process_seconds": seconds}


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Medians, with the lowest and the highest; ratios are taken within a repeat."""
    baseline = runs[MODES[0]]
    rows = [["", "time", "of it training", "filling", "ratio", "rows run through frozen units"]]
    for mode, found in runs.items():
        ratios = [
            before["process_seconds"] / after["process_seconds"]
            for before, after in zip(baseline, found, strict=True)
        ]
        if {each["weights_sha256"] for each in found} != {baseline[0]["weights_sha256"]}:
            raise SystemExit(f"the weights of {mode} are not those of {MODES[0]}")
        rows.append(
            [
                mode,
                spread([each["process_seconds"] for each in found]),
                duration(statistics.median(each["train_seconds"] for each in found)),
                duration(statistics.median(each["materialize_seconds"] for each in found)),
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
                f"{found[0]['cache']['prefix_unit_rows_computed']:,}",
            ]
        )
    return markdown_table(rows)


def spread(seconds: list[float]) -> str:
    """Median, lowest and highest."""
    middle = duration(statistics.median(seconds))
    return f"{middle} ({duration(min(seconds))} - {duration(max(seconds))})"


if __name__ == "__main__":
    sys.exit(main())
