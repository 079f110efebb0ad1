"""The options of `python -m cachefreeze.probe`. Each is described once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.training.options import (
    Help,
    Parser,
    add_options,
    filled,
    option,
    refuse_senseless,
    refuse_views,
    views_from,
)
from cachefreeze.training.settings import Settings, new_folder, settings_of
from cachefreeze.training.terminal import Verbosity

# Those of DINOv2's linear evaluation, for a batch of 256.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
TASKS = ("classification", "segmentation")
METHODS = ("linear", "logistic", "neighbours")
_COUNT = (lambda count: count >= 1, "1 or more")
_POSITIVE = (lambda numbers: all(one > 0 for one in numbers), "above 0")
# Settings of the network and the data, which are those of `cachefreeze.train`.
SHARED = ("weights", "skip_broken", "cache_dir", "cache_max_gb", "device", "precision", "workers")


def _new_output_dir(given: dict[str, Any]) -> Path:
    return new_folder("probes")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """All settings of a probing."""

    model: str | None = option(group="what is probed", metavar="NAME")
    """frozen network: timm:NAME, torchvision:NAME, hf:NAME, wrn16_2 and the like, or a best.pt or
    last.pt of a run of cachefreeze.train"""
    data_dir: Path | None = option()
    """folder of images: train/CLASS/* with val/CLASS/*, or CLASS/*; for segmentation, folders
    images and masks"""
    task: str = option(default="classification", choices=TASKS)
    """task of the heads: to predict the class of an image, or of each of its pixels"""
    image_size: int = option(default=224, limits=(lambda size: size >= 8, "8 or more"))
    """height and width that images are resized and cropped to"""
    val_fraction: float | None = option(
        told="0.2 if there is no folder train, val or test",
        limits=(lambda share: 0 < share < 1, "between 0 and 1"),
        metavar="SHARE",
    )
    """share of the images to validate on"""

    blocks: tuple[int, ...] = option(
        group="heads", default=(1, 4), limits=(lambda n: min(n) >= 1, "1 or more"), type=int,
        nargs="+",
    )  # fmt: skip
    """numbers of blocks: for each number n, there are heads on the joined outputs of the last n
    blocks of the network"""
    pooling: tuple[str, ...] = option(
        default=("class", "mean", "both"), choices=("class", "mean", "both"), nargs="+"
    )
    """part of a block's output that a head takes: the class token, the mean of the patches, or
    both"""
    methods: tuple[str, ...] = option(default=METHODS, choices=METHODS, nargs="+")
    """heads: linear layers trained by SGD, logistic regression, and nearest neighbours (with
    segmentation: linear only)"""
    lr: tuple[float, ...] = option(
        default=RATES, limits=_POSITIVE, type=float, nargs="+", told="13 rates from 1e-5 to 0.1",
        metavar="RATE",
    )  # fmt: skip
    """learning rates of linear heads for --batch-size 256; for other sizes they are scaled in
    proportion"""
    weight_decay: tuple[float, ...] = option(
        default=(0.0,), limits=(lambda n: min(n) >= 0, "0 or more"), type=float, nargs="+",
        metavar="W",
    )  # fmt: skip
    """weight decays of linear heads"""
    C: tuple[float, ...] = option(
        default=(0.01, 0.1, 1.0, 10.0), limits=_POSITIVE, type=float, nargs="+", metavar="C"
    )
    """inverse regularisation strengths of logistic regressions, as in scikit-learn"""
    k: tuple[int, ...] = option(
        default=(10, 20), limits=(lambda n: min(n) >= 1, "1 or more"), type=int, nargs="+"
    )
    """numbers of nearest neighbours"""
    epochs: int = option(default=10, limits=_COUNT)
    """number of epochs of linear heads; the network itself does not run again"""
    batch_size: int = option("-b", default=128, limits=_COUNT)
    """number of images in a step of linear heads"""
    views: int | str | None = option(metavar="K|flips", type=views_from)
    """train linear heads on K views of each image, cropped and mirrored at random, or (flips) on
    the image and its mirror image; the network runs over each view once, whatever the number of
    epochs"""
    seed: int = option(
        default=0, limits=(lambda seed: 0 <= seed < 2**63, "0 or more, and below 2^63")
    )
    """seed of the first weights of heads, the order of images, and views"""

    predict: Path | None = option(group="prediction")
    """folder of images to predict by the best head, or by that of --head"""
    head: Path | None = option(metavar="FILE")
    """best.pt of an earlier probing, to use with --predict: nothing is trained"""

    output_dir: Path = option(group="output", default=_new_output_dir, told="probes/DATE-TIME")
    """folder of the table, the report and the best head"""
    report: bool = option(default=True)
    """draw report.html"""
    progress: bool = option(default=True)
    """draw progress bars if the output is a terminal"""
    quiet: bool = option("-q", default=False)
    """print warnings, errors and the result only"""

    @property
    def verbosity(self) -> Verbosity:
        """Amount of output on the terminal."""
        return Verbosity(not self.quiet, self.progress and not self.quiet)


def parse(argv: Sequence[str]) -> tuple[ProbeSettings, dict[str, Any]]:
    """Reads a command line.

    Args:
        argv: Words of the command line.

    Returns:
        Settings of the probing, and the given ones of those that `cachefreeze.train` has too.

    Raises:
        UserError: An option does not exist, or a value makes no sense.
    """
    parser = Parser(
        prog="python -m cachefreeze.probe",
        usage="%(prog)s --model NAME --data-dir FOLDER [options]",
        description="Train many heads on a frozen network, which runs once over each image.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_options(parser, ProbeSettings)
    add_options(parser, Settings, SHARED)
    given = {n: value for n, value in vars(parser.parse_args(argv)).items() if value is not None}
    shared = {name: given.pop(name) for name in SHARED if name in given}
    values = filled(ProbeSettings, given)
    refuse_senseless(ProbeSettings, values)
    values = {n: tuple(one) if isinstance(one, list) else one for n, one in values.items()}
    settings = ProbeSettings(**values)
    _refuse(settings, given)
    return settings, shared


def _refuse(settings: ProbeSettings, given: dict[str, Any]) -> None:
    if settings.head is not None:
        if settings.predict is None or settings.model or settings.data_dir:
            raise UserError(
                "--head names a head that is trained already: give --predict FOLDER too, and "
                "leave out --model and --data-dir"
            )
    elif settings.model is None or settings.data_dir is None:
        raise UserError(
            "probing needs --model and --data-dir: a network, such as "
            "timm:vit_small_patch14_dinov2, and a folder of images"
        )
    refuse_views(settings.views)
    if set(settings.methods) == {"neighbours"}:
        raise UserError(
            "--methods neighbours alone leaves no head that could be saved: add linear or logistic"
        )
    if settings.views is not None and "linear" not in settings.methods:
        raise UserError("--views is for linear heads only: leave it out, or add --methods linear")
    if settings.task == "segmentation":
        for name in ("views", "pooling", "methods", "C", "k"):
            if name in given:
                raise UserError(
                    f"--{name} is for classification only: leave it out. Segmentation trains "
                    "linear heads on patches, without augmentation"
                )


def network_settings(settings: ProbeSettings, shared: dict[str, Any]) -> Settings:
    """Returns the settings of the network and of the data, as `cachefreeze.train` has them.

    Raises:
        UserError: There is no such network.
    """
    folder, fraction = settings.data_dir, settings.val_fraction
    assert folder is not None
    if fraction is None and not any((folder / name).is_dir() for name in ("train", "val", "test")):
        fraction = 0.2
    given = {
        "dataset": "imagefolder", "data_dir": folder, "image_size": settings.image_size,
        "arch": settings.model, "seed": settings.seed, **shared,
    }  # fmt: skip
    return settings_of(given if fraction is None else {**given, "val_fraction": fraction})
