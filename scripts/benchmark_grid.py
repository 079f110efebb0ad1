"""Never a loss: the cached run beside freezing only, over settings where a cache has little to win.

    python scripts/benchmark_grid.py --repeats 3 --pin 0

Tiny networks, one epoch, nothing frozen, single rows, slow disks, no room: in each the cached run
should take at most 1.02 times the other, but for the noise, whose size is in the table as well: the
same command run twice. All runs are in this one process, in turn; medians are of their ratios.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cachefreeze import config, train
from cachefreeze.device import keep_freed_memory
from cachefreeze.report.summary_text import markdown_table
from cachefreeze.resume import Start
from cachefreeze.store import write

WRN, DENSENET = ("--arch", "wrn10_1"), ("--arch", "densenet16_4")
EARLY = ("--t0", "0.3", "--schedule", "linear")
FOLDER = ("--dataset", "imagefolder", "--image-size", "32", "-j", "0", "-b", "32")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Options of a run, and MB/s that its disk takes."""

    name: str
    options: tuple[str, ...]
    disk: float = float("inf")


SETTINGS = [
    Setting("one epoch", (*WRN, "--epochs", "1")),
    Setting("one epoch, all but the head frozen at once", (*WRN, "--epochs", "1", "--t0", "0.01")),
    Setting("two epochs", (*WRN, "--epochs", "2")),
    Setting("three epochs", (*WRN, "--epochs", "3")),
    Setting("three epochs, early freezing", (*WRN, "--epochs", "3", *EARLY)),
    Setting("eight epochs, early freezing", (*WRN, "--epochs", "8", *EARLY)),
    Setting("t0 = 1: nothing freezes", (*WRN, "--epochs", "3", "--t0", "1")),
    Setting("no freezing", (*WRN, "--epochs", "3", "--no-freeze")),
    Setting("single rows, one epoch", (*WRN, "--epochs", "1", "-b", "1")),
    Setting("single rows, two epochs", (*WRN, "--epochs", "2", "-b", "1", *EARLY)),
    Setting("the whole set in three batches", (*WRN, "--epochs", "8", "-b", "512", *EARLY)),
    Setting("no room at all", (*WRN, "--epochs", "6", *EARLY, "--cache-max-gb", "0")),
    Setting("room for the smallest", (*WRN, "--epochs", "6", *EARLY, "--cache-max-gb", "0.016")),
    Setting("a disk of 2 MB/s", (*WRN, "--epochs", "6", *EARLY), 2),
    Setting("a disk of 20 MB/s", (*WRN, "--epochs", "6", *EARLY), 20),
    Setting("a disk of 100 MB/s", (*WRN, "--epochs", "6", *EARLY), 100),
    Setting("fp32", (*WRN, "--epochs", "4", *EARLY, "--precision", "fp32")),
    Setting("a tiny DenseNet, two epochs", (*DENSENET, "--epochs", "2")),
    Setting("a tiny DenseNet, six epochs", (*DENSENET, "--epochs", "6", *EARLY)),
    Setting("VGG-11, two epochs", ("--arch", "vgg11", "--epochs", "2")),
    Setting("lz4", (*WRN, "--epochs", "6", *EARLY, "--cache-codec", "lz4")),
    Setting("zstd", (*WRN, "--epochs", "6", *EARLY, "--cache-codec", "zstd")),
    Setting(
        "auto, little room",
        (*WRN, "--epochs", "6", *EARLY, "--cache-codec", "auto", "--cache-max-gb", "0.05"),
    ),
    Setting("200 JPEGs, two epochs", (*FOLDER, *WRN, "--epochs", "2")),
    Setting("200 JPEGs, ten epochs", (*FOLDER, *WRN, "--epochs", "10", *EARLY)),
    Setting("200 JPEGs, nothing frozen", (*FOLDER, *WRN, "--epochs", "5", "--no-freeze")),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="of every setting (default: 3)")
    parser.add_argument("--pin", type=int, metavar="CORE", help="run on this processor core only")
    parser.add_argument("--only", default="", help="settings whose names have this in them")
    args = parser.parse_args()
    if args.pin is not None:
        os.sched_setaffinity(0, {args.pin})
        torch.set_num_threads(1)  # it has counted the cores already
    keep_freed_memory()
    found = []
    with tempfile.TemporaryDirectory(prefix="cachefreeze-grid-") as name:
        folder = Path(name)
        write_images(folder / "images")
        for setting in SETTINGS:
            if args.only in setting.name:
                found.append(compare(setting, args.repeats, folder))
                print(" | ".join(found[-1][1]), file=sys.stderr)
    found.sort(reverse=True)
    header = ["setting (worst first)", "cached / freezing only", "the same run twice", "kept"]
    header += ["seconds"]
    print("\n".join(markdown_table([header, *(row for _, row in found)])))
    return 0


def compare(setting: Setting, repeats: int, folder: Path) -> tuple[float, list[str]]:
    """The median ratio, and a line of the table."""
    run_once(setting, folder, "--no-cache")  # to warm up
    ratios, noise, seconds = [], [], []
    kept = 0
    for _ in range(repeats):
        plain = run_once(setting, folder, "--no-cache")
        cached = run_once(setting, folder, "--cache")
        again = run_once(setting, folder, "--no-cache")
        assert cached["weights_sha256"] == plain["weights_sha256"]
        # Against the mean of the run before and the run after: machines drift.
        around = (plain["wall_seconds"] + again["wall_seconds"]) / 2
        ratios.append(cached["wall_seconds"] / around)
        noise.append(again["wall_seconds"] / plain["wall_seconds"])
        seconds.append(around)
        kept = len(cached["cache"]["boundaries"])
    row = [setting.name, spread(ratios), spread(noise), str(kept)]
    return statistics.median(ratios), [*row, f"{statistics.median(seconds):.1f}"]


def run_once(setting: Setting, folder: Path, switch: str) -> dict[str, Any]:
    options = [*setting.options, switch, "--no-report", "--cache-dir", str(folder / "cache")]
    if "imagefolder" in options:
        options += ["--data-dir", str(folder / "images")]
    output = folder / "run"
    with slow_disk(setting.disk), contextlib.redirect_stdout(io.StringIO()):
        summary = train.run(Start(config.parse([*options, "--output-dir", str(output)]), options))
    shutil.rmtree(output)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return summary


@contextlib.contextmanager
def slow_disk(megabytes: float) -> Iterator[None]:
    """Every write call takes as long as it would at so many MB/s."""
    real = write._write_all

    def slow(file: io.FileIO, content: memoryview) -> None:
        start = time.perf_counter()
        real(file, content)
        rest = len(content) / megabytes / 1e6 - (time.perf_counter() - start)
        time.sleep(max(rest, 0))

    write._write_all = slow
    try:
        yield
    finally:
        write._write_all = real


def write_images(folder: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 20)):
        for name in ("bright", "dark"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.normal(160 if name == "bright" else 90, 40, (32, 32, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{number}.jpg")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


if __name__ == "__main__":
    sys.exit(main())
