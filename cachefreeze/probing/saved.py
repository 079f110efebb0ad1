"""A head with its network in one file, which `torch.load` reads without this package."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cachefreeze.data.images import IMAGE_SUFFIXES
from cachefreeze.errors import UserError, first_line
from cachefreeze.models import build
from cachefreeze.probing.backbone import Backbone, Joined, Layout
from cachefreeze.probing.grid import pixels_of
from cachefreeze.probing.heads import Linear
from cachefreeze.probing.pictures import Pictures
from cachefreeze.training.checkpoint import read_saved

FORMAT = "cachefreeze probe 1"


@dataclass(frozen=True)
class Saved:
    """A head with its network.

    Attributes:
        network: Name of the network, and arguments of `models.build`.
        outputs: Number of outputs of the network itself, which nothing uses.
        layout: Places of the outputs of its blocks.
        columns: Columns of a row that the head takes.
        task: `classification` or `segmentation`.
        classes: Names of the classes.
        image_size: Height and width of the images.
        mean: Mean of each channel, of pixels scaled to 0 .. 1.
        std: Standard deviation of each channel, of pixels scaled to 0 .. 1.
        model: Weights of the network by name.
        head: `weight` (classes, columns) and `bias` (classes,) of the head.
    """

    network: Mapping[str, Any]
    outputs: int
    layout: Layout
    columns: tuple[int, ...]
    task: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: Mapping[str, Tensor]
    head: Mapping[str, Tensor]

    def write(self, path: Path) -> None:
        """Writes a file that `torch.load(path, weights_only=True)` reads."""
        content = {
            "format": FORMAT,
            "network": dict(self.network), "outputs": self.outputs,
            "layout": self.layout.as_json(), "columns": list(self.columns), "task": self.task,
            "classes": list(self.classes), "image_size": self.image_size,
            "mean": list(self.mean), "std": list(self.std),
            "model": {name: one.detach().cpu() for name, one in self.model.items()},
            "head": {name: one.detach().cpu() for name, one in self.head.items()},
        }  # fmt: skip
        torch.save(content, path)

    @classmethod
    def read(cls, path: Path) -> "Saved":
        """Reads such a file. Nothing in it can run code.

        Raises:
            UserError: The file is not there, is damaged, or is another one.
        """
        if not path.is_file():
            raise UserError(f"--head {path} is no file: give the best.pt of a probing")
        found = read_saved(path, f"--head {path}", "is no head of a probing")
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UserError(f"--head {path} is no head of a probing: give the best.pt of one")
        try:
            return cls(
                dict(found["network"]), int(found["outputs"]), Layout.from_json(found["layout"]),
                tuple(map(int, found["columns"])), str(found["task"]),
                tuple(map(str, found["classes"])), int(found["image_size"]),
                tuple(map(float, found["mean"])), tuple(map(float, found["std"])),
                dict(found["model"]), dict(found["head"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--head {path} is damaged ({first_line(error)}): give another best.pt"
            ) from error

    def built(self, device: torch.device) -> nn.Module:
        """Builds the network with its head: images (n, 3, size, size) to logits.

        Raises:
            UserError: The network cannot be built, or the weights do not fit it.
        """
        model = build(classes=self.outputs, **self.network)
        head = Linear(self.columns, len(self.classes))
        try:
            model.load_state_dict(self.model)
            head.linear.load_state_dict(self.head)
        except RuntimeError as error:
            raise UserError(
                f"the weights do not fit {self.network.get('arch')} as it is built here "
                f"({first_line(error)}): use the library's version that it was trained with"
            ) from error
        backbone = Backbone(model, self.layout, pooled=self.task == "classification")
        return nn.Sequential(backbone, Joined(), head).eval().to(device)


def images_in(folder: Path) -> list[Path]:
    """Returns the images of a folder and its sub-folders.

    Raises:
        UserError: It is not a folder, or there are none.
    """
    if not folder.is_dir():
        raise UserError(f"--predict {folder} is not a folder: give a folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"--predict {folder} has no images in it: give a folder of images")
    return paths


def predict(
    saved: Saved, folder: Path, output: Path, device: torch.device, size: int = 32
) -> Iterator[tuple[Path, str, float]]:
    """Predicts the images of a folder, and writes predictions.csv, or a mask for each image.

    Args:
        saved: Head with its network.
        folder: Folder whose images are predicted, with those of its sub-folders.
        output: Folder that is written to.
        device: Device that the network runs on.
        size: Number of images in a batch.

    Yields:
        Path of each image, its class, and the probability of this class. For segmentation, the
        class of most pixels, and the share of these pixels.

    Raises:
        UserError: There are no images in the folder, or one cannot be decoded.
    """
    paths = images_in(folder)
    pictures = Pictures(paths, None, saved.image_size, saved.mean, saved.std)
    model = saved.built(device)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "class", "probability" if _is_whole(saved) else "share of pixels"])
        for start in range(0, len(paths), size):
            some = paths[start : start + size]
            x = torch.stack([pictures.picture(start + n) for n in range(len(some))])
            with torch.no_grad():
                logits = model(x.to(device)).cpu()
            for path, (number, share) in zip(some, _said(saved, logits, some, output), strict=True):
                lines.writerow([str(path), saved.classes[number], f"{share:.4f}"])
                yield path, saved.classes[number], share


def _is_whole(saved: Saved) -> bool:
    return saved.task == "classification"


def _said(
    saved: Saved, logits: Tensor, paths: Sequence[Path], output: Path
) -> list[tuple[int, float]]:
    if _is_whole(saved):
        share, number = logits.softmax(1).max(1)
        return list(zip(number.tolist(), share.tolist(), strict=True))
    found = []
    size = saved.image_size
    for path, mask in zip(paths, pixels_of(logits, saved.layout.side, (size, size)), strict=True):
        Image.fromarray(mask.numpy().astype(np.uint8)).save(_free(output / f"{path.stem}.png"))
        counts = torch.bincount(mask.flatten(), minlength=len(saved.classes))
        found.append((int(counts.argmax()), float(counts.max()) / mask.numel()))
    return found


def _free(path: Path) -> Path:
    """Returns a path that is not taken: images of sub-folders may share a name."""
    names = (path.with_stem(f"{path.stem}-{n}") for n in range(2, 100_000))
    return path if not path.exists() else next(one for one in names if not one.exists())
