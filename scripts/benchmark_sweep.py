"""Time sweeps of ten trials on one frozen backbone, against their first trial alone.

    python scripts/benchmark_sweep.py IMAGES [--images 2000] [--val 500] [--size 98]

IMAGES is a folder with `train` and `test`, each with one sub-folder of images a class. Optuna's
trials train the head of a ResNet-18 with random weights in one process. On the command line,
`python -m cachefreeze.probe` trains one head of a ViT-S in each trial, two processes at a time.
Seconds are those of the processor; those of a process include its imports.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchmark_probe import NETWORK, arguments, chosen
from torch.nn import functional as F
from torch.utils.data import DataLoader

import cachefreeze
from cachefreeze.probing.pictures import Pictures

TRIALS = 10


def by_optuna(folder: Path, directory: Path, size: int, epochs: int) -> None:
    import optuna
    import torchvision

    paths = sorted((folder / "train").rglob("*.*"))
    names = sorted({path.parent.name for path in paths})
    labels = [names.index(path.parent.name) for path in paths]
    pictures = Pictures(paths, labels, size, (0.5,) * 3, (0.25,) * 3)
    dataset: Any = [pictures[row] for row in range(len(pictures))]
    seconds, computed = [], []

    def trial(tried: optuna.Trial) -> float:
        rate = tried.suggest_float("lr", 1e-4, 1e-1, log=True)
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=len(names))
        cachefreeze.freeze(*[part for name, part in model.named_children() if name != "fc"])
        optimizer = torch.optim.SGD(model.fc.parameters(), lr=rate, momentum=0.9)
        began = time.process_time()
        with cachefreeze.ActivationCache(model, directory=directory) as cache:
            for _ in range(epochs):
                total = 0.0
                for x, y in DataLoader(dataset, 32, shuffle=True, drop_last=True):
                    loss = F.cross_entropy(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.item()
        seconds.append(time.process_time() - began)
        shown = epochs * (len(dataset) // 32) * 32
        computed.append(shown - cache.stats.rows_served)
        return total

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0)).optimize(trial, TRIALS)
    print(f"Optuna, {len(dataset)} images, {epochs} epochs")
    print("seconds of each trial:", *[f"{one:.1f}" for one in seconds])
    print("rows computed in each:", *computed)
    print(f"all trials / the first: {sum(seconds) / seconds[0]:.2f}", flush=True)


def by_processes(folder: Path, place: Path, size: int) -> None:
    def trial(number: int) -> None:
        command = [
            sys.executable, "-m", "cachefreeze.probe", "--model", f"timm:{NETWORK}", "--quiet",
            "--data-dir", str(folder), "--image-size", str(size), "--workers", "0", "--no-report",
            "--cache-dir", str(place / "cache"), "--methods", "linear", "--blocks", "1",
            "--pooling", "class", "--lr", str(0.001 * (number + 1)), "--device", "cpu",
            "--precision", "fp32", "--output-dir", str(place / f"trial-{number}"),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, began = used(), time.perf_counter()
    with ThreadPoolExecutor(2) as two:
        list(two.map(trial, range(TRIALS)))
    all_of_them, wall = used() - before, time.perf_counter() - began
    found = [
        json.loads((place / f"trial-{number}" / "heads.json").read_text())
        for number in range(TRIALS)
    ]
    before, began = used(), time.perf_counter()
    (place / "cache").rename(place / "rows of the sweep")
    trial(TRIALS)
    first, wall_of_first = used() - before, time.perf_counter() - began
    print("Command line, two at a time")
    print("rows computed in each:", *[one["rows"] - one["rows_served"] for one in found])
    print(f"all trials / the first: {all_of_them / first:.2f} ({all_of_them:.0f} / {first:.0f} s)")
    print(f"from beginning to end: {wall / wall_of_first:.2f} ({wall:.0f} / {wall_of_first:.0f} s)")


def main() -> None:
    parser = arguments(__doc__, epochs=5)
    parser.add_argument("--size", type=int, default=98)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        chosen(args.folder, place / "images", args.images, args.val)
        by_optuna(place / "images", place / "rows", args.size, args.epochs)
        by_processes(place / "images", place, args.size)


if __name__ == "__main__":
    main()
