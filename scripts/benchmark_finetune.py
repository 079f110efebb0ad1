"""Time whole runs with the cache against a script written by hand, or against no cache.

    python scripts/benchmark_finetune.py [--repeats 5] [--images 2500] [--folder IMAGES]
    python scripts/benchmark_finetune.py --plain [--blocks 0 2] [--json FILE]
    python scripts/benchmark_finetune.py --small

A ResNet-18 with random weights on JPEG images of 64 pixels. By hand: `by_hand.py`, which saves the
features of the frozen backbone to an .npy file and trains the head on them. With the cache:
`own_loop_cached.py`. Whole processes, in turn, each with one thread: the first run, and a second
one with what the first has kept. With `--plain`, the same loop without the cache takes the place
of the script. `--small` is `--plain` with 150 images for 2 epochs. `--json` writes what was found
to a file, from which `doc_figures.py` draws the picture of the README.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPTS = Path(__file__).parent
CLASSES = 10


def make_images(folder: Path, count: int) -> None:
    """Writes JPEG images of smooth noise, in one folder a class."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
        picture.save(place / f"{number:05d}.jpg", quality=90)


@dataclass
class Process:
    """What a whole process took.

    Attributes:
        seconds: Seconds from its start to its end.
        of_processor: Seconds in which a processor worked for it.
        epochs: Seconds of the processor in each epoch, if it tells them.
    """

    seconds: float
    of_processor: float
    epochs: list[float]


def run(script: str, *options: str) -> Process:
    """Runs a script with one thread, and returns what it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *options],
        check=True, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    of_processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    epochs = re.findall(r"^epoch ([\d.]+) s of the processor$", done.stdout, re.MULTILINE)
    return Process(took, of_processor, [float(one) for one in epochs])


def told(name: str, one: list[float], other: list[float]) -> str:
    """Says what two ways took, and the ratio within each repeat."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return (
        f"{name:28} {statistics.median(one):6.2f} s against {statistics.median(other):6.2f} s: "
        f"{statistics.median(one) / statistics.median(other):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} within a repeat)"
    )


def against_hand(images: Path, epochs: int, repeats: int, of_processor: bool) -> None:
    """Compares with the script written by hand."""
    found: dict[str, list[float]] = {}
    epochs_option = ("--epochs", str(epochs))
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for which in ("first", "second"):
                for script in ("own_loop_cached.py", "by_hand.py"):
                    options = [str(images), f"{folder}/{script}.kept", *epochs_option]
                    process = run(script, *options)
                    took = process.of_processor if of_processor else process.seconds
                    found.setdefault(f"{which} {script}", []).append(took)
        print(", ".join(f"{name} {times[-1]:.2f}" for name, times in found.items()), flush=True)
    for which in ("first", "second"):
        print(told(which, found[f"{which} own_loop_cached.py"], found[f"{which} by_hand.py"]))


def against_plain(
    images: Path, epochs: int, repeats: int, of_processor: bool, blocks: list[int]
) -> dict[str, list[Process]]:
    """Compares with the same loop without the cache.

    Args:
        images: Folder of the images.
        epochs: Number of epochs.
        repeats: Number of runs of each way.
        of_processor: Whether only seconds of the processor count.
        blocks: Numbers of last blocks that are trained beside the head, one comparison each.

    Returns:
        Processes of each way, by its name.
    """
    found: dict[str, list[Process]] = {}
    for _ in range(repeats):
        for count in blocks:
            with tempfile.TemporaryDirectory() as folder:
                for way in ("plain", "first", "second"):
                    options = [str(images), f"{folder}/kept", "--epochs", str(epochs)]
                    options += ["--blocks", str(count), *(["--plain"] if way == "plain" else [])]
                    process = run("own_loop_cached.py", *options)
                    found.setdefault(f"{count} blocks, {way}", []).append(process)
                    print(f"{count} blocks, {way}: {process}", flush=True)
    for count in blocks:
        took = {
            way: [
                process.of_processor if of_processor else process.seconds
                for process in found[f"{count} blocks, {way}"]
            ]
            for way in ("plain", "first", "second")
        }
        for way in ("first", "second"):
            print(told(f"head and {count} blocks, {way} run", took[way], took["plain"]))
    return found


def main() -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each way")
    parser.add_argument("--images", type=int, metavar="N", help="images that are made")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--folder", type=Path, help="images in one folder a class, in their place")
    parser.add_argument("--plain", action="store_true", help="against no cache")
    parser.add_argument("--small", action="store_true", help="small runs, against no cache")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[0, 2], metavar="N",
        help="with --plain and --small: last blocks that are trained beside the head",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="with --plain: file to write what was measured")
    parser.add_argument(
        "--processor", action="store_true", help="seconds of the processor, on a busy machine"
    )
    args = parser.parse_args()
    images, epochs = (150, 2) if args.small else (2500, 10)
    with tempfile.TemporaryDirectory() as folder:
        place = args.folder or Path(folder)
        if args.folder is None:
            make_images(place, args.images or images)
        measured = (place, args.epochs or epochs, args.repeats, args.processor)
        if args.small or args.plain:
            found = against_plain(*measured, args.blocks)
            if args.json is not None:
                ways = {way: [asdict(one) for one in runs] for way, runs in found.items()}
                args.json.write_text(json.dumps(ways, indent=1) + "\n")
        else:
            against_hand(*measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
