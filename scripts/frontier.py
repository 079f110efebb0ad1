r"""Measures what freezing from scratch is worth: error against time, with plain training beside it.

    python scripts/frontier.py run CIFAR10 --results docs/figures/worth.jsonl

CIFAR10 is a folder with `train` and `test`, each with one sub-folder of images a class. A network
is trained from scratch by FreezeOut with the cache, with each t0 and schedule, and without
freezing for some lengths. A network that was trained on every second class is fine-tuned on the
other classes, in the same ways. Every image and its mirror image are shown equally often. Each run
is a process of its own, with a new folder for its cache. Every finished run is a line of the
results, so that the script goes on where it was stopped.

On a CPU the clock of the program counts processor seconds, so that other processes do not count:
neither in the results nor in what the cache decides. At full size, on a GPU:

    python scripts/frontier.py run CIFAR10 --results gpu.jsonl --device cuda --epochs 40 \
        --plain-epochs 40 32 24 16 12 8 \
        --fine-tuning-epochs 20 15 10 5 --images 5000 --test-images 1000 --arch wrn40_4
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PARTS = ("scratch", "fine-tuning")
# Schedule, and whether rates are scaled. The authors of FreezeOut recommend the first two.
BEST = (("cubic", True), ("linear", False))
OTHERS = (("linear", True), ("cubic", False))
# t0 and schedule of fine-tuning: the first unit freezes after 3, 13 or 30 % of the run.
FINE_TUNING = ((0.3, "cubic"), (0.5, "cubic"), (0.3, "linear"))
# The program's options in every run.
COMMON = (
    "--dataset", "imagefolder", "--augment", "--views", "flips", "--precision", "fp32",
    "--no-report", "--quiet",
)  # fmt: skip
# Words in the program's error when the weights of a run have become infinite.
DIVERGED = "try a smaller --lr"

Run = dict[str, Any]


def planned(args: argparse.Namespace) -> Iterator[Run]:
    """Yields the settings of all runs, so that a stop at any moment leaves a whole answer."""
    same = {
        name: getattr(args, name)
        for name in ("arch", "images", "test_images", "image_size", "batch_size", "device")
    }
    for seed in args.seeds:
        if "scratch" in args.parts:
            scratch = {"part": "scratch", **same, "lr": args.lr, "seed": seed}
            yield from _plain(scratch, args.plain_epochs)
            for schedule, scaled in BEST:
                for t0 in args.t0:
                    yield _freezing(scratch, args.epochs, t0, schedule, scaled)
        if "fine-tuning" in args.parts:
            tuning = {"part": "fine-tuning", **same, "lr": args.fine_tuning_lr, "seed": seed}
            if seed == args.seeds[0]:
                before = {**tuning, "part": "before", "lr": args.lr, "seed": 0}
                yield from _plain(before, [args.epochs])
            yield from _plain(tuning, args.fine_tuning_epochs)
            for t0, schedule in FINE_TUNING:
                yield _freezing(tuning, max(args.fine_tuning_epochs), t0, schedule, False)
        if "scratch" in args.parts:
            for schedule, scaled in OTHERS:
                for t0 in args.t0:
                    yield _freezing(scratch, args.epochs, t0, schedule, scaled)


def _plain(common: Run, lengths: Sequence[int]) -> Iterator[Run]:
    for epochs in lengths:
        yield {**common, "way": "plain", "epochs": epochs}


def _freezing(common: Run, epochs: int, t0: float, schedule: str, scaled: bool) -> Run:
    freezing = {"t0": t0, "schedule": schedule, "scale_lr": scaled}
    return {**common, "way": "freezing", "epochs": epochs, **freezing}


def read(results: Path) -> list[Run]:
    """Reads the finished runs, and takes a line off the file that a kill has cut."""
    if not results.exists():
        return []
    text = results.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        results.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def link(source: Path, folder: Path, part: str, images: int, test_images: int) -> None:
    """Links the first images of each class that a part of the study is about."""
    for split, count in (("train", images), ("test", test_images)):
        classes = sorted(one for one in (source / split).iterdir() if one.is_dir())
        for place in {"before": classes[::2], "fine-tuning": classes[1::2]}.get(part, classes):
            (folder / split / place.name).mkdir(parents=True)
            for path in sorted(place.iterdir())[:count]:
                (folder / split / place.name / path.name).symlink_to(path.resolve())


def carry_out(one: Run, data: Path, trained: Path) -> Run:
    """Trains once.

    Args:
        one: Settings of the run.
        data: Folder with all images.
        trained: File with the checkpoint that fine-tuning starts from.

    Returns:
        Settings and results. The error is None if the weights became infinite.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link(data, folder / "images", one["part"], one["images"], one["test_images"])
        options = [*COMMON, "--data-dir", str(folder / "images"), "--output-dir", f"{name}/run"]
        for option in ("arch", "image_size", "batch_size", "device", "lr", "epochs", "seed"):
            options += [f"--{option.replace('_', '-')}", str(one[option])]
        if one["part"] == "fine-tuning":
            options += ["--weights", str(trained)]
        if one["way"] == "plain":
            options += ["--no-freeze", "--no-cache"]
        else:
            options += ["--t0", str(one["t0"]), "--schedule", one["schedule"]]
            options += ["--cache-dir", f"{name}/cache"]
            options += ["--scale-lr" if one["scale_lr"] else "--no-scale-lr"]
        environment = dict(os.environ)
        if one["device"] == "cpu":
            options += ["--workers", "0"]
            environment["OMP_NUM_THREADS"] = "1"
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "one", *options],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wall = time.perf_counter() - began
        if done.returncode and DIVERGED in done.stderr:
            return {**one, "error": None, "stopped": done.stderr.strip().splitlines()[-1]}
        if done.returncode:
            raise SystemExit(f"error: a run has failed: {done.stderr.strip()[-2000:]}")
        if one["part"] == "before":
            shutil.copy(folder / "run" / "last.pt", trained)
        summary = json.loads((folder / "run" / "summary.json").read_text())
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    from cachefreeze.keys.environment import machine

    return {
        **one,
        "error": 1 - summary["val_accuracy"],
        "errors": [round(1 - json.loads(line)["val_accuracy"], 6) for line in lines],
        "train_loss": summary["train_loss"],
        # Validation and the start of Python are left out.
        "seconds": summary["train_seconds"] + summary["fill_seconds"],
        "fill_seconds": summary["fill_seconds"],
        "validate_seconds": summary["validate_seconds"],
        "wall_seconds_of_process": wall,
        "freeze_steps": summary["freeze_steps"],
        "steps": summary["steps"],
        "rows_served": summary["cache"]["rows_served"],
        "rows_computed": summary["cache"]["rows_computed"],
        "forecast": summary["forecast"],
        "torch": version("torch"),
        "cachefreeze": version("cachefreeze"),
        "processor": machine()[0],
    }


