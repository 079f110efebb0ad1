"""Time 52 heads on a ViT-S against the loop of DINOv2's evaluation, written by hand.

    python scripts/benchmark_probe.py IMAGES [--images 2000] [--val 500] [--epochs 10] [--repeats 3]

IMAGES is a folder with `train` and `test`, each with one sub-folder of images a class, such as
CIFAR-10. The network is `timm:vit_small_patch14_dinov2` with random weights on images of 98 pixels.
By hand, it runs in every step under `no_grad`, the heads are modules in a list, and every epoch
ends with a validation. Beside it: `python -m cachefreeze.probe` with the same heads for the first
time, again from the store, and one head alone from the store. Whole processes on one thread, in
turn; seconds are those of the processor.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NETWORK, SIZE = "vit_small_patch14_dinov2", 98


def by_hand(folder: Path, epochs: int, batch_size: int, results: Path) -> None:
    """Trains the heads as DINOv2's evaluation does."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from torch import nn
    from torch.nn import functional as F

    from cachefreeze.data import epoch_order
    from cachefreeze.probing.options import RATES

    def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = [], []
        for label, place in enumerate(sorted((folder / split).iterdir())):
            for path in sorted(place.iterdir()):
                image = Image.open(path).convert("RGB")
                pixels.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
                labels.append(label)
        return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)

    (x, y), (val_x, val_y) = images("train"), images("val")
    values = x.flatten(0, 2).double() / 255
    mean, std = values.mean(0).float(), values.std(0, correction=0).float()

    def network_input(pixels: torch.Tensor) -> torch.Tensor:
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    torch.manual_seed(0)
    model: Any = timm.create_model(NETWORK, num_classes=int(y.max()) + 1, img_size=SIZE).eval()
    model.requires_grad_(False)
    torch.manual_seed(0)
    kinds = [(n, pooling, rate) for n in (1, 4) for pooling in ("class", "both") for rate in RATES]
    heads = nn.ModuleList()
    for n, pooling, _ in kinds:
        head = nn.Linear(384 * n * (2 if pooling == "both" else 1), int(y.max()) + 1)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        heads.append(head)
    groups = [
        {"params": list(head.parameters()), "lr": rate * batch_size / 256}
        for head, (_, _, rate) in zip(heads, kinds, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0)
    steps = epochs * -(-len(y) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return model.get_intermediate_layers(
            network_input(pixels), n=4, return_prefix_tokens=True, norm=True
        )[::-1]

    def outputs(pixels: torch.Tensor) -> list[torch.Tensor]:
        found = features(pixels)
        said = []
        for head, (n, pooling, _) in zip(heads, kinds, strict=True):
            parts = []
            for patches, prefix in found[:n]:
                parts.append(prefix[:, 0])
                if pooling == "both":
                    parts.append(patches.mean(1))
            said.append(head(torch.cat(parts, 1)))
        return said

    accuracies = [0.0] * len(kinds)
    for epoch in range(epochs):
        for rows in torch.from_numpy(epoch_order(len(y), 0, epoch)).split(batch_size):
            loss: Any = sum(F.cross_entropy(one, y[rows]) for one in outputs(x[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        right = torch.zeros(len(kinds))
        with torch.no_grad():
            for some, labels in zip(val_x.split(batch_size), val_y.split(batch_size), strict=True):
                for number, one in enumerate(outputs(some)):
                    right[number] += (one.argmax(1) == labels).sum()
        accuracies = (right / len(val_y)).tolist()
    heads_found = [
        {"blocks": n, "pooling": pooling, "rate": rate, "score": accuracy}
        for (n, pooling, rate), accuracy in zip(kinds, accuracies, strict=True)
    ]
    results.write_text(json.dumps({"heads": heads_found}))


def seconds_of(command: list[str]) -> float:
    """Returns the seconds of the processor that a command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def chosen(source: Path, folder: Path, images: int, val: int) -> None:
    """Links some images of each class."""
    for split, name, count in (("train", "train", images), ("test", "val", val)):
        classes = sorted(one for one in (source / split).iterdir() if one.is_dir())
        for place in classes:
            (folder / name / place.name).mkdir(parents=True)
            for path in sorted(place.iterdir())[: count // len(classes)]:
                (folder / name / place.name / path.name).symlink_to(path.resolve())


def arguments(description: str | None, epochs: int) -> argparse.ArgumentParser:
    """Makes a parser of the arguments that the benchmarks of probings have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=epochs)
    return parser


def main() -> None:
    parser = arguments(__doc__, epochs=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hand-epochs", type=int, help="if fewer: its time is extrapolated")
    parser.add_argument("--hand-repeats", type=int, help="if fewer: it takes minutes")
    parser.add_argument("--hand", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hand is not None:
        by_hand(args.folder, args.epochs, args.batch_size, args.hand)
        return
    hand_epochs = args.hand_epochs or args.epochs
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        chosen(args.folder, place / "images", args.images, args.val)
        common = [
            sys.executable, "-m", "cachefreeze.probe", "--model", f"timm:{NETWORK}",
            "--data-dir", str(place / "images"), "--image-size", str(SIZE), "--workers", "0",
            "--cache-dir", str(place / "cache"), "--methods", "linear", "--no-report", "--quiet",
            "--epochs", str(args.epochs), "-b", str(args.batch_size), "--device", "cpu",
            "--precision", "fp32",
        ]  # fmt: skip
        grid = ["--pooling", "class", "both", "--output-dir", str(place / "grid")]
        one = ["--blocks", "1", "--pooling", "class", "--lr", "0.01"]
        one += ["--output-dir", str(place / "one")]
        hand = [sys.executable, __file__, str(place / "images"), "--hand", str(place / "hand.json")]
        hand += ["--batch-size", str(args.batch_size), "--epochs"]
        times: dict[str, list[float]] = {}
        for repeat in range(args.repeats):
            shutil.rmtree(place / "cache", ignore_errors=True)
            for what, command in (
                ("first", [*common, *grid]),
                ("second", [*common, *grid]),
                ("one head", [*common, *one]),
                ("by hand", [*hand, str(hand_epochs)]),
            ):
                if what == "by hand" and repeat >= (args.hand_repeats or args.repeats):
                    continue
                times.setdefault(what, []).append(seconds_of(command))
                print(repeat, what, f"{times[what][-1]:.1f} s", flush=True)
        medians = {what: statistics.median(found) for what, found in times.items()}
        for what, found in times.items():
            print(f"{what}: {medians[what]:.1f} s ({min(found):.1f} to {max(found):.1f})")
        if hand_epochs != args.epochs:
            times["start"] = [seconds_of([*hand, "0"])]
            start = times["start"][0]
            medians["by hand"] = start + (medians["by hand"] - start) * args.epochs / hand_epochs
            print(f"by hand: {medians['by hand']:.1f} s, extrapolated from {hand_epochs} epochs")
        for what in ("first", "second"):
            print(f"{what}: {medians['by hand'] / medians[what]:.1f} times as fast as by hand")
        print(f"52 heads / one head: {medians['second'] / medians['one head']:.2f}")
        if hand_epochs == args.epochs:
            ours = json.loads((place / "grid" / "heads.json").read_text())["heads"]
            theirs = json.loads((place / "hand.json").read_text())["heads"]
            differ = [abs(a["score"] - b["score"]) for a, b in zip(ours, theirs, strict=True)]
            best = [max(some, key=lambda head: head["score"]) for some in (ours, theirs)]
            print(f"largest difference of accuracies: {max(differ):.4f}; best heads: {best}")


if __name__ == "__main__":
    main()
