"""Accuracy of a fine-tuning as a function of the number of stored views of each image.

    python scripts/views_curve.py CIFAR10 --results curve.jsonl

CIFAR10 is a folder with `train` and `test`, each with one sub-folder of images a class. A small
convolutional network is trained on plain images of five classes. Its first layers are frozen then,
and the others are trained on a few images of each of the other five classes, which are shifted and
mirrored at random: with no views, both mirrorings, K views of each image, and a new view in every
epoch. Accuracy is that on test images of these classes. Each seed has its own images, and the same
ones for every K. Every finished run is a line of the results, so that the script goes on where it
was stopped.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import cachefreeze

BEFORE = ("airplane", "bird", "deer", "frog", "ship")
AFTER = ("automobile", "cat", "dog", "horse", "truck")
UNLIMITED = "unlimited"
SETTINGS = ("none", "flips", 1, 2, 4, 8, 16, UNLIMITED)
CHANGE = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


class Net(nn.Module):
    """Layers that are frozen after the first training, and layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(*_conv(3, 16, 1), *_conv(16, 16, 2))
        self.trained = nn.Sequential(
            *_conv(16, 32, 1), *_conv(32, 32, 2), *_conv(32, 64, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(AFTER)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(self.frozen(x))


def _conv(width: int, out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def images(folder: Path, classes: tuple[str, ...], count: int) -> tuple[Tensor, Tensor]:
    """Reads the first images of each class, (N, 3, 32, 32) in -1 .. 1, and their labels."""
    pixels, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir())[:count]:
            pixels.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return x.float() / 127.5 - 1, torch.tensor(labels)


def train(model: nn.Module, loader: Any, epochs: int, rate: float) -> None:
    """Trains what is not frozen by SGD with a cosine schedule."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(some).argmax(1) == labels).sum())
        for some, labels in zip(x.split(250), y.split(250), strict=True)
    )
    return right / len(y)


def pretrained(args: argparse.Namespace) -> Net:
    """Returns a network trained on the classes of before, from a file if it is there."""
    torch.manual_seed(0)
    model, path = Net(), args.results.with_suffix(".pt")
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    began = time.process_time()
    x, y = images(args.folder / "train", BEFORE, args.before_images)
    loader = DataLoader(TensorDataset(x, y), 50, shuffle=True, drop_last=True)
    train(model, loader, args.before_epochs, 0.05)
    test = images(args.folder / "test", BEFORE, args.test_images)
    print(
        f"backbone: {accuracy(model, *test):.1%} on its own classes, "
        f"{time.process_time() - began:.0f} s of the processor"
    )
    torch.save(model.state_dict(), path)
    return model


def run(
    args: argparse.Namespace, views: int | str, seed: int, train_set: Any, test_set: Any
) -> dict[str, Any]:
    """Fine-tunes once."""
    model = pretrained(args)
    torch.manual_seed(seed)
    model.trained[-1].reset_parameters()  # type: ignore[operator]
    cachefreeze.freeze(model.frozen)
    x, y = train_set
    chosen = np.random.default_rng(seed).permuted(np.arange(len(y)).reshape(len(AFTER), -1), axis=1)
    rows = torch.from_numpy(chosen[:, : args.images].reshape(-1))
    dataset = TensorDataset(x[rows], y[rows])
    shown = {"none": {}, "flips": {"views": "flips"}}.get(
        str(views),
        {"views": args.epochs if views == UNLIMITED else views, "transform": CHANGE, "seed": seed},
    )
    began = time.process_time()
    with cachefreeze.ActivationCache(model) as cache:
        loader = cache.loader(dataset, 25, shuffle=True, **shown)  # type: ignore[arg-type]
        train(model, loader, args.epochs, 0.05)
        seconds = time.process_time() - began
        served = cache.stats.rows_served / (args.epochs * len(rows))
    found = accuracy(model, *test_set)
    return {
        "views": views, "seed": seed, "accuracy": found, "seconds": seconds, "served": served,
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> list[tuple[int | str, float, float, float, float]]:
    """Returns mean accuracy, its standard error, seconds and share of rows served, by setting."""
    found = []
    for views in SETTINGS:
        some = [one for one in lines if one["views"] == views]
        if len(some) > 1:
            values = [100 * one["accuracy"] for one in some]
            error = statistics.stdev(values) / len(values) ** 0.5
            seconds = statistics.median(one["seconds"] for one in some)
            served = statistics.mean(one["served"] for one in some)
            found.append((views, statistics.mean(values), error, seconds, served))
    return found


def differences(lines: list[dict[str, Any]], other: int | str) -> tuple[float, float]:
    """Returns mean and standard error of what unlimited views gain on a setting, by seed."""
    by = {(one["views"], one["seed"]): 100 * one["accuracy"] for one in lines}
    gains = [
        value - by[other, seed]
        for (views, seed), value in by.items()
        if views == UNLIMITED and (other, seed) in by
    ]
    return statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=Path("curve.jsonl"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=50, help="images of each class")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--before-images", type=int, default=500, help="of each class")
    parser.add_argument("--before-epochs", type=int, default=8)
    parser.add_argument("--test-images", type=int, default=500, help="of each class")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    if args.results.exists():
        lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    done = {(line["views"], line["seed"]) for line in lines}
    left = [(v, s) for s in range(args.seeds) for v in SETTINGS if (v, s) not in done]
    if left:
        train_set = images(args.folder / "train", AFTER, 1000)
        test_set = images(args.folder / "test", AFTER, args.test_images)
    for views, seed in left:
        lines.append(run(args, views, seed, train_set, test_set))
        with args.results.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(lines[-1], flush=True)
    print("| views | accuracy, % | standard error | seconds | rows served |")
    print("|---|---|---|---|---|")
    for views, mean, error, seconds, served in table(lines):
        print(f"| {views} | {mean:.2f} | {error:.2f} | {seconds:.1f} | {served:.0%} |")
    for other in SETTINGS[:-1]:
        gain, error = differences(lines, other)
        print(f"unlimited - {other}: {gain:+.2f} +- {error:.2f} points")


if __name__ == "__main__":
    main()