def run(args: argparse.Namespace) -> int:
    """Carries out the runs that are not in the results yet; returns the exit code."""
    if not (args.data / "train").is_dir() or not (args.data / "test").is_dir():
        print(f"error: {args.data} has no folders train and test: give one", file=sys.stderr)
        return 2
    args.results.parent.mkdir(parents=True, exist_ok=True)
    trained = args.results.with_suffix(".pt")
    found = read(args.results)
    for one in planned(args):
        if any(one.items() <= line.items() for line in found) and (
            one["part"] != "before" or trained.exists()
        ):
            continue
        line = carry_out(one, args.data, trained)
        with args.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        took = "stopped" if line["error"] is None else f"{line['seconds']:.1f} s"
        print(*one.values(), "|", line["error"], took, flush=True)
    return 0


def one_run(options: list[str]) -> int:
    """Runs the program, on a CPU with a clock that counts processor seconds."""
    if options[options.index("--device") + 1] == "cpu":
        time.perf_counter = time.process_time
    from cachefreeze.train import main as train

    return train(options)


def main() -> int:
    """Does what is asked for; returns the exit code."""
    if sys.argv[1:2] == ["one"]:
        return one_run(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_run = kinds.add_parser("run", help="carry out the runs that are not in the results yet")
    of_run.add_argument("data", type=Path)
    of_run.add_argument("--results", type=Path, default=Path("worth.jsonl"))
    of_run.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    of_run.add_argument("--t0", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8])
    of_run.add_argument("--arch", default="wrn16_1")
    of_run.add_argument("--epochs", type=int, default=6, help="of runs that freeze layers")
    of_run.add_argument("--plain-epochs", type=int, nargs="+", default=[6, 3, 2, 4, 1])
    of_run.add_argument("--fine-tuning-epochs", type=int, nargs="+", default=[4, 2, 1, 3])
    of_run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    of_run.add_argument("--images", type=int, default=1000, help="of each class")
    of_run.add_argument("--test-images", type=int, default=200, help="of each class")
    of_run.add_argument("--image-size", type=int, default=32)
    of_run.add_argument("--batch-size", type=int, default=64)
    of_run.add_argument("--lr", type=float, default=0.1)
    of_run.add_argument("--fine-tuning-lr", type=float, default=0.05)
    of_run.add_argument("--device", default="cpu")
    args = parser.parse_args()
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
